"""cifar10_stitching.py as its users run it: recipes, bad input, what a sweep leaves, resuming, comparing; on small networks."""

import csv
import doctest
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cifar10_stitching as script
from common.errors import InputError
from common.models import zoo
from common.run import clock
from common.run.run import Run
from common.symmetry.stitching import StitchedModel, stitch_points
from common.zoo import pairs as zoo_pairs
from common.zoo import sweeps, training
from common.zoo.pairs import draw_pairs, pairs_of
from common.zoo.training import splits_of
from tests.command_lines import exit_status
from tests.small_images import smooth, write_mnist

pytestmark = pytest.mark.slow

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
    """A zoo of four mCNNs of width 2, untrained, another of two CCTs, and 100 training and 30 test images."""
    folder = tmp_path_factory.mktemp("stitching")
    for name, arch, n in (("zoo", "mCNN", 4), ("transformers", "cct_2_3x2_32", 2)):
        (folder / name).mkdir()
        for i in range(n):
            torch.manual_seed(i)
            torch.save(zoo.make(arch, width=2 if arch == "mCNN" else None).state_dict(), folder / name / f"{i}.pt")
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
    assert out.count("  epoch   2  step     10 ") == len(order)  # a line an epoch
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
    pairs = draw_pairs(list(range(8)), 4, seed=0)
    assert sorted(number for pair in pairs for number in pair) == list(range(8))
    assert pairs == draw_pairs(list(range(8)), 4, seed=0) != draw_pairs(list(range(8)), 4, seed=1)
    more = draw_pairs([0, 1, 2], 6, seed=0)
    assert len(set(more)) == 6
    with pytest.raises(InputError, match="3 networks make 6 pairs, not 7"):
        draw_pairs([0, 1, 2], 7, seed=0)
    assert doctest.testmod(zoo_pairs) == (0, 1) and doctest.testmod(sweeps) == (0, 1)


def test_chunks_share_the_pairs(place: Path) -> None:
    def pairs(line: str) -> list[tuple[int, int]]:
        line = f"--arch mCNN --zoo {place / 'zoo'} --retrain_repeats 5 {line}"
        args = script.parse(script.get_parser(), line.split())
        return pairs_of(args, 5)[script.chunk_of(args, 5)]

    parts = [pairs(f"--num_chunks 3 --chunk {chunk}") for chunk in range(3)]
    assert [pair for part in parts for pair in part] == pairs("") and all(parts)


def test_validation_images_are_not_trained_on(place: Path) -> None:
    for alpha, n in (("0.1", 10), ("crossval", 20)):
        line = f"--arch mCNN --dataset mnist --data-dir {place / 'data'} --birkhoff --alpha {alpha}"
        args = script.parse(script.get_parser(), line.split())
        data = splits_of(args, torch.device("cpu"), script.validation_share(args))
        images = [set(map(bytes, split.images.flatten(1).numpy())) for split in (data.training, data.selection)]
        assert len(images[1]) == n and len(images[0]) == 100 - n and not images[0] & images[1]


