"""cifar10_projections.py as its users run it: the published command, what it leaves, stops, failures, bad input."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cifar10_projections as script
from common.datasets.classification import load_splits
from common.errors import Failed
from common.run.trackers import Trackers
from common.zoo import training
from tests.command_lines import assert_one_line_and_nothing_made, exit_status
from tests.small_images import smooth, write_mnist

pytestmark = pytest.mark.slow

SMALL = "--repeats 2 --dataset mnist --width 2 --epochs 2 --batch-size 16"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 30 test images."""
    return write_mnist(tmp_path_factory.mktemp("projections"), smooth(100), smooth(30, seed=1))


def run(line: str, data: Path, results: Path) -> int:
    return exit_status(script.main, [*line.split(), "--data-dir", str(data), "--results-dir", str(results)])


def directory(results: Path) -> Path:
    (found,) = (results / "cifar10_projections").iterdir()
    return found


def test_the_published_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--repeats=10", "--dry-run"]) == 0
    assert capsys.readouterr().out == "projections\n"
    args, _ = script.parse(script.get_parser(), ["--repeats=10"])
    assert (args.epochs, args.batch_size, args.lr, args.width, args.layers) == (50, 32, 0.001, 64, [0, 2, 5])
    jobs = script.make_jobs(args, Path("cells"))
    assert len(jobs) == 2 * (1 + 3 * 3 * 10) and jobs[0].name == "relu" and not jobs[0].needs
    assert jobs[-1].name == "sigmoid_identity_layer_5_run_9" and jobs[-1].needs == ("sigmoid",)


def test_names_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for line, name in {
        "--name again --recipe published": "again",
        "--layers 0 5 --seed 2 --retry-failed": "projections-layers.0.5-seed.2",
        "--epochs 3 --groups identity Grelu --progress": "projections-groups.identity.Grelu-epochs.3",
    }.items():
        assert script.main([*line.split(), "--dry-run"]) == 0
        assert capsys.readouterr().out == f"{name}\n"


