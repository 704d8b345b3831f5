"""The architectures of a zoo by name, and their saved models.

A saved model is a plain state dict under the keys of the original (Godfrey et al., NeurIPS 2022), so a zoo trained by either
loads in both.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from common import checkpoint
from common.errors import InputError
from common.models import cct, cnn
from common.models.stitchable_resnet import STAGES, StitchableResNet

CNNS = {
    "mCNN": cnn.mCNN,
    "mCNN_k": cnn.mCNN_k,
    "mCNN_k_sigmoid": cnn.mCNN_k_sigmoid,
    "cwCNN": cnn.cwCNN,
    "cwCNN_k": cnn.cwCNN_k,
}
ARCHITECTURES = (*CNNS, *STAGES, *cct.ARCHITECTURES)


class ZooError(InputError):
    """A saved model that is missing, damaged, or of another architecture."""


def make(arch: str, n_classes: int = 10, width: int | None = None) -> nn.Module:
    """A network with random weights: (B, 3, 32, 32) -> (B, n_classes).

    `width` is the number of channels of the first convolution, for CNNS alone. Raises ValueError for unknown names.

    >>> make("mCNN", width=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"there is no architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if arch in CNNS:
        return CNNS[arch](n_classes, width or cnn.WIDTHS[arch])
    if width is not None:
        raise ValueError(f"{arch} has no width to choose: {', '.join(CNNS)} have")
    if arch in STAGES:
        return StitchableResNet(*STAGES[arch], n_classes, padded_shortcut=arch != "resnet18")
    return cct.cct(arch, n_classes)


def load(path: str | Path, arch: str) -> nn.Module:
    """Load a network, with its own number of classes and width, in evaluation mode, on the CPU.

    A transformer may have the plain keys, too. No code in the file is run. Raises InputError.
    """
    path = Path(path)
    state = checkpoint.read(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ZooError(f"{path} is no state dict of a model")
    state = cct.stitchable_keys(state)
    with torch.device("meta"):
        model = make(arch, *sizes_of(state, arch))
    why_not = difference(state, model.state_dict())
    if why_not:
        raise ZooError(f"{path} is no {arch}: {why_not}")
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ZooError(f"{path}: {_some(broken)} {'is' if len(broken) == 1 else 'are'} not finite (NaN or infinite)")
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval()


def sizes_of(state: dict[str, Tensor], arch: str) -> tuple[int, int | None]:
    """The number of classes of a state dict and, for CNNS, the width: at least 1 each, whatever the tensors are."""
    tensors = list(state.values())
    # the first tensor is the first convolution's weight, the last one the classifier's bias
    width, n_classes = (max(1, tensor.shape[0]) if tensor.ndim else 1 for tensor in (tensors[0], tensors[-1]))
    return n_classes, width if arch in CNNS else None


def difference(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """The keys or shapes in which a state dict differs from a model's `own`, in words; empty if it fits."""
    missing, foreign = [key for key in own if key not in state], [key for key in state if key not in own]
    parts = [f"{what} {_some(keys)}" for what, keys in (("it lacks", missing), ("also has", foreign)) if keys]
    if not parts:
        wrong = [key for key in own if own[key].shape != state[key].shape]
        parts = [f"{key} is {tuple(state[key].shape)} there, not {tuple(own[key].shape)}" for key in wrong[:1]]
    return " and ".join(parts)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def load_members(folder: str | Path, arch: str, numbers: set[int]) -> dict[int, nn.Module]:
    """Load the models <number>.pt of a folder. Raises ZooError unless all have the same shapes."""
    members = {number: load(Path(folder) / f"{number}.pt", arch) for number in sorted(numbers)}
    for number, model in members.items():
        why_not = difference(model.state_dict(), members[min(numbers)].state_dict())
        if why_not:
            raise ZooError(f"{folder}/{number}.pt is not like {min(numbers)}.pt: {why_not}")
    return members


def fingerprint(members: dict[int, nn.Module]) -> str:
    """A hash of the members' numbers and weights: 16 hex digits."""
    content = hashlib.sha256()
    for number, model in members.items():
        content.update(str(number).encode())
        for tensor in model.state_dict().values():
            content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()[:16]
