"""The projection head, and saved models: their files, and encoders to use elsewhere.

    encoder = load_encoder("some_dir/encoder_cifar10_duet_rot_eq-rot_target-vm_final.pt")
    z = encoder(images - 0.5)  # images (B, C, H, W) in [0, 1] -> representations (B, 512)

Names of modules are the published ones, so that published weights fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common import checkpoint
from common.datasets import images
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


# ---- saved models ----------------------------------------------------------------------------------------------------------


def published_stem(dataset: str, model: str, equi_tx: str | None, target: str) -> str:
    """The published beginning of the names of a run's models."""
    equi = f"_{equi_tx}" if equi_tx else ""
    more = {"duet": f"_eq-{equi_tx}_target-{target}", "essl": f"_eq-{equi_tx}", "simclr": ""}
    return f"encoder_{dataset}_{model}{equi}{more[model]}"


class SavedModels:
    """The models of one run in a folder, <stem>_<when>.pt.

    Published names say little of a run, so a file <stem>.run says whose they are.
    """

    def __init__(self, folder: Path, stem: str, run_name: str):
        self.folder, self.stem, self.run_name, self.owner = folder, stem, run_name, folder / f"{stem}.run"

    def paths(self) -> list[Path]:
        """All models that are there."""
        models = (path for path in self.folder.glob(f"{self.stem}_*.pt"))
        return sorted(path for path in models if re.fullmatch(r"\d{4,}|final", path.stem[len(self.stem) + 1 :]))

    def check(self, *, begun: bool, overwrite: bool = False) -> None:
        """Make the folder. Raises InputError if models of another run are there; a run that has not `begun` has none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            return
        models = self.paths()
        if models and not (begun and self.owner.exists()):
            raise InputError(f"{models[0]} is there, of another run: overwrite it, or save elsewhere")
        name = self.owner.read_text(errors="replace") if self.owner.exists() else ""
        if name not in ("", self.run_name):
            raise InputError(f"{self.owner} says that the run {name!r} saves there: choose another place")

    def claim(self, *, begun: bool, overwrite: bool) -> None:
        """Note whose the models are; `overwrite` removes those of other runs. Raises InputError, OSError."""
        for old in (self.owner, *self.paths()) if overwrite else ():
            old.unlink(missing_ok=True)
        try:
            with open(self.owner, "x") as file:  # of two that start at once, one alone can
                file.write(self.run_name)
        except FileExistsError:
            self.check(begun=begun)
            self.owner.write_text(self.run_name)  # it is empty if a kill came between the two

    def save(self, model: nn.Module, when: str, options: dict[str, Any], steps: int, *, keep_all: bool) -> Path:
        """Write a model after `steps` steps, with the options of its training; older ones go. Raises OSError."""
        path = self.folder / f"{self.stem}_{when}.pt"
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        encoder: Any = model.base_network
        state = {"model": weights, "encoder": encoder.options, "options": options, "steps": steps}
        checkpoint.save(state | {"description": describe(encoder, options)}, path)
        for old in self.paths():
            if old != path and not keep_all:
                old.unlink()
        return path


def describe(encoder: CifarResNet, options: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an encoder in its checkpoints, from the options of its training (common/trained.py)."""
    data = {"name": options["dataset"], "image_size": options["image_size"], "center_crop": options["center_crop"]}
    return {"constructor": "CifarResNet", "arguments": encoder.options, "data": data}


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


def load_for_images(path: Path, dataset: str | None) -> tuple[CifarResNet, dict[str, Any]]:
    """The encoder of a saved model, and the options of the images that it takes: dataset, image_size and center_crop.

    `dataset` replaces the one that it was trained with. Raises InputError also if it has other channels.
    """
    saved = read_saved(path)
    encoder, options = encoder_of(saved, path), saved["options"]
    known = {"dataset": tuple(images.BY_OPTION), "image_size": range(8, 513), "center_crop": (False, True)}
    for name, values in known.items():
        if type(options.get(name)) is not type(values[0]) or options[name] not in values:
            raise InputError(f"{path} is of another version: its option {name} is {options.get(name, 'missing')!r}")
    own = {name: options[name] for name in known} | ({"dataset": dataset} if dataset else {})
    channels = images.SHAPES[images.BY_OPTION[own["dataset"]]][0]
    if channels != encoder.conv1.in_channels:
        raise InputError(f"{path} takes {encoder.conv1.in_channels} channels, images of {own['dataset']} have {channels}")
    return encoder, own


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
    if not checkpoint.has_finite_weights(encoder):
        raise InputError(f"{path} has weights that are not finite")
    return encoder.eval()
