"""amortised_clustering.py as its users run it: published commands, bad input, what a run leaves, NaN, full disks, resuming."""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import amortised_clustering as script
from common import checkpoint
from common.datasets import clustering
from common.graphs import GraphedModel
from common.models.sets import MODEL_TYPES
from common.run import apply, clock
from common.run.budget import BudgetedTraining
from common.run.metrics import read_metrics
from tests.command_lines import assert_help_shows_the_papers_options_first, assert_one_line_and_nothing_made, exit_status

pytestmark = pytest.mark.slow

PUBLISHED = "-type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs.50 -wc 60"
SHORT = "-type Swarm -n_hidden 8 -n_iter 3 -tasks 40 -bs 6 -max_epochs 3 -lr 0.01"


def run(line: str, results: Path, *more: str) -> int:
    return exit_status(script.main, [*line.split(), *more, "-results_dir", str(results)])


def directory(results: Path) -> Path:
    (found,) = (results / "amortised_clustering").iterdir()
    return found


# ---- command line --------------------------------------------------------------------------------------------------------


def test_options_and_defaults_are_the_published_ones() -> None:
    published = {
        "type": "Swarm", "n_hidden": 128, "n_layers": 1, "n_iter": 5, "non_lin": "relu", "n_heads": 4, "n_ind_points": 10,
        "dropout": 0, "tasks": 10000, "bs": 100, "wc": 60, "update_interval": 10, "max_epochs": 1000, "bt_horizon": 0.2,
        "bt_alpha": 0.9, "lr": 0.01, "no_cuda": False, "dry_run": False, "to_stdout": False, "run": None, "resume": None,
    }  # fmt: skip
    args = vars(script.get_parser().parse_args(["-type", "Swarm"]))
    assert {name: args[name] for name in published} == published
    own = {
        "seed",
        "results_dir",
        "pooling",
        "loss",
        "precision",
        "deterministic",
        "compile",
        "overwrite",
        "device",
        "tensorboard",
        "wandb_project",
        *apply.POINTS_OPTIONS,
    }
    assert args.keys() - published.keys() == own


def test_help(capsys: pytest.CaptureFixture) -> None:
    assert_help_shows_the_papers_options_first(script.main, "-n_ind_points ", capsys)


def test_dry_run_prints_the_name_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(PUBLISHED, tmp_path / "results", "-dry_run") == 0
    assert capsys.readouterr().out == "-type.Swarm-n_hidden.128-n_iter.10-n_layers.1-dropout.0.0-bs.50-wc.60\n"
    assert not (tmp_path / "results").exists()


def test_published_line_runs_as_printed_for_a_second(tmp_path: Path) -> None:
    """As it is, but for a smaller budget and fewer tasks."""
    assert run(PUBLISHED.replace("-wc 60", "-wc 0.01") + " -tasks 100", tmp_path) == 0
    result = json.loads((directory(tmp_path) / "result.json").read_text())
    assert result["parameters"] == 135_178 and result["steps"] >= 1


