"""Image sets for tests: the real ones where they are, and small ones in the published formats."""

import os
import struct
from pathlib import Path

import pytest
import torch

from common.datasets import images
from common.datasets.images import ImageSet


def real(name: str, split: str) -> ImageSet:
    """A real image set; the test is skipped where it is not to be had, but never in CI, which says so."""
    try:
        return images.load(name, split, Path(__file__).parent.parent / "data")
    except images.DataError as error:
        if os.environ.get("REQUIRE_REAL_IMAGES"):
            raise
        pytest.skip(str(error))


def write_idx(path: Path, content: torch.Tensor) -> None:
    header = bytes([0, 0, 8, content.ndim]) + struct.pack(f">{content.ndim}I", *content.shape)
    path.write_bytes(header + content.to(torch.uint8).numpy().tobytes())


def write_mnist(folder: Path, training: ImageSet, test: ImageSet) -> Path:
    """The four idx files of two image sets."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, data in (("train", training), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", data.images[:, 0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", data.labels)
    return folder


def smooth(n: int, shape: tuple[int, int, int] = (1, 28, 28), seed: int = 0) -> ImageSet:
    """Random images with large smooth regions, of ten classes that differ in brightness."""
    gen = torch.Generator().manual_seed(seed)
    C, H, W = shape
    labels = torch.arange(n) % 10
    coarse = torch.rand(n, C, 4, 4, generator=gen) * 0.5 + labels[:, None, None, None] / 20
    fine = torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear")
    return ImageSet((fine * 255).to(torch.uint8), labels, tuple("0123456789"))
