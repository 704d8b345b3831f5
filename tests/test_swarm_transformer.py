"""swarm_transformer.py as its users run it: published commands, names, bad input, a run's files, memory, NaN, the test set."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import swarm_transformer as script
from common.datasets.images import ImageSet
from common.models.image_transformer import ImageTransformer
from common.run import apply, options
from common.run.budget import BudgetedTraining
from common.run.memory import MicroBatches
from common.run.metrics import read_metrics
from tests.command_lines import assert_help_shows_the_papers_options_first, assert_one_line_and_nothing_made, exit_status
from tests.small_images import real, smooth, write_mnist
from tests.test_images import write_cifar

pytestmark = pytest.mark.slow

PUBLISHED = {
    "-data CIFAR10 -n_layers 1 -n_hidden 512 -n_iter 20 -wc 7200 -lr 0.002 -bs 20": "CIFAR10-1-relu-512-20-wc7200-lr0.002-bs20",
    "-data FashionMNIST -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50": (
        "FashionMNIST-1-relu-256-10-wc480-lr0.001-bs50"
    ),
    "-data MNIST -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50": "MNIST-1-relu-256-10-wc480-lr0.001-bs50",
}
SHORT = "-data MNIST -n_hidden 8 -n_iter 2 -bs 7 -max_epochs 3 -lr 0.01 -n_samples 4"


def run(line: str, results: Path, *more: str) -> int:
    return exit_status(script.main, [*line.split(), *more, "-results_dir", str(results)])


def directory(results: Path) -> Path:
    (found,) = (results / "swarm_transformer").iterdir()
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """50 training and 12 test images, as the options that name their place."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, smooth(50), smooth(12, seed=1))
    return "-data_dir", str(folder)


# ---- command line and names ----------------------------------------------------------------------------------------------


def test_options_and_defaults() -> None:
    published = {
        "data": None, "n_hidden": 128, "n_layers": 1, "n_iter": 5, "non_lin": "relu", "bs": 50, "wc": 60, "update_interval": 10,
        "lr": 0.01, "no_cuda": False, "name": None, "dry_run": False, "to_stdout": False, "bt_horizon": 0.1, "bt_alpha": 0.9,
        "cond": False, "resume": None, "learn_loc": False,
    }  # fmt: skip
    args = vars(script.get_parser().parse_args([]))
    assert {name: args[name] for name in published} == published
    own = {
        "seed", "results_dir", "data_dir", "precision", "deterministic", "compile", "max_epochs", "epoch_images", "overwrite",
        "n_samples", "device", "tensorboard", "wandb_project", *apply.IMAGES_OPTIONS,
    }  # fmt: skip
    assert args.keys() - published.keys() == own