def test_the_stitching_layer_alone_learns_and_the_best_epoch_is_kept(place: Path, tmp_path: Path) -> None:
    """With the statistics that it was validated with; and training does improve on the layer that it starts from."""
    line = f"--arch mCNN --dataset mnist --data-dir {place / 'data'} --zoo {place / 'zoo'} --stitch_epochs 6 --batch-size 16"
    args = script.parse(script.get_parser(), [*line.split(), "--nopermwarmup", "--stitch_lr", "0.1", "--noschedule"])
    data = splits_of(args, torch.device("cpu"))
    networks = [zoo.load(place / "zoo" / f"{i}.pt", "mCNN") for i in (0, 1)]
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    (job,) = script.make_jobs(args, tmp_path, [(0, 1)], [p for p in stitch_points(networks[0]) if p.index == 6])
    torch.manual_seed(0)
    stitched = script.stitch(*networks, 6, script.make_layer(args, job.point.channels, 0))
    weights = {name: p.clone() for name, p in stitched.named_parameters()}
    found = script.train(args, job, stitched, data, Run("cifar10_stitching", "alone", args, another="--name NAME"))
    assert script.accuracy(stitched, data.selection, data.preprocessing) == found["best"]["val_accuracy"]
    losses = [row["train_loss"] for row in found["epochs"]]
    assert losses[-1] < losses[0]
    changed = [name for name, p in stitched.named_parameters() if not torch.equal(p, weights[name])]
    assert changed == [name for name, p in stitched.named_parameters() if p.requires_grad] and len(changed) == 1
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", ["wreath", "lasso"])
def test_the_second_half_begins_with_the_best_of_the_first(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With new optimisers, at a sixteenth of the rate, with scales; what was best without scales does not count any more."""
    step, steps = script.training_step, []
    accuracies = iter([0.5, 0.375, 0.25, 0.125, 0.0])  # of four epochs, and of the test images

    def noted(
        model: StitchedModel, x: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer, **more: Any
    ) -> Any:
        weights = {name: value.clone() for name, value in model.stitching_layer.state_dict().items()}
        steps.append(
            (weights, len(optimizer.state), optimizer.param_groups[0]["lr"], getattr(model.stitching_layer, "scalars", None))
        )
        return step(model, x, labels, optimizer, **more)

    def agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    monkeypatch.setattr(script, "training_step", noted)
    monkeypatch.setattr(script, "evaluate", lambda *_, **__: {"accuracy": next(accuracies)})
    assert run(f"--{kind} --stitch_epochs 4 --stitch_lr 0.1 --pairs 0-1 --layers 3", place, tmp_path) == 0
    weights, with_moments, rates, scalars = zip(*steps, strict=True)
    assert agree(weights[10], weights[5]) and not agree(weights[10], weights[9])  # five steps an epoch
    assert with_moments[0] == with_moments[10] == 0
    assert rates[::5] == (0.1, 0.05, 0.1 / 16, 0.05 / 16)
    best = json.loads((directory(tmp_path) / "result.json").read_text())["cells"][0]["best"]
    state = torch.load(directory(tmp_path) / "cells" / "0-1_layer_3_run_0.pt", weights_only=True)
    if kind == "wreath":
        assert scalars == (False,) * 10 + (True,) * 10 and with_moments[11] == 2
        assert best == {"val_accuracy": 25, "half": 1, "epoch": 0} and agree(weights[15], state)
    else:
        assert best == {"val_accuracy": 50, "half": 0, "epoch": 0} and agree(weights[5], state)


def test_a_sweep_resumes_where_it_stood(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "--birkhoff --noschedule --pairs 0-1 --layers 3 6 10"
    assert run(line, place, tmp_path / "whole") == 0
    whole = json.loads((directory(tmp_path / "whole") / "result.json").read_text())

    run_job, trained = script.run_job, []

    def interrupted(args: object, job: script.StitchJob, *more: object) -> dict[str, Any]:
        if len(trained) == 1:
            signal.raise_signal(signal.SIGTERM)
        record = run_job(args, job, *more)  # type: ignore[arg-type]
        trained.append(job.name)
        return record

    monkeypatch.setattr(script, "run_job", interrupted)
    assert run(line, place, tmp_path / "parts") == 75
    assert trained == ["0-1_layer_10_run_0"]
    assert run(line, place, tmp_path / "parts") == 2  # says how to resume
    trained.append("no more signals")
    assert run(f"{line} --resume", place, tmp_path / "parts") == 0
    assert trained[2:] == ["0-1_layer_6_run_0", "0-1_layer_3_run_0"]  # what was done is not done again
    parts = json.loads((directory(tmp_path / "parts") / "result.json").read_text())
    assert parts["cells"] == whole["cells"] and parts["layers"] == whole["layers"]
    assert parts["seconds"] > 0 and "seconds" not in parts["cells"][0]  # times are not what a run comes to
    log = (directory(tmp_path / "parts") / "log").read_text()
    assert "stopped by SIGTERM" in log and log.count("% of test images (parents") == 3


def test_damaged_records_are_refused_before_anything_is_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--lasso --nopermwarmup --pairs 0-1 --layers 3 14"
    with monkeypatch.context() as patch:
        patch.setattr(script, "describe", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert run(line, place, tmp_path) == 75
    (path,) = directory(tmp_path).glob("cells/*.json")
    record, before = json.loads(path.read_text()), {file.name for file in path.parent.iterdir()}
    lacking = [{name: value for name, value in record.items() if name != without} for without in ("accuracy", "pair")]
    others: list[dict[str, Any]] = [{"pair": [0, 2]}, {"penalty": None}, {"epochs": [1]}, {"sparsity": "x"}, {"parents": [1.0]}]
    for damaged in [{}, *lacking, *(record | other for other in others)]:
        path.write_text(json.dumps(damaged))
        capsys.readouterr()
        assert run(f"{line} --resume", place, tmp_path) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "0-1_layer_14_run_0.json is damaged: " in error and "this job begins again" in error
        assert {file.name for file in path.parent.iterdir()} == before
    path.write_text(json.dumps(record))
    weights = path.with_suffix(".pt").read_bytes()
    torch.save({}, path.with_suffix(".pt"))
    assert run(f"{line} --resume", place, tmp_path) == 2 and "it has no tensor 'matrix'" in capsys.readouterr().err
    path.with_suffix(".pt").write_bytes(weights)
    assert run(f"{line} --resume", place, tmp_path) == 0


def test_all_long_loops_have_bars(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--nopermwarmup --bn_epoch --bn_batches 2 --pairs 0-1 --layers 3 --progress"
    assert run(line, place, tmp_path) == 0
    error = capsys.readouterr().err
    for title in ("networks: ", "jobs: ", "epoch 1: ", "epoch 2: ", "batch statistics: "):
        assert title in error


def outcome(results: Path) -> dict[str, Any]:
    """Everything that a sweep has measured and learned."""
    path = directory(results)
    result = json.loads((path / "result.json").read_text())
    layers = {file.name: torch.load(file, weights_only=True) for file in path.glob("cells/*.pt")}
    weights = {f"{name} {key}": value.tolist() for name, layer in layers.items() for key, value in layer.items()}
    files = {file.name for file in path.glob("cells/*")}
    del result["seconds"]
    return {"result": result, "weights": weights, "files": files, "metrics": (path / "metrics.csv").read_text()}


def signalling(work: Callable[..., Any], every: int) -> Callable[..., Any]:
    """The same work; a signal comes during each `every`-th call."""
    calls = itertools.count(1)

    def signalled(*arguments: Any, **named: Any) -> Any:
        if next(calls) % every == 0:
            signal.raise_signal(signal.SIGTERM)
        return work(*arguments, **named)

    return signalled


RESUMED = {  # 90 training images, so 5 steps an epoch
    "two halves, alternating": "--birkhoff --alternating --pgd_hook --bn_epoch --bn_batches 2 --stitch_epochs 4 --layers 6",
    "two halves, Adam": "--wreath --stitch_epochs 4 --layers 6",
    "two halves of any matrix": "--lasso --stitch_epochs 4 --stitch_lr 0.1 --layers 6",
    "dropout": "--nopermwarmup --bn_epoch --bn_batches 2 --arch cct_2_3x2_32 --zoo ZOO --layers 9",
}


@pytest.mark.parametrize("when", ["every step", "every sixth batch"])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_stitching_resumes_after_any_step(
    kind: str, when: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a validation, a re-estimation of statistics, and the evaluation on test images: all of them have batches."""
    line = RESUMED[kind].replace("ZOO", str(place / "transformers")) + " --pairs 0-1"
    assert run(line, place, tmp_path / "whole") == 0
    if when == "every step":
        monkeypatch.setattr(script, "training_step", signalling(script.training_step, 1))
    else:
        monkeypatch.setattr(StitchedModel, "forward", signalling(StitchedModel.forward, 6))
        monkeypatch.setattr(training, "EVALUATED_AT_ONCE", 8)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=itertools.count().__next__))  # a second from look to look
    statuses = [run(line, place, tmp_path / "parts")]
    while statuses[-1] == 75 and len(statuses) < 50:
        statuses.append(run(f"{line} --resume", place, tmp_path / "parts"))
    steps = 5 * (4 if "halves" in kind else 2)
    assert statuses == [75] * (steps if when == "every step" else len(statuses) - 1) + [0] and len(statuses) > 3
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    (record,) = directory(tmp_path / "parts").glob("cells/*.json")
    assert json.loads(record.read_text())["seconds"] == len(statuses) + steps // 5  # a look a start, and one an epoch


