"""Two augmented views of each image, with the parameters that made them (Suau et al., ICML 2023, section 3).

A stack of transformations first draws values for each image of a batch, on the CPU, where a generator gives the same numbers
everywhere; then it transforms the images, on their device. The values also give the normalised parameter that DUET structures
its representation by, about 0 to 1 for each of the codes (scales of larger inputs begin at -0.1):

    sca  1 - (height of the crop - 1) / side of the view: about 0 for a whole image, 0.6 for the smallest crops
    rot  (degrees + 180) / 360          ron  1/8, 3/8, 5/8, 7/8 for 0 to 3 quarter turns
    fli, flv  1/4 as it is, 3/4 mirrored        blu, gra  0 as it is, 1 blurred or grey
    bri, con, sat, hue  linear in the factor over the range from which it is drawn; 1/2 as it is
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.ssl import transformations as tf

COLOURS = ("bri", "con", "sat", "hue")  # in the order of a jitter's factors
CODES = ("sca", "rot", "ron", "fli", "flv", "blu", "gra", "jit", "res", "ccr", *COLOURS)
PARAMETRISED = tuple(code for code in CODES if code not in ("jit", "res", "ccr"))
CIRCULAR = ("rot", "ron", "fli", "flv")  # codes whose parameters fit on a circle; of the others, both ends would be one point
NEEDS_RGB = ("gra", "jit", *COLOURS)
STRENGTHS = torch.tensor([0.4, 0.4, 0.4, 0.1])  # a factor is drawn from 1 -+ that; of hue, from 0 -+ that
UNCHANGED = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors
CROP_AREA, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
BLUR_SIGMA = (0.1, 2.0)
# the share of the images that is transformed; all of them by the others
PROBABILITY = {"fli": 0.5, "flv": 0.5, "blu": 0.5, "gra": 0.2, "jit": 0.8}


@dataclass(frozen=True)
class Draw:
    """Values (B, ...) of each operation of a stack for a batch, and the order of colour steps."""

    values: tuple[Tensor, ...]
    colour_order: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Draw:
        return Draw(tuple(values[rows] for values in self.values), self.colour_order)

    def to(self, device: torch.device) -> Draw:
        return Draw(tuple(values.to(device, non_blocking=True) for values in self.values), self.colour_order)


class Stack:
    """Transformations in the order of their codes, for square images, which come out with `size` pixels a side.

    The colour codes together are one operation, at the place of the first of them; `jit` means all four. If no code makes the
    size, the centre is cropped to it at the end (or, with `resized`, the whole is resized). Raises ValueError for other codes.
    """

    def __init__(self, codes: Sequence[str], size: int, *, resized: bool = False):
        unknown = [code for code in codes if code not in CODES]
        if unknown:
            raise ValueError(f"there is no transformation {unknown[0]!r}: choose from {' '.join(CODES)}")
        self.size = size
        self.codes = list(codes)
        jittered = [code in codes or "jit" in codes for code in COLOURS]
        self.strengths = STRENGTHS * torch.tensor(jittered, device="cpu")  # where values are drawn
        self.operations: list[str] = []
        for code in codes:
            operation = "jit" if code in COLOURS else code
            if operation != "jit" or "jit" not in self.operations:
                self.operations.append(operation)
        if not {"sca", "res", "ccr"} & set(codes):
            self.operations.append("res" if resized else "ccr")

    def draw(self, n: int, input_size: int, generator: torch.Generator) -> Draw:
        """Draw the values for n images of `input_size` pixels a side."""
        values, order = [], [0, 1, 2, 3]
        size = input_size
        for operation in self.operations:
            values.append(_draw(operation, n, size, self.strengths, generator))
            if operation == "jit":
                order = torch.randperm(4, generator=generator).tolist()
            if operation in ("sca", "res", "ccr"):
                size = self.size
        return Draw(tuple(values), tuple(colour for colour in order if self.strengths[colour] > 0))

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Transform images (B, C, H, H) in [0, 1] as drawn: (B, C, size, size), around 0."""
        for operation, values in zip(self.operations, draw.values, strict=True):
            images = _apply(operation, images, values, self.size, draw.colour_order)
        return images - 0.5

    def applies(self, code: str) -> bool:
        """True if `code` is applied, alone or as part of `jit` (colours) or `ccr` (scale)."""
        other = {"sca": "ccr"} | dict.fromkeys(COLOURS, "jit")
        return code in self.codes or other.get(code) in self.codes

    def parameter(self, code: str, draw: Draw) -> Tensor:
        """The normalised parameters (B, 1) of one code; of its last place, if it has several. KeyError if it has none."""
        operation = "jit" if code in COLOURS else code
        if code == "sca" and "sca" not in self.operations:
            operation = "ccr"  # a crop of which nothing is drawn
        for own, values in reversed(list(zip(self.operations, draw.values, strict=True))):
            if own == operation:
                return normalised(code, values, self.size)[:, None]
        raise KeyError(code)


def clean_view(images: Tensor, size: int) -> Tensor:
    """The view without random transformations: the central pixels, around 0."""
    return tf.centre_crop(images, size) - 0.5