def test_help(capsys: pytest.CaptureFixture) -> None:
    assert_help_shows_the_papers_options_first(script.main, "-learn_loc ", capsys)


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_lines(line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(line, tmp_path / "results", "-dry_run") == 0
    assert capsys.readouterr().out == PUBLISHED[line] + "\n"
    assert not (tmp_path / "results").exists()


def name_of(*argv: str) -> str:
    parser = script.get_parser()
    return script.name_of(parser, script.parse(parser, list(argv)))


NAMES = {  # the original's examples, whose last field is left over from an option that is gone
    "MNIST-1-relu-256-10-wc480-lr0.001-bs50-x": "MNIST-1-relu-256-10-wc480-lr0.001-bs50",
    "CIFAR10-1-relu-512-20-wc7200-lr0.002-bs20-x": "CIFAR10-1-relu-512-20-wc7200-lr0.002-bs20",
    "FashionMNIST-2-elu-64-5-wc0.5-lr1e-05-bs100-x": "FashionMNIST-2-elu-64-5-wc0.5-lr1e-05-bs100",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_originals_names(name: str) -> None:
    assert name_of("-name", name) == NAMES[name]
    args = script.parse(script.get_parser(), ["-name", name, "-cond"])
    assert args.cond and f"-lr{options.shortest(args.lr)}-" in name and f"-wc{options.shortest(args.wc)}-" in name


def test_a_last_field_that_is_left_out_is_told(capsys: pytest.CaptureFixture) -> None:
    assert name_of("-name", "MNIST-1-relu-256-10-wc480-lr0.001-bs50-x").endswith("-bs50")
    assert "the last field of -name, x, is left out" in capsys.readouterr().err
    assert name_of("-name", "MNIST-1-relu-256-10-wc480-lr0.001-bs50-cond").endswith("-bs50-cond")
    assert name_of("-name", "MNIST-1-relu-256-10-wc480-lr0.001-bs50").endswith("-bs50")
    assert not capsys.readouterr().err


def test_places_are_no_names() -> None:
    """Whatever they are called."""
    for where in ("my-data", "r-cond", "x-bs.3", "-seed.3", "a/b-cond"):
        for spelled in (["-data_dir", where], [f"-data_dir={where}"], [f"-data_dir.{where}"]):
            args = script.parse(script.get_parser(), ["-data", "MNIST", *spelled])
            assert (args.data_dir, args.data, args.cond, args.bs, args.seed) == (where, "MNIST", False, 50, 0)


def random_options(rng: random.Random) -> list[str]:
    """A command line out of everything that makes up a run."""
    number = rng.choice([rng.random(), 10 ** rng.uniform(-9, 0), 0.001, 1])  # with all digits, too
    line = ["-data", rng.choice(script.DATA), "-lr", repr(number)]
    choices = {
        "-n_hidden": lambda: 4 * rng.randint(1, 200), "-n_layers": lambda: rng.randint(1, 9),
        "-n_iter": lambda: rng.randint(1, 50), "-non_lin": lambda: rng.choice(["relu", "elu", "lrelu"]),
        "-bs": lambda: rng.randint(1, 999), "-wc": lambda: rng.choice([480, 0.5, rng.uniform(0.001, 1e6)]),
        "-update_interval": lambda: rng.randint(0, 99), "-bt_horizon": rng.random, "-bt_alpha": lambda: rng.uniform(1e-9, 1),
        "-learn_loc": lambda: rng.choice(["true", "1", "False", "0"]), "-seed": lambda: rng.randint(0, 10**6),
        "-precision": lambda: rng.choice(["fp32", "bf16"]), "-max_epochs": lambda: rng.randint(1, 10**6),
        "-epoch_images": lambda: rng.randint(1, 10**5), "-n_samples": lambda: rng.randint(1, 1000),
    }  # fmt: skip
    for option, value in choices.items():
        if rng.random() < 0.3:
            line += [option, str(value())]
    return line + [flag for flag in ("-no_cuda", "-cond", "-compile", "-deterministic") if rng.random() < 0.3]


def test_names_round_trip_and_tell_all_models_apart() -> None:
    """A name gives all options back, and the same name; other options have another name."""
    rng, parser, seen = random.Random(0), script.get_parser(), {}
    for _ in range(500):
        args = script.parse(parser, random_options(rng))
        name = script.name_of(parser, args)
        again = script.parse(parser, ["-name", name])
        made_of = {option: value for option, value in vars(args).items() if option not in script.NOT_IN_NAME}
        assert {**vars(again), "name": None} == vars(args) and script.name_of(parser, again) == name
        assert script.name_of(parser, script.parse(parser, [f"-name.{name}"])) == name
        assert seen.setdefault(name, made_of) == made_of
        assert "/" not in name and len(name) < 240
    for option in ("-cond", "-learn_loc 1", "-bt_alpha 0.8", "-seed 1", "-no_cuda", "-n_samples 3", "-update_interval 3"):
        assert name_of(*SHORT.split()) != name_of(*SHORT.split(), *option.split())


NAME = "-name MNIST-1-relu-256-10-wc480-lr0.001-bs50"
BAD = {
    "": "which images? -data says it, or -name",
    "-data MNISTS": "invalid choice: 'MNISTS'",
    "-name MNIST": "'MNIST' does not parse: names look like",
    "-name MNIST-1-relu-256-10-wc480-lr0.001": "does not parse",
    "-name KMNIST-1-relu-256-10-wc480-lr0.001-bs50": "does not parse",
    f"{NAME}-results_dir.x": "-results_dir is no part of the end of a name",
    f"{NAME}-bs.20": "-bs is no part of the end of a name",
    f"{NAME}-seed3": "unknown option '-seed3'",
    f"{NAME}-Cond": "unknown option '-Cond'",
    f"{NAME}x": "does not parse",
    f"{NAME}-cnd -dry_run": "there is no option -cnd; did you mean -cond?",
    f"{NAME}-Compil -dry_run": "there is no option -Compil; did you mean -compile?",
    f"{NAME}-h": "-h is no part of the end of a name",
    f"{NAME}-cond-h": "-h is no part of the end of a name",
    f"{NAME}-help": "unknown option '-help'",
    f"{NAME}--help": "--help is no part of the end of a name",
    f"{NAME} -bs 20": "-name says -bs 50, the command line 20: leave one out",
    "-name MNIST-0-relu-256-10-wc480-lr0.001-bs50": "0 is too small",
    "-data MNIST -n_hidden 6": "-n_hidden 6 is not a multiple of 4",
    "-data MNIST -n_hidden 0": "0 is too small: at least 4",
    "-data MNIST -n_layers 0": "0 is too small",
    "-data MNIST -n_iter 0": "0 is too small",
    "-data MNIST -bs 0": "0 is too small",
    "-data MNIST -lr 0": "0 is out of range",
    "-data MNIST -lr nan": "nan is out of range",
    "-data MNIST -wc 0": "0 is out of range",
    "-data MNIST -bt_horizon 1.1": "1.1 is out of range",
    "-data MNIST -bt_alpha 0": "0 is out of range",
    "-data MNIST -learn_loc maybe": "'maybe' is neither true nor false",
    "-data MNIST -learn_loc": "-learn_loc needs a value",
    "-data MNIST -n_samples 0": "0 is too small",
    "-data MNIST -epoch_images 0": "0 is too small",
    "-data MNIST -cond yes": "unknown option 'yes'",
    "-data MNIST -resume nowhere/best.pkl": "there is no checkpoint nowhere/best.pkl",
    "-data MNIST -resume auto -overwrite": "choose one",
    "-data MNIST -data_dir nowhere": "train-labels-idx1-ubyte[.gz] in nowhere/MNIST/raw, nowhere/MNIST, nowhere",
    "-data SMALL -data_dir nowhere": "CIFAR10 is not there: looked for cifar-10-batches-py/ or cifar-10-python.tar.gz in n",
    f"-data MNIST -data_dir {300 * 'x'}": "File name too long",
    "-data MNIST -n_hidden 65540": "65540 is too large: at most 65536",
    "-data MNIST -n_hidden 65536 -n_layers 100": "too large",
    "-data BWCIFAR -lr 0.41865911867268657 -wc 51155.49783052558 -bt_horizon 0.123456789012345 -bt_alpha 0.123456789012345 "
    "-update_interval 43220.5062371772 -seed 826153 -epoch_images 42555 -max_epochs 503505 -no_cuda -compile -cond "
    "-learn_loc 1 -precision bf16 -n_samples 244": "characters, and file systems take 255: leave out defaults",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert_one_line_and_nothing_made(run(line, tmp_path / "results"), BAD[line], tmp_path / "results", capsys)


# ---- what a run leaves ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: tuple[str, str]) -> Path:
    results = tmp_path_factory.mktemp("finished")
    assert run(SHORT, results, *small) == 0
    return results


def test_files(finished: Path) -> None:
    path = directory(finished)
    assert path.name == "MNIST-1-relu-8-2-wc60-lr0.01-bs7-max_epochs.3-n_samples.4"
    files = "args.json best.pkl last.pkl log metrics.csv metrics.png result.json samples.png weights.png"
    assert sorted(p.name for p in path.iterdir()) == files.split()
    metrics = read_metrics(path / "metrics.csv")
    assert metrics["epoch"] == [1, 2, 3] and metrics["step"] == [7, 14, 21]  # 45 images, 7 at a time
    assert metrics["val_bits"] == pytest.approx([loss / math.log(2) for loss in metrics["val_loss"]], rel=1e-6)
    assert torch.load(path / "best.pkl", weights_only=True)["best_val_loss"] == pytest.approx(min(metrics["val_loss"]))
    for picture in ("metrics", "weights", "samples"):
        with Image.open(path / f"{picture}.png") as image:
            assert min(image.size) > 400 and np.array(image.convert("L")).std() > 10


def test_report(finished: Path, small: tuple[str, str]) -> None:
    """Validation chose the model; the test images are measured once, with that model."""
    path = directory(finished)
    result = json.loads((path / "result.json").read_text())
    model = ImageTransformer(shape=(1, 28, 28), n_hidden=8, n_iter=2)
    model.load_state_dict(torch.load(path / "best.pkl", weights_only=True)["model"])
    data = script.load_data("MNIST", small[1], 0, torch.device("cpu"))
    assert (len(data.training), len(data.validation), len(data.test)) == (45, 5, 12)
    for split, images in (("validation", data.validation), ("test", data.test)):
        nats = script.evaluate(model, images, "fp32", 4).mean().item()
        assert result[split]["nats"] == pytest.approx(nats, rel=1e-6)
        assert result[split]["bits"] == pytest.approx(nats / math.log(2), rel=1e-6)
        assert result[split]["levels"]["chance"] == math.log(256) > nats
    assert sum(row["images"] for row in result["test_by_class"].values()) == 12
    mean = sum(row["images"] * row["nats"] for row in result["test_by_class"].values()) / 12
    assert mean == pytest.approx(result["test"]["nats"])
    log = (path / "log").read_text()
    assert log.endswith(script.report_table(result) + "\n") and "by position" in log and "bits per dimension" in log


def test_columns_of_the_report_stand_below_each_other(finished: Path) -> None:
    result = json.loads((directory(finished) / "result.json").read_text())
    for name in ("0", "T-shirt/top", "a class with quite a long name"):
        result["test_by_class"] = {name: {"images": 1000, "nats": 2.5}, "bag": {"images": 1, "nats": 2.5}}
        lines = script.report_table(result).splitlines()
        assert {len(line) for line in lines} == {len(lines[0])} and lines[0].endswith("bits per dimension")


def test_by_position_is_what_its_name_says() -> None:
    """The slow way: each position's histogram, with one more of every value, from the training images alone."""
    training, other = smooth(30, (3, 2, 2)), smooth(7, (3, 2, 2), seed=1)
    total = 0.0
    for image in other.images:
        for position in np.ndindex(3, 2, 2):
            count = int((training.images[:, *position] == image[position]).sum())
            total -= math.log((count + 1) / (30 + 256))
    expected = total / other.images.numel()
    assert script.position_cross_entropy(script.log_histograms(training), other) == pytest.approx(expected, rel=1e-5)


def test_splits_do_not_overlap_and_follow_the_seed(small: tuple[str, str]) -> None:
    first, again, other = (script.load_data("MNIST", small[1], seed, torch.device("cpu")) for seed in (0, 0, 1))
    rows = [{tuple(image.flatten().tolist()) for image in split.images} for split in (first.training, first.validation)]
    assert len(rows[0] | rows[1]) == 50 and not rows[0] & rows[1]
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)


def test_5000_of_60000_validate() -> None:
    real("MNIST", "train")
    data = script.load_data("MNIST", None, 0, torch.device("cpu"))
    assert (len(data.training), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)


@pytest.mark.parametrize(
    "more", ["-cond", "-learn_loc true -cond", "-precision bf16", "-n_layers 2 -non_lin elu", "-epoch_images 10"]
)
def test_options_run(more: str, tmp_path: Path, small: tuple[str, str]) -> None:
    assert run(f"-data MNIST -n_hidden 8 -n_iter 2 -bs 20 -max_epochs 2 -lr 0.01 {more}", tmp_path, *small) == 0
    best = torch.load(directory(tmp_path) / "best.pkl", weights_only=True)["model"]
    assert ("cond_embedding.weight" in best) == ("-cond" in more)
    if "-epoch_images" in more:
        assert json.loads((directory(tmp_path) / "result.json").read_text())["steps"] == 2


@pytest.mark.parametrize(("data", "shape"), [("CIFAR10", (32, 32)), ("BWCIFAR", (32, 32)), ("SMALL", (16, 16))])
def test_colours(data: str, shape: tuple[int, int], tmp_path: Path) -> None:
    write_cifar(tmp_path / "data")
    line = f"-data {data} -n_hidden 4 -n_iter 2 -bs 20 -max_epochs 1 -n_samples 2 -cond"
    assert run(line, tmp_path / "results", "-data_dir", str(tmp_path / "data")) == 0
    best = torch.load(directory(tmp_path / "results") / "best.pkl", weights_only=True)["model"]
    assert best["location_features"].shape[1:] == shape and ("channel_embedding" in best) == (data != "BWCIFAR")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_runs(tmp_path: Path, small: tuple[str, str]) -> None:
    assert run(f"{SHORT} -compile", tmp_path, *small) == 0


def test_it_learns_real_images(tmp_path: Path) -> None:
    """Chance is 5.55 nats; 60 steps on Fashion-MNIST go well below 4."""
    training, test = (real("FashionMNIST", split)[:300] for split in ("train", "test"))
    write_mnist(tmp_path / "data" / "FashionMNIST", training, test)
    line = "-data FashionMNIST -n_hidden 16 -n_iter 3 -bs 9 -max_epochs 2 -lr 0.02 -n_samples 2"
    assert run(line, tmp_path / "results", "-data_dir", str(tmp_path / "data")) == 0
    assert json.loads((directory(tmp_path / "results") / "result.json").read_text())["test"]["nats"] < 3.7


def test_start_from_another_model(
    finished: Path, tmp_path: Path, small: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    best = str(directory(finished) / "best.pkl")
    for more in ("-n_hidden 16", "-cond", "-n_layers 2"):
        assert run(f"-data MNIST -n_hidden 8 {more}", tmp_path / "results", "-resume", best, *small) == 2
        error = capsys.readouterr().err
        assert "is of another model" in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()
    assert run(SHORT.replace("-lr 0.01", "-lr 1e-12"), tmp_path / "results", "-resume", best, *small) == 0
    before, after = (
        torch.load(d / "best.pkl", weights_only=True)["model"] for d in (Path(best).parent, directory(tmp_path / "results"))
    )
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_budget_and_plots(tmp_path: Path, small: tuple[str, str]) -> None:
    """Sampling does not count."""
    assert run("-data MNIST -n_hidden 8 -n_iter 2 -bs 20 -wc 0.01", tmp_path, *small) == 0
    assert 0.6 <= json.loads((directory(tmp_path) / "result.json").read_text())["seconds"] < 0.9


# ---- memory --------------------------------------------------------------------------------------------------------------


def a_model() -> ImageTransformer:
    torch.manual_seed(0)
    return ImageTransformer(shape=(1, 28, 28), n_hidden=8, n_iter=2, n_classes=10)


def gradients(model: ImageTransformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_have_the_same_gradient() -> None:
    model, batch = a_model(), smooth(12)
    expected_loss = script.accumulate_gradients(model, batch, "fp32", 12)
    expected = gradients(model)
    for size in (6, 5, 1):
        loss = script.accumulate_gradients(model, batch, "fp32", size)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6)


class TooSmall(ImageTransformer):
    """Its memory has room for three images."""

    error: Exception

    def forward(self, images: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        if len(images) > 3 and self.training:
            raise self.error
        return super().forward(images, classes)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_splits_the_batch(error: Exception) -> None:
    model, batch = a_model(), smooth(12)
    loss = script.accumulate_gradients(model, batch, "fp32", 12)
    expected = gradients(model)
    model.__class__, model.error = TooSmall, error
    log: list[str] = []
    micro = MicroBatches(12, log.append)
    in_parts = micro.run_in_parts(lambda size: script.accumulate_gradients(model, batch, "fp32", size))
    assert in_parts.item() == pytest.approx(loss.item(), rel=1e-6)
    assert micro.size == 3  # 12, 6, 4, 3 were tried
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6)
    assert len(log) == 3 and "parts of 3 from now on" in log[-1]


def test_other_errors_are_shown_as_they_are(tmp_path: Path, small: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(script, "nats", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        script.main([*SHORT.split(), *small, "-results_dir", str(tmp_path)])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_run_in_too_little_memory(
    training: bool, finished: Path, tmp_path: Path, small: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends as one that had enough; and if nothing fits, it says so and fails, and can be gone on with elsewhere."""
    honest, room = script.nats, [3]

    def cramped(model: ImageTransformer, batch: ImageSet, precision: str, *forward: Any) -> torch.Tensor:
        if len(batch) > room[0] and torch.is_grad_enabled() == training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(model, batch, precision, *forward)

    monkeypatch.setattr(script, "nats", cramped)
    assert run(SHORT, tmp_path / "3", *small) == 0
    losses = [read_metrics(directory(results) / "metrics.csv")["val_loss"] for results in (finished, tmp_path / "3")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    room[0] = 0
    assert run(SHORT, tmp_path / "0", *small) == 1
    room[0] = 100
    assert run(SHORT, tmp_path / "0", *small, "-resume", "auto") == 0


# ---- what goes wrong in the middle ---------------------------------------------------------------------------------------


def test_nan_in_the_middle_goes_back_and_on(tmp_path: Path, small: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the loss is not finite, once the gradient."""
    honest, calls = script.nats, [0]

    def poisoned(model: ImageTransformer, batch: ImageSet, precision: str, *forward: Any) -> torch.Tensor:
        nats = honest(model, batch, precision, *forward)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == 9:  # epochs have 7 steps
                return nats * math.nan
            if calls[0] == 9 + 7 + 2:
                nats.register_hook(lambda grad: grad * math.inf)
        return nats

    saved = []

    def save(training: BudgetedTraining) -> None:
        saved.append(all(parameter.isfinite().all() for parameter in training.model.parameters()))
        honest_save(training)

    honest_save = BudgetedTraining.save
    monkeypatch.setattr(BudgetedTraining, "save", save)
    monkeypatch.setattr("common.run.state.SAVE_SECONDS", -1)  # save after every step
    monkeypatch.setattr(script, "nats", poisoned)
    assert run(SHORT.replace("-max_epochs 3", "-max_epochs 5"), tmp_path, *small) == 0
    assert len(saved) > 20 and all(saved)
    metrics = read_metrics(directory(tmp_path) / "metrics.csv")
    assert [math.isnan(loss) for loss in metrics["val_loss"]] == [False, True, False, True, False]
    assert metrics["lr"][-1] == pytest.approx(0.01 * 0.9**2)
    for name in ("best.pkl", "last.pkl"):
        state = torch.load(directory(tmp_path) / name, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