BAD = {
    "": "-type",
    "-type Sworm": "invalid choice: 'Sworm'",
    "-type Swarm -tasks 9": "9 is too small: at least 10",
    "-type Swarm -n_hidden 0": "0 is too small",
    "-type Swarm -n_iter -1": "-1 is too small",
    "-type Swarm -bs 0": "0 is too small",
    "-type Swarm -max_epochs 0": "0 is too small",
    "-type Swarm -lr 0": "0 is out of range",
    "-type Swarm -lr 1.5": "1.5 is out of range",
    "-type Swarm -lr nan": "nan is out of range",
    "-type Swarm -dropout 1": "1 is out of range",
    "-type Swarm -dropout -0.1": "-0.1 is out of range",
    "-type Swarm -wc 0": "0 is out of range",
    "-type Swarm -bt_alpha 1.01": "1.01 is out of range",
    "-type Swarm -bt_horizon 2": "2 is out of range",
    "-type Swarm -update_interval -1": "-1 is out of range",
    "-type Swarm -seed -1": "-1 is too small",
    "-type Swarm -run a/b": "cannot be part of a file name",
    "-type Swarm -pooling POMA -n_hidden 8": "-n_hidden 8 is too small",
    "-type SetTransformer -n_heads 3": "-n_hidden 128 does not split into -n_heads 3",
    "-type SetLinear -dropout 0.1": "-type SetLinear has no dropout",
    "-type LSTM -dropout 0.1": "needs -n_layers 2",
    "-type Swarm -resume nowhere/best.pkl": "there is no checkpoint nowhere/best.pkl",
    "-type Swarm -resume auto -overwrite": "choose one",
    "-type Swarm -run -dry_run": "-run needs a value",
    "-type Swarm -run x-seed.3": "reads like other options",
    "-type Swarm -wc 1e308": "1e308 is out of range",
    "-type Swarm -n_hidden 2147483647": "too large",
    f"-type Swarm -resume {300 * 'x'}": "cannot use xxx",
    "-type Swarm -n_hid 3": "unknown option '-n_hid'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert_one_line_and_nothing_made(run(line, tmp_path / "results"), BAD[line], tmp_path / "results", capsys)


def test_results_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert run(SHORT, tmp_path / "file") == 2
    error = capsys.readouterr().err
    assert f"cannot write to {tmp_path / 'file'}" in error and error.count("\n") == 1
    assert run(SHORT, tmp_path / (300 * "x")) == 2
    error = capsys.readouterr().err
    assert "cannot use " in error and "File name too long" in error and error.count("\n") == 1


# ---- what a run leaves ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("finished")
    assert run(SHORT, results) == 0
    return results


def test_files(finished: Path) -> None:
    path = directory(finished)
    assert path.name == SHORT.replace(" -", "-").replace(" ", ".")
    files = "args.json best.pkl last.pkl log metrics.csv metrics.png result.json samples.png weights.png"
    assert sorted(p.name for p in path.iterdir()) == files.split()
    args = json.loads((path / "args.json").read_text())
    assert (args["seed"], args["n_hidden"], args["torch"]) == (0, 8, torch.__version__)
    best = torch.load(path / "best.pkl", weights_only=True)
    metrics = read_metrics(path / "metrics.csv")
    assert metrics["epoch"] == [1, 2, 3] and metrics["step"] == [6, 12, 18]
    assert best["best_val_loss"] == pytest.approx(min(metrics["val_loss"]))
    assert best["name"] == path.name
    for picture in ("metrics", "weights", "samples"):
        with Image.open(path / f"{picture}.png") as image:
            assert min(image.size) > 400 and np.array(image.convert("L")).std() > 10


def test_report(finished: Path, capsys: pytest.CaptureFixture) -> None:
    result = json.loads((directory(finished) / "result.json").read_text())
    oracle, model, chance = (result[name] for name in ("oracle", "model", "chance"))
    assert oracle["cross_entropy"] < model["cross_entropy"] < chance["cross_entropy"]
    assert chance["cross_entropy"] == pytest.approx(math.log(10), abs=1e-4)
    assert oracle["accuracy"] > model["accuracy"] > chance["accuracy"]
    assert abs(chance["rand_index"]) < 0.02 < model["rand_index"] < oracle["rand_index"]
    assert sum(row["tasks"] for row in result["by_clusters"].values()) == result["validation_tasks"] == 4
    k_means = result["k_means"]
    assert chance["rand_index"] < k_means["adjusted_rand_index"] < 1 and k_means["tasks"] == 4
    mean = sum(row["tasks"] * row["model"]["accuracy"] for row in result["by_clusters"].values()) / 4
    assert mean == pytest.approx(model["accuracy"])
    log = (directory(finished) / "log").read_text()
    assert f"oracle {oracle['cross_entropy']:.4f}, chance 2.3026" in log and log.endswith(script.report_table(result) + "\n")
    for text in (log, script.summary(result)):
        assert f"{k_means['adjusted_rand_index']:.3f} (" in text and "told the number of clusters" in text


def test_same_seed_same_run_other_seed_another(finished: Path, tmp_path: Path) -> None:
    figures = []
    for seed in (0, 1):
        assert run(SHORT, tmp_path / str(seed), "-seed", str(seed)) == 0
        figures.append(read_metrics(directory(tmp_path / str(seed)) / "metrics.csv")["val_loss"])
    assert figures[0] == read_metrics(directory(finished) / "metrics.csv")["val_loss"] != figures[1]


def test_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(SHORT, tmp_path, "-to_stdout") == 0
    out = capsys.readouterr().out
    assert "epoch    3" in out and out.count("clusters  tasks") == 1
    assert not (directory(tmp_path) / "log").exists()


@pytest.mark.parametrize("kind", [k for k in MODEL_TYPES if k != "Swarm"])
def test_every_type_runs(kind: str, tmp_path: Path) -> None:
    assert run(f"-type {kind} -n_hidden 8 -n_layers 2 -tasks 20 -bs 9 -max_epochs 2 -n_iter 3", tmp_path) == 0
    assert f"note: -type {kind} has no use for -n_iter" in (directory(tmp_path) / "log").read_text()


@pytest.mark.parametrize(
    "more", ["-pooling POMA -n_hidden 12", "-loss greedy", "-precision bf16", "-dropout 0.3 -n_layers 2 -non_lin elu"]
)
def test_options_run(more: str, tmp_path: Path) -> None:
    assert run("-type Swarm -n_hidden 8 -n_iter 3 -tasks 20 -bs 9 -max_epochs 2 -wc 1", tmp_path, *more.split()) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["Swarm", "SetLinear"])
