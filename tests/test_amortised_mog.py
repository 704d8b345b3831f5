"""amortised_mog.py and its model: the original's numbers, the data, the baselines, and runs as users start them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import amortised_mog as script
from common.datasets.mixtures import DEVIATION, draw_sets
from common.models.mixture import Mixture, MixtureNetwork, PoolingByAttention, log_likelihood, single_gaussian_log_likelihood
from common.seeds import generator_of
from tests.reference import Vectors, assert_agrees

# ---- the original's numbers ----------------------------------------------------------------------------------------------


def of_original(v: Vectors, prefix: str = "", suffix: str = "") -> Mixture:
    """Means and deviations (N, 1, D, K), log-weights (N, 1, K) of the original."""
    mu, si, pi = (v[f"{prefix}{name}{suffix}"].squeeze(1) for name in ("mu", "si", "pi"))
    return Mixture(mu.mT, si.mT, pi)


@pytest.mark.parametrize("case", ["plain", "masked", "far"])
def test_likelihood_reference(case: str) -> None:
    v = Vectors("swarm/mog_llh")
    points, mixture = v[f"{case}/X"].requires_grad_(), of_original(v, f"{case}/")
    mixture = Mixture(*(part.clone().requires_grad_() for part in mixture))
    mask = v[f"{case}/mask"].bool() if f"{case}/mask" in v else None
    values = log_likelihood(points, mixture, mask)
    assert_agrees(values, v[f"{case}/llh"].squeeze(1), 1e-5)
    values.sum().backward()
    expected = of_original(v, f"{case}/grad/")
    for name, part, gradient in zip(Mixture._fields, mixture, expected, strict=True):
        assert_agrees(part.grad, gradient, 1e-5, name)
    assert_agrees(points.grad, v[f"{case}/grad/X"], 1e-5, "points")


@pytest.mark.parametrize("pooling", ["MEAN", "POMA"])
@pytest.mark.parametrize("suffix", ["", "_masked"])
def test_model_reference(pooling: str, suffix: str) -> None:
    v = Vectors(f"swarm/mog_model_{pooling.lower()}")
    sizes = {name: v.config[name] for name in ("n_hidden", "n_iter", "pooling")}
    model = MixtureNetwork(v.config["n_dim"], v.config["n_clust"], **sizes)
    model.load_state_dict(v.under("param/"))  # strict: the original's checkpoints load
    mask = v["mask"].bool() if suffix else None
    mixture = model(v["x"], mask)
    for name, part, expected in zip(Mixture._fields, mixture, of_original(v, suffix=suffix), strict=True):
        assert_agrees(part, expected, 1e-5, name)
    value = log_likelihood(v["x"], mixture, mask).mean()
    assert_agrees(value, v[f"llh{suffix}"], 1e-5)
    value.backward()
    for name, parameter in model.named_parameters():
        assert_agrees(parameter.grad, v[f"grad{suffix}/{name}"], 1e-4, name)


def test_pooling_by_attention_reference() -> None:
    v = Vectors("swarm/attention")
    pma = PoolingByAttention(v.config["d"], v.config["n_heads"], v.config["n_seeds"])
    pma.load_state_dict(v.under("param/pma."))
    assert_agrees(pma(v["x"]), v["pma"], 1e-5)


# ---- model and data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["MEAN", "POMA"])
@pytest.mark.parametrize("attention", [False, True])
def test_order_and_padding_change_nothing(pooling: str, attention: bool) -> None:
    torch.manual_seed(0)
    model = MixtureNetwork(3, 5, n_hidden=12, n_layers=2, n_iter=3, pooling=pooling, attention=attention).double()
    points = torch.randn(2, 7, 3, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    mixture = model(points, mask)
    assert [part.shape for part in mixture] == [(2, 5, 3), (2, 5, 3), (2, 5)]
    order = torch.randperm(7)
    padding_changed = torch.where(mask.unsqueeze(2), points, 100.0)
    alone = model(points[1:, :4])
    for part, permuted, changed, one in zip(
        mixture, model(points[:, order], mask[:, order]), model(padding_changed, mask), alone, strict=True
    ):
        torch.testing.assert_close(part, permuted)
        torch.testing.assert_close(part, changed)
        torch.testing.assert_close(part[1:], one)


def test_deviations_have_a_floor_that_gradients_pass() -> None:
    model = MixtureNetwork(1, 1, n_hidden=4, n_iter=1)
    with torch.no_grad():
        model.swarm[0].ffwd.bias[1] = -30  # the raw deviation
    points = torch.zeros(1, 3, 1)
    mixture = model(points)
    assert mixture.deviations.item() == pytest.approx(1e-3, rel=1e-4)
    assert log_likelihood(points, mixture).isfinite().all()
    with torch.no_grad():
        model.swarm[0].ffwd.bias[1] = -7.5
    log_likelihood(points + 5, model(points)).sum().backward()
    assert model.swarm[0].ffwd.bias.grad[1] > 0  # the points ask for a wider Gaussian


def test_likelihood_of_a_set_without_points_is_zero() -> None:
    mixture = Mixture(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.full((1, 2), -math.log(2)))
    assert log_likelihood(torch.zeros(1, 3, 2), mixture, torch.zeros(1, 3)).tolist() == [0.0]
    with pytest.raises(ValueError, match="do not fit"):
        log_likelihood(torch.zeros(1, 3, 3), mixture)


def test_data() -> None:
    sets = draw_sets(2000, 3, 4, torch.Generator().manual_seed(0))
    sizes = sets.mask.sum(1)
    assert sizes.min() == 100 and sizes.max() == 499
    assert (sets.points[~sets.mask] == 0).all()
    assert sets.means.abs().max() <= 4 and abs(sets.means.std().item() - 8 / math.sqrt(12)) < 0.05
    torch.testing.assert_close(sets.weights.sum(1), torch.ones(2000))
    # flat Dirichlet: each weight has mean 1/4 and variance 3/80
    torch.testing.assert_close(sets.weights.mean(0), torch.full((4,), 0.25), atol=0.02, rtol=0)
    torch.testing.assert_close(sets.weights.var(0), torch.full((4,), 3 / 80), atol=0.005, rtol=0)
    distance = torch.where(sets.mask, (sets.points.unsqueeze(2) - sets.means.unsqueeze(1)).norm(dim=3).amin(2), 0)
    assert distance.max() < 8 * DEVIATION  # every point is near a mean


def test_data_are_a_function_of_the_key() -> None:
    args = script.get_parser().parse_args([])
    one, again, other = (script.batch_of(args, 0, 3, step) for step in (7, 7, 8))
    assert torch.equal(one.points, again.points) and one.points.shape != other.points.shape


def test_baselines() -> None:
    sets = draw_sets(20, 2, 1, torch.Generator().manual_seed(0))  # of one cluster: the true mixture is a Gaussian
    values = script.measure_baselines(sets)
    entropy = -(math.log(2 * math.pi * DEVIATION**2) + 1)
    assert values["oracle"].mean().item() == pytest.approx(entropy, abs=0.05)
    assert (values["single Gaussian"] >= values["oracle"]).all()  # it is fitted to the points
    assert values["single Gaussian"].mean().item() == pytest.approx(entropy, abs=0.05)
    x = sets.points[3][sets.mask[3]].double()
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0))
    assert single_gaussian_log_likelihood(sets.points, sets.mask)[3].item() == pytest.approx(gaussian.log_prob(x).mean().item())


# ---- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"STEPS_PER_EPOCH": 3, "VALIDATION_BATCHES": 2, "TEST_BATCHES": 2}.items():
        monkeypatch.setattr(script, name, value)


LINE = ["-n_hidden", "12", "-n_iter", "2", "-bs", "3", "-no_cuda"]


def run(*options: str) -> Path:
    assert script.main([*LINE, *options]) == 0
    (directory,) = Path("results/amortised_mog").iterdir()
    return directory


@pytest.mark.parametrize(
    "options", [["-p", "POMA"], ["-pma", "-n_layers", "2", "-dropout", "0.1", "-n_dim", "3"], ["-n_dim", "1", "-n_clust", "12"]]
)
def test_runs(options: list[str], capsys: pytest.CaptureFixture) -> None:
    directory = run(*options, "-max_epochs", "1")
    names = {path.name for path in directory.iterdir()}
    assert names >= {"args.json", "best.pkl", "log", "metrics.csv", "metrics.png", "weights.png", "samples.png", "result.json"}
    result = json.loads((directory / "result.json").read_text())
    assert set(result["log_likelihood"]) == {"model", "oracle", "single Gaussian"} and result["test_sets"] == 6
    assert "nats per point" in capsys.readouterr().out


def test_a_run_without_options_is_called_default(capsys: pytest.CaptureFixture) -> None:
    assert script.main(["-dry_run"]) == 0
    assert capsys.readouterr().out == "default\n"
    assert script.main(["-dry_run", "-pma", "-lr", "1e-3", "-wc", "30"]) == 0
    assert capsys.readouterr().out == "-pma-lr.1e-3-wc.30\n"


@pytest.mark.parametrize(("gamma", "rates"), [([], [0.01] * 3), (["-gamma", "0.5"], [0.01, 0.005, 0.0025])])
def test_learning_rate(gamma: list[str], rates: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "draw", lambda *_: None)
    lines = (run("-max_epochs", "3", *gamma) / "metrics.csv").read_text().splitlines()
    assert [float(line.split(",")[-1]) for line in lines[1:]] == pytest.approx(rates)


def test_published_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "draw", lambda *_: None)
    monkeypatch.setattr(script, "PUBLISHED_DECAY", (2, 0.1))
    lines = (run("-max_epochs", "3") / "metrics.csv").read_text().splitlines()
    assert [float(line.split(",")[-1]) for line in lines[1:]] == pytest.approx([0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n_dim", "0"], "too small"),
        (["-n_clust", "0"], "too small"),
        (["-p", "POMA", "-n_hidden", "8"], "POMA takes 8 hidden units"),
        (["-pma", "-n_hidden", "6"], "no multiple of 4"),
        (["-gamma", "0"], "gamma"),
        (["-dropout", "1"], "dropout"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not Path("results").exists()


def test_learns() -> None:
    """A small model comes to beat the best single Gaussian of each set."""
    gen = generator_of(0)
    torch.manual_seed(0)
    model = MixtureNetwork(1, 1, n_hidden=8, n_iter=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        sets = draw_sets(8, 1, 1, gen)
        loss = -log_likelihood(sets.points, model(sets.points, sets.mask), sets.mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
