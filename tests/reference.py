"""Reading the reference vectors in tests/data, and comparing with them."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


class Vectors:
    """One file of vectors; `v["x"]` is a tensor, `v.config` the options."""

    def __init__(self, name: str):
        self.arrays = np.load(DATA / f"{name}.npz", allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"])) if "config" in self.arrays else {}

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}


def names(pattern: str) -> list[str]:
    return sorted(f"{path.parent.name}/{path.stem}" for path in (DATA / "swarm").glob(f"{pattern}.npz"))


def assert_agrees(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """The largest difference, relative to the largest entry (or absolute where that is below 1e-5)."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    largest = expected.abs().max().item()
    error = (actual.detach() - expected).abs().max().item() / (largest if largest > 1e-5 else 1.0)
    assert error <= tolerance, f"{what}: off by {error:.2g} of the largest entry, more than {tolerance:g}"
