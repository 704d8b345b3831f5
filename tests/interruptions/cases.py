"""Small runs of all scripts that train, to be killed, interrupted and resumed, and what they leave."""

import csv
import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import amortised_clustering
import amortised_mog
import swarm_transformer
from common import plotting
from common.checkpoint import atomic_write
from common.routing import pictures as routing_pictures
from common.run import backtracking, state
from common.ssl import evaluation
from common.ssl import models as ssl_models
from common.ssl import pictures as ssl_pictures
from common.symmetry import pictures as symmetry_pictures
from tests.command_lines import exit_status
from tests.interruptions.disk import Disk, watch

# all save after every step; dropout, where there is some, needs the state of the generators
LINES = {
    "clustering": "amortised_clustering -type Swarm -n_hidden 4 -n_iter 2 -dropout 0.2 -tasks 10 "
    "-bs 5 -max_epochs 4 -lr 0.5 -bt_horizon 0 -resume auto -results_dir RESULTS",
    "mixture": "amortised_mog -n_hidden 12 -n_iter 2 -dropout 0.2 -bs 2 -max_epochs 4 -lr 0.5 -gamma 0.9 -bt_horizon 0 "
    "-resume auto -results_dir RESULTS",
    "images": "swarm_transformer -data FashionMNIST -n_hidden 4 -n_iter 2 -bs 4 -epoch_images 6 -max_epochs 5 -lr 1.0 "
    "-bt_horizon 0 -n_samples 1 -resume auto -results_dir RESULTS -data_dir DATA",
    "duet": "train_ssl --dataset fashionmnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 16 "
    "--subset 32 --epochs 2 --warmup-epochs 1 --test-every 2 --lr 0.01 --tx sca rot --equi-tx rot --resume "
    "--results-dir RESULTS --dataset-root DATA",
    "zoo": "train_zoo --arch mCNN --width 1 --dataset fashionmnist --epochs 2 --batch-size 24 --num_models 2 --resume "
    "--out RESULTS --data-dir DATA",
    "zoo of transformers": "train_zoo --arch cct_2_3x2_32 --dataset fashionmnist --subset 20 --epochs 2 --batch-size 8 "
    "--resume --out RESULTS --data-dir DATA",
    "routing": "routing_networks --data CIFAR100-MTL --decision AAC --width 4 --modules 2 --epochs 2 --batch-size 8 --depth 1 "
    "--resume --results-dir RESULTS --data-dir DATA",
    "routing that draws": "routing_networks --data CIFAR100-MTL --decision RELAX --model dispatched --width 4 --modules 2 "
    "--agents 2 --exploration-end 0 --epochs 2 --batch-size 8 --depth 1 --resume --results-dir RESULTS --data-dir DATA",
    "stitching": "cifar10_stitching --recipe Grelu --arch mCNN --dataset fashionmnist --zoo DATA/zoo --pairs 0-1 "
    "--layers 3 14 --stitch_epochs 2 --batch-size 24 --bn_batches 1 --resume --results-dir RESULTS --data-dir DATA",
    "alternating stitching": "cifar10_stitching --birkhoff --alternating --arch mCNN --dataset fashionmnist --zoo DATA/zoo "
    "--pairs 0-1 --layers 14 --stitch_epochs 4 --batch-size 24 --resume --results-dir RESULTS --data-dir DATA",
    "alignment": "cifar10_alignment --arch mCNN --dataset fashionmnist --similarity cka --zoo DATA/zoo --pairs 0-1 1-2 "
    "--block 10 --resume --results-dir RESULTS --data-dir DATA",
    "rotations": "cifar10_projections --repeats 1 --width 1 --dataset fashionmnist --layers 5 --groups orthogonal "
    "--activations relu --epochs 2 --batch-size 24 --resume --results-dir RESULTS --data-dir DATA",
}
# the digits of the times have lengths of their own
PASSING = (
    "seconds", "metrics_size", "results_dir", "save_dir", "out", "resume", "retry_failed", "overwrite", "git_revision",
)  # fmt: skip


@dataclass
class Case:
    """A script and its line, in a folder where it leaves its results."""

    script: str
    line: list[str]
    results: Path

    def run(self) -> int:
        """Start it in this process; its exit status."""
        return exit_status(importlib.import_module(self.script).main, self.line)

    def outcome(self) -> dict[str, Any]:
        return outcome(self.results)


def outcome(folder: Path) -> dict[str, Any]:
    """All files below a folder, without times, places, and how the run was started."""
    left: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            left[name] = lasting(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                left[name] = lasting(list(csv.DictReader(file)))
        elif path.suffix in (".pkl", ".pt"):
            left[name] = lasting(torch.load(path, weights_only=True))
        else:
            left[name] = None
    return left


def make_case(kind: str, data: Path, results: Path) -> Case:
    script, *words = LINES[kind].split()
    return Case(script, [word.replace("RESULTS", str(results)).replace("DATA", str(data)) for word in words], results)


def lasting(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: lasting(value) for key, value in content.items() if key not in PASSING}
    return [lasting(value) for value in content] if isinstance(content, list | tuple) else content


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a}, {b}"


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Pictures are files, but empty ones."""
    pictures = (plotting, amortised_clustering, amortised_mog, routing_pictures, ssl_pictures, symmetry_pictures)
    for module in pictures:
        for name in vars(module):
            if name.startswith("plot_"):
                patch.setattr(module, name, lambda path, *_, **__: atomic_write(path, lambda file: file.write(b"a picture")))
    for script in (amortised_clustering, amortised_mog, swarm_transformer):
        patch.setattr(script, "samples", lambda *_: [])


def shorten_mixtures(patch: pytest.MonkeyPatch) -> None:
    """Epochs of two steps, and as few batches to measure."""
    for name in ("STEPS_PER_EPOCH", "VALIDATION_BATCHES", "TEST_BATCHES"):
        patch.setattr(amortised_mog, name, 2)


def save_often_draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Save after every step, return to the best model soon."""
    patch.setattr(backtracking, "PATIENCE", 0)
    torch.set_num_threads(1)
    patch.setattr(state, "SAVE_SECONDS", -1.0)
    draw_nothing(patch)
    shorten_mixtures(patch)
    patch.setattr(ssl_models, "HIDDEN", 4)
    for probe in ("linear_probe", "nearest_neighbours"):
        patch.setattr(evaluation, probe, lambda *_: {"top_1": 10.0})
    patch.setattr(evaluation, "rotation_errors", lambda *_: {})


def undisturbed(case: Case, **how: Any) -> tuple[dict[str, Any], Disk]:
    """The outcome of a run that nobody disturbs, and its disk. The results are removed."""
    with watch(case.results, **how) as disk:
        assert case.run() == 0
    outcome = case.outcome()
    shutil.rmtree(case.results)
    return outcome, disk
