"""A published image set in three splits, on the device, for training and measuring the networks of a zoo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.datasets import images
from common.datasets.augmentation import Preprocessing, as_rgb_32, draw_epoch
from common.datasets.images import ImageSet
from common.seeds import generator_of


@dataclass(frozen=True)
class Splits:
    """Images of 32x32 in three channels, uint8, on the device."""

    training: ImageSet
    selection: ImageSet  # chooses the epoch: validation images or, as published, the test images
    test: ImageSet
    preprocessing: Preprocessing
    fingerprint: str  # of all training images

    @property
    def device(self) -> torch.device:
        return self.test.labels.device

    def batches(self, batch_size: int, generator: torch.Generator, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch, from batch number `first` on: augmented images (B, 3, 32, 32), channels last, and labels (B).

        A smaller last batch is left out, as published. Raises ValueError if there are fewer images than a batch.
        """
        if batch_size > len(self.training):
            raise ValueError(f"a batch of {batch_size} is more than the {len(self.training)} training images")
        order, flip, offset = (draw.to(self.device) for draw in draw_epoch(len(self.training), generator))
        for batch in range(first, len(self.training) // batch_size):
            rows = slice(batch * batch_size, (batch + 1) * batch_size)
            augmented = self.preprocessing.augment(self.training.images[order[rows]], flip[rows], offset[rows])
            yield augmented.contiguous(memory_format=torch.channels_last), self.training.labels[order[rows]]


def load_splits(
    name: str,
    data_dir: str | Path,
    device: torch.device,
    *,
    seed: int,
    subset: int | None = None,
    select: str = "validation",
    validation_share: float | None = None,
) -> Splits:
    """Load a published image set, downloaded if it is not there, and split it. Raises DataError.

    The seed draws `subset` training images, and among them the validation images (see images.split_validation), unless
    `select` is "test". With the same seed and subset, validation images are never among the training images of a zoo.
    """
    training, test = (images.load(name, split, data_dir, download=True) for split in images.SPLITS)
    fingerprint = training.fingerprint()
    if subset is not None:
        training = training[torch.randperm(len(training), generator=generator_of(seed))[:subset]]
    selection = None
    if select == "validation":
        training, selection = images.split_validation(training, seed, validation_share)
    training, test = (as_rgb_32(split).to(device) for split in (training, test))
    selection = test if selection is None else as_rgb_32(selection).to(device)
    return Splits(training, selection, test, Preprocessing(name, device), fingerprint)
