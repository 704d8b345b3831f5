"""cifar10_stitching.py as its users run it: recipes, bad input, what a sweep leaves, going on, comparing; on small networks."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch

import cifar10_stitching as script
from common.models import zoo
from common.run.interruption import Interruption
from tests.command_lines import exit_status
from tests.small_images import smooth, write_mnist

KINDS = {
    "full": "--recipe standard",
    "permutation": "--recipe Grelu --bn_batches 2",
    "permutation (cross-validated)": "--recipe crossval --stitch_repeats 2",
    "softsort": "--wreath --noschedule",
    "rank 1": "--recipe lowrank --rank 1",
    "rank 2": "--recipe lowrank --rank 2",
    "lasso 0.01": "--recipe lasso --multiplier 0.01 --threshold 0.5",
    "alternating": "--birkhoff --alternating --pgd_hook --bn_epoch --bn-batches 0",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of four mCNNs of width 2, untrained, and 100 training and 30 test images."""
    folder = tmp_path_factory.mktemp("stitching")
    (folder / "zoo").mkdir()
    for i in range(4):
        torch.manual_seed(i)
        torch.save(zoo.make("mCNN", width=2).state_dict(), folder / "zoo" / f"{i}.pt")
    write_mnist(folder / "data", smooth(100), smooth(30, seed=1))
    return folder


def run(line: str, place: Path, results: Path) -> int:
    common = f"--arch mCNN --dataset mnist --data-dir {place / 'data'} --zoo {place / 'zoo'} --stitch_epochs 2 --batch-size 16"
    return exit_status(script.main, [*common.split(), *line.split(), "--results-dir", str(results)])