def test_signals_are_seen_between_networks(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first layer is trained; and nothing is lost."""
    accuracy, measured = script.accuracy, []

    def signalled(*arguments: Any) -> float:
        if not measured:
            signal.raise_signal(signal.SIGUSR1)
        measured.append(arguments)
        return accuracy(*arguments)

    monkeypatch.setattr(script, "accuracy", signalled)
    line = "--nopermwarmup --pairs 0-1 --layers 3"
    assert run(line, place, tmp_path) == 75 and len(measured) == 1
    assert "stopped by SIGUSR1 before the first stitching layer: --resume auto continues from there" in capsys.readouterr().out
    assert run(f"{line} --resume", place, tmp_path) == 0


def test_a_finished_sweep_is_not_taken_for_another(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--nopermwarmup --pairs 0-1 --layers 3 --name mine --lowrank"
    assert run(f"{line} --rank 1", place, tmp_path) == 0
    assert run(f"{line} --rank 1 --resume", place, tmp_path) == 0
    capsys.readouterr()
    assert run(f"{line} --rank 2 --resume", place, tmp_path) == 2
    assert "was made with rank 1, not 2" in (error := capsys.readouterr().err) and "--name NAME starts another" in error


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
    assert "have stitched the same pair" in capsys.readouterr().err


def test_a_typed_kind_takes_the_place_of_the_recipes() -> None:
    args = script.parse(script.get_parser(), "--recipe Grelu --arch mCNN --lowrank --rank 2".split())
    assert args.lowrank and not args.birkhoff and args.alpha == 1e-3 and args.noschedule and args.bn_epoch


def test_rates_of_a_schedule_are_those_of_the_epochs(place: Path, tmp_path: Path) -> None:
    assert run("--nopermwarmup --pairs 0-1 --layers 3 --stitch_epochs 4", place, tmp_path) == 0
    with open(directory(tmp_path) / "metrics.csv") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == [0.001, 0.0005, 0.00025, 0.000125]


def test_a_loss_that_is_not_finite_is_no_result(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stitchings fail: there is a result, without tables and pictures, and nothing that could be compared."""
    assert run("--birkhoff --alpha 1e39 --nopermwarmup --pairs 0-1 --layers 3 6", place, tmp_path) == 1
    path = directory(tmp_path)
    result = json.loads((path / "result.json").read_text())
    names = {"0-1_layer_6_run_0", "0-1_layer_3_run_0"}
    reason = "the loss of epoch 1 is not finite: a smaller --stitch_lr may help"
    assert result["failed"] == dict.fromkeys(names, reason) and result["layers"] == result["cells"] == []
    assert {file.name for file in path.iterdir()} == {"args.json", "cells", "last.pkl", "log", "result.json"}
    assert {file.name for file in path.glob("cells/*")} == {f"{name}.failed.json" for name in names}
    assert f"0-1_layer_3_run_0 failed: {reason}" in (out := capsys.readouterr().out) and "2 jobs failed, --retry-failed" in out
    assert exit_status(script.main, ["--compare", str(path), "--results-dir", str(tmp_path)]) == 2
    assert "all stitching layers of these runs failed" in capsys.readouterr().err


def test_stitchings_that_failed_are_left_out_and_repeated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--birkhoff --noschedule --pairs 0-1 2-3 --layers 3 6"
    assert run(line, place, tmp_path / "whole") == 0
    whole = outcome(tmp_path / "whole")
    step = script.training_step
    with monkeypatch.context() as broken:
        broken.setattr(script, "training_step", lambda model, *a, **b: step(model, *a, **b) / (model.point.index != 6))
        assert run(line, place, tmp_path / "parts") == 1
    parts = outcome(tmp_path / "parts")
    assert set(parts["result"]["failed"]) == {"0-1_layer_6_run_0", "2-3_layer_6_run_0"}
    assert [of["layer"] for of in parts["result"]["layers"]] == [3] and len(parts["result"]["cells"]) == 2
    assert all(whole["weights"][name] == value for name, value in parts["weights"].items()) and len(parts["files"]) == 6
    assert (directory(tmp_path / "parts") / "matrices.png").exists()
    capsys.readouterr()
    assert run(f"{line} --resume", place, tmp_path / "parts") == 1
    assert "2 jobs failed: --retry-failed repeats them" in capsys.readouterr().out
    assert run(f"{line} --retry-failed", place, tmp_path / "parts") == 0
    assert outcome(tmp_path / "parts") == whole
    assert run(f"{line} --retry-failed", place, tmp_path / "parts") == 0 and "nothing to do" in capsys.readouterr().out


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
    "--arch mCNN --birkhoff --lasso": "--birkhoff and --lasso are two kinds of stitching layer",
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
    "--arch mCNN --zoo ZOO --pairs 0-1 --layers 4": "--layers 4: mCNN has 3 6 10 14",
    "--arch mCNN --zoo ZOO --pairs 0-1 --lowrank --rank 3": "--rank 3 is above the 2 channels of layer 3",
    "--arch mCNN --zoo ZOO --pairs 0-9": "the zoo has no 9.pt",
    "--arch mCNN --zoo ZOO --pairs 1-1": "no pair of two networks",
    "--arch mCNN --zoo ZOO --retrain_repeats 13": "4 networks make 12 pairs, not 13",
    "--arch resnet20 --zoo ZOO --pairs 0-1": "0.pt is no resnet20: it lacks",
    "--arch mCNN --zoo nowhere": "nowhere holds 0 networks",
    "--arch mCNN --resume --overwrite": "choose one",
    "--arch mCNN --retry-failed --overwrite": "choose one",
}