def test_compile_runs(kind: str, tmp_path: Path) -> None:
    assert run(f"-type {kind} -n_hidden 8 -n_iter 3 -tasks 20 -bs 9 -max_epochs 2 -compile", tmp_path) == 0
    checked = torch.load(directory(tmp_path) / "best.pkl", weights_only=True)
    assert not any("_orig_mod" in name for name in checked["model"])


def test_it_learns(tmp_path: Path) -> None:
    """Chance is 2.30; a gradient with the wrong sign, or of the wrong parameters, does not get below 1.2."""
    assert run("-type Swarm -n_hidden 24 -n_iter 5 -tasks 100 -bs 10 -max_epochs 6 -lr 0.01", tmp_path) == 0
    model = json.loads((directory(tmp_path) / "result.json").read_text())["model"]
    assert model["cross_entropy"] < 1.2 and model["accuracy"] > 0.55


def test_budget_ends_the_run_and_does_not_count_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by a hundredth of a second whenever it is looked at, and by a minute in each drawing."""
    now, drawn = [0.0], []

    def look() -> float:
        now[0] += 0.01
        return now[0]

    def slow(args: argparse.Namespace, data: script.Data, training: BudgetedTraining) -> None:
        drawn.append(training.clock.used())
        now[0] += 60

    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=look))
    monkeypatch.setattr(script, "draw", slow)
    assert run("-type Swarm -n_hidden 8 -n_iter 2 -tasks 40 -bs 6 -wc 0.02 -update_interval 0.003", tmp_path) == 0
    result = json.loads((directory(tmp_path) / "result.json").read_text())
    assert 1.2 <= result["seconds"] < 1.2 + 0.3
    assert len(drawn) > 3 and drawn[-1] < 1.2 + 0.3


def test_the_time_ends_between_two_looks_at_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the look before an epoch: the epoch takes one step, and is validated."""
    honest = BudgetedTraining.has_next_epoch

    def has_next_epoch(self: BudgetedTraining, max_epochs: float) -> bool:
        result = honest(self, max_epochs)
        self.clock.budget = 0.0 if self.epoch == 1 else 1e6
        return result

    monkeypatch.setattr(BudgetedTraining, "has_next_epoch", has_next_epoch)
    assert run(SHORT, tmp_path) == 0
    assert read_metrics(directory(tmp_path) / "metrics.csv")["step"] == [6, 7]


# ---- resuming from a checkpoint ------------------------------------------------------------------------------------------


def test_start_from_best(finished: Path, tmp_path: Path) -> None:
    best = directory(finished) / "best.pkl"
    assert run(SHORT.replace("-lr 0.01", "-lr 1e-12"), tmp_path, "-resume", str(best)) == 0
    before, after = (torch.load(d / "best.pkl", weights_only=True) for d in (best.parent, directory(tmp_path)))
    for name, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][name], tensor, rtol=0, atol=1e-6)
    assert after["optimizer"]["param_groups"][0]["lr"] == 1e-12
    assert after["optimizer"]["state"][0]["step"] > before["optimizer"]["state"][0]["step"]


