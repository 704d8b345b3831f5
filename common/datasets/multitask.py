"""Multi-task versions of image sets: a sample is an image, a task, and a label within that task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.datasets import images
from common.datasets.images import DataError, ImageSet
from common.seeds import generator_of

N_TASKS = {"MNIST-MTL": 10, "FashionMNIST-MTL": 10, "CIFAR100-MTL": 20}
N_LABELS = {"MNIST-MTL": 2, "FashionMNIST-MTL": 2, "CIFAR100-MTL": 5}
PER_TASK = {"train": 1000, "test": 200}  # images of the digit, and as many of others, in one-against-rest tasks
# the superclass of each of CIFAR-100's classes, in their alphabetical order
CIFAR100_SUPERCLASSES = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12,
    14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1,
    9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip


@dataclass(frozen=True)
class MultitaskSet:
    """N images, each with its task and its label within the task."""

    images: Tensor  # (N, C, H, W) uint8
    tasks: Tensor  # (N) int64
    labels: Tensor  # (N) int64
    task_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> MultitaskSet:
        return MultitaskSet(self.images.to(device), self.tasks.to(device), self.labels.to(device), self.task_names)


def load(name: str, data_dir: str | Path, seed: int, per_task: int | None = None) -> tuple[MultitaskSet, MultitaskSet, str]:
    """Training and test split of one of N_TASKS, read or downloaded, and a fingerprint of the images. Raises DataError.

    One-against-rest tasks have `per_task` training images of their class [1,000], and as many of others.
    """
    train, test = (images.load(name.removesuffix("-MTL"), split, data_dir, download=True) for split in images.SPLITS)
    if name == "CIFAR100-MTL":
        return superclasses(train), superclasses(test), train.fingerprint()
    training, test_set = (
        one_against_rest(train, per_task or PER_TASK["train"], seed),
        one_against_rest(test, PER_TASK["test"], seed),
    )
    return training, test_set, train.fingerprint()


def one_against_rest(data: ImageSet, per_task: int, seed: int) -> MultitaskSet:
    """A task for each class, with `per_task` images of it (label 1) and as many of all others together (label 0).

    The images are drawn with the seed. Raises DataError if a class has too few.
    """
    n_classes = len(data.classes)
    by_class = [(data.labels == c).nonzero()[:, 0] for c in range(n_classes)]
    fewest = min(len(own) for own in by_class)
    if fewest < per_task:
        raise DataError(f"a task needs {per_task} images of its class: there is one of {fewest}")
    indices, tasks, labels = [], [], []
    for task in range(n_classes):
        others = [c for c in range(n_classes) if c != task]
        # as equal as possible; the classes with one image more rotate with the task
        shares = [per_task // len(others) + ((i + task) % len(others) < per_task % len(others)) for i in range(len(others))]
        for c, n, label in [(task, per_task, 1), *zip(others, shares, [0] * len(others), strict=True)]:
            own = by_class[c]
            indices.append(own[torch.randperm(len(own), generator=generator_of(seed, task, c)).to(own.device)[:n]])
            tasks += [task] * n
            labels += [label] * n
    return MultitaskSet(data.images[torch.cat(indices)], torch.tensor(tasks), torch.tensor(labels), tuple(data.classes))


def superclasses(data: ImageSet) -> MultitaskSet:
    """CIFAR-100 as 20 tasks of five classes: the task is the superclass, the label the rank of the class in it.

    >>> from common.datasets.images import ImageSet
    >>> classes = torch.tensor([8, 13, 48, 58, 90])  # bicycle, bus, motorcycle, pickup truck, train: vehicles 1
    >>> mtl = superclasses(ImageSet(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), classes, ("",) * 100))
    >>> mtl.tasks.tolist(), mtl.labels.tolist()
    ([18, 18, 18, 18, 18], [0, 1, 2, 3, 4])
    """
    superclass = torch.tensor(CIFAR100_SUPERCLASSES)
    rank = torch.stack([(superclass[:c] == superclass[c]).sum() for c in range(100)])
    labels = data.labels.cpu()
    return MultitaskSet(data.images, superclass[labels], rank[labels], tuple(f"superclass {i}" for i in range(20)))
