"""How many models of a zoo can be trained in an hour, by recipe, precision and memory format.

    python -m benchmarks.zoo            # mCNN and resnet20 as published, about a minute

Steps on random images, augmentation included. A model's time is that of the steps of all its epochs on 45,000 images,
extrapolated; evaluation and the reading of data are left out. "contiguous" is the memory format that one writes first;
train_zoo.py uses channels-last for both recipes. benchmarks/precision.py looks at the accuracy.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from itertools import product

import torch

from benchmarks.measure import Bench, Kind, run_benchmark
from common.datasets import augmentation
from common.datasets.augmentation import Preprocessing
from common.models import zoo
from common.zoo import training

N_TRAINING = 45_000
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class TrainingStep:
    """A training step of one architecture, recipe, precision and memory format."""

    def __init__(self, arch: str, recipe: str, precision: str, layout: str, width: int | None, device: str):
        torch.manual_seed(0)
        self.precision, self.device, self.layout = precision, torch.device(device), FORMATS[layout]
        self.batch_size, self.epochs = (int(training.RECIPES[recipe][name]) for name in ("batch_size", "epochs"))
        self.model = zoo.make(arch, width=width if arch in zoo.CNNS else None).to(device, memory_format=self.layout)
        self.optimizer = training.make_optimizer(self.model, recipe, 0.001)
        self.images = torch.randint(0, 256, (4 * self.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, 10, (4 * self.batch_size,), device=device)
        self.preprocessing = Preprocessing("CIFAR10", self.device)
        self.gen = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        draws = augmentation.draw_epoch(len(self.images), self.gen)
        order, flip, offset = (draw[: self.batch_size].to(self.device) for draw in draws)
        x = self.preprocessing.augment(self.images[order], flip, offset)
        x = x.contiguous(memory_format=self.layout)
        training.training_step(self.model, self.optimizer, x, self.labels[order], self.precision)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run(bench: Bench, width: int | None = None) -> None:
    """`width`: of mCNN [64]."""
    recipes = ["published"] if bench.quick else list(training.RECIPES)
    for arch, recipe in product(("mCNN", "resnet20"), recipes):
        kinds = {
            f"{precision}, {layout}": Kind(partial(TrainingStep, arch, recipe, precision, layout, width, "cpu"))
            for precision, layout in product(("fp32", "bf16"), FORMATS)
        }
        baselines = ("fp32, contiguous", "fp32, channels-last")
        work = f"zoo step, {arch}, {recipe}"
        timings = bench.compare(work, kinds, 2 if bench.quick else 3, baselines, operations="fp32, contiguous")
        batch_size, epochs = (int(training.RECIPES[recipe][name]) for name in ("batch_size", "epochs"))
        for kind, values in timings.items():
            hours = epochs * (N_TRAINING // batch_size) * statistics.median(values.wall) / 3600
            bench.add(f"networks an hour, {arch}, {recipe}", kind, value=1 / hours, unit="an hour")


if __name__ == "__main__":
    sys.exit(run_benchmark("zoo", run, __doc__))