def test_start_from_another_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    best = str(directory(finished) / "best.pkl")
    for line in ("-type Swarm -n_hidden 16", "-type LSTM", "-type Swarm -n_hidden 8 -n_layers 2"):
        assert run(line, tmp_path / "results", "-resume", best) == 2
        error = capsys.readouterr().err
        assert "is of another model" in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_checkpoints_that_load_but_are_of_no_use(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state, path = torch.load(directory(finished) / "best.pkl", weights_only=True), tmp_path / "best.pkl"
    key = next(iter(state["model"]))
    moments = {**state["optimizer"], "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(1, 2)}}}
    for changed, message in (
        ({"model": {**state["model"], key: state["model"][key] * math.nan}}, "not finite"),
        ({"model": {**state["model"], key: "hello"}}, "no tensor of weights"),
        ({"optimizer": moments}, "optimizer of another model"),
        ({"optimizer": None}, "optimizer of another model"),
    ):
        torch.save(state | changed, path)
        assert run(SHORT, tmp_path / "results", "-resume", str(path)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert run(SHORT, finished, "-overwrite", "-resume", str(directory(finished) / "best.pkl")) == 2
    assert "-overwrite would delete" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_killed_before_anything_was_saved(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run that was to start from a file does not start from nothing instead."""
    part = tmp_path / "amortised_clustering" / (directory(finished).name + ".part")
    part.mkdir(parents=True)
    assert run(SHORT, tmp_path, "-dry_run") == 0
    (part / "args.json").write_text(json.dumps({"resume": "old/best.pkl"}))
    assert run(SHORT, tmp_path, "-resume", "auto") == 2
    assert "was to start from old/best.pkl" in capsys.readouterr().err
    (part / "args.json").write_text(json.dumps({"resume": "auto"}))
    assert run(SHORT, tmp_path, "-resume", "auto") == 0


def test_budget_below_a_step(tmp_path: Path) -> None:
    assert run(SHORT + " -wc 1e-9", tmp_path) == 0
    assert json.loads((directory(tmp_path) / "result.json").read_text())["steps"] == 1


def test_reader_who_goes_away(tmp_path: Path) -> None:
    command = [sys.executable, script.__file__, *SHORT.split(), "-results_dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0 and b"Traceback" not in process.stderr.read()
    assert (directory(tmp_path) / "result.json").exists()


# ---- what goes wrong in the middle ---------------------------------------------------------------------------------------


def test_padding_for_cuda_graphs_reaches_no_figure_and_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    args = script.get_parser().parse_args(["-type", "Swarm", "-n_hidden", "8"])
    data, model = script.make_data(20, 6, 0, torch.device("cpu")), script.make_model(args)
    plain = script.validate(model, data.tasks, data.validation, "fp32")
    monkeypatch.setattr(clustering, "padded_length", lambda n, device: n + 5)  # as on a GPU
    assert clustering.padded_batch(data.tasks, data.training[0], graphed=True)[2][:, -5:].sum() == 0
    graphed = script.validate(model, data.tasks, data.validation, "fp32", GraphedModel(model))
    for name, values in plain.items():
        torch.testing.assert_close(graphed[name], values, rtol=1e-5, atol=1e-6)
    chance = script.measure_baselines(data.tasks, data.validation, 0)["chance"]
    assert all(torch.equal(values, data.by_task["chance"][name]) for name, values in chance.items())
    sizes = set(data.tasks.sizes.tolist())
    assert all(len(points) == len(true) and len(points) in sizes for points, _, true, _ in script.samples(args, data, model))


def test_nan_in_the_middle_goes_back_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch fails (back to the start), then the fifth (back to the best)."""
    honest, calls = script.log_probs, []

    def poisoned(model: torch.nn.Module, points: torch.Tensor, mask: torch.Tensor, precision: str) -> torch.Tensor:
        log_p = honest(model, points, mask, precision)
        if torch.is_grad_enabled():
            calls.append(1)
            # epochs have 6 steps; the failing first one ends after 3
            if len(calls) in (3, 3 + 3 * 6 + 2):
                return log_p * math.nan
        return log_p

    monkeypatch.setattr(script, "log_probs", poisoned)
    assert run(SHORT.replace("-max_epochs 3", "-max_epochs 7"), tmp_path) == 0
    metrics = read_metrics(directory(tmp_path) / "metrics.csv")
    assert [math.isnan(loss) for loss in metrics["val_loss"]] == [True, False, False, False, True, False, False]
    assert metrics["lr"][0] == 0.01 and metrics["lr"][1] == pytest.approx(0.009) and metrics["lr"][5] == pytest.approx(0.0081)
    result = json.loads((directory(tmp_path) / "result.json").read_text())
    assert result["model"]["cross_entropy"] == pytest.approx(np.nanmin(metrics["val_loss"]), rel=1e-6)
    for name in ("best.pkl", "last.pkl"):
        state = torch.load(directory(tmp_path) / name, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
        assert math.isfinite(state["best_val_loss"] if name == "best.pkl" else state["best"]["best"])


def test_infinite_gradients_reach_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the step is finite, the weights after it are not; every step is followed by a save."""
    honest_log_probs, honest_save, calls, saved = script.log_probs, checkpoint.save, [0], []

    def poisoned(model: torch.nn.Module, points: torch.Tensor, mask: torch.Tensor, precision: str) -> torch.Tensor:
        log_p = honest_log_probs(model, points, mask, precision)
        calls[0] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls[0] == 8:
            log_p.register_hook(lambda grad: grad * math.inf)
        return log_p

    def save(state: dict, path: Path) -> None:
        saved.append(all(tensor.isfinite().all() for tensor in state["model"].values()))
        honest_save(state, path)

    monkeypatch.setattr("common.run.state.SAVE_SECONDS", -1)
    monkeypatch.setattr(script, "log_probs", poisoned)
    monkeypatch.setattr(checkpoint, "save", save)
    assert run(SHORT, tmp_path) == 0
    assert len(saved) > 15 and all(saved)
    losses = read_metrics(directory(tmp_path) / "metrics.csv")["val_loss"]
    assert [math.isnan(loss) for loss in losses] == [False, True, False]
