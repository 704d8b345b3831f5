"""The DeepSets exercise: its data, both models' symmetry, the batched sweep against models trained alone, what a run leaves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import deepsets_exercise as script
from common.run.run import Run
from deepsets_exercise import DeepSet, all_instances, count_params, evaluate, make_data, make_mlp, train
from tests.command_lines import assert_one_line_and_nothing_made, exit_status


def run(line: str, results: Path) -> int:
    return exit_status(script.main, [*line.split(), "--results-dir", str(results)])


# ---- data ----------------------------------------------------------------------------------------------------------------


def test_data() -> None:
    torch.manual_seed(0)
    X, y = make_data(20_000)
    assert X.shape == (20_000, 10, 1) and y.shape == (20_000, 1) and X.dtype == y.dtype == torch.float32
    assert y.sum() == 10_000  # balanced
    for label, k in ((0, 3), (1, 5)):
        of_class = X[y[:, 0] == label, :, 0]
        assert set(of_class.unique().tolist()) == {0.0, torch.tensor(1 / k).item()}
        assert ((of_class > 0).sum(1) == k).all()
        # every position equally often: 10,000 k / 10, with a deviation of sqrt(10,000 p (1 - p)) < 50
        assert ((of_class > 0).sum(0) - 1000 * k).abs().max() < 250
        assert len(of_class.unique(dim=0)) == math.comb(10, k)  # every subset turns up
    torch.testing.assert_close(X.sum(1), torch.ones(20_000, 1))
    assert not torch.equal(make_data(10)[0], make_data(10)[0])
    with pytest.raises(ValueError, match="equal classes"):
        make_data(3)


def test_all_instances() -> None:
    X, y = all_instances()
    assert X.shape == (372, 10, 1) and len(X.unique(dim=0)) == 372 and y.sum() == 252
    assert torch.equal((X > 0).sum((1, 2)), torch.where(y[:, 0] == 1, 5, 3))


def test_evaluation_counts_both_classes_the_same() -> None:
    class Constant(torch.nn.Module):
        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return torch.full((len(X), 1), 0.8)

    assert evaluate(Constant()) == pytest.approx((-(math.log(0.8) + math.log(0.2)) / 2, 0.5))


# ---- models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"DeepSet": train(DeepSet())[0], "MLP": train(make_mlp(), steps=1000)[0]}


def differences(model: torch.nn.Module) -> float:
    """How much 20 permutations change the probabilities of 372 instances, at most."""
    X, _ = all_instances()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        return max((model(X[:, rng.permutation(10)]) - model(X)).abs().max().item() for _ in range(20))


@pytest.mark.slow
def test_invariance_is_exact_and_the_mlp_has_none(trained: dict[str, torch.nn.Module]) -> None:
    assert differences(trained["DeepSet"]) < 1e-6
    assert differences(DeepSet()) < 1e-6
    assert differences(trained["MLP"]) > 1e-3


def test_the_deep_set_solves_it(trained: dict[str, torch.nn.Module]) -> None:
    assert evaluate(trained["DeepSet"])[1] > 0.99


def test_linear_elements_cannot_do_better_than_ln_2() -> None:
    torch.manual_seed(0)
    model, history = train(DeepSet(linear_elements=True), steps=1000)
    assert evaluate(model)[0] == pytest.approx(math.log(2), abs=0.01)
    assert np.mean(history[-200:]) == pytest.approx(math.log(2), abs=0.01)
    class_0, class_1 = script.pooled_by_class(model)
    assert class_0 == pytest.approx(class_1, abs=1e-5)


def test_parameters() -> None:
    assert count_params(DeepSet()) == (5 + 5) + (25 + 5) + (5 + 1) + (5 + 5) + (5 + 1)
    assert count_params(make_mlp(7)) == (70 + 7) + (49 + 7) + (7 + 1)


# ---- the sweep -----------------------------------------------------------------------------------------------------------


def test_training_together_is_training_alone() -> None:
    """Also for models of several widths: the units that fill them up stay silent."""
    torch.manual_seed(0)
    models = [make_mlp(width) for width in (3, 3, 8)]
    wide = [script.widened(model, 8) for model in models]
    X, y = all_instances()
    for model, filled in zip(models, wide, strict=True):
        torch.testing.assert_close(filled(X), model(X))
    torch.manual_seed(1)
    losses, accuracies = script.train_together(wide, steps=60, batch_size=32, lr=0.03)
    for i, model in enumerate(models):
        torch.manual_seed(1)
        train(model, 60, 32, 0.03)
        loss, accuracy = evaluate(model)
        assert losses[i].item() == pytest.approx(loss, rel=1e-3) and accuracies[i].item() == pytest.approx(accuracy, abs=1e-2)
    assert losses.std() > 1e-4


def test_first_match() -> None:
    def row(hidden: int, loss: float, accuracy: float) -> dict:
        return {"hidden": hidden, "parameters": 10 * hidden, "losses": 3 * [loss], "accuracies": 3 * [accuracy]}

    rows = [row(1, 0.5, 0.7), row(2, 0.01, 0.98), row(3, 0.02, 1.0), row(4, 0.005, 1.0), row(5, 0.001, 1.0)]
    assert script.first_match({"DeepSet": row(0, 0.01, 1.0), "MLP": rows})["hidden"] == 4
    assert script.first_match({"DeepSet": row(0, 0.0001, 1.0), "MLP": rows}) is None


# ---- the script ----------------------------------------------------------------------------------------------------------

SHORT = "--steps 30 --batch-size 16 --seeds 2"


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(SHORT, tmp_path) == 0
    (path,) = (tmp_path / "deepsets_exercise").iterdir()
    assert path.name == "steps.30-batch-size.16-seeds.2"
    pictures = ["batch.png", "linear.png", "losses.png", "sweep.png"]
    assert sorted(p.name for p in path.iterdir()) == sorted(["args.json", "log", "result.json", *pictures])
    for picture in pictures:
        with Image.open(path / picture) as image:
            assert min(image.size) > 400 and np.array(image.convert("L")).std() > 10
    out = capsys.readouterr().out
    assert (path / "log").read_text() in out and "largest difference" in out and "MLP of 64" in out and "ln 2 = 0.6931" in out
    result = json.loads((path / "result.json").read_text())
    assert result["DeepSet"]["parameters"] == 62 and len(result["sweep"]["MLP"]) == len(script.SWEEP_WIDTHS)
    assert result["largest_difference"]["DeepSet"] < 1e-6
    # the same again: refused, replaced, and the same figures
    assert run(SHORT, tmp_path) == 2
    assert "has finished: --overwrite replaces it, --seed N starts another" in capsys.readouterr().err
    assert run(f"{SHORT} --overwrite", tmp_path) == 0
    assert json.loads((path / "result.json").read_text()) == result


def test_without_the_sweep(tmp_path: Path) -> None:
    assert run("--steps 5 --batch-size 4 --no-sweep --hidden 3 --seed 1", tmp_path) == 0
    (path,) = (tmp_path / "deepsets_exercise").iterdir()
    assert path.name == "steps.5-batch-size.4-hidden.3-seed.1-no-sweep" and not (path / "sweep.png").exists()


def test_a_dry_run_prints_the_name_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--steps 5 --dry-run", tmp_path) == 0
    assert capsys.readouterr().out == "steps.5\n" and not list(tmp_path.iterdir())


def test_the_results_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(script.main, ["--results-dir=my--seed.3", "--steps=2", "--batch-size=4", "--no-sweep"]) == 0
    assert [str(path) for path in Path().glob("*/*/*")] == ["my--seed.3/deepsets_exercise/steps.2-batch-size.4-no-sweep"]


def test_an_interrupted_run_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(script, "train", stop)
        assert run(SHORT, tmp_path) == 130
    assert run(SHORT, tmp_path) == 0
    (path,) = (tmp_path / "deepsets_exercise").iterdir()
    assert (path / "log").read_text().count("1. Data") == 1


def test_a_run_that_another_process_has_begun_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It appears after this one has looked."""
    honest = Run._look

    def look(run: Run) -> str:
        status = honest(run)
        run.part.mkdir(parents=True)
        (run.part / "args.json").write_text("{}")
        return status

    monkeypatch.setattr(Run, "_look", look)
    assert run(SHORT, tmp_path) == 2
    assert "another process has made" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*/*/*")] == ["args.json"]


BAD = {
    "--steps 0": "0 is too small",
    "--batch-size 7": "--batch-size 7 is odd",
    "--batch-size 0": "0 is too small",
    "--hidden 0": "0 is too small",
    "--hidden 5000": "5000 is too large",
    "--lr 0": "0 is out of range",
    "--lr nan": "nan is out of range",
    "--seed -1": "-1 is too small",
    "--seeds 0": "0 is too small",
    "--steps many": "'many' is not a whole number",
    "--epochs 3": "unknown option '--epochs'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert_one_line_and_nothing_made(run(line, tmp_path / "results"), BAD[line], tmp_path / "results", capsys)


def test_results_directory_with_too_long_a_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert_one_line_and_nothing_made(run(SHORT, tmp_path / (300 * "x")), "File name too long", tmp_path / "results", capsys)


def test_loss_is_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    model = make_mlp()
    p = model(make_data(8)[0])
    torch.manual_seed(0)
    again = make_mlp()
    X, y = make_data(8)
    assert torch.equal(p, again(X))
    torch.manual_seed(0)
    _, history = train(make_mlp(), steps=1, batch_size=8)
    assert history[0] == pytest.approx(F.binary_cross_entropy(p, y).item())