def _draw(operation: str, n: int, size: int, strengths: Tensor, generator: torch.Generator) -> Tensor:
    """Values of one operation for n images of size x size pixels. Images that are left out get values that change nothing."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    left_out = torch.rand(n, generator=generator) >= PROBABILITY.get(operation, 1.0)
    match operation:
        case "sca":
            return draw_crops(n, size, generator)
        case "rot":
            return uniform(-180, 180)
        case "ron":
            return torch.randint(4, (n,), generator=generator)
        case "blu":
            return uniform(*BLUR_SIGMA).masked_fill(left_out, 0)
        case "jit":
            factors = UNCHANGED + strengths * (2 * torch.rand(n, 4, generator=generator) - 1)
            return torch.where(left_out[:, None], UNCHANGED, factors)
        case _:
            return ~left_out  # "fli", "flv", "gra"; nothing is drawn for "res" and "ccr"


def draw_crops(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Boxes (n, 4) as x0, y0, x1, y1, inclusive, of random crops from size x size pixels, as torchvision draws them.

    The area is uniform, the ratio of width to height uniform in its logarithm; the first of ten tries that fits is taken.
    """
    area = size**2 * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * torch.rand(n, 10, generator=generator))
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.exp(low + (high - low) * torch.rand(n, 10, generator=generator))
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (n, 10)
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    fits[:, -1] |= ~fits.any(1)
    first = fits.int().argmax(1, keepdim=True)
    width, height = (side.gather(1, first).squeeze(1).clamp(1, size) for side in (width, height))  # whole image if none fits
    x0, y0 = ((torch.rand(n, generator=generator) * (size - side + 1)).floor() for side in (width, height))
    return torch.stack([x0, y0, x0 + width - 1, y0 + height - 1], 1)


def _apply(operation: str, images: Tensor, values: Tensor, size: int, colour_order: Sequence[int]) -> Tensor:
    match operation:
        case "sca":
            return tf.crop_and_resize(images, values, size)
        case "rot":
            return tf.rotate(images, values)
        case "ron":
            return tf.quarter_turns(images, values)
        case "fli":
            return tf.flip(images, values, axis=3)
        case "flv":
            return tf.flip(images, values, axis=2)
        case "blu":
            return tf.blur(images, values)
        case "gra":
            return tf.to_grey(images, values)
        case "jit":
            return tf.jitter(images, values, colour_order)
        case "res":
            return tf.resize(images, size)
        case _:
            return tf.centre_crop(images, size)


def normalised(code: str, values: Tensor, size: int) -> Tensor:
    """The parameters (B) of a code, between 0 and 1, from the values drawn for views of size x size pixels."""
    if code in COLOURS:
        colour = COLOURS.index(code)
        low, high = UNCHANGED[colour] - STRENGTHS[colour], UNCHANGED[colour] + STRENGTHS[colour]
        return (values[:, colour] - low) / (high - low)
    match code:
        case "sca":
            if values.ndim == 1:  # of the central crop
                return torch.full_like(values, 1 / size, dtype=torch.float32)
            return 1 - (values[:, 3] - values[:, 1]) / size
        case "rot":
            return (values + 180) / 360
        case "ron":
            return values / 4 + 0.125
        case "fli" | "flv":
            return values / 2 + 0.25
        case "blu":
            return (values > 0).float()
        case "gra":
            return values.float()
        case _:
            raise ValueError(f"{code} has no parameter")


def sweep(code: str, images: Tensor, size: int, n: int) -> list[tuple[float, Tensor]]:
    """Images transformed by a code alone, in up to n steps through its range: (normalised parameter, view) of each."""
    B, _, H, _ = images.shape
    swept = []
    for values in _sweep_values(code, H, n):
        operation = "jit" if code in COLOURS else code
        same = values.expand(B, *values.shape[1:])
        order = [COLOURS.index(code)] if code in COLOURS else []
        view = _apply(operation, images, same.to(images.device), size, order)
        swept.append((float(normalised(code, values, size)), clean_view(view, size)))
    return swept


def _sweep_values(code: str, side: int, n: int) -> list[Tensor]:
    """Values (1, ...) of a code's operation from one end of its range to the other."""
    steps = torch.linspace(0, 1, n)
    match code:
        case "sca":  # square crops from the centre, the whole image first
            lengths = side * (1 - steps * (1 - CROP_AREA[0] ** 0.5))
            first = (side - lengths) / 2
            return list(torch.stack([first, first, first + lengths - 1, first + lengths - 1], 1)[:, None])
        case "rot":
            return list((360 * steps - 180)[:, None])
        case "ron":
            return [torch.tensor([turns]) for turns in range(4)]
        case "blu":
            return [torch.tensor([sigma]) for sigma in (0.0, sum(BLUR_SIGMA) / 2)]
        case "fli" | "flv" | "gra":
            return [torch.tensor([False]), torch.tensor([True])]
        case _:
            values = UNCHANGED.repeat(n, 1, 1)
            colour = COLOURS.index(code)
            values[:, 0, colour] += STRENGTHS[colour] * (2 * steps - 1)
            return list(values)
