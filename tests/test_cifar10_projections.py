"""cifar10_projections.py as its users run it: the published line, what it leaves, going on, bad input; on small networks."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch

import cifar10_projections as script
from tests.command_lines import assert_one_line_and_nothing_made, exit_status
from tests.small_images import smooth, write_mnist

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
    cells = script.cells_of(args)
    assert len(cells) == 2 * (1 + 3 * 3 * 10) and cells[0] == script.Cell("relu")


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


def test_the_front_stays_as_it_was_trained(data: Path, tmp_path: Path) -> None:
    """Also its matrix; the rest moves. And what is drawn differs from run to run, and not from start to start."""
    args, _ = script.parse(script.get_parser(), f"{SMALL} --data-dir {data}".split())
    splits = script.load_splits("MNIST", data, torch.device("cpu"), seed=0, batch_size=16)
    script.run_cell(args, script.Cell("relu"), splits, tmp_path, script.Interruption())
    cell = script.Cell("relu", "orthogonal", 2, 1)
    network = script.make_network(args, cell, tmp_path, torch.device("cpu"))
    saved = torch.load(tmp_path / "relu.pt", weights_only=True)
    assert torch.equal(network.state_dict()["2.original_op.weight"], saved["2.weight"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    again = script.make_network(args, cell, tmp_path, torch.device("cpu")).state_dict()
    other = script.make_network(args, script.Cell("relu", "orthogonal", 2, 0), tmp_path, torch.device("cpu")).state_dict()
    assert torch.equal(again["2.transform.weight"], before["2.transform.weight"])
    assert not torch.equal(other["2.transform.weight"], before["2.transform.weight"])
    script.train(args, network, splits, (2, 1, 1), tmp_path / "last.pkl", script.Interruption())
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(int(name.partition(".")[0]) > 2 for name in changed)


def test_a_test_goes_on_where_it_stood(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"{SMALL} --activations relu --layers 2 --groups orthogonal"
    assert run(line, data, tmp_path / "whole") == 0
    whole = json.loads((directory(tmp_path / "whole") / "result.json").read_text())

    run_cell, begun = script.run_cell, []

    def interrupted(args: object, cell: script.Cell, *more: object) -> object:
        begun.append(cell.stem)
        if len(begun) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return run_cell(args, cell, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(script, "run_cell", interrupted)
    assert run(line, data, tmp_path / "parts") == 75
    begun[:] = ["", ""]
    assert run(f"{line} --resume", data, tmp_path / "parts") == 0
    assert begun[2:] == ["relu_orthogonal_layer_2_run_0", "relu_orthogonal_layer_2_run_1"]  # not the network again
    parts = json.loads((directory(tmp_path / "parts") / "result.json").read_text())
    assert parts["cells"] == whole["cells"] and parts["penalties"] == whole["penalties"]
    assert parts["seconds"] > 0 and "seconds" not in parts["cells"][0]


def test_a_training_goes_on_with_its_next_epoch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: losses, accuracies and the weights of the network come out as if nobody had interrupted it."""
    line = f"{SMALL} --activations relu --layers 2 --groups orthogonal --epochs 3 --repeats 1"
    assert run(line, data, tmp_path / "whole") == 0
    step, steps = script.training_step, []

    def interrupted(*arguments: object) -> object:
        steps.append(len(steps))
        if len(steps) in (8, 31):  # of 5 an epoch, in the second epoch of the network, and in the third of its rest
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(script, "training_step", interrupted)
    assert [run(f"{line} --resume", data, tmp_path / "parts") for _ in range(3)] == [75, 75, 0]
    assert len(steps) == 30 + 3 + 3  # what an interrupted epoch had done is done again
    parts, whole = directory(tmp_path / "parts"), directory(tmp_path / "whole")
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    weights = [torch.load(path / "cells" / "relu.pt", weights_only=True) for path in (parts, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert not list((parts / "cells").glob("*.last.pkl"))


BAD = {
    "--repeats 0": "0 is too small: at least 1",
    "--layers 1": "invalid choice: 1",
    "--layers 2 2": "--layers 2 2 names one twice",
    "--groups rotation": "invalid choice: 'rotation'",
    "--activations tanh": "invalid choice: 'tanh'",
    "--resume --overwrite": "choose one",
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
