"""Files that are replaced in one step, and checkpoints: written whole, read without running code, checked for damage."""

from __future__ import annotations

import copy
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from common.errors import InputError, warn

DIRECTORY = 0x10  # a flag of records of a zip archive: torch.load takes memory as it is for the content of such a record


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another model, or no checkpoint at all."""


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file: a reader finds the old content or the new one, never half of it, also after a power cut.

    Raises OSError (a full disk, for example) with the old file untouched and nothing left next to it.
    """
    new = path.with_name(path.name + ".new")
    if new.is_symlink():  # it would be written through
        new.unlink()
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(state: Any, path: Path) -> None:
    """Write a checkpoint of tensors and plain values; tensors go to the CPU. Raises OSError if it cannot be written."""
    state = on_cpu(state)

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # the zip writer hides the reason of a failed write
            raise error.__cause__ or error.__context__ or error from None

    atomic_write(path, write)


def on_cpu(state: Any) -> Any:
    """The same containers with all tensors on the CPU, so that a machine without a GPU reads the file with plain torch.load.

    What is on the CPU already is not copied.
    """
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        moved = {name: on_cpu(value) for name, value in state.items()}
        if all(moved[name] is value for name, value in state.items()):
            return state
        same = copy.copy(state)  # its type, and attributes: a module's state dict has versions
        same.update(moved)
        return same
    if type(state) in (list, tuple):
        values = [on_cpu(value) for value in state]
        return state if all(a is b for a, b in zip(values, state, strict=True)) else type(state)(values)
    return state


def read(path: str | Path) -> Any:
    """The content of a checkpoint, on the CPU. No code in it is run. Raises CheckpointError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is a directory, no checkpoint" if path.is_dir() else f"there is no checkpoint {path}")
    try:
        intact = has_right_checksums(path)
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols: what cannot be read is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign bytes fail in many ways
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this suite") from error
    if intact is None:
        warn(f"note: {path} has no checksums, so damage to it cannot be noticed")
    return state


def has_right_checksums(path: Path) -> bool | None:
    """True if the CRC-32 of every record is right, None if there are none. Raises BadZipFile if one is wrong.

    torch.load does not compare them. There are none in files of before torch 1.6, which are no zip archives, and in those
    saved with compute_crc32 = False, which have 0 everywhere.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch.load, too, goes by these
            return None
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED or record.external_attr & DIRECTORY for record in records):
                raise zipfile.BadZipFile("torch.save compresses nothing, and makes no directories")
            if not any(record.CRC for record in records):
                return None
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
    return True


def load_model(model: torch.nn.Module, weights: Any, path: Path) -> None:
    """Load a state dict that was read from `path`. Raises CheckpointError, with the model unchanged, if it does not fit."""
    check_fits(model, weights, path)
    model.load_state_dict(weights)


def check_fits(model: torch.nn.Module, weights: Any, path: Path) -> None:
    """Raises CheckpointError if `weights`, read from `path`, is no state dict of this model."""
    own = model.state_dict()
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


def has_finite_weights(model: torch.nn.Module) -> bool:
    """True if all parameters are finite; a GPU is waited for once."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())


def start_from(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take weights and moments from a best.pkl, at the optimiser's own learning rate. Raises CheckpointError."""
    state, own = read(path), [{**group} for group in optimizer.param_groups]
    if isinstance(state, dict) and "model" in state and "optimizer" not in state:
        raise CheckpointError(f"{path} has weights alone, without the moments of the optimizer: start from a best.pkl")
    if not isinstance(state, dict) or not {"model", "optimizer"} <= state.keys():
        raise CheckpointError(f"{path} is no checkpoint of this suite: it has no model and optimizer")
    load_model(model, state["model"], path)
    if not has_finite_weights(model):
        raise CheckpointError(f"{path} has weights that are not finite: choose an earlier checkpoint")
    try:
        optimizer.load_state_dict(state["optimizer"])
        moments = [(p, moment) for p, of in optimizer.state.items() for moment in of.values() if moment.ndim]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} has an optimizer of another model") from None
    if any(moment.shape != parameter.shape for parameter, moment in moments):
        raise CheckpointError(f"{path} has an optimizer of another model")
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