def directory(results: Path) -> Path:
    (found,) = (path for path in (results / "cifar10_stitching").iterdir() if not path.name.startswith("figures"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_sweep_leaves(kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{KINDS[kind]} --pairs 0-1 2-3 --layers 3 14", place, tmp_path) == 0
    path = directory(tmp_path)
    result = json.loads((path / "result.json").read_text())
    assert result["kind"] == ("permutation" if kind == "alternating" else kind)
    runs = 2 if "cross" in kind else 1
    order = [([i, i + 1], layer, run) for i in (0, 2) for layer in (14, 3) for run in range(runs)]
    assert [(cell["pair"], cell["layer"], cell["run"]) for cell in result["cells"]] == order
    for cell in result["cells"]:
        assert cell["penalty"] == pytest.approx(sum(cell["parents"]) / 2 - cell["accuracy"])
        if "permutation" in cell:
            assert sorted(cell["permutation"]) == list(range(cell["channels"])) and len(cell["scales"]) == cell["channels"]
        state = torch.load(path / "cells" / f"{cell['pair'][0]}-{cell['pair'][1]}_layer_{cell['layer']}_run_{cell['run']}.pt")
        assert state["rounded"].shape == (cell["channels"], cell["channels"])
        if kind.startswith("lasso"):
            zeros = state["matrix"].abs() < 0.5
            assert torch.equal(state["rounded"], torch.where(zeros, 0.0, state["matrix"]))
            assert cell["sparsity"] == pytest.approx(zeros.float().mean().item())
        if kind.startswith("rank"):
            assert torch.linalg.matrix_rank(state["rounded"]) <= int(kind[-1])
    assert [of["layer"] for of in result["layers"]] == [3, 14] and all(of["n"] == 2 for of in result["layers"])
    with open(path / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(order)  # epochs
    assert {p.name for p in path.iterdir()} == {
        "args.json", "cells", "last.pkl", "log", "matrices.png", "metrics.csv", "result.json"
    }  # fmt: skip
    out = capsys.readouterr().out
    assert f"{kind if kind != 'alternating' else 'permutation'}: penalty" in out and "chance 10" in out
    assert run(f"{KINDS[kind]} --pairs 0-1 2-3 --layers 3 14", place, tmp_path) == 2
    assert run(f"{KINDS[kind]} --pairs 0-1 2-3 --layers 3 14 --resume", place, tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_recipes_are_those_of_the_batch_files() -> None:
    def options(line: str) -> dict[str, object]:
        return vars(script.parse(script.get_parser(), line.split()))

    grelu = options("--recipe Grelu --arch mCNN")
    assert grelu["birkhoff"] and grelu["alpha"] == 0.1 and grelu["stitch_epochs"] == 20 and grelu["retrain_repeats"] == 32
    assert grelu["noschedule"] and grelu["bn_epoch"] and not grelu["nopermwarmup"] and grelu["stitch_lr"] is None
    crossval = options("--recipe crossval --arch resnet20 --num_chunks 8 --chunk 7")
    assert crossval["alpha"] == "crossval" and (crossval["stitch_repeats"], crossval["stitch_epochs"]) == (5, 5)
    assert crossval["retrain_repeats"] == 16
    standard = options("--recipe standard --arch resnet18 --stitch_epochs 4")
    assert standard["nopermwarmup"] and standard["stitch_epochs"] == 4 and not standard["birkhoff"]
    assert options("--recipe lowrank --rank 4 --arch mCNN")["lowrank"] and options("--recipe lasso --arch mCNN")["lasso"]


def test_pairs_are_drawn_without_repetition() -> None:
    pairs = zoo.draw_pairs(list(range(8)), 4, seed=0)
    assert sorted(number for pair in pairs for number in pair) == list(range(8))
    assert pairs == zoo.draw_pairs(list(range(8)), 4, seed=0) != zoo.draw_pairs(list(range(8)), 4, seed=1)
    more = zoo.draw_pairs([0, 1, 2], 6, seed=0)
    assert len(set(more)) == 6
    with pytest.raises(zoo.ZooError, match="3 networks make 6 pairs, not 7"):
        zoo.draw_pairs([0, 1, 2], 7, seed=0)


def test_chunks_share_the_pairs(place: Path) -> None:
    def pairs(line: str) -> list[tuple[int, int]]:
        line = f"--arch mCNN --zoo {place / 'zoo'} --retrain_repeats 5 {line}"
        return script.pairs_of(script.parse(script.get_parser(), line.split()))

    parts = [pairs(f"--num_chunks 3 --chunk {chunk}") for chunk in range(3)]
    assert [pair for part in parts for pair in part] == pairs("") and all(parts)


def test_validation_images_are_not_trained_on(place: Path) -> None:
    for alpha, n in (("0.1", 10), ("crossval", 20)):
        line = f"--arch mCNN --dataset mnist --data-dir {place / 'data'} --birkhoff --alpha {alpha}"
        data = script.load_data(script.parse(script.get_parser(), line.split()), torch.device("cpu"))
        images = [set(map(bytes, split.images.flatten(1).numpy())) for split in (data.training, data.selection)]
        assert len(images[1]) == n and len(images[0]) == 100 - n and not images[0] & images[1]


def test_the_joint_alone_learns_and_the_best_epoch_is_kept(place: Path) -> None:
    """With the statistics that it was validated with; and training does improve on the joint that it starts from."""
    line = f"--arch mCNN --dataset mnist --data-dir {place / 'data'} --zoo {place / 'zoo'} --stitch_epochs 6 --batch-size 16"
    args = script.parse(script.get_parser(), [*line.split(), "--nopermwarmup", "--stitch_lr", "0.1", "--noschedule"])
    data = script.load_data(args, torch.device("cpu"))
    networks = [zoo.load(place / "zoo" / f"{i}.pt", "mCNN") for i in (0, 1)]
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    (cell,) = script.cells_of(args, [(0, 1)], [p for p in script.joints_of(networks[0]) if p.index == 6])
    torch.manual_seed(0)
    stitched = script.stitch(*networks, 6, script.make_joint(args, cell.place.channels, 0))
    weights = {name: p.clone() for name, p in stitched.named_parameters()}
    found = script.train_cell(args, cell, stitched, data, Interruption())
    assert script.accuracy(stitched, data.selection, data.preprocessing) == found["best"]["val_accuracy"]
    losses = [row["train_loss"] for row in found["epochs"]]
    assert losses[-1] < losses[0]
    changed = [name for name, p in stitched.named_parameters() if not torch.equal(p, weights[name])]
    assert changed == [name for name, p in stitched.named_parameters() if p.requires_grad] and len(changed) == 1
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_a_sweep_goes_on_where_it_stood(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "--birkhoff --noschedule --pairs 0-1 --layers 3 6 10"
    assert run(line, place, tmp_path / "whole") == 0
    whole = json.loads((directory(tmp_path / "whole") / "result.json").read_text())

    run_cell, trained = script.run_cell, []

    def interrupted(args: object, cell: script.Cell, *more: object) -> None:
        if len(trained) == 1:
            signal.raise_signal(signal.SIGTERM)
        run_cell(args, cell, *more)  # type: ignore[arg-type]
        trained.append(cell.stem)

    monkeypatch.setattr(script, "run_cell", interrupted)
    assert run(line, place, tmp_path / "parts") == 75
    assert trained == ["0-1_layer_10_run_0"]
    assert run(line, place, tmp_path / "parts") == 2  # says how to go on
    trained.append("no more signals")
    assert run(f"{line} --resume", place, tmp_path / "parts") == 0
    assert trained[2:] == ["0-1_layer_6_run_0", "0-1_layer_3_run_0"]  # what was done is not done again
    parts = json.loads((directory(tmp_path / "parts") / "result.json").read_text())
    assert parts["cells"] == whole["cells"] and parts["layers"] == whole["layers"]
    assert parts["seconds"] > 0 and "seconds" not in parts["cells"][0]  # times are not what a run comes to
    log = (directory(tmp_path / "parts") / "log").read_text()
    assert "stopped by SIGTERM" in log and log.count("% of test images (parents") == 3


def test_a_finished_sweep_is_not_taken_for_another(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--nopermwarmup --pairs 0-1 --layers 3 --name mine --lowrank"
    assert run(f"{line} --rank 1", place, tmp_path) == 0
    assert run(f"{line} --rank 1 --resume", place, tmp_path) == 0
    capsys.readouterr()
    assert run(f"{line} --rank 2 --resume", place, tmp_path) == 2
    assert "was begun with rank 1, not 2: --name NAME starts another" in capsys.readouterr().err


def test_chunks_are_put_together(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of two chunks are those of the sweep that was not cut."""
    line = "--recipe crossval --stitch_repeats 2 --layers 14 --retrain_repeats 2"
    assert run(line, place, tmp_path / "whole") == 0
    for chunk in range(2):
        assert run(f"{line} --num_chunks 2 --chunk {chunk}", place, tmp_path / "parts") == 0
    tables = []
    for folder in ("whole", "parts"):
        runs = [str(path) for path in sorted((tmp_path / folder / "cifar10_stitching").iterdir())]
        assert exit_status(script.main, ["--compare", *runs, "--results-dir", str(tmp_path / folder)]) == 0
        tables.append((tmp_path / folder / "cifar10_stitching" / "figures-mCNN-mnist" / "penalties.csv").read_text())
    assert tables[0] == tables[1] and tables[0].count("\n") == 2
    assert exit_status(script.main, ["--compare", runs[0], runs[0], "--results-dir", str(tmp_path)]) == 2
    assert "have joined the same pair" in capsys.readouterr().err


def test_a_typed_joint_takes_the_place_of_the_recipes() -> None:
    args = script.parse(script.get_parser(), "--recipe Grelu --arch mCNN --lowrank --rank 2".split())
    assert args.lowrank and not args.birkhoff and args.alpha == 1e-3 and args.noschedule and args.bn_epoch


def test_rates_of_a_schedule_are_those_of_the_epochs(place: Path, tmp_path: Path) -> None:
    assert run("--nopermwarmup --pairs 0-1 --layers 3 --stitch_epochs 4", place, tmp_path) == 0
    with open(directory(tmp_path) / "metrics.csv") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == [0.001, 0.0005, 0.00025, 0.000125]


def test_a_loss_that_is_not_finite_is_no_result(place: Path, tmp_path: Path) -> None:
    assert run("--birkhoff --alpha 1e39 --nopermwarmup --pairs 0-1 --layers 3", place, tmp_path) == 1
    (part,) = (tmp_path / "cifar10_stitching").iterdir()
    assert part.name.endswith(".part") and not list((part / "cells").iterdir())


def test_comparing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("full", "permutation", "rank 1", "rank 2", "lasso 0.01"):
        assert run(f"{KINDS[kind]} --pairs 0-1 2-3 --layers 3 6", place, tmp_path) == 0
    runs = [str(path) for path in (tmp_path / "cifar10_stitching").iterdir()]
    capsys.readouterr()
    assert exit_status(script.main, ["--compare", *runs, "--results-dir", str(tmp_path)]) == 0
    folder = tmp_path / "cifar10_stitching" / "figures-mCNN-mnist"
    assert {p.name for p in folder.iterdir()} == {"penalties.csv", "penalties.png", "rank.png", "sparsity.png"}
    with open(folder / "penalties.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows[::2]] == ["full", "permutation", "lasso 0.01", "rank 1", "rank 2"]
    assert {row["layer"] for row in rows} == {"3", "6"} and all(row["n"] == "2" for row in rows)
    assert exit_status(script.main, ["--compare", str(tmp_path / "nothing"), "--results-dir", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


BAD = {
    "--arch mCNN --birkhoff --lasso": "--birkhoff and --lasso are two kinds of joint",
    "--arch mCNN --lowrank": "--lowrank and --rank R belong together",
    "--arch mCNN --rank 2": "--lowrank and --rank R belong together",
    "": "--arch is missing",
    "--arch vgg": "invalid choice: 'vgg'",
    "--arch mCNN --num_chunks 2 --chunk 2": "--chunk 2 is beyond the last",
    "--arch mCNN --alternating": "--alternating is for --birkhoff",
    "--arch mCNN --alpha crossval": "--alpha crossval is for --birkhoff",
    "--arch mCNN --birkhoff --alpha much": "'much' is not a number",
    "--arch mCNN --alpha 0.1": "--alpha 0.1 is for --birkhoff",
    "--arch mCNN --multiplier 7": "--multiplier 7.0 is for --lasso",
    "--arch mCNN --birkhoff --threshold 0.5": "--threshold 0.5 is for --lasso",
    "--arch mCNN --birkhoff --bn-batches 3": "--bn-batches 3 is for --bn_epoch",
    "--arch mCNN --zoo ZOO --pairs 0-1 --num_chunks 4 --chunk 0": "chunk 0 of 4 has none of the 1 pairs",
    "--arch mCNN --stitch_epochs 1": "cannot be halved",
    "--arch mCNN --zoo ZOO --pairs 0-1 --layers 4": "--layers 4: mCNN has joints at 3 6 10 14",
    "--arch mCNN --zoo ZOO --pairs 0-1 --lowrank --rank 3": "--rank 3 is above the 2 channels of layer 3",
    "--arch mCNN --zoo ZOO --pairs 0-9": "the zoo has no 9.pt",
    "--arch mCNN --zoo ZOO --pairs 1-1": "no pair of two networks",
    "--arch mCNN --zoo ZOO --retrain_repeats 13": "4 networks make 12 pairs, not 13",
    "--arch resnet20 --zoo ZOO --pairs 0-1": "0.pt is no resnet20: it lacks",
    "--arch mCNN --zoo nowhere": "nowhere holds 0 networks",
    "--arch mCNN --resume --overwrite": "choose one",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.replace("ZOO", str(place / "zoo")).split()
    more = ["--dataset", "mnist", "--data-dir", str(place / "data"), "--results-dir", str(tmp_path)]
    assert exit_status(script.main, [*words, *more]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("cifar10_stitching.py: error: ") and BAD[line] in error
    assert not list(tmp_path.iterdir())
