"""The projection head, and saved models: their files, and encoders to use elsewhere.

    encoder = load_encoder("some_dir/encoder_cifar10_duet_rot_eq-rot_target-vm_final.pt")
    z = encoder(images - 0.5)  # images (B, C, H, W) in [0, 1] -> representations (B, 512)

Names of modules are the published ones, so that published weights fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from common import checkpoint
from common.errors import InputError
from common.models.resnet import CifarResNet

HIDDEN, EMBEDDING = 2048, 128


def projection_head(features: int) -> nn.Sequential:
    """SimCLR's projection: two hidden layers, batch norm after each layer and at the end."""
    return nn.Sequential(
        nn.Linear(features, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, EMBEDDING), nn.BatchNorm1d(EMBEDDING),
    )  # fmt: skip


# ---- one saved model -----------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: Path, options: dict[str, Any], steps: int) -> None:
    """Write a model of DUET, SimCLR or ESSL after `steps` steps, with the options of its training. Raises OSError."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    state = {"model": weights, "encoder": model.base_network.options, "options": options, "steps": steps}  # type: ignore[union-attr]
    checkpoint.save(state, path)


def read_saved(path: str | Path) -> dict[str, Any]:
    """A saved model: `model` (a state dict), `encoder` and `options`. Runs no code in it. Raises InputError if it is none."""
    state = checkpoint.read(path)
    parts = ("model", "encoder", "options")
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in parts):
        raise InputError(f"{path} is no encoder saved by train_ssl.py")
    return state


def load_encoder(path: str | Path) -> CifarResNet:
    """The encoder of a saved model, on the CPU, ready for use (in evaluation mode). Raises InputError if there is none."""
    return encoder_of(read_saved(path), path)


def encoder_of(state: dict[str, Any], path: str | Path) -> CifarResNet:
    """The encoder of a saved model that `read_saved` has read. Raises InputError if it is of another version, or damaged."""
    try:
        encoder = CifarResNet(**state["encoder"])
    except Exception as error:  # options of another version or of no sense fail in many ways
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} is of another version: no encoder with {state['encoder']} can be made ({reason})") from None
    prefix = "base_network."
    weights = {key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)}
    shapes, saved_shapes = (
        {name: tuple(getattr(value, "shape", ("no tensor",))) for name, value in tensors.items()}
        for tensors in (encoder.state_dict(), weights)
    )
    for name in shapes | saved_shapes:
        if shapes.get(name) != saved_shapes.get(name):
            there, here = (known.get(name, "missing") for known in (saved_shapes, shapes))
            raise InputError(f"{path} is of another version: {prefix}{name} is {there} there and {here} here")
    checkpoint.load_model(encoder, weights, Path(path))
    if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
        raise InputError(f"{path} has weights that are not finite")
    return encoder.eval()


# ---- the models of a run in a folder ---------------------------------------------------------------------------------------


def saved_models(folder: Path, stem: str) -> list[Path]:
    """The models that a run has saved in a folder under a published name."""
    return sorted(path for path in folder.glob(f"{stem}_*.pt") if re.fullmatch(r"\d{4,}|final", path.stem[len(stem) + 1 :]))


def check_owner(folder: Path, stem: str, run_name: str, *, begun: bool) -> None:
    """Check that the models in a folder are of this run alone: published names say little.

    A file <stem>.run says whose they are. A run that has not `begun` has none. Raises InputError if another run's are there.
    """
    owner, models = folder / f"{stem}.run", saved_models(folder, stem)
    if models and not (begun and owner.exists()):
        raise InputError(f"{models[0]} is there, of another run: overwrite it, or save elsewhere")
    name = owner.read_text(errors="replace") if owner.exists() else ""
    if name not in ("", run_name):
        raise InputError(f"{owner} says that the run {name!r} saves there: choose another place")


def claim(folder: Path, stem: str, run_name: str, *, begun: bool, overwrite: bool) -> None:
    """Note that the models in a folder are of this run; `overwrite` removes those of others. Raises InputError, OSError."""
    owner = folder / f"{stem}.run"
    for old in (owner, *saved_models(folder, stem)) if overwrite else ():
        old.unlink(missing_ok=True)
    try:
        with open(owner, "x") as file:  # of two that start at once, one alone can
            file.write(run_name)
    except FileExistsError:
        check_owner(folder, stem, run_name, begun=begun)
        owner.write_text(run_name)  # it is empty if a kill came between the two
