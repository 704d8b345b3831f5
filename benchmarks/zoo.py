"""How many models of a zoo can be trained in an hour, by recipe, precision and memory format.

    python -m benchmarks.zoo            # mCNN and resnet20 as published; --width 8 --repeats 1 for a quick look

Steps on random images, augmentation included, are timed in turn, several times; medians. A model's time is that of the steps
of all its epochs on 45,000 images, extrapolated; evaluation and the reading of data are left out. "contiguous" is the memory
format that one writes first; train_zoo.py uses channels-last for both recipes. Accuracy is not looked at here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import product

import torch

from common.datasets import augmentation
from common.datasets.augmentation import Preprocessing
from common.models import zoo
from common.run.memory import tune_malloc
from common.zoo import training

N_TRAINING = 45_000
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="of mCNN [64]")
    parser.add_argument("--steps", type=int, help="timed at a time [2 on a CPU, 50 on a GPU]")
    parser.add_argument("--repeats", type=int, default=5, help="[%(default)s]")
    return parser


class Kind:
    """A training step of one architecture, recipe, precision and memory format."""

    def __init__(self, arch: str, recipe: str, precision: str, layout: str, width: int | None, device: torch.device):
        torch.manual_seed(0)
        self.precision, self.device, self.layout = precision, device, FORMATS[layout]
        self.batch_size, self.epochs = (int(training.RECIPES[recipe][name]) for name in ("batch_size", "epochs"))
        self.model = zoo.make(arch, width=width if arch in zoo.CNNS else None).to(device, memory_format=self.layout)
        self.optimizer = training.make_optimizer(self.model, recipe, 0.001)
        self.images = torch.randint(0, 256, (4 * self.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, 10, (4 * self.batch_size,), device=device)
        self.preprocessing = Preprocessing("CIFAR10", device)
        self.gen = torch.Generator().manual_seed(0)

    def seconds(self, steps: int) -> float:
        """Seconds a step takes."""
        began = time.perf_counter()
        for _ in range(steps):
            draws = augmentation.draw_epoch(len(self.images), self.gen)
            order, flip, offset = (draw[: self.batch_size].to(self.device) for draw in draws)
            x = self.preprocessing.augment(self.images[order], flip, offset)
            x = x.contiguous(memory_format=self.layout)
            training.training_step(self.model, self.optimizer, x, self.labels[order], self.precision)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    tune_malloc()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = args.steps or (50 if device.type == "cuda" else 2)
    choices = list(product(("mCNN", "resnet20"), training.RECIPES, ("fp32", "bf16"), FORMATS))
    kinds = {choice: Kind(*choice, args.width, device) for choice in choices}
    for kind in kinds.values():
        kind.seconds(1)  # warm-up
    times: dict[tuple[str, str, str, str], list[float]] = {choice: [] for choice in choices}
    for _ in range(args.repeats):
        for choice, kind in kinds.items():
            times[choice].append(kind.seconds(steps))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, mCNN of width {args.width or 64}, medians of {args.repeats} x {steps} steps")
    print(
        f"{'':>10}{'recipe':>12}{'precision':>11}{'memory':>15}{'ms a step':>12}{'images/s':>11}{'models/hour':>13}{'speed':>8}"
    )
    for choice in choices:
        arch, recipe, precision, layout = choice
        kind, step = kinds[choice], statistics.median(times[choice])
        hours = kind.epochs * (N_TRAINING // kind.batch_size) * step / 3600
        plain = statistics.median(times[arch, recipe, "fp32", "contiguous"])
        print(
            f"{arch:>10}{recipe:>12}{precision:>11}{layout:>15}{1000 * step:>12.2f}{kind.batch_size / step:>11.0f}"
            f"{1 / hours:>13.3g}{plain / step:>7.2f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
