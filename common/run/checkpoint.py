"""Checkpoint files: what they are called, written in one step, read without running anything in them.

`best.pkl` holds the model with the lowest validation loss so far (`model`, `optimizer`, `name`, `best_val_loss`; infinity
before the first validation, when the model is the untrained one). `last.pkl` holds all that is needed to go on exactly where
the run stood.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

BEST, LAST = "best.pkl", "last.pkl"


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, of another model, or no checkpoint at all; the message is one line."""


def write_in_one_step(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file: whoever opens it finds the old content or the new one, never half; also after a power cut.

    Raises OSError (a full disk, say) with the old file untouched and nothing left beside it.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint of tensors and plain values in one step. Raises OSError if it cannot be written."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # the zip writer hides the reason of a failed write
            raise error.__cause__ or error.__context__ or error from None

    write_in_one_step(path, write)


def load(path: Path, needed: tuple[str, ...] = ("model", "optimizer", "best_val_loss")) -> dict[str, Any]:
    """Read a checkpoint to the CPU; no code in it is run. Raises CheckpointError if it is not one with the `needed` entries."""
    if not path.is_file():
        raise CheckpointError(f"{path} is a directory, no checkpoint" if path.is_dir() else f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign bytes fail in many ways
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this suite") from error
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of this suite: it has no entry {missing[0]!r}")
    return state


def load_model(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a model. Raises CheckpointError, before anything is changed, if they do not fit."""
    own, weights = model.state_dict(), state["model"]
    if not isinstance(weights, dict) or own.keys() != weights.keys():
        raise CheckpointError(f"{path} is of another model: its tensors have other names; use the options it was trained with")
    for name, tensor in own.items():
        if not isinstance(weights[name], torch.Tensor) or weights[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(f"{path} is damaged: {name} is no tensor of weights")
        if tensor.shape != weights[name].shape:
            raise CheckpointError(
                f"{path} is of another model: {name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} here; "
                "use the options it was trained with"
            )
    model.load_state_dict(weights)


def seed_everything(seed: int) -> None:
    """Seed all global random generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of all global random generators, as plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, np.asarray(keys).tolist(), *rest),  # arrays would not load with weights_only=True
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the global random generators; those of devices that are not here any more are left out."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
