"""Pictures of self-supervised learning: views with their parameters, and group marginals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from common import plotting
from common.plotting import ImageGrid, headline, save_figure
from common.ssl import evaluation
from common.ssl.duet import TARGETS, jensen_shannon
from common.ssl.views import PARAMETRISED, Stack, clean_view


def plot_views(path: Path, title: str, pixels: Tensor, stack: Stack, code: str | None, generator: torch.Generator) -> None:
    """Images (N, C, H, H) in [0, 1] and two views of each below, with their parameters of a code, if the stack has them."""
    draws = [stack.draw(len(pixels), pixels.shape[3], generator) for _ in range(2)]
    views = [clean_view(pixels, stack.size), *(stack(pixels, draw.to(pixels.device)) for draw in draws)]
    mosaic = ((torch.cat(views) + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    caption, names = "training images (above), and two views of each", None
    if code in stack.codes and code in PARAMETRISED:
        parameters = (stack.parameter(code, draw)[:, 0].tolist() for draw in draws)
        names = [f"{first:.2f}, {second:.2f}" for first, second in zip(*parameters, strict=True)]
        caption += f", with their parameters of {code}"
    plotting.plot_images(path, title, [ImageGrid(caption, mosaic, len(pixels), names)])


def draw_marginals(
    path: Path, title: str, encoder: nn.Module, images: Tensor, size: int, code: str, bins: int, target: str
) -> dict[str, Any]:
    """Draw the group marginal of uint8 images (N, C, H, H) as a transformation goes through its range. Returns its metrics."""
    parameters, learned = evaluation.marginals_by_parameter(encoder, images, size, code, bins)
    learned, targets = learned.cpu(), TARGETS[target](torch.tensor(parameters), bins)
    plot_marginals(path, title, code, parameters, learned.numpy(), targets.numpy())
    divergence = jensen_shannon(learned.log(), targets).item()
    uniform = jensen_shannon(torch.zeros_like(targets), targets).item()
    return {"code": code, "divergence_from_target": divergence, "divergence_of_uniform": uniform, "images": len(images)}


def plot_marginals(
    path: Path, title: str, code: str, parameters: Sequence[float], learned: NDArray[np.floating], target: NDArray[np.floating]
) -> None:
    """Heat maps of distributions over bins (n, G), a column for each of n parameters: learned, and the target."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(1, 2, sharey=True)
    bins, top = learned.shape[1], max(learned.max(), target.max())
    middles = (np.arange(bins) + 0.5) / bins
    for panel, distribution, name in (
        (panels[0], learned, "group marginal, mean of test images"),
        (panels[1], target, "target"),
    ):
        x = _edges(np.asarray(parameters))
        drawn = panel.pcolormesh(x, np.linspace(0, 1, bins + 1), distribution.T, cmap="viridis", vmin=0, vmax=top)
        panel.plot([middles[0], middles[-1]], [middles[0], middles[-1]], color="white", linestyle=":", linewidth=1)
        panel.set(title=name, xlabel=f"parameter of {code} that was applied", xlim=(x[0], x[-1]))
        panel.title.set_fontsize(9)
    panels[0].set_ylabel("bin of the structure axis")
    figure.colorbar(drawn, ax=panels, label="probability")
    save_figure(figure, path)


def _edges(centres: NDArray[np.floating]) -> NDArray[np.floating]:
    """Borders of cells around increasing or decreasing centres."""
    between = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - between[0]], between, [2 * centres[-1] - between[-1]]])
