"""Image sets for self-supervised learning: both splits, as large as transformations are to see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from common import parallel
from common.datasets import images
from common.datasets.images import DataError, ImageSet
from common.errors import InputError


@dataclass(frozen=True)
class Data:
    """Both splits of a set, and a fingerprint of the files' content."""

    training: ImageSet
    test: ImageSet
    fingerprint: str


def load_splits(
    name: str, data_dir: str | Path, side: int, device: torch.device, *, subset: int | None = None, seed: int = 0
) -> Data:
    """Both splits of a set, images with `side` rows and columns, on a device; `subset` training images, drawn by the seed.

    Files that are nowhere are downloaded to `data_dir`, by the first process. Raises DataError, also if a split is too small
    to give every process an image, and batch norm two.
    """

    def fetch() -> list[ImageSet]:
        return [images.load(name, split, data_dir, download=True) for split in images.SPLITS]

    parallel.main_first(fetch, InputError, OSError)
    training, test = fetch()
    fingerprint = training.fingerprint() + test.fingerprint()
    if subset:
        if subset > len(training):
            raise DataError(f"a subset of {subset} is more than the {len(training)} training images of {name}")
        training = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:subset]]
    if min(len(training), len(test)) < max(2, parallel.world_size()):
        counts = f"{len(training)} training and {len(test)} test images"
        raise DataError(f"{name} has {counts}: too few for {parallel.world_size()} processes")
    return Data(images.resize(training, side).to(device), images.resize(test, side).to(device), fingerprint)
