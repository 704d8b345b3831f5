"""Trained models: rebuilt from what a checkpoint holds, and exported without the state of their training.

    model = common.load("results/amortised_mog/NAME")           # of a run's directory, or of a file
    common.export("results/amortised_mog/NAME", "mixture.pkl")  # its weights alone, in a small file

best.pkl, last.pkl, the .pt files of train_ssl.py and exported files hold the state dict "model", and what the model is made
of and what it was trained on, as plain values:

    "description": {
        "constructor": "MixtureNetwork",                                # one of CONSTRUCTORS
        "arguments": {"n_dim": 2, "n_clust": 4, "n_hidden": 128, ...},  # all by keyword
        "data": {"name": "mixtures", "n_dim": 2, "n_clust": 4, ...},
    }

| script | constructor | "data" |
| --- | --- | --- |
| amortised_clustering.py | make_set_model | name "clustering", n_dim, n_labels, n_points [from, to], n_clusters [from, to], mean and deviation of a coordinate over all training tasks (points are not standardised) |
| swarm_transformer.py | ImageTransformer | name (FashionMNIST ...), shape [C, H, W], classes (their names), cond |
| amortised_mog.py | MixtureNetwork | name "mixtures", n_dim, n_clust, n_points [from, to], mean_range, deviation |
| train_ssl.py | CifarResNet | name (cifar10 ...), image_size, center_crop; it takes images in [0, 1] less 0.5 |
| train_zoo.py | zoo.make | name (cifar10 ...) where the model's record says it; see common/datasets/augmentation.py |
| routing_networks.py | make_routed | name (MNIST-MTL ...), n_tasks, n_labels, mean and deviation of each channel in [0, 1] |

Members of a zoo are plain state dicts, as published: their architecture is in the record next to them, or is found from the weights.
An exported file has "model", "description", and of "name", "best_val_loss", "steps" what the checkpoint has.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint
from common.checkpoint import CheckpointError
from common.errors import InputError, one_line
from common.models import cct, routed, zoo
from common.models.image_transformer import ImageTransformer
from common.models.mixture import MixtureNetwork
from common.models.resnet import CifarResNet
from common.models.sets import make_set_model

CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {
    "make_set_model": make_set_model,
    "ImageTransformer": ImageTransformer,
    "MixtureNetwork": MixtureNetwork,
    "CifarResNet": CifarResNet,
    "zoo.make": zoo.make,
    "make_routed": routed.make_routed,
}
CONVOLUTIONAL = ("CifarResNet", "zoo.make", "make_routed")  # in the scripts' layout of weights: another may round differently
ENCODER = "base_network."  # of the keys of a model in training with train_ssl.py, which has heads, too
IMAGE_OPTIONS = ("image_size", "center_crop")  # of a saved encoder
KEPT = ("name", "best_val_loss", "steps")  # further entries of an exported file


def load(path: str | Path, description: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a run's directory, or of a checkpoint, on the CPU, in evaluation mode, in float32 and not compiled.

    Of a directory it is the model that the run's report is about: that of best.pkl, or of the last epoch where there is none.
    Of train_ssl.py it is the encoder, whose output the probes classify, without its heads. `description` is for files that
    have none. No code in a file is run, and no random number is drawn. Raises CheckpointError.
    """
    path = file_of(Path(path))
    weights, described, _ = read(path, description)
    return build(described, weights, path)


def describe(path: str | Path) -> dict[str, Any]:
    """The description in a checkpoint, or in that of a run's directory. Raises CheckpointError."""
    return read(file_of(Path(path)))[1]


def export(path: str | Path, out: str | Path, description: Mapping[str, Any] | None = None) -> Path:
    """Write the model of a run, or of a checkpoint, to a new file, without heads, optimiser and state of the training.

    Both `load` and `train_ssl.py --linear-probe` read it. Raises CheckpointError, InputError if `out` is there, and OSError.
    """
    path, out = file_of(Path(path)), Path(out)
    if out.exists():
        raise InputError(f"{out} is there: remove it, or name another file")
    weights, described, state = read(path, description)
    build(described, weights, path)  # what does not load is not exported
    content = {"model": weights, "description": described} | {name: state[name] for name in KEPT if name in state}
    if described["constructor"] == "CifarResNet":  # in the form of a saved encoder
        data, model = described.get("data", {}), {ENCODER + key: value for key, value in weights.items()}
        options = {"dataset": data.get("name"), **{name: data.get(name) for name in IMAGE_OPTIONS}}
        content |= {"model": model, "encoder": described["arguments"], "options": options}
    checkpoint.save(content, out)
    return out


