"""train_zoo.py as its users run it: the published command and training run, bad input, its files, stops, failures, locks."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_zoo as script
from common.datasets.classification import load_splits
from common.models import zoo
from common.run import state
from common.run.lock import release_lock, take_lock
from common.run.schedule import halving
from common.zoo import training
from tests.command_lines import assert_help_shows_the_papers_options_first, assert_one_line_and_nothing_made, exit_status
from tests.interruptions.cases import assert_equal, outcome
from tests.reference import Vectors, assert_agrees
from tests.small_images import smooth, write_mnist
from tests.test_images import write_cifar

pytestmark = pytest.mark.slow

SHORT = "--arch mCNN --width 2 --dataset mnist --epochs 2 --batch-size 16 --device cpu"


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100 training and 20 test images, as the option that names their place."""
    folder = tmp_path_factory.mktemp("grey")
    write_mnist(folder, smooth(100), smooth(20, seed=1))
    return f"--data-dir {folder}"


def run(line: str) -> int:
    return exit_status(script.main, line.split())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the published recipe ------------------------------------------------------------------------------------------------


def test_training_run_of_the_original() -> None:
    """Four epochs of the zoo's recipe in the original: losses, weights and statistics after each of them."""
    v = Vectors("modelsym/train")
    model = zoo.make("mCNN", width=4)
    model.load_state_dict(v.under("model1/param/"))
    optimizer = script.make_optimizer(model, "published", 0.01)
    accuracies = []
    for epoch in range(4):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * halving(epoch, 4)
        for batch in range(3):
            metrics = training.training_step(model, optimizer, v[f"train/x/{batch}"], v[f"train/y/{batch}"], "fp32")
            if batch == 0:
                assert_agrees(metrics["loss"], v["zoo/metrics/train_loss"][epoch], 1e-3, f"loss of epoch {epoch}")
        expected = v.under(f"zoo/epoch{epoch + 1}/")
        assert len(expected) == 8
        for name, value in expected.items():
            assert_agrees(model.state_dict()[name], value, 1e-3, f"{name} of epoch {epoch}")
        model.eval()
        with torch.no_grad():
            right = [(model(v[f"val/x/{i}"]).argmax(1) == v[f"val/y/{i}"]).float().mean() for i in range(2)]
        accuracies.append(100 * torch.stack(right).mean())
    assert_agrees(torch.stack(accuracies), v["zoo/metrics/val_acc"], 1e-4, "accuracies")


