"""Transformations of images, each image with parameters of its own, in a few operations for the whole batch.

Images are (B, C, H, W) with values in [0, 1]; H = W for those that turn them. Given the same parameters the results are those
of kornia's augmentations (0.6.12 and 0.9.0), which the original uses; there a crop is a loop over the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import strict_fp32

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@strict_fp32()
def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut out boxes (B, 4), as x0, y0, x1, y1 (pixels, inclusive), and stretch them to size x size.

    Bilinear, with corners on corners: a product with a matrix in y and one in x, whose rows have two entries that are not zero.
    """
    _, _, H, W = images.shape
    x0, y0, x1, y1 = boxes.unbind(1)
    return _interpolation(y0, y1, H, size) @ images @ _interpolation(x0, x1, W, size).mT


def _interpolation(first: Tensor, last: Tensor, n: int, size: int) -> Tensor:
    """Matrices (B, 1, size, n) that read `size` values, evenly spaced from `first` (B) to `last` (B), out of n."""
    steps = torch.linspace(0, 1, size, device=first.device)
    positions = first[:, None] + (last - first)[:, None] * steps  # (B, size)
    pixels = torch.arange(n, device=first.device)
    return (1 - (positions[:, None, :, None] - pixels).abs()).clamp(min=0)


def resize(images: Tensor, size: int) -> Tensor:
    """Stretch whole images to size x size, bilinear, corners on corners."""
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=True)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The central size x size pixels. Raises ValueError if images are smaller."""
    top, left = ((length - size) // 2 for length in images.shape[2:])
    if min(top, left) < 0:
        raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} pixels have no {size}x{size} in their centre")
    return images[:, :, top : top + size, left : left + size]


@strict_fp32()
def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate counter-clockwise around the centre by `degrees` (B), bilinear, with zeros outside."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # where each pixel comes from; the y axis points down
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, align_corners=True)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate counter-clockwise by `turns` (B) times 90 degrees, exactly."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])  # (4, B, C, H, W)
    return turned[turns, torch.arange(len(images), device=images.device)]


def flip(images: Tensor, flipped: Tensor, axis: int) -> Tensor:
    """Mirror the images that `flipped` (B) says along an axis: 3 for left and right, 2 for top and bottom."""
    return torch.where(flipped[:, None, None, None], images.flip(axis), images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur with a 3x3 Gaussian of deviation `sigma` (B) pixels, border reflected; sigma 0 leaves an image as it is."""
    side = torch.exp(-0.5 / sigma.square().clamp(min=1e-12))  # weight beside the centre's, which is 1
    side, centre = (weight[:, None, None, None] for weight in (side / (1 + 2 * side), 1 / (1 + 2 * side)))
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = centre * padded[:, :, :, 1:-1] + side * (padded[:, :, :, :-2] + padded[:, :, :, 2:])
    return centre * rows[:, :, 1:-1] + side * (rows[:, :, :-2] + rows[:, :, 2:])


def grey(images: Tensor) -> Tensor:
    """The luminance of RGB images (B, 3, H, W): (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def to_grey(images: Tensor, greyed: Tensor) -> Tensor:
    """Take the colours out of the images that `greyed` (B) says."""
    return torch.where(greyed[:, None, None, None], grey(images).expand_as(images), images)


def jitter(images: Tensor, factors: Tensor, order: Sequence[int]) -> Tensor:
    """Change colours by `factors` (B, 4) for brightness, contrast, saturation and hue, in the `order` of these four.

    The first three multiply: 1 changes nothing. Hue is turned by a part of the full circle: 0 changes nothing.
    """
    for step in order:
        factor = factors[:, step, None, None, None]
        if step == BRIGHTNESS:
            images = (images * factor).clamp(0, 1)
        elif step == CONTRAST:
            mean = grey(images).mean((2, 3), keepdim=True)
            images = (mean + factor * (images - mean)).clamp(0, 1)
        elif step == SATURATION:
            shade = grey(images)
            images = (shade + factor * (images - shade)).clamp(0, 1)
        else:
            images = turn_hue(images, factor)
    return images


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB images by a part of the full circle, with saturation and value in HSV kept."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, 1)
    # hue in sixths of the circle, measured from the strongest colour
    hue = torch.where(
        red == value, (green - blue) / safe, torch.where(green == value, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    sixths = hue + 6 * turn
    # each colour is `value` within a sixth of its own hue, `low` beyond two sixths, and in between on a line
    offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # of red, green, blue; made where the images are
    k = (offsets + sixths) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
