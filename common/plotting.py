"""The style of all pictures, and those of many scripts: learning curves, traces of weights, grids of images, accuracies.

All are drawn from plain numbers and written in one step, without a display.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.checkpoint import atomic_write
from common.errors import one_line

# Okabe and Ito's palette, told apart by colour-blind people, plus a grey and a brown
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#8C8C8C", "#7B3F00")
TRAINING, VALIDATION, BASELINE = PALETTE[1], PALETTE[0], "#666666"
SCREEN, PRINT = 110, 220  # dots per inch


def save_figure(figure: Figure, path: Path, dpi: int = SCREEN) -> None:
    """Write a PNG in one step. Raises OSError if it cannot be written."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a font may lack a letter of a name
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def plain(text: str) -> str:
    """A name from outside as a picture's text: printable, and without mathematics between dollar signs."""
    return one_line(text).replace("$", r"\$")


def headline(figure: Figure, title: str) -> None:
    """A run's name above a figure, broken at its dashes: it may be longer than the figure is wide."""
    figure.suptitle(textwrap.fill(plain(title), width=int(12 * figure.get_figwidth())), fontsize=10)


def draw_curve(axes: Axes, x: Sequence[float], y: Sequence[float], **style: object) -> None:
    """A line, or a point where there is only one; what is not finite leaves a gap."""
    axes.plot(x, np.where(np.isfinite(y), y, np.nan), marker="o" if len(x) < 15 else "", markersize=4, **style)  # type: ignore[arg-type]


def draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Horizontal lines with their names and values."""
    for (name, value), line in zip(baselines.items(), ("--", ":"), strict=False):
        axes.axhline(value, color=BASELINE, linestyle=line, linewidth=1.2, label=f"{name} {value:.3f}")


def plot_metrics(
    path: Path,
    title: str,
    metrics: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    by_step: Mapping[str, Sequence[float]],
    steps_per_epoch: float,
    baselines: Mapping[str, Mapping[str, float]],
    loss_name: str,
) -> None:
    """Learning curves: loss by epoch and by minutes trained, the learning rate, and further measures.

    `metrics` are the columns of metrics.csv (step, seconds, train_loss, val_loss, lr, and more), `by_step` the training loss
    and perhaps more at some `steps`. Columns that have `baselines`, as {"val_loss": {"oracle": 0.1, "chance": 2.3}}, are drawn.
    """
    measures = [column for column in baselines if column != "val_loss"]
    traced = [name for name in by_step if name != "loss"]
    n_panels = 3 + len(measures) + len(traced)
    rows = (n_panels + 1) // 2
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(rows, 2).flatten()
    epochs = [step / steps_per_epoch for step in metrics["step"]]
    step_epochs = [step / steps_per_epoch for step in steps]

    by_epoch, by_minute, rate = panels[0], panels[1], panels[2]
    by_epoch.plot(step_epochs, by_step.get("loss", []), color=TRAINING, alpha=0.4, linewidth=0.8)
    draw_curve(by_epoch, epochs, metrics["train_loss"], color=TRAINING, label="training (faint: each batch)")
    draw_curve(by_epoch, epochs, metrics["val_loss"], color=VALIDATION, label="validation")
    by_epoch.set(xlabel="epoch", ylabel=loss_name)
    draw_curve(by_minute, [s / 60 for s in metrics["seconds"]], metrics["val_loss"], color=VALIDATION, label="validation")
    by_minute.set(xlabel="minutes trained", ylabel=loss_name)
    for panel in (by_epoch, by_minute):
        draw_baselines(panel, baselines.get("val_loss", {}))
    for panel, column in zip(panels[3:], measures, strict=False):
        draw_curve(panel, epochs, metrics[column], color=VALIDATION, label="validation")
        panel.set(xlabel="epoch", ylabel=column.removeprefix("val_").replace("_", " "))
        draw_baselines(panel, baselines.get(column, {}))
    draw_curve(rate, epochs, metrics["lr"], color=PALETTE[2])
    rate.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    for panel, name in zip(panels[3 + len(measures) :], traced, strict=False):
        panel.plot(step_epochs, by_step[name], color=TRAINING, linewidth=0.8)
        panel.set(xlabel="epoch", ylabel=name.replace("_", " "), yscale="log")

    for panel in panels[:n_panels]:
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, loc="center right")
    for panel in panels[n_panels:]:
        panel.set_axis_off()
    save_figure(figure, path)


def plot_weights(
    path: Path, title: str, steps: Sequence[int], weights: Mapping[str, NDArray[np.floating]], steps_per_epoch: float
) -> None:
    """Traces of some entries of every parameter: {name: (records, entries)}, four panels a row. Nothing is drawn of none."""
    if not weights:
        return
    columns, rows = min(4, len(weights)), -(-len(weights) // 4)
    height = 2.8 * rows + 0.6
    figure = Figure(figsize=(4 * columns, height))  # a constrained layout of 70 panels would take 15 seconds
    figure.subplots_adjust(0.9 / (4 * columns), 0.5 / height, 0.99, 1 - 0.8 / height, wspace=0.3, hspace=0.45)
    headline(figure, title)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    epochs = [step / steps_per_epoch for step in steps]
    for panel, (name, values) in zip(panels, weights.items(), strict=False):
        panel.plot(epochs, values, linewidth=0.8)
        panel.set_title(name, fontsize=8)
        panel.set(xlabel="epoch", ylabel="weight")
        panel.grid(alpha=0.25)
    for panel in panels[len(weights) :]:
        panel.set_axis_off()
    save_figure(figure, path)


@dataclass(frozen=True)
class ImageGrid:
    """Images (N, C, H, W) uint8 for a picture, row by row; `line` marks a row of pixels in the last row of images."""

    title: str
    images: NDArray[np.uint8]
    columns: int
    names: Sequence[str] | None = None  # of the columns
    line: int | None = None


def plot_images(path: Path, title: str, grids: Sequence[ImageGrid]) -> None:
    """Grids of images, one below the other, each pixel as it is."""
    gap = 2
    mosaics = [_mosaic(grid, gap) for grid in grids]
    width = max(mosaic.shape[1] for mosaic in mosaics)
    inches = 11 / width  # a pixel's size: the widest grid fills the picture
    heights = [mosaic.shape[0] * inches + 0.5 for mosaic in mosaics]
    figure = Figure(figsize=(11.4, sum(heights) + 0.6), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights).flatten()
    for panel, grid, mosaic in zip(panels, grids, mosaics, strict=True):
        panel.imshow(mosaic, interpolation="nearest", aspect="equal")
        panel.set(title=grid.title, xlim=(0, width), xticks=[], yticks=[])
        panel.title.set_fontsize(9)
        height, step = grid.images.shape[2], grid.images.shape[3] + gap
        for column, name in enumerate(grid.names or ()):
            panel.text(column * step + step / 2, mosaic.shape[0] + 2, name, fontsize=7, ha="center", va="top")
        if grid.line is not None:
            y = mosaic.shape[0] - gap - height + grid.line - 0.5
            panel.plot([0, grid.columns * step], [y, y], color=PALETTE[5], linewidth=0.8)
        for edge in panel.spines.values():
            edge.set_visible(False)
    save_figure(figure, path)


def _mosaic(grid: ImageGrid, gap: int) -> NDArray[np.uint8]:
    """The images of a grid as one, (rows, columns, 3), with white gaps."""
    N, C, H, W = grid.images.shape
    rows = -(-N // grid.columns)
    mosaic = np.full((rows * (H + gap) + gap, grid.columns * (W + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(grid.images):
        top, left = gap + i // grid.columns * (H + gap), gap + i % grid.columns * (W + gap)
        mosaic[top : top + H, left : left + W] = image.transpose(1, 2, 0)  # one channel becomes three
    return mosaic


def plot_epochs(
    path: Path,
    title: str,
    metrics: Mapping[str, Sequence[float]],
    measures: Sequence[str],
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    """Curves by epoch, a panel a measure: the columns train_<measure> and test_<measure> of metrics.csv, and the rate `lr`.

    `baselines` are by measure, as {"track_head_top_1_mean": {"chance": 10.0}}.
    """
    columns = 3
    rows = -(-(len(measures) + 1) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, measure in zip(panels, measures, strict=False):
        for split, colour in (("train", TRAINING), ("test", VALIDATION)):
            points = [
                (epoch, value)
                for epoch, value in zip(metrics["epoch"], metrics[f"{split}_{measure}"], strict=True)
                if np.isfinite(value)
            ]
            draw_curve(panel, [epoch for epoch, _ in points], [value for _, value in points], color=colour, label=split)
        draw_baselines(panel, baselines.get(measure, {}))
        panel.set(title=measure.replace("_", " "), xlabel="epoch")
        panel.legend(fontsize=8)
    draw_curve(panels[len(measures)], metrics["epoch"], metrics["lr"], color=PALETTE[2])
    panels[len(measures)].set(title="learning rate", xlabel="epoch")
    for panel in panels[: len(measures) + 1]:
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.25)
    for panel in panels[len(measures) + 1 :]:
        panel.set_axis_off()
    save_figure(figure, path)


def plot_intervals(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of label, accuracy, half of its interval (or None) and chance in per cent, a bar each."""
    figure = Figure(figsize=(10, 0.6 * len(rows) + 1.4), layout="constrained")
    headline(figure, title)
    axes = figure.subplots()
    halves = [row["half"] or 0.0 for row in rows]
    axes.errorbar([row["accuracy"] for row in rows], range(len(rows)), xerr=halves, fmt="o", color=VALIDATION, capsize=3)
    labels = [textwrap.fill(f"{row['label']} (n = {row['n']})", width=60) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    chances = {row["chance"] for row in rows}
    axes.set(xlabel="accuracy in %" + (f" (chance {chances.pop():g})" if len(chances) == 1 and None not in chances else ""))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    save_figure(figure, path)
