"""The architectures of a zoo by name, their saved models, and pairs of them.

Saved models are plain state dicts under the keys of the original (Godfrey et al., NeurIPS 2022): a zoo trained by either loads
in both.
"""

from __future__ import annotations

import hashlib
import random
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

    `width` is that of the first convolution, for those in CNNS alone. Raises ValueError for what there is not.

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
    """A saved network, with the number of classes and the width that it was made with, in evaluation mode, on the CPU.

    Of a transformer, the plain keys are known, too. No code in the file is run. Raises InputError.
    """
    path = Path(path)
    state = checkpoint.read(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ZooError(f"{path} is no state dict of a model")
    state = cct.stitchable_keys(state)
    tensors = list(state.values())
    # the first tensor is the first convolution's weight, the last one the classifier's bias
    n_classes, width = (tensor.shape[0] if tensor.ndim else 0 for tensor in (tensors[-1], tensors[0]))
    with torch.device("meta"):
        model = make(arch, max(n_classes, 1), max(width, 1) if arch in CNNS else None)
    why_not = difference(state, model.state_dict())
    if why_not:
        raise ZooError(f"{path} is no {arch}: {why_not}")
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ZooError(f"{path}: {_some(broken)} {'is' if len(broken) == 1 else 'are'} not finite (NaN or infinite)")
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval()


def difference(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """In which keys, or shapes, a state dict differs from that of a model; nothing if it fits."""
    missing, foreign = [key for key in own if key not in state], [key for key in state if key not in own]
    parts = [f"{what} {_some(keys)}" for what, keys in (("it lacks", missing), ("also has", foreign)) if keys]
    if not parts:
        wrong = [key for key in own if own[key].shape != state[key].shape]
        parts = [f"{key} is {tuple(state[key].shape)} there, not {tuple(own[key].shape)}" for key in wrong[:1]]
    return " and ".join(parts)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def pairs_of(folder: str | Path, chosen: list[str] | None, n: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of numbers of saved models <number>.pt: the ones that are chosen ("0-1"), or n that the seed draws.

    Raises ZooError if the zoo has too few.
    """
    numbers = sorted(int(path.stem) for path in Path(folder).glob("*.pt") if path.stem.isdigit())
    if len(numbers) < 2:
        raise ZooError(f"{folder} holds {len(numbers)} networks (0.pt, 1.pt, ...): two are needed; train_zoo.py makes them")
    if not chosen:
        return draw_pairs(numbers, n, seed)
    pairs = [read_pair(text, numbers) for text in chosen]
    if len(set(pairs)) < len(pairs):
        raise ZooError(f"--pairs {' '.join(chosen)} names a pair twice")
    return pairs


def read_pair(text: str, numbers: list[int]) -> tuple[int, int]:
    """Two of the numbers, written like 0-1. Raises ZooError."""
    first, dash, second = text.partition("-")
    if not (dash and first.isdigit() and second.isdigit()) or int(first) == int(second):
        raise ZooError(f"--pairs {text!r} is no pair of two networks: write it like 0-1")
    missing = [number for number in (int(first), int(second)) if number not in numbers]
    if missing:
        raise ZooError(f"--pairs {text}: the zoo has no {missing[0]}.pt, only {', '.join(map(str, numbers))}")
    return int(first), int(second)


def draw_pairs(numbers: list[int], n: int, seed: int) -> list[tuple[int, int]]:
    """n ordered pairs, all different, in rounds in which no network comes twice. Raises ZooError if there are not so many.

    >>> draw_pairs([0, 1, 2, 3], 2, seed=0)
    [(3, 1), (0, 2)]
    """
    if n > len(numbers) * (len(numbers) - 1):
        raise ZooError(f"{len(numbers)} networks make {len(numbers) * (len(numbers) - 1)} pairs, not {n}")
    chance = random.Random(seed)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < n:
        order = chance.sample(numbers, len(numbers))
        pairs += [pair for pair in zip(order[::2], order[1::2], strict=False) if pair not in pairs]
    return pairs[:n]


def load_members(folder: str | Path, arch: str, numbers: set[int], n_classes: int) -> dict[int, nn.Module]:
    """The saved models of some numbers, of equal shapes, which tell `n_classes` apart. Raises ZooError."""
    members = {number: load(Path(folder) / f"{number}.pt", arch) for number in sorted(numbers)}
    for number, model in members.items():
        classes = next(reversed(model.state_dict().values())).shape[0]
        if classes != n_classes:
            raise ZooError(f"{folder}/{number}.pt tells {classes} classes apart, the images have {n_classes}: --dataset")
        why_not = difference(model.state_dict(), members[min(numbers)].state_dict())
        if why_not:
            raise ZooError(f"{folder}/{number}.pt is not like {min(numbers)}.pt: {why_not}")
    return members


def fingerprint(members: dict[int, nn.Module]) -> str:
    """16 hex digits that other weights, or other numbers of members, do not have."""
    content = hashlib.sha256()
    for number, model in members.items():
        content.update(str(number).encode())
        for tensor in model.state_dict().values():
            content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()[:16]