DRY = {  # what is known without networks and images
    "--arch mCNN --pairs a/b": "--pairs 'a/b' is no pair of two networks: write it like 0-1",
    "--arch mCNN --pairs 0-1 2-2": "--pairs '2-2' is no pair of two networks",
    "--arch mCNN --pairs 0-1 1-0 0-1": "names a pair twice",
    "--arch mCNN --layers 3 4": "--layers 4: mCNN has 3 6 10 14",
    "--arch resnet20 --lowrank --rank 17": "--rank 17 is above the 16 channels of layer 3",
    "--arch resnet20 --lowrank --rank 33 --layers 56 40": "--rank 33 is above the 32 channels of layer 40",
    "--arch mCNN --pairs 0-1 --num_chunks 4 --chunk 0": "chunk 0 of 4 has none of the 1 pairs",
    "--arch mCNN --subset 60 --batch-size 55": "--batch-size 55 is more than the 54 training images",
    "--arch mCNN --subset 60 --batch-size 49 --recipe crossval": "--batch-size 49 is more than the 48 training images",
}


@pytest.mark.parametrize("line", DRY)
def test_a_dry_run_refuses_what_the_run_would(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(script.main, [*line.split(), "--dry-run", "--results-dir", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("cifar10_stitching.py: error: ") and DRY[line] in error
    again = line.replace("33", "32").replace("17", "16").replace("55", "54").replace("49", "48")
    if again != line:  # the largest that fits
        assert exit_status(script.main, [*again.split(), "--dry-run", "--results-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.replace("ZOO", str(place / "zoo")).split()
    more = ["--dataset", "mnist", "--data-dir", str(place / "data"), "--results-dir", str(tmp_path)]
    assert exit_status(script.main, [*words, *more]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("cifar10_stitching.py: error: ") and BAD[line] in error
    assert not list(tmp_path.iterdir())
