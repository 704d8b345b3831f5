"""Images of a user, from a .npy, a PNG, or a folder of PNGs, as a model's images are: uint8, of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.errors import InputError, one_line

MODES = ("1", "L", "P", "LA", "RGB", "RGBA")  # of PNGs with 8 bits


def read_images(path: Path, shape: Sequence[int]) -> Tensor:
    """Images (N, C, H, W) uint8 of the shape (C, H, W).

    A .npy holds (N, H, W), or (N, H, W, C), integers in 0..255; the PNGs of a folder come in the order of their names. Raises
    InputError for what is missing, damaged, or does not fit.
    """
    C, H, W = shape
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".png")
        if not files:
            raise InputError(f"{path} has no PNGs")
        images = np.stack([_read_png(file, C, H, W) for file in files])
    elif not path.is_file():
        raise InputError(f"there is no file {path}")
    elif path.suffix.lower() == ".png":
        images = _read_png(path, C, H, W)[None]
    else:
        images = _read_npy(path, C, H, W)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_array(images: Tensor) -> NDArray[np.uint8]:
    """Images (N, C, H, W) as `read_images` takes them from a .npy: (N, H, W), or in colour (N, H, W, C)."""
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    return array[..., 0] if array.shape[3] == 1 else array


def _read_npy(path: Path, C: int, H: int, W: int) -> NDArray[np.uint8]:
    """(N, H, W, C)."""
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # damaged and foreign bytes fail in many ways
        reason = "it holds Python objects" if "Object arrays" in str(error) else "it is damaged, or something else"
        raise InputError(f"{path} cannot be read: {reason}; a .npy, a PNG or a folder of PNGs is needed") from None
    one = (H, W) if C == 1 else (H, W, C)
    if not isinstance(array, np.ndarray) or array.shape[1:] not in (one, (H, W, C)):
        found = f"an array {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(f"{path} holds {found}: the model takes images (N, {', '.join(map(str, one))})")
    if array.dtype.kind not in "iu":
        hint = "(255 * images).round().astype('uint8') for images in 0..1"
        raise InputError(f"{path} holds {array.dtype}: integers 0..255 are needed, {hint}")
    if not len(array):
        raise InputError(f"{path} holds no images")
    if array.min() < 0 or array.max() > 255:
        raise InputError(f"{path} has values {array.min()}..{array.max()}: 0..255 are needed")
    return array.reshape(-1, H, W, C).astype(np.uint8)


def _read_png(path: Path, C: int, H: int, W: int) -> NDArray[np.uint8]:
    """(H, W, C)."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            if file.size != (W, H):
                raise InputError(f"{path} has {file.size[0]} x {file.size[1]} pixels: the model takes {W} x {H}")
            if file.mode not in MODES:
                raise InputError(f"{path} has no channels of 8 bits (its mode is {file.mode}): save it as grey or RGB")
            pixels, alpha = np.split(np.asarray(file.convert("RGBA")), [3], axis=2)
    except InputError:
        raise
    except Exception as error:  # damaged and foreign bytes fail in many ways
        raise InputError(f"{path} cannot be read as a PNG: {one_line(error, 200)}") from None
    if (alpha != 255).any():
        raise InputError(f"{path} is transparent in places: save it without an alpha channel")
    if C == 1 and (pixels != pixels[:, :, :1]).any():
        raise InputError(f"{path} is in colour: the model takes grey images")
    return pixels[:, :, :C].copy()  # writable
