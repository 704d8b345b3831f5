"""Pictures of stitching, alignment and the rotation test: penalties, accuracies, matrices, similarities of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.plotting import BASELINE, PALETTE, PRINT, headline, save_figure


def layer_labels(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Layers by index, with a star inside a residual block."""
    return [f"{layer['index']}{'*' * layer['inside_block']}" for layer in layers]


def plot_penalties(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Penalties as bars, grouped by layer: `rows` have kind, layer, inside_block, penalty and deviation."""
    layers = sorted({row["layer"] for row in rows})
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    inside = {row["layer"] for row in rows if row["inside_block"]}
    figure = Figure(figsize=(max(6.0, 0.2 * len(layers) * (len(kinds) + 2)), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        own = {row["layer"]: row for row in rows if row["kind"] == kind}
        places = [layers.index(layer) + (i - (len(kinds) - 1) / 2) * width for layer in own]
        deviations = [row["deviation"] or 0.0 for row in own.values()]
        heights = [row["penalty"] for row in own.values()]
        axes.bar(places, heights, width, yerr=deviations, capsize=2, label=kind, color=PALETTE[i % len(PALETTE)])
    axes.axhline(0, color=BASELINE, linewidth=0.8)
    axes.set_xticks(range(len(layers)), [f"{layer}*" if layer in inside else str(layer) for layer in layers])
    note = " (* inside a residual block)" if inside else ""
    headline(figure, title)
    axes.set(xlabel=f"layer{note}", ylabel="penalty (% of accuracy)")
    figure.legend(fontsize=8, loc="outside right center")
    axes.grid(axis="y", alpha=0.25)
    save_figure(figure, path, PRINT)


def plot_ranks(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by the rank of the stitching layer: `rows` have kind ("rank 4"), layer, accuracy. Without ranks no picture."""
    ranked = [{**row, "rank": int(row["kind"].split()[1])} for row in rows if row["kind"].startswith("rank ")]
    _plot_accuracies(path, title, "rank", ranked, rows)


def plot_sparsities(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by the sparsity of the stitching layer: `rows` have kind, layer, accuracy, sparsity if it is a lasso."""
    _plot_accuracies(path, title, "sparsity", [row for row in rows if row["kind"].startswith("lasso ")], rows)


def _plot_accuracies(
    path: Path, title: str, axis: str, rows: Sequence[Mapping[str, Any]], all_rows: Sequence[Mapping[str, Any]]
) -> None:
    """Accuracy of stitched networks by rank or sparsity, a panel a layer, with full matrices and permutations as lines."""
    if not rows:
        return
    references = [row for row in all_rows if row["kind"] in ("full", "permutation")]
    layers = sorted({row["layer"] for row in rows})
    figure = Figure(figsize=(3.2 * len(layers), 3.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for panel, layer in zip(panels, layers, strict=True):
        points = sorted((row[axis], row["accuracy"]) for row in rows if row["layer"] == layer)
        panel.plot([x for x, _ in points], [y for _, y in points], marker="o", color=PALETTE[1], label=axis)
        for i, row in enumerate(row for row in references if row["layer"] == layer):
            panel.axhline(row["accuracy"], color=PALETTE[(0, 2)[i % 2]], linestyle="--", linewidth=1.2, label=row["kind"])
        panel.set(title=f"layer {layer}", xlabel=axis)
        if axis == "rank":
            panel.set_xscale("log", base=2)
            panel.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy (% of test images)")
    panels[-1].legend(fontsize=8)
    save_figure(figure, path, PRINT)


def plot_heat_maps(path: Path, title: str, labels: Sequence[str], maps: Mapping[str, NDArray[np.floating]]) -> None:
    """Similarities (L, L) of the layers of two networks, from 0 to 1, a panel a measure; NaN is grey."""
    side = max(3.4, 0.24 * len(labels) + 1.2)
    figure = Figure(figsize=(side * len(maps) + 0.8, side + 0.5), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    note = " (* inside a residual block)" if any(label.endswith("*") for label in labels) else ""
    for panel, (name, values) in zip(panels, maps.items(), strict=True):
        panel.set_facecolor("#BBBBBB")
        drawn = panel.imshow(values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        if len(labels) <= 8:  # numbers can be read
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        panel.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 8 else 0, fontsize=8)
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set(title=name, xlabel=f"layer of network 2{note}")
    panels[0].set_ylabel("layer of network 1")
    figure.colorbar(drawn, ax=panels, label="similarity", shrink=0.8)
    save_figure(figure, path, PRINT)


def plot_diagonals(path: Path, title: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Similarity of each layer with itself, a curve a measure: `rows` have similarity, layer, mean, deviation, untrained."""
    figure = Figure(figsize=(max(6.5, 0.45 * len(labels) + 3), 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row["similarity"] for row in rows)):
        own = [row for row in rows if row["similarity"] == name]
        places = [labels.index(row["layer"]) for row in own]
        deviations = np.nan_to_num([row["deviation"] for row in own])  # of a single pair there is none
        colour = PALETTE[i % len(PALETTE)]
        axes.errorbar(places, [row["mean"] for row in own], deviations, marker="o", capsize=3, label=name, color=colour)
        axes.plot(places, [row["untrained"] for row in own], linestyle=":", color=colour, label=f"{name}, untrained")
    note = " (* inside a residual block)" if any(label.endswith("*") for label in labels) else ""
    axes.set_xticks(range(len(labels)), labels)
    headline(figure, f"{title}, mean and deviation of pairs")
    axes.set(xlabel=f"layer{note}", ylabel="similarity", ylim=(None, 1.02))
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right center")
    save_figure(figure, path, PRINT)


def plot_matrices(path: Path, title: str, matrices: Sequence[tuple[str, NDArray[np.floating], NDArray[np.floating]]]) -> None:
    """Matrices of stitching layers, as (name, trained, rounded for evaluation), the rounded ones below."""
    figure = Figure(figsize=(3.0 * len(matrices) + 0.8, 6.4), layout="constrained")
    headline(figure, title)
    panels = figure.subplots(2, len(matrices), squeeze=False)
    for column, (name, trained, rounded) in enumerate(matrices):
        for panel, matrix, how in zip(panels[:, column], (trained, rounded), ("trained", "in evaluation"), strict=True):
            top = max(float(np.abs(matrix).max()), 1e-6)
            drawn = panel.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
            panel.set_title(f"{name}, {how}", fontsize=9)
            panel.set(xlabel="channel of network 1", ylabel="channel of network 2")
            figure.colorbar(drawn, ax=panel, shrink=0.7)
    save_figure(figure, path)
