"""Models, data and the life of runs, shared by the experiments. Importing it reads no file and loads no other package.

model = common.load("results/amortised_mog/NAME")  # the trained model of a run, or of a file
common.export("results/amortised_mog/NAME", "mixture.pkl")  # its weights alone, in a small file
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def load(path: str | Path, description: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a run's directory, or of a checkpoint, on the CPU, in evaluation mode: see `common.trained.load`."""
    from common import trained

    return trained.load(path, description)


def export(path: str | Path, out: str | Path, description: Mapping[str, Any] | None = None) -> Path:
    """Write the model of a run, or of a checkpoint, without the state of its training: see `common.trained.export`."""
    from common import trained

    return trained.export(path, out, description)
