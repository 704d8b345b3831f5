"""Pictures of several finished runs, as papers show them: loss over training time, accuracy over seeds.

Penalties by layer and heat maps are drawn by `--compare` of the scripts themselves.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common import plotting
from common.errors import one_line
from common.gallery.key_metrics import value_at
from common.gallery.runs import Run
from common.gallery.tables import Group, as_text, group_runs, varying_options
from common.plotting import PALETTE, draw_baselines, draw_curve, headline, save_figure

# options that name a group in the first place, as the paper's figure does; others follow where these are the same
MAIN_OPTIONS = {
    "amortised_clustering": ("type",),
    "swarm_transformer": ("data",),
    "amortised_mog": ("p", "pma"),
    "train_ssl": ("model", "tx", "equi_tx"),
    "train_zoo": ("arch", "dataset"),
    "routing_networks": ("data", "model", "decision"),
}
N_CURVES, N_ROWS = 20, 40  # groups in a picture: the best
SAME_BASELINE = 0.2  # relative difference of a baseline, such as an oracle's loss, from run to run


def draw(script: str, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw the pictures of an experiment, if it has any. Returns their paths. Raises OSError."""
    groups, path = group_runs([run for run in runs if run.state == "finished"]), folder / f"{script}.png"
    match script:
        case "amortised_clustering":
            baselines = {name: baseline(groups, f"{name}.cross_entropy") for name in ("chance", "oracle")}
            title = "clustering: validation loss over training time"
            drawn = draw_over_time(path, title, "cross entropy", "val_loss", groups, baselines)
        case "swarm_transformer":
            nats = {name: baseline(groups, f"validation.levels.{name}") for name in ("chance", "by position")}
            bits = {name: None if value is None else value / math.log(2) for name, value in nats.items()}
            title = "images: bits per dimension over training time"
            drawn = draw_over_time(path, title, "validation bits", "val_bits", groups, bits)
        case "amortised_mog":
            likelihoods = {name: baseline(groups, f"log_likelihood.{name}") for name in ("single Gaussian", "oracle")}
            losses = {name: None if value is None else -value for name, value in likelihoods.items()}
            title = "mixtures: validation loss over training time"
            drawn = draw_over_time(path, title, "negative log-likelihood", "val_loss", groups, losses)
        case "train_ssl":
            drawn = draw_points(path, "linear probe by transformation", "linear probe %", "chance_top_1", groups)
        case "train_zoo" | "routing_networks":
            drawn = draw_points(path, f"{script}: test accuracy", "test accuracy", "chance_accuracy", groups, scale=100)
        case _:
            drawn = False
    return [path] if drawn else []


def labels(groups: Sequence[Group], script: str) -> list[str]:
    """Names of groups by their options."""
    main = [", ".join(str(group.options.get(name)) for name in MAIN_OPTIONS[script]) for group in groups]
    names = []
    for label, group in zip(main, groups, strict=True):
        alike = [run for other, same in zip(groups, main, strict=True) if same == label for run in other.runs]
        more = [f"{name} {as_text(group.options.get(name))}" for name in varying_options(alike)]
        names.append(one_line(", ".join([label, *more]), 300).replace("$", r"\$"))  # no mathematics
    return names


def baseline(groups: Sequence[Group], path: str) -> float | None:
    """Mean of a baseline that each run has measured on its own data, None if these differ."""
    values = [value for group in groups for run in group.runs if (value := value_at(run.result, path)) is not None]
    if not values or max(values) - min(values) > SAME_BASELINE * abs(max(values)):
        return None
    return statistics.fmean(values)


def draw_over_time(
    path: Path, title: str, measure: str, column: str, groups: Sequence[Group], baselines: dict[str, float | None]
) -> bool:
    """Draw a column of metrics.csv, lower is better, over minutes; a colour a group. False if no run has it."""
    curves: dict[str, list[tuple[list[float], list[float]]]] = {}
    for label, group in zip(labels(groups, path.stem), groups, strict=True):
        for run in group.runs:
            pairs = zip(run.curves.get("seconds", []), run.curves.get(column, []), strict=False)
            points = [(seconds / 60, value) for seconds, value in pairs if seconds is not None and value is not None]
            if points:
                curves.setdefault(label, []).append(([x for x, _ in points], [y for _, y in points]))
    if not curves:
        return False
    best = sorted(curves, key=lambda label: statistics.fmean(values[-1] for _, values in curves[label]))[:N_CURVES]
    known = {name: value for name, value in baselines.items() if value is not None}
    shown = [(label, *curve) for label in best for curve in curves[label]]
    plot_over_time(path, title + best_of(len(best), len(curves)), measure, shown, known)
    return True


def draw_points(path: Path, title: str, name: str, chance: str, groups: Sequence[Group], scale: float = 1.0) -> bool:
    """Draw mean and deviation of a key metric in per cent; a row a group, the best first. False if no run has it."""
    rows: list[dict[str, Any]] = []
    for label, group in zip(labels(groups, path.stem), groups, strict=True):
        if (metric := group.key_metric(name)) is not None:
            by_chance, half = baseline([group], chance), metric.deviation
            row = {"label": label, "n": metric.n, "accuracy": scale * metric.mean}
            row["half"] = None if half is None else scale * half
            row["chance"] = None if by_chance is None else scale * by_chance
            rows.append(row)
    if not rows:
        return False
    rows.sort(key=lambda row: -row["accuracy"])
    best = rows[:N_ROWS]
    plotting.plot_intervals(path, f"{title}, mean and standard deviation{best_of(len(best), len(rows))}", best)
    return True


def best_of(n_shown: int, n: int) -> str:
    """The end of a title that says how many groups are left out."""
    return f" (the {n_shown} best of {n})" if n_shown < n else ""


def plot_over_time(
    path: Path,
    title: str,
    measure: str,
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    baselines: Mapping[str, float],
) -> None:
    """Curves of (label, minutes, values), several of a label faint below their mean.

    A baseline far from the curves, as chance and an oracle often are, stands in the legend alone.
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
    low, high = (extreme(extreme(values) for *_, values in curves) for extreme in (min, max))
    margin = 0.05 * (high - low)
    draw_baselines(axes, baselines)
    axes.set(xlabel="minutes of training", ylabel=measure, ylim=(low - margin, high + margin) if margin else None)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right center")
    save_figure(figure, path)
