"""What the papers show, drawn from results of several runs: losses over time, accuracies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.plotting import PALETTE, VALIDATION, draw_baselines, draw_curve, headline, save_figure


def plot_over_time(
    path: Path,
    title: str,
    measure: str,
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    levels: Mapping[str, float],
) -> None:
    """Curves of (label, minutes, values), several of a label faint below their mean; `levels` to judge them by.

    A level far from the curves, as chance and an oracle often are, stands in the legend alone.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    headline(figure, title)
    axes = figure.subplots()
    for i, label in enumerate(dict.fromkeys(label for label, *_ in curves)):
        own = [(minutes, values) for other, minutes, values in curves if other == label]
        colour = PALETTE[i % len(PALETTE)]
        for minutes, values in own:
            draw_curve(axes, minutes, values, color=colour, alpha=0.3 if len(own) > 1 else 1, linewidth=1)
        begin, end = max(minutes[0] for minutes, _ in own), min(minutes[-1] for minutes, _ in own)
        grid = np.linspace(begin, max(begin, end), 200)
        mean = np.mean([np.interp(grid, minutes, values) for minutes, values in own], axis=0)
        name = textwrap.fill(f"{label} (n = {len(own)})", width=40)
        axes.plot(grid, mean, color=colour, linewidth=2, linestyle=("-", "--", ":")[i // len(PALETTE) % 3], label=name)
    low, high = (of(of(values) for *_, values in curves) for of in (min, max))
    margin = 0.05 * (high - low)
    draw_baselines(axes, levels)
    axes.set(xlabel="minutes of training", ylabel=measure, ylim=(low - margin, high + margin) if margin else None)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right center")
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