def test_the_published_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--num_models=100 --arch=mCNN --num_chunks=4 --chunk=1"
    assert run(f"{line} --dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("results/zoo/cifar10-mCNN: models 25, 26,") and out.endswith(" 49\n")
    args = script.parse(script.get_parser(), line.split())
    expected = {"epochs": 50, "batch_size": 32, "lr": 0.001, "width": 64, "select": "validation", "precision": "fp32"}
    assert {name: getattr(args, name) for name in expected} == expected
    assert training.learning_rate("published", 0.001, 1562 * 12 - 1, 1562, 50) == 0.001
    assert training.learning_rate("published", 0.001, 1562 * 12, 1562, 50) == 0.0005
    assert_help_shows_the_papers_options_first(script.main, "--chunk", capsys)


def test_a_dry_run_refuses_a_batch_of_more_than_the_subset(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ("", "--select test "):
        n = 20 if more else 18  # a tenth validates
        line = f"--arch mCNN --subset 20 {more}--dry-run --batch-size"
        assert run(f"{line} {n}") == 0 and run(f"{line} {n + 1}") == 2
        assert f"--batch-size {n + 1} is more than the {n} training images" in capsys.readouterr().err


def test_names_of_zoos(capsys: pytest.CaptureFixture[str]) -> None:
    for line, name in {
        "--arch resnet20 --epochs 50 --lr 0.001": "cifar10-resnet20",
        "--arch cwCNN --width 512": "cifar10-cwCNN",
        "--arch mCNN --width 8 --seed 2 --dataset mnist": "mnist-mCNN-seed.2-width.8",
        "--arch mCNN --recipe fast --epochs 12 --batch-size 64": "cifar10-mCNN-recipe.fast-batch-size.64",
    }.items():
        assert run(f"{line} --dry-run") == 0
        assert capsys.readouterr().out == f"results/zoo/{name}: models 0\n"


@pytest.mark.parametrize("n, chunks", [(100, 4), (10, 3), (2, 5)])
def test_chunks_share_a_zoo(n: int, chunks: int) -> None:
    lines = [f"--arch mCNN --num_models {n} --num_chunks {chunks} --chunk {chunk}" for chunk in range(chunks)]
    parts = [list(script.models_of_chunk(script.parse(script.get_parser(), line.split()))) for line in lines]
    assert [index for part in parts for index in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


BAD = {
    "": "--arch is missing: choose from mCNN, ",
    "--arch lenet": "invalid choice: 'lenet'",
    "--arch resnet20 --width 8": "--width: resnet20 has no width to choose",
    "--arch mCNN --width 0": "too small",
    "--arch mCNN --num_chunks 4 --chunk 4": "--chunk 4 is beyond --num_chunks 4",
    "--arch mCNN --chunk 0": "--num_chunks and --chunk go together",
    "--arch mCNN --lr 0": "out of range",
    "--arch mCNN --resume --overwrite": "choose one",
    "--arch mCNN --retry-failed --overwrite": "choose one",
    "--arch mCNN --epoch 3": "unrecognized arguments",
    "--arch mCNN --dataset mnist --batch-size 91": "--batch-size 91 is more than the 90 training images",
    "--arch mCNN --dataset mnist --subset 20 --batch-size 20": "--batch-size 20 is more than the 18 training images",
}


@pytest.mark.parametrize("out", ["..", "a/..", "x.part", "a\nb", "\x1b[31m", "\udcff", "a\tb/c", 130 * "ä"])
def test_what_is_no_directory_of_a_zoo(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(script.main, ["--arch", "mCNN", "--dry-run", "--out", out]) == 2
    printed = capsys.readouterr()
    assert "cannot be a zoo's directory" in printed.err and printed.err[:-1].isprintable() and not printed.out


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo"
    assert_one_line_and_nothing_made(run(f"{line} {grey} --out {out}"), BAD[line], out, capsys)


# ---- what a zoo leaves ---------------------------------------------------------------------------------------------------


def test_what_a_zoo_leaves(grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{SHORT} {grey} --out {tmp_path / 'zoo'}"
    assert run(f"{line} --num_models 2") == 0
    out = capsys.readouterr().out
    for text in ("2 models, 0 of them finished; 90 training, 10 validation images", "(chance 0.1)", "model   1  finished"):
        assert text in out
    names = {f"{i}.{kind}" for i in range(2) for kind in ("pt", "json", "csv")}
    assert {path.name for path in (tmp_path / "zoo").iterdir()} == names
    with open(tmp_path / "zoo" / "0.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10"] and [float(row["lr"]) for row in rows] == [0.001, 0.0005]
    record = json.loads((tmp_path / "zoo" / "0.json").read_text())
    accuracies = [float(row["validation_accuracy"]) for row in rows]
    assert record["validation"]["accuracy"] == pytest.approx(max(accuracies))
    assert record["best_epoch"] == 1 + accuracies.index(max(accuracies))
    model = zoo.load(tmp_path / "zoo" / "0.pt", "mCNN")
    data = load_splits("MNIST", grey.removeprefix("--data-dir "), torch.device("cpu"), seed=0)
    measured = training.evaluate(model, data.test, data.preprocessing)
    assert measured == pytest.approx(record["test"])
    # a second start trains what is missing, and nothing else
    before = (tmp_path / "zoo" / "0.pt").stat().st_mtime_ns
    assert run(f"{line} --num_models 2") == 0 and "nothing to do" in capsys.readouterr().out
    assert run(f"{line} --num_models 3") == 0
    assert (tmp_path / "zoo" / "2.pt").exists() and (tmp_path / "zoo" / "0.pt").stat().st_mtime_ns == before
    # models differ; each is the same however the zoo is shared among jobs
    first, second = (weights(tmp_path / "zoo" / f"{i}.pt")["0.weight"] for i in range(2))
    assert not torch.equal(first, second)
    assert run(f"{SHORT} {grey} --out {tmp_path / 'chunk'} --num_models 2 --num_chunks 2 --chunk 1") == 0
    assert {path.name for path in (tmp_path / "chunk").iterdir()} == {"1.pt", "1.json", "1.csv"}
    assert_same_weights(tmp_path / "zoo" / "1.pt", tmp_path / "chunk" / "1.pt")
    # other options, on top of it
    capsys.readouterr()
    assert run(f"{line} --epochs 3") == 2
    assert "0.pt was made with epochs 2, not 3: --overwrite replaces it" in capsys.readouterr().err
    assert run(f"{line} --epochs 3 --overwrite") == 0
    assert json.loads((tmp_path / "zoo" / "0.json").read_text())["epochs"] == 3


def test_each_model_has_trackers_of_its_own(
    grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next to its files; they are continued with it, replaced with it, and foreign without it."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "zoo"
    line = f"{SHORT} {grey} --out {out} --num_models 2 --tensorboard --wandb-project zoo"

    def events(index: int) -> list[tuple[int, float]]:
        board = accumulators.EventAccumulator(str(out / f"{index}.trackers" / "tensorboard"))
        board.Reload()
        return [(event.step, event.value) for event in board.Scalars("train_loss")]

    with monkeypatch.context() as patch:  # the second model, in its second epoch
        break_weights(patch, at=18, look=lambda: signal.raise_signal(signal.SIGTERM))
        assert run(line) == 75
    assert len(events(0)) == 2 and len(events(1)) == 1
    run_ids = [(out / f"{i}.trackers" / "wandb-id").read_text() for i in range(2)]
    assert run_ids[0] != run_ids[1]
    assert run(f"{line} --resume") == 0
    for i in range(2):
        with open(out / f"{i}.csv") as file:
            losses = [(int(row["epoch"]), float(row["train_loss"])) for row in csv.DictReader(file)]
        assert events(i) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses]
        assert len(list((out / f"{i}.trackers").glob("wandb/offline-run-*"))) == 1 + i
    assert run_ids == [(out / f"{i}.trackers" / "wandb-id").read_text() for i in range(2)]
    (out / "0.trackers" / "own").touch()
    assert run(f"{SHORT} {grey} --out {out} --num_models 2 --overwrite") == 0
    assert files(out).keys() == {f"{i}.{kind}" for i in range(2) for kind in ("pt", "json", "csv")}
    (out / "2.trackers").mkdir()
    capsys.readouterr()
    assert run(f"{SHORT} {grey} --out {out} --num_models 3") == 2
    assert "2.trackers is there without its model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", ["--select test", "--recipe fast --epochs 3 --precision bf16", "--arch mCNN_k_sigmoid --progress"]
)
def test_variants(more: str, grey: str, tmp_path: Path) -> None:
    assert run(f"{SHORT} {more} {grey} --out {tmp_path / 'zoo'}") == 0
    record = json.loads((tmp_path / "zoo" / "0.json").read_text())
    with open(tmp_path / "zoo" / "0.csv") as file:
        rows = list(csv.DictReader(file))
    if "test" in more:
        assert record["images"] == {"training": 100, "selection": 20, "test": 20} and record["validation"] is None
        assert record["test"]["accuracy"] == pytest.approx(max(float(row["test_accuracy"]) for row in rows))
    if "fast" in more:
        rates = [float(row["lr"]) for row in rows]
        assert 0.003 > rates[0] > rates[1] > rates[2] > 0


def test_colour_and_other_architectures(tmp_path: Path) -> None:
    write_cifar(tmp_path, "CIFAR100")
    line = f"--dataset cifar100 --data-dir {tmp_path} --device cpu --epochs 1 --batch-size 4 --num_models 1"
    for arch in ("resnet20", "cct_2_3x2_32"):
        assert run(f"{line} --arch {arch} --out {tmp_path / arch}") == 0
        assert zoo.load(tmp_path / arch / "0.pt", arch)(torch.zeros(1, 3, 32, 32)).shape == (1, 100)


def test_of_equal_epochs_the_first_is_chosen(grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "evaluate", lambda *_: {"loss": 1.0, "accuracy": 0.0})
    assert run(f"{SHORT} {grey} --out {tmp_path / 'zoo'}") == 0
    assert json.loads((tmp_path / "zoo" / "0.json").read_text())["best_epoch"] == 1


def test_the_recipe_learns(grey: str, tmp_path: Path) -> None:
    """Classes that differ in brightness: chance is 0.1."""
    assert run(f"{SHORT} --width 4 --epochs 30 --recipe fast {grey} --out {tmp_path / 'zoo'}") == 0
    assert json.loads((tmp_path / "zoo" / "0.json").read_text())["training"]["accuracy"] > 0.3


def test_models_of_the_original_are_left_alone(grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo"
    out.mkdir()
    torch.save(zoo.make("mCNN", width=2).state_dict(), out / "0.pt")
    assert run(f"{SHORT} {grey} --out {out} --num_models 2") == 0
    assert {path.name for path in out.iterdir()} == {"0.pt", "1.pt", "1.json", "1.csv"}
    for other, message in {
        "--width 3": "0.pt is of another model: 0.weight is (2, 3, 3, 3) there, not (3, 3, 3, 3)",
        "--arch mCNN_k": "0.pt is no mCNN_k: it lacks 0.bias",
    }.items():
        capsys.readouterr()
        assert run(f"{SHORT} {other} {grey} --out {out}") == 2
        assert message in capsys.readouterr().err


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


# ---- models that fail ----------------------------------------------------------------------------------------------------


def break_weights(monkeypatch: pytest.MonkeyPatch, at: int, look: Callable[[], None] = lambda: None) -> None:
    """A weight becomes NaN in step `at` of all, from 0. `look` is called before the next one."""
    step, steps = training.training_step, iter(range(1000))

    def breaking(model: torch.nn.Module, *rest: object) -> dict[str, torch.Tensor]:
        number = next(steps)
        if number == at + 1:
            look()
        metrics = step(model, *rest)  # type: ignore[arg-type]
        if number == at:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return metrics

    monkeypatch.setattr(training, "training_step", breaking)


def test_a_model_that_fails_leaves_the_others_alone(
    grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "zoo"
    line, whole = f"{SHORT} --num_models 3 {grey} --out {out}", f"{SHORT} --num_models 3 {grey} --out {tmp_path / 'whole'}"
    assert run(whole) == 0
    lasts = []
    with monkeypatch.context() as patch:
        patch.setattr(state, "SAVE_SECONDS", 0.0)
        # of 10 steps a model, in the second epoch of the second
        break_weights(patch, at=16, look=lambda: lasts.append(torch.load(out / "1.last.pkl", weights_only=True)))
        capsys.readouterr()
        assert run(line) == 1
    (last,) = lasts  # what is not finite never reaches a file
    assert last["progress"] == (1, 1, 6) and all(value.isfinite().all() for value in last["model"].values())
    said, reason = capsys.readouterr().out, "the loss of epoch 2 is not finite: a smaller --lr may help"
    assert f"1 failed: {reason}\n" in said
    assert said.endswith("\n1 of 3 models failed (1): --retry-failed repeats them\n")
    left = files(out)
    assert left.keys() == {f"{i}.{kind}" for i in (0, 2) for kind in ("pt", "json", "csv")} | {"1.failed.json", "1.csv"}
    noted = json.loads(left["1.failed.json"])
    assert (noted["job"], noted["reason"], noted["options"]["lr"]) == ("1", reason, 0.001)
    # nothing changes without --retry-failed
    for more in ("", "--resume"):
        assert run(f"{line} {more}") == 1 and files(out) == left
        said = capsys.readouterr().out
        assert (
            "1 failed: the loss of epoch 2" in said
            and said.endswith("--retry-failed repeats them\n")
            and "epoch   1" not in said
        )
    assert run(f"{line} --retry-failed") == 0
    assert "model   1  finished" in capsys.readouterr().out
    assert_equal(outcome(out), outcome(tmp_path / "whole"))
    assert run(f"{line} --retry-failed") == 0 and "nothing to do" in capsys.readouterr().out


def test_weights_that_fail_in_the_last_step_of_all(grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training loss is finite, the validation's is not."""
    break_weights(monkeypatch, at=4)
    assert run(f"{SHORT} --epochs 1 {grey} --out {tmp_path / 'zoo'}") == 1
    assert files(tmp_path / "zoo").keys() == {"0.failed.json"}


def test_overwriting_repeats_a_model_that_failed(grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"{SHORT} --epochs 1 {grey} --out {tmp_path / 'zoo'}"
    with monkeypatch.context() as patch:
        break_weights(patch, at=0)
        assert run(line) == 1
    assert run(f"{line} --overwrite") == 0
    assert files(tmp_path / "zoo").keys() == {"0.pt", "0.json", "0.csv"}


# ---- interruptions -------------------------------------------------------------------------------------------------------


def stop_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes in every step, and at the start of every evaluation until it is made again."""
    step, evaluate, evaluations = training.training_step, training.evaluate, iter(range(1000))

    def stopped_step(*args: object) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return step(*args)  # type: ignore[arg-type]

    def stopped_evaluation(*args: object) -> dict[str, float]:
        if next(evaluations) % 2 == 0:
            signal.raise_signal(signal.SIGUSR1)
        return evaluate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "training_step", stopped_step)
    for module in (training, script):
        monkeypatch.setattr(module, "evaluate", stopped_evaluation)


def test_a_model_in_training_is_continued_only_on_request(
    grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "zoo"
    with monkeypatch.context() as patch:
        stop_often(patch)
        assert run(f"{SHORT} {grey} --out {out}") == 75
    left = files(out)
    assert left.keys() == {"0.last.pkl"}
    write_mnist(tmp_path / "other", smooth(100, seed=5), smooth(20, seed=1))
    for more, message in {
        grey: "0.last.pkl is there, of a model in training: --resume continues it, --overwrite replaces it, another",
        f"{grey} --resume --seed 1": "0.last.pkl was made with seed 0, not 1",
        f"{grey} --retry-failed --width 3": "0.last.pkl was made with width 2, not 3",
        f"--data-dir {tmp_path / 'other'} --resume": "made with other data",
    }.items():
        capsys.readouterr()
        assert run(f"{SHORT} {more} --out {out}") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and files(out) == left
    assert run(f"{SHORT} {grey} --out {out} --retry-failed") == 0  # it resumes, too
    (out / "0.last.pkl").write_bytes(left["0.last.pkl"])
    assert run(f"{SHORT} {grey} --out {out} --overwrite") == 0
    assert files(out).keys() == {"0.pt", "0.json", "0.csv"}


def test_damaged_files_are_refused_before_anything_is_made(
    grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "zoo"
    line = f"{SHORT} {grey} --out {out} --num_models 3 --resume"
    with monkeypatch.context() as patch:
        stop_often(patch)
        assert [run(line) for _ in range(15)] == [75] * 15  # 13 for the first model, two steps of the second
    whole = files(out)
    last, record, table = whole["1.last.pkl"], json.loads(whole["0.json"]), whole["0.csv"]
    damages = {
        "0.json": [b"", b"{", b"[]", b"{}", *(json.dumps(record | {name: None}).encode() for name in ("data", "epochs"))],
        "0.csv": [b"", table[:-60], table.replace(b"\n2,", b"\n3,"), b"\xff" * len(table)],
        "1.last.pkl": [b"", last[:1000], whole["0.pt"], last.replace(b"accuracy", b"ACCURACY", 1)],
    }
    for name, content in [(name, content) for name, contents in damages.items() for content in contents]:
        (out / name).write_bytes(content)
        capsys.readouterr()
        assert run(line) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(out / name.removesuffix(".json")) in error and "damaged" in error
        assert files(out) == whole | {name: content}
        (out / name).write_bytes(whole[name])
    (tmp_path / "file").touch()
    assert run(f"{SHORT} {grey} --out {tmp_path / 'file'}") == 2
    (out / "1.csv").mkdir()
    assert run(line) == 2 and "1.csv is damaged" in capsys.readouterr().err
    (out / "1.csv").rmdir()
    assert run(line) == 0


def test_a_damaged_table_of_a_model_in_training_is_refused(
    grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "zoo"
    with monkeypatch.context() as patch:
        stop_often(patch)
        assert [run(f"{SHORT} {grey} --out {out} --resume") for _ in range(8)] == [75] * 8  # an epoch, and more
    table = (out / "0.csv").read_bytes()
    assert table.count(b"\n") == 2
    for damaged in (b"x" * len(table), table.replace(b"\n1,", b"\n4,")):
        (out / "0.csv").write_bytes(damaged)
        assert run(f"{SHORT} {grey} --out {out} --resume") == 2
        error = capsys.readouterr().err
        assert "0.csv is damaged" in error and error.count("\n") == 1 and (out / "0.csv").read_bytes() == damaged
    (out / "0.csv").write_bytes(table + b"2,10,0.1")  # a row that a kill has cut off
    assert run(f"{SHORT} {grey} --out {out} --resume") == 0


def test_foreign_files_and_other_data_are_refused(grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that look like a model's are not replaced; a zoo is of the same images throughout."""
    out = tmp_path / "zoo"
    out.mkdir()
    for name in ("0.json", "0.csv"):
        (out / name).write_text("{}")
        assert run(f"{SHORT} {grey} --out {out}") == 2
        assert "is there without its model" in capsys.readouterr().err and (out / name).read_text() == "{}"
        (out / name).unlink()
    assert run(f"{SHORT} {grey} --out {out}") == 0
    write_mnist(tmp_path / "other", smooth(100, seed=5), smooth(20, seed=1))
    before = files(out)
    assert run(f"{SHORT} --data-dir {tmp_path / 'other'} --out {out} --num_models 2") == 2
    assert "0.json was made with data" in capsys.readouterr().err and files(out) == before


def test_a_model_in_training_elsewhere_is_left_to_it(grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zoo"
    out.mkdir()
    lock = take_lock(out / "0.lock")
    assert lock is not None
    (out / "0.last.pkl").touch()  # the other process may be writing it
    assert run(f"{SHORT} {grey} --out {out} --num_models 2") == 0
    said = capsys.readouterr().out
    assert "0 is left to another process" in said
    assert said.endswith("\n1 of 2 models are left to other processes (0): the same line again tells when they are done\n")
    assert files(out).keys() == {"0.lock", "0.last.pkl", "1.pt", "1.json", "1.csv"}
    release_lock(lock, out / "0.lock")
    (out / "0.last.pkl").unlink()
    assert run(f"{SHORT} {grey} --out {out} --num_models 2") == 0
    assert (out / "0.json").exists()


def test_a_zoo_that_is_there_needs_no_data_and_loses_leftovers(
    grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "zoo"
    assert run(f"{SHORT} --epochs 1 {grey} --out {out}") == 0
    left = files(out)
    (out / "0.last.pkl").touch()  # of a process that was killed at its very end
    (out / "0.lock").touch()
    assert run(f"{SHORT} --epochs 1 --data-dir {tmp_path / 'nowhere'} --out {out}") == 0
    assert f"all models of {out} that were asked for are there: nothing to do" in capsys.readouterr().out
    assert files(out) == left