def file_of(path: Path) -> Path:
    """The checkpoint of a run's directory: best.pkl, the last encoder, or the state of its last step. A file is itself."""
    if not path.is_dir():
        part = path.with_name(path.name + ".part")
        if not path.exists() and part.is_dir():
            raise CheckpointError(f"there is no {path}: the run has not finished, {part} is its directory")
        return path
    candidates = (path / "best.pkl", *sorted(path.glob("encoder_*_final.pt")), path / "last.pkl")
    for file in candidates:
        if file.is_file():
            return file
    models = sorted(file.name for file in path.glob("*.pt"))
    several = (
        f"it has {', '.join(models[:3])}{' ...' if len(models) > 3 else ''}: name one" if models else "no best.pkl is there"
    )
    raise CheckpointError(f"{path} is no directory of a run with one model: {several}")


def read(path: Path, description: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """State dict, description and whole content of a checkpoint. Raises CheckpointError."""
    state = checkpoint.read(path)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} is no checkpoint of this suite: it holds no model")
    if all(isinstance(value, Tensor) for value in state.values()):
        member = cct.stitchable_keys(state)
        return member, dict(description or describe_member(member, path)), {}
    weights = state.get("model")
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} is no checkpoint of this suite: it holds no model")
    described = description or state.get("description") or describe_encoder(state)
    if not isinstance(described, Mapping):
        raise CheckpointError(
            f"{path} does not say what its model is made of, as files of an earlier version: give a description, made by the "
            "script's `describe` from the options of the run (docs/api.md)"
        )
    if described.get("constructor") == "CifarResNet":
        weights = {key.removeprefix(ENCODER): value for key, value in weights.items() if key.startswith(ENCODER)}
    return weights, dict(described), state


def describe_encoder(state: dict[str, Any]) -> dict[str, Any] | None:
    """The description of an encoder saved by train_ssl.py before it had one."""
    encoder, options = state.get("encoder"), state.get("options")
    if not isinstance(encoder, dict) or not isinstance(options, dict):
        return None
    data = {"name": options.get("dataset"), **{name: options.get(name) for name in IMAGE_OPTIONS}}
    return {"constructor": "CifarResNet", "arguments": encoder, "data": data}


def describe_member(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The description of a member of a zoo: what its record says, or else the one architecture that has such weights."""
    try:
        options = json.loads(path.with_suffix(".json").read_text())["options"]
        arch, data = str(options["arch"]), {"name": options.get("dataset")}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        data, fitting = {}, [arch for arch in zoo.ARCHITECTURES if not difference(weights, arch)]
        if not fitting:
            raise CheckpointError(
                f"{path} is a state dict of no architecture of a zoo: {', '.join(zoo.ARCHITECTURES)}"
            ) from None
        if len(fitting) > 1:
            raise CheckpointError(
                f"{path} is of {' or '.join(fitting)}, whose weights look the same, and {path.stem}.json, which names one, is "
                "missing; common.models.zoo.load takes the name"
            ) from None
        arch = fitting[0]
    if arch not in zoo.ARCHITECTURES:
        raise CheckpointError(f"{path.with_suffix('.json')} is of another version: there is no architecture {one_line(arch)}")
    n_classes, width = zoo.sizes_of(weights, arch)
    return {"constructor": "zoo.make", "arguments": {"arch": arch, "n_classes": n_classes, "width": width}, "data": data}


def difference(weights: dict[str, Tensor], arch: str) -> str:
    """How a state dict differs from that of an architecture, in words; empty if it fits."""
    with torch.device("meta"):  # whatever the file is, and so the sizes
        return zoo.difference(weights, zoo.make(arch, *zoo.sizes_of(weights, arch)).state_dict())


def build(description: Mapping[str, Any], weights: dict[str, Tensor], path: Path) -> nn.Module:
    """The model of a description with weights read from `path`. Raises CheckpointError if they do not go together."""
    name, arguments = description.get("constructor"), description.get("arguments")
    make = CONSTRUCTORS.get(name) if isinstance(name, str) else None
    if make is None or not isinstance(arguments, Mapping):
        known = ", ".join(CONSTRUCTORS)
        raise CheckpointError(f"{path} is of another version, or damaged: a model by {one_line(name, 100)}, not one of {known}")
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = make(**arguments)
    except Exception as error:  # arguments of another version or of no sense fail in many ways
        reason = one_line(error, 200) or type(error).__name__
        raise CheckpointError(
            f"{path} is of another version, or damaged: {name} makes no model of its arguments ({reason})"
        ) from None
    if why_not := zoo.difference(weights, model.state_dict()):
        raise CheckpointError(f"{path} does not fit its description, of {name}: {why_not}")
    broken = [key for key, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} has weights that are not finite, {broken[0]} for one: choose an earlier checkpoint")
    checkpoint.load_model(model, weights, path)
    if name in CONVOLUTIONAL:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()