def test_what_a_test_leaves(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{SMALL} --layers 0 5"
    assert run(line, data, tmp_path) == 0
    path = directory(tmp_path)
    names = {"args.json", "cells", "last.pkl", "log", "metrics.csv", "penalties.csv", "penalties.png", "result.json"}
    assert {file.name for file in path.iterdir()} == names
    result = json.loads((path / "result.json").read_text())
    by_cell = {(of["activation"], of["group"], of["layer"], of["run"]): of["accuracy"] for of in result["cells"]}
    assert len(by_cell) == 2 * (1 + 2 * 3 * 2) and result["baselines"].keys() == {"relu", "sigmoid"}
    for row in result["penalties"]:  # each against the network with its own activation
        own = [by_cell[row["activation"], row["group"], row["layer"], i] for i in range(2)]
        control = [by_cell[row["activation"], "identity", row["layer"], i] for i in range(2)]
        assert row["penalty"] == pytest.approx(by_cell[row["activation"], None, 0, 0] - sum(own) / 2)
        assert row["penalty_to_identity"] == pytest.approx((sum(control) - sum(own)) / 2)
    with open(path / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(by_cell)  # epochs
    out = capsys.readouterr().out
    assert "chance 10" in out and "relu layer 0 orthogonal" in out
    assert out.count("  epoch   2  step     10 ") == len(by_cell)  # a line an epoch
    assert run(line, data, tmp_path) == 2  # says how to go on
    assert run(f"{line} --resume", data, tmp_path) == 0 and "nothing to do" in capsys.readouterr().out


def test_drawing_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{SMALL} --repeats 1 --activations relu --layers 0", data, tmp_path) == 0
    path = directory(tmp_path)
    before = (path / "penalties.csv").read_text()
    for name in ("penalties.csv", "penalties.png"):
        (path / name).unlink()
    capsys.readouterr()
    assert script.main(["--draw", str(path)]) == 0
    assert (path / "penalties.csv").read_text() == before and (path / "penalties.png").exists()
    assert "relu layer 0 orthogonal" in capsys.readouterr().out
    assert exit_status(script.main, ["--draw", str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err


def test_the_front_stays_as_it_was_trained(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also its matrix; the rest moves. And what is drawn differs from run to run, and not from start to start."""
    args, _ = script.parse(script.get_parser(), f"{SMALL} --data-dir {data}".split())
    splits = load_splits("MNIST", data, torch.device("cpu"), seed=0)
    run = SimpleNamespace(options={}, signal=None, dash="--", log=print, trackers=Trackers(args, tmp_path, "none"))
    script.train(args, splits, run, script.RotationJob(tmp_path, "relu"))
    job = script.RotationJob(tmp_path, "relu", "orthogonal", 2, 1)
    network = script.make_network(args, job, torch.device("cpu"))
    saved = torch.load(tmp_path / "relu.pt", weights_only=True)
    assert torch.equal(network.state_dict()["2.original_op.weight"], saved["2.weight"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    again = script.make_network(args, job, torch.device("cpu")).state_dict()
    other = script.make_network(
        args, script.RotationJob(tmp_path, "relu", "orthogonal", 2, 0), torch.device("cpu")
    ).state_dict()
    assert torch.equal(again["2.transform.weight"], before["2.transform.weight"])
    assert not torch.equal(other["2.transform.weight"], before["2.transform.weight"])
    monkeypatch.setattr(script, "make_network", lambda *_: network)
    script.train(args, splits, run, job)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(int(name.partition(".")[0]) > 2 for name in changed)


# ---- stops ---------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result_of(results: Path) -> dict:
    """The result of the run, without its time."""
    result = json.loads((directory(results) / "result.json").read_text())
    assert result.pop("seconds") > 0 and "seconds" not in result["cells"][0]
    return result


def test_a_test_that_is_stopped_between_two_trainings(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"{SMALL} --activations relu --layers 2 --groups orthogonal"
    assert run(line, data, tmp_path / "whole") == 0
    train, begun = script.train, []

    def stopped(args: object, data: object, run: object, job: script.RotationJob) -> None:
        begun.append(job.name)
        train(args, data, run, job)  # type: ignore[arg-type]
        if len(begun) == 2:
            run.signal = "SIGUSR1"  # type: ignore[attr-defined]

    monkeypatch.setattr(script, "train", stopped)
    assert run(line, data, tmp_path / "parts") == 75
    assert run(f"{line} --resume", data, tmp_path / "parts") == 0
    assert begun == ["relu", "relu_orthogonal_layer_2_run_0", "relu_orthogonal_layer_2_run_1"]
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def stop_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes in every step, and at the start of every evaluation until it is made again."""
    step, evaluate, evaluations = training.training_step, training.evaluate, iter(range(1000))

    def stopped_step(*args: object) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return step(*args)  # type: ignore[arg-type]

    def stopped_evaluation(*args: object, **named: Callable[[], None]) -> dict[str, float]:
        if next(evaluations) % 2 == 0:
            signal.raise_signal(signal.SIGUSR1)
        return evaluate(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "training_step", stopped_step)
    for module in (training, script):
        monkeypatch.setattr(module, "evaluate", stopped_evaluation)


def test_damaged_files_are_refused_before_anything_is_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{SMALL} --activations relu --layers 2 --groups orthogonal --repeats 1"
    with monkeypatch.context() as patch:
        stop_often(patch)
        assert [run(f"{line} --resume", data, tmp_path) for _ in range(15)] == [75] * 15  # 13 for the network, two of its rest
    part = directory(tmp_path)
    whole = files(part)
    record = json.loads(whole["cells/relu.json"])
    for name, content in (
        ("relu.json", b"{"),
        *(
            ("relu.json", json.dumps(record | other).encode())
            for other in ({"accuracy": None}, {"group": "Grelu"}, {"epochs": 2})
        ),
        ("relu.pt", whole["cells/relu.pt"][:1000]),
        ("relu_orthogonal_layer_2_run_0.last.pkl", whole["cells/relu_orthogonal_layer_2_run_0.last.pkl"][:1000]),
    ):
        path = part / "cells" / name
        path.write_bytes(content)
        left = files(part)
        capsys.readouterr()
        assert run(f"{line} --resume", data, tmp_path) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{name} is damaged" in error and files(part) == left
        path.write_bytes(whole[f"cells/{name}"])
    assert run(f"{line} --resume", data, tmp_path) == 0


# ---- trainings that fail -------------------------------------------------------------------------------------------------


def fail(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let trainings fail after an epoch."""
    train_epoch = script.train_epoch

    def failing(args: object, data: object, state: script.State, *more: object) -> object:
        metrics = train_epoch(args, data, state, *more)  # type: ignore[arg-type]
        if state.path.name.removesuffix(".last.pkl") in names:
            raise Failed("the loss of epoch 1 is not finite")
        return metrics

    monkeypatch.setattr(script, "train_epoch", failing)


def test_a_network_that_fails_and_its_rests(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{SMALL} --layers 2 --groups orthogonal --repeats 1 --epochs 1"
    assert run(line, data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        fail(patch, "relu")
        assert run(line, data, tmp_path / "failed") == 1
    result = result_of(tmp_path / "failed")
    reason = "the loss of epoch 1 is not finite"
    rest = "relu_orthogonal_layer_2_run_0"
    assert result["failed"] == {"relu": reason, rest: f"it needs relu, which failed: {reason}"}
    assert result["baselines"].keys() == {"sigmoid"} and {row["activation"] for row in result["penalties"]} == {"sigmoid"}
    names = set(files(directory(tmp_path / "failed")))
    assert "cells/relu.failed.json" in names and not any(name.startswith(f"cells/{rest}") for name in names)
    capsys.readouterr()
    assert run(f"{line} --resume", data, tmp_path / "failed") == 1
    assert "has finished, but 2 jobs failed: --retry-failed repeats them" in capsys.readouterr().out
    assert run(f"{line} --retry-failed", data, tmp_path / "failed") == 0
    assert result_of(tmp_path / "failed") == result_of(tmp_path / "whole")
    assert files(directory(tmp_path / "failed")).keys() == files(directory(tmp_path / "whole")).keys()
    assert run(f"{line} --retry-failed", data, tmp_path / "failed") == 0 and "nothing to do" in capsys.readouterr().out


def test_penalties_are_of_the_runs_that_are_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"{SMALL} --activations relu --layers 2 5 --groups orthogonal identity --epochs 1 --repeats 3"
    names = [f"relu_{of}" for of in ("orthogonal_layer_2_run_0", "identity_layer_2_run_1")]
    fail(monkeypatch, *names, *(f"relu_identity_layer_5_run_{i}" for i in range(3)))
    assert run(line, data, tmp_path) == 1
    result = result_of(tmp_path)
    accuracies = {(of["group"], of["layer"], of["run"]): of["accuracy"] for of in result["cells"]}
    assert len(accuracies) == 1 + 12 - 5 and len(result["failed"]) == 5
    rows = {(row["layer"], row["group"]): row for row in result["penalties"]}
    assert {place: row["n"] for place, row in rows.items()} == {(2, "orthogonal"): 2, (2, "identity"): 2, (5, "orthogonal"): 3}
    paired = accuracies["identity", 2, 2] - accuracies["orthogonal", 2, 2]  # the only run that both have
    assert rows[2, "orthogonal"]["penalty_to_identity"] == pytest.approx(paired)
    assert rows[2, "orthogonal"]["deviation_to_identity"] is None and "penalty_to_identity" not in rows[5, "orthogonal"]
    own = [accuracies["orthogonal", 2, i] for i in (1, 2)]
    assert rows[2, "orthogonal"]["accuracy"] == pytest.approx(sum(own) / 2)


def test_a_test_of_which_nothing_could_be_trained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "relu", "sigmoid")
    assert run(f"{SMALL} --layers 2 --groups identity", data, tmp_path) == 1
    path = directory(tmp_path)
    assert {file.name for file in path.iterdir()} == {"args.json", "cells", "last.pkl", "log", "result.json"}
    result = json.loads((path / "result.json").read_text())
    assert len(result["failed"]) == 2 * (1 + 2) and result["cells"] == result["penalties"] == []
    capsys.readouterr()
    assert exit_status(script.main, ["--draw", str(path)]) == 2
    error = capsys.readouterr().err
    assert "has no penalties: its trainings failed" in error and error.count("\n") == 1


# ---- bad input -----------------------------------------------------------------------------------------------------------

BAD = {
    "--repeats 0": "0 is too small: at least 1",
    "--layers 1": "invalid choice: 1",
    "--layers 2 2": "--layers 2 2 names one twice",
    "--groups rotation": "invalid choice: 'rotation'",
    "--activations tanh": "invalid choice: 'tanh'",
    "--resume --overwrite": "choose one",
    "--retry-failed --overwrite": "choose one",
    "--dataset cifar10": "CIFAR10 is not there",
    "--batch-size 101 --dataset mnist": "--batch-size 101 is more than the 90 training images",
    "--lr inf": "inf is out of range",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(
    line: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.datasets.images._download", lambda *_: None)
    status = run(line, data, tmp_path / "results")
    assert_one_line_and_nothing_made(status, BAD[line], tmp_path / "results", capsys)
