"""ESSL's prediction task: which transformation was applied to a third, half-size input (Dangovski et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.ssl import transformations as tf
from common.ssl.losses import VALUE_CODES
from common.ssl.views import COLOURS, STRENGTHS, UNCHANGED

MAX_DEGREES = 90.0


def draw_task(code: str, n: int, generator: torch.Generator) -> Tensor:
    """What will be done to n images (n): degrees, or a colour factor; of the codes with classes nothing is drawn."""
    if code not in VALUE_CODES:
        return torch.zeros(n)
    signed = 2 * torch.rand(n, generator=generator) - 1
    if code == "rot":
        return MAX_DEGREES * signed
    which = COLOURS.index(code)
    return UNCHANGED[which] + STRENGTHS[which] * signed


def make_task(code: str, images: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, H) in [0, 1], transformed, with what is to be predicted of them.

    Classes: all variants of every image, one after the other (4B for quarter turns, else 2B), and their labels. Values: each
    image once, and degrees / 180 or the colour factor (B, 1).
    """
    if code == "rot":
        return tf.rotate(images, values), values[:, None] / 180
    if code in COLOURS:
        which = COLOURS.index(code)
        factors = UNCHANGED.to(images.device).repeat(len(images), 1)
        factors[:, which] = values
        return tf.jitter(images, factors, [which]), values[:, None]
    match code:
        case "ron":
            variants = [torch.rot90(images, turns, (2, 3)) for turns in range(4)]
        case "fli":
            variants = [images, images.flip(3)]
        case "flv":
            variants = [images, images.flip(2)]
        case _:
            variants = [images, tf.grey(images).expand_as(images)]
    labels = torch.arange(len(variants), device=images.device).repeat_interleave(len(images))
    return torch.cat(variants), labels
