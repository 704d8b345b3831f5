"""train_ssl.py as its users run it: published commands, bad input, runs, stops, saved encoders, trackers, processes."""

import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train_ssl as script
from common.datasets import images
from common.models.resnet import CifarResNet
from common.run import trackers
from common.run.metrics import read_metrics
from common.run.state import State
from common.ssl import duet, evaluation
from common.ssl.models import load_encoder, read_saved
from common.ssl.simclr import SimCLR
from tests.command_lines import Terminal, exit_status
from tests.interruptions.cases import assert_equal, outcome
from tests.small_images import smooth, write_mnist
from tests.stopping import signal_at
from tests.test_images import write_cifar

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PUBLISHED = (
    "--model duet --encoder cifar10_resnet32 --dataset cifar10 --batch-size 1024 --test-every 10 --warmup-epochs 10 "
    "--epochs 800 --center-crop --tx sca rot --equi-tx rot --duet-target vm --duet-lambda 1000 --save-dir some_dir"
)
SHORT = (
    "--dataset mnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 16 --epochs 3 --warmup-epochs 1 "
    "--test-every 2"
)
DUET = f"{SHORT} --tx sca rot --equi-tx rot --duet-target vm"


@pytest.fixture(autouse=True)
def two_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear probes, of a run three, are most of the time of a small run."""
    monkeypatch.setattr(evaluation, "PENALTIES", (1e-3, 1e-2))


def run(line: str, folder: Path, *more: str) -> int:
    """Run in this process; the exit status, also where argparse ends it."""
    return exit_status(script.main, [*line.split(), *more, "--results-dir", str(folder / "results")])


def directory(folder: Path) -> Path:
    (path,) = (folder / "results" / "train_ssl").iterdir()
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """50 training and 20 test images of one channel, as the options that name their place."""
    folder = tmp_path_factory.mktemp("grey")
    write_mnist(folder, smooth(50), smooth(20, seed=1))
    return "--dataset-root", str(folder)


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("colour")
    write_cifar(folder, "CIFAR10")
    return "--dataset-root", str(folder)


# ---- command line --------------------------------------------------------------------------------------------------------


def test_the_published_line_and_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PUBLISHED, tmp_path, "--dry-run") == 0
    name = "cifar10-duet-tx.sca.rot-equi-tx.rot-center-crop-duet-lambda.1000-duet-target.vm"
    assert capsys.readouterr().out.strip() == name
    args, _ = script.parse(script.get_parser(), ["--tx", "sca", "rot", "--equi-tx", "rot"])
    expected = {
        "device": None, "dataset": "cifar10", "batch_size": 1024, "image_size": 32, "center_crop": False, "save_dir": None,
        "wandb_project": None, "model": "duet", "encoder": "cifar10_resnet32", "num_classes": 10, "epochs": 800,
        "warmup_epochs": 10, "test_every": 10, "lr": 0.0004, "duet_lambda": 10.0, "duet_bins": 8, "duet_target": "ga",
        "essl_lambda": 0.4, "debug_steps": None,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_help_lists_every_published_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["-h"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--device --dataset --dataset-root --batch-size --image-size --center-crop --save-dir --wandb-project --model "
        "--encoder --num-classes --epochs --warmup-epochs --test-every --lr --tx --equi-tx --duet-lambda --duet-bins "
        "--duet-target --essl-lambda --debug-steps --seed --encoder-width --precision --compile --resume --tensorboard "
        "--linear-probe --knn"
    ).split():
        assert option in text
    assert "--tx" in text and all(encoder in text for encoder in script.ENCODERS) and len(script.ENCODERS) == 13


def test_the_optimiser_is_the_published_one() -> None:
    model = SimCLR(CifarResNet((1, 1, 1), width=1), ("sca",), 8, n_classes=3)
    group = script.make_optimizer(model, 0.1).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.9, 0.95), 1e-4, 1e-8)


def test_every_epoch_has_an_order_of_its_own() -> None:
    args, _ = script.parse(script.get_parser(), ["--tx", "sca", "--equi-tx", "sca", "--batch-size", "16"])
    epochs = [torch.cat(script.training_batches(args, smooth(50), epoch)).tolist() for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and sorted(epochs[1]) == list(range(50))


def test_jitter_has_the_parameters_of_colours() -> None:
    line = "--encoder cifar10_resnet20 --encoder-width 1 --tx jit --equi-tx hue"
    args, _ = script.parse(script.get_parser(), line.split())
    model = script.make_model(args, torch.device("cpu"))
    assert isinstance(model, duet.DUET) and model.structure == "hue"


BAD = {
    "--equi-tx rot": "--tx is missing",
    "--tx sca rot": "--equi-tx is missing",
    "--tx sca rot --equi-tx fli": "--equi-tx fli is not one of the transformations sca rot",
    "--tx sca jit --equi-tx jit": "--equi-tx jit has no parameter",
    "--tx sca res --equi-tx res": "--equi-tx res has no parameter",
    "--tx sca rot --equi-tx rot --duet-bins 7": "--duet-bins 7 does not divide the encoder's 512 features",
    "--tx sca rot --equi-tx rot --encoder-width 3 --duet-bins 16": "does not divide the encoder's 24 features",
    "--tx sca rot --equi-tx rot --encoder lifted_cifar10_resnet20": "54 input channels",
    "--tx sca rot --equi-tx rot --encoder Cifar10_ResNet": "choose cifar10_resnet20",
    "--tx sca rot --equi-tx rot --encoder resnet50": "invalid choice",
    "--tx sca turn --equi-tx rot": "invalid choice: 'turn'",
    "--tx sca jit --equi-tx sca --dataset mnist": "jit changes colours",
    "--model essl --tx sca --equi-tx gra --dataset fashionmnist": "gra changes colours",
    "--model essl --tx rot --equi-tx sca": "--equi-tx sca is nothing that ESSL can predict",
    "--model essl --tx rot --equi-tx blu": "--equi-tx blu is nothing that ESSL can predict",
    "--model essl --tx sca": "--equi-tx is missing",
    "--tx sca --equi-tx sca --test-every 0": "too small: at least 1",
    "--tx sca --equi-tx sca --batch-size 1": "too small: at least 2",
    "--tx sca --equi-tx sca --lr 0": "out of range",
    "--tx sca --equi-tx sca --duet-lambda nan": "out of range",
    "--tx sca --equi-tx sca --dataset cifar100 --num-classes 10": "--num-classes 10 is too small: cifar100 has 100",
    "--tx sca --equi-tx sca --resume --overwrite": "choose one",
    "--tx sca --equi-tx sca --epoch 3": "unrecognized arguments",
    "--knn nowhere.pt": "there is no checkpoint nowhere.pt",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line, tmp_path, "--dataset-root", str(tmp_path / "no data")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("train_ssl.py: error: ") and BAD[line] in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PUBLISHED, tmp_path, "--device", "cuda") == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_essl_takes_its_transformation_out_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    args, _ = script.parse(script.get_parser(), "--model essl --tx rot sca ron fli sca --equi-tx ron".split())
    assert args.tx == ["rot", "sca", "fli", "sca"]
    assert "[ESSL] Transformation ron removed from tx" in capsys.readouterr().out
    script.parse(script.get_parser(), "--model essl --tx sca --equi-tx ron".split())
    assert capsys.readouterr().out == ""


# ---- what a run leaves ---------------------------------------------------------------------------------------------------

LINES = {
    "duet": (f"{DUET} --center-crop", "encoder_mnist_duet_rot_eq-rot_target-vm", "model_group_0_loss_mean"),
    "simclr": (f"{SHORT} --model simclr --tx sca fli", "encoder_mnist_simclr", "model_ntxent_total_top5_mean"),
    "no bins": (f"{SHORT} --duet-bins 0 --tx sca", "encoder_mnist_duet_eq-None_target-ga", "model_ntxent_ABAA_top1_mean"),
    "essl classes": (
        f"{SHORT} --model essl --tx sca ron --equi-tx ron",
        "encoder_mnist_essl_ron_eq-ron",
        "model_essl_top_1_mean",
    ),
    "essl value": (f"{SHORT} --model essl --tx ccr --equi-tx rot", "encoder_mnist_essl_rot_eq-rot", "model_essl_loss_mean"),
    "bf16, joint": (f"{DUET} --precision bf16 --joint-pass", "encoder_mnist_duet_rot_eq-rot_target-vm", "total_loss"),
}


@pytest.mark.parametrize("kind", LINES)
def test_what_a_run_leaves(kind: str, grey: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, stem, metric = LINES[kind]
    saved = tmp_path / "saved"
    assert run(line, tmp_path, *grey, "--save-dir", str(saved)) == 0
    path = directory(tmp_path)
    assert sorted(p.name for p in saved.iterdir()) == [f"{stem}.run", f"{stem}_final.pt"]
    result = json.loads((path / "result.json").read_text())
    assert result["epochs"] == 3 and result["steps"] == 12  # 3 batches of 16, one of 2
    assert result["test"] and all(math.isfinite(value) for value in result["test"].values())
    for of in (result, result["raw_pixels"], result["untrained"]):
        assert 0 <= of["linear_probe"]["top_1"] <= 100 and 0 <= of["knn"]["top_1"] <= 100
    metrics = read_metrics(path / "metrics.csv")
    assert metrics["epoch"] == [0, 1, 2]
    assert metrics["lr"] == pytest.approx([0.0004 * m for m in (0.001, 1, 0.5)])
    assert [math.isnan(value) for value in metrics[f"test_{metric}"]] == [False, True, False]
    assert not any(math.isnan(value) for value in metrics[f"train_{metric}"])
    pictures = {p.name for p in path.glob("*.png")}
    assert pictures >= {"metrics.png", "weights.png", "samples.png"}
    assert ("marginals.png" in pictures) == (kind != "no bins")
    out, log = capsys.readouterr().out, (path / "log").read_text()
    for text in (
        "Training starts!",
        "[Train epoch 0 in ",
        "[Test  epoch 2 in ",
        f"{metric}: ",
        "(chance 10)",
        "lr: 0.0004",
        "(chance 10, raw pixels ",
    ):
        assert text in out and text in log
    # a second start
    assert run(line, tmp_path, *grey, "--save-dir", str(saved)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(line, tmp_path, *grey, "--save-dir", str(saved), "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", ["--tx sca bri rot hue --equi-tx hue", "--model essl --tx jit gra --equi-tx gra", "--tx jit"]
)
def test_colours(options: str, colour: tuple[str, str], tmp_path: Path) -> None:
    more = "" if "equi" in options else " --model simclr"
    assert run(f"{SHORT} --dataset cifar10 --epochs 1 {options}{more}", tmp_path, *colour) == 0


def test_debug_steps_are_as_many_as_asked_for(grey: tuple[str, str], tmp_path: Path) -> None:
    assert run(f"{DUET} --epochs 2 --debug-steps 2", tmp_path, *grey) == 0
    result = json.loads((directory(tmp_path) / "result.json").read_text())
    assert result["steps"] == 4 and result["training_images"] == 32


def test_no_epochs_save_the_untrained_model(grey: tuple[str, str], tmp_path: Path) -> None:
    assert run(f"{DUET} --epochs 0 --warmup-epochs 0", tmp_path, *grey) == 0
    assert [p.name for p in directory(tmp_path).glob("*.pt")] == ["encoder_mnist_duet_rot_eq-rot_target-vm_final.pt"]


def test_all_models_are_kept_on_request(grey: tuple[str, str], tmp_path: Path) -> None:
    assert run(f"{DUET} --keep-all", tmp_path, *grey) == 0
    names = sorted(p.stem.rsplit("_", 1)[1] for p in directory(tmp_path).glob("*.pt"))
    assert names == ["0000", "0002", "final"]


def test_models_of_another_run_are_not_replaced(
    grey: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = "--save-dir", str(tmp_path / "saved")
    assert run(f"{DUET} --epochs 1", tmp_path, *grey, *saved) == 0
    (file,) = (tmp_path / "saved").glob("*.pt")
    before = file.read_bytes()
    assert run(f"{DUET} --epochs 1 --seed 1", tmp_path, *grey, *saved) == 2
    assert f"{file} is there, of another run" in capsys.readouterr().err
    assert file.read_bytes() == before
    (tmp_path / "no directory").touch()  # nor removed, if the run that was to replace it cannot begin
    assert run(f"{DUET} --epochs 1 --seed 1 --overwrite", tmp_path / "no directory", *grey, *saved) == 2
    assert file.read_bytes() == before
    assert run(f"{DUET} --epochs 1 --seed 1 --overwrite", tmp_path, *grey, *saved) == 0
    assert file.read_bytes() != before
    # nor by one that has begun at the same time, and saved nothing yet
    file.unlink()
    assert run(f"{DUET} --epochs 1 --seed 2", tmp_path, *grey, *saved) == 2
    assert "saves there" in capsys.readouterr().err
    # names that begin alike are others' business
    for equi, status in (("--equi-tx rot", 0), ("", 0)):
        assert run(f"{SHORT} --epochs 0 --model simclr --tx rot {equi}", tmp_path, *grey, *saved) == status


def test_a_place_that_models_cannot_be_saved_in(
    grey: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/nowhere")):
        assert run(DUET, tmp_path, *grey, "--save-dir", str(place)) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert str(place) in error
    assert not (tmp_path / "results").exists()


def test_a_loss_that_is_not_finite_ends_the_run(
    grey: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a sentence; and never reaches a checkpoint: a second start goes on from before."""
    loss_of, calls = duet.DUET.loss, []

    def loss(self: duet.DUET, *args: object, training: bool) -> object:
        calls.append(training)
        total, metrics = loss_of(self, *args, training=training)
        return (total * math.nan, metrics | {"total_loss": total * math.nan}) if sum(calls) == 6 else (total, metrics)

    monkeypatch.setattr("common.run.state.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(duet.DUET, "loss", loss)
    assert run(DUET, tmp_path, *grey) == 1
    reason = "failed: the loss of epoch 1 is not finite: a smaller --lr or --duet-lambda may help\n"
    assert capsys.readouterr().err.endswith(f"train_ssl.py: {reason}")
    assert (directory(tmp_path) / "log").read_text().endswith(reason)
    last = torch.load(directory(tmp_path) / "last.pkl", weights_only=True)
    assert last["progress"] == (1, 1, 5)
    assert all(value.isfinite().all() for value in last["model"].values())
    assert run(f"{DUET} --resume", tmp_path, *grey) == 0


# ---- stopped and resumed ---------------------------------------------------------------------------------------------------


def test_a_run_without_epochs_is_stopped_in_its_test(
    grey: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{DUET} --epochs 0 --resume"
    with monkeypatch.context() as patch:
        patch.setattr(State, "check_signal", signal_at(2))
        assert run(line, tmp_path, *grey) == 75
    assert run(line, tmp_path, *grey) == 0
    assert not (directory(tmp_path) / "metrics.csv").exists()


def test_probes_of_raw_pixels_and_of_the_initial_weights(
    grey: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baselines of a run are those of its seed's first weights, also if it was resumed."""
    line, measured, measure = f"{DUET} --epochs 2 --center-crop --resume auto", [], evaluation.measure_classes

    def noted(encoder: torch.nn.Module, *how: Any) -> dict[str, dict[str, float]]:
        measured.append((encoder, measure(encoder, *how)))
        return measured[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(State, "check_signal", signal_at(5))
        assert run(line, tmp_path, *grey) == 75
    monkeypatch.setattr(evaluation, "measure_classes", noted)
    assert run(line, tmp_path, *grey) == 0
    result = json.loads((directory(tmp_path) / "result.json").read_text())
    (trained, own), (pixels, of_pixels), (untrained, of_untrained) = measured
    assert {probe: result[probe] for probe in own} == own
    assert result["raw_pixels"] == of_pixels and not list(pixels.parameters())
    assert result["untrained"] == of_untrained
    args, _ = script.parse(script.get_parser(), line.split())
    first = script.make_model(args, torch.device("cpu")).base_network.state_dict()
    assert_equal(dict(untrained.state_dict()), dict(first))
    assert not torch.equal(trained.conv1.weight, first["conv1.weight"])


# ---- saved encoders ------------------------------------------------------------------------------------------------------


def test_saved_encoders(
    grey: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    assert run(DUET, tmp_path, *grey, "--save-dir", str(saved)) == 0
    (file,) = saved.glob("*.pt")
    assert read_saved(file)["options"]["duet_target"] == "vm"
    encoder = load_encoder(file)
    assert not encoder.training
    view = torch.rand(5, 1, 8, 8) - 0.5
    z = encoder(view)
    assert z.shape == (5, 8) and torch.equal(z[:2], encoder(view[:2]))  # no statistics of a batch

    result = json.loads((directory(tmp_path) / "result.json").read_text())
    capsys.readouterr()
    assert run("--linear-probe", tmp_path, str(file), "--knn", str(file), *grey) == 0
    out = capsys.readouterr().out
    for probe in ("linear_probe", "knn"):
        written = json.loads((saved / f"{file.stem}_{probe}_mnist.json").read_text())
        assert written["top_1"] == pytest.approx(result[probe]["top_1"], abs=5.1)  # one image of 20
        assert f"{probe.replace('_', ' ')} top-1 {written['top_1']:.2f} % (chance 10, raw pixels " in out
        for baseline in ("raw_pixels", "untrained"):  # of the same images, and the same weights
            assert written[baseline]["top_1"] == pytest.approx(result[baseline][probe]["top_1"], abs=5.1)
    assert (
        run("--knn", tmp_path, str(file), "--linear-probe", "nowhere.pt", "--overwrite", *grey) == 2
    )  # before anything is computed
    assert "no checkpoint nowhere.pt" in capsys.readouterr().err
    assert run("--knn", tmp_path, str(file), "--overwrite", "--dry-run", *grey) == 0
    assert capsys.readouterr().out.strip() == str(saved / f"{file.stem}_knn_mnist.json")
    assert run("--knn", tmp_path, str(file), *grey) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--knn", tmp_path, str(file), "--dataset", "cifar10", *grey) == 2
    assert "takes 1 channels, images of cifar10 have 3" in capsys.readouterr().err
    written = {path: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:  # a signal while images are read
        read = images.load
        patch.setattr(images, "load", lambda *of, **how: os.kill(os.getpid(), signal.SIGTERM) or read(*of, **how))
        assert run("--knn", tmp_path, str(file), "--overwrite", *grey) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in saved.iterdir()} == written
    for content in (file.read_bytes()[:1000], b"", b"text"):
        file.write_bytes(content)
        assert run("--knn", tmp_path, str(file), *grey) == 2
        assert "damaged" in capsys.readouterr().err


def test_encoders_of_another_version(grey: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what is other."""
    assert run(f"{DUET} --epochs 0", tmp_path, *grey, "--save-dir", str(tmp_path)) == 0
    (file,) = tmp_path.glob("*.pt")
    saved, key = torch.load(file, weights_only=True), "base_network.conv1.weight"
    capsys.readouterr()
    for changed, message in (
        (
            {"encoder": saved["encoder"] | {"depth": 20}},
            "no encoder with {'blocks': [3, 3, 3], 'in_channels': 1, ",
        ),
        ({"encoder": {"in_channels": 1}}, "missing 1 required positional argument: 'blocks'"),
        ({"encoder": saved["encoder"] | {"width": 2}}, f"{key} is (1, 1, 3, 3) there and (2, 1, 3, 3) here"),
        ({"model": {name: w for name, w in saved["model"].items() if name != key}}, f"{key} is missing there and (1, 1, 3, 3)"),
        ({"model": saved["model"] | {"base_network.stem": torch.zeros(2)}}, "base_network.stem is (2,) there and missing here"),
        ({"model": saved["model"] | {key: 3}}, f"{key} is ('no tensor',) there"),
        ({"options": {}}, "its option dataset is 'missing'"),
        ({"options": saved["options"] | {"image_size": "8"}}, "its option image_size is '8'"),
        ({"options": saved["options"] | {"dataset": ["mnist"]}}, "its option dataset is ['mnist']"),
    ):
        torch.save(saved | changed, file)
        for probe in ("--linear-probe", "--knn"):
            assert run(probe, tmp_path, str(file), *grey) == 2
            (error,) = capsys.readouterr().err.strip().splitlines()
            assert f"{file} is of another version: " in error and message in error


# ---- bars and trackers --------------------------------------------------------------------------------------------------


def test_bars_are_for_terminals(grey: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = ("training, epoch 2/3", "test, epoch 2/3", "measuring the encoder")
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", kind())
        assert run(f"{DUET} --overwrite --save-dir {tmp_path}", tmp_path, *grey) == 0
        assert all((f"{title}: " in sys.stderr.getvalue()) == (kind is Terminal) for title in titles)
    assert sys.stderr.getvalue() == ""
    (file,) = tmp_path.glob("*.pt")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("--linear-probe", tmp_path, str(file), *grey) == 0
    assert "linear probe: " in sys.stderr.getvalue()


def test_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert run(f"{DUET} --wandb-project duet", tmp_path) == 2
    assert ".wandb.yaml" in capsys.readouterr().err and not list(tmp_path.iterdir())
    Path(".wandb.yaml").write_text("WANDB_BASE_URL: https://example.org\n")
    assert run(f"{DUET} --wandb-project duet", tmp_path) == 2
    assert "no line WANDB_API_KEY" in capsys.readouterr().err
    Path(".wandb.yaml").write_text("WANDB_API_KEY: secret\nWANDB_BASE_URL: https://example.org\nPATH: /nowhere\n")
    path = os.environ["PATH"]
    trackers.check(argparse.Namespace(tensorboard=False, wandb_project="duet"))
    assert (os.environ.pop("WANDB_API_KEY"), os.environ.pop("WANDB_BASE_URL")) == ("secret", "https://example.org")
    assert os.environ["PATH"] == path


# ---- several processes ---------------------------------------------------------------------------------------------------


def torchrun(n: int, line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *line]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    """NT-Xent with everybody's negatives, batch norm over all rows: also in a batch that does not halve."""
    done = torchrun(2, [str(ROOT / "tests" / "parallel_step.py"), str(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run(
        [sys.executable, ROOT / "tests" / "parallel_step.py", tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys() and len(one) > 4
    for key, alone in one.items():
        both = two[key]
        assert set(alone) == set(both)
        for name, value in alone.items():
            error = (value - both[name]).abs().max() / alone["scale"] if name != "scale" else torch.zeros(())
            assert error < 1e-5, (key, name, float(error))


def train_two(line: str, results: Path, *wrapper: str) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "tests" / "stopping.py"), *wrapper] if wrapper else [str(ROOT / "train_ssl.py")]
    return torchrun(2, [*script, *line.split(), "--results-dir", str(results / "results")], results)


@pytest.fixture(scope="module")
def of_two(grey: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A line, and the place of its results that two processes have left."""
    line, folder = " ".join([DUET, "--lr 0.0001 --epochs 2", *grey]), tmp_path_factory.mktemp("two")
    done = train_two(line, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return line, folder


def test_a_run_of_two_processes_is_that_of_one(of_two: tuple[str, Path], tmp_path: Path) -> None:
    line, folder = of_two
    assert run(line, tmp_path) == 0
    one, two = directory(tmp_path), directory(folder)
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    metrics, expected = read_metrics(two / "metrics.csv"), read_metrics(one / "metrics.csv")
    for name in ("train_total_loss", "train_model_group_0_loss_mean", "train_track_head_top_1_mean"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-3), name  # rounding, amplified by steps
    assert metrics["step"] == expected["step"]
    # a second start of both is refused by one line
    done = train_two(line, folder)
    assert done.returncode != 0 and done.stderr.count("has finished: --overwrite replaces it") == 1


def test_a_signal_to_one_of_two_processes_stops_both(of_two: tuple[str, Path], tmp_path: Path) -> None:
    """At the same step, within an epoch and within a test: what is left at the end is that of two undisturbed ones."""
    line = f"{of_two[0]} --resume"
    # 4 steps and 2 batches of a test an epoch: the second process after step 6, then the first in the last test
    for rank, look, by, step in ((1, 8, "a signal to another process", 6), (0, 4, "SIGTERM", 8)):
        done = train_two(line, tmp_path, str(rank), str(look))
        assert done.returncode == 1, done.stderr[-3000:]  # torchrun's own, whatever its processes end with
        stopped = f"stopped by {by} after step {step}: --resume auto continues from there\n"
        assert (directory(tmp_path) / "log").read_text().endswith(stopped) and done.stdout.count(stopped) == 1
        assert torch.load(directory(tmp_path) / "last.pkl", weights_only=True)["progress"] == (1, step - 4, step)
    done = train_two(line, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(outcome(directory(tmp_path)), outcome(directory(of_two[1])))
    done = train_two(line, tmp_path)
    assert done.returncode == 0 and done.stdout.count("has finished: nothing to do") == 1
