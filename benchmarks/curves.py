"""Amortised clustering over wall clock, as the paper's figure has it: validation loss, and adjusted Rand index next to k-means.

    python -m benchmarks.curves RUN ...             # finished runs of amortised_clustering.py
    python -m benchmarks.curves RUN,RUN,...         # each went on with the best model of the one before: one curve

draws results/clustering/loss_over_time.png: the runs' val_loss over minutes with the oracle's and chance level and the curve of
the original program (results/clustering/original_hour.csv, which says where it comes from), and their val_rand_index with the
levels of k-means and of a Gaussian mixture (results/clustering/peers.json, by benchmarks.clustering_peers; without it, k-means
as in the runs' result.json). It also prints after how many steps each run passes k-means.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import ROOT
from common.gallery.runs import NOT_OPTIONS
from common.plotting import BASELINE, PALETTE, draw_curve, save_figure
from common.run.metrics import read_metrics
from common.run.records import RecordError, read_json

FOLDER = ROOT / "results" / "clustering"
K_MEANS = "k-means"  # the beginning of the names of those methods


@dataclass(frozen=True)
class Curve:
    """A finished run: its name, what it is, and its columns of metrics.csv; levels of other methods on its validation tasks."""

    name: str
    label: str
    metrics: Mapping[str, Sequence[float]]
    loss: Mapping[str, float]  # of oracle and chance
    rand_index: Mapping[str, float]  # of oracle, k-means, ...
    options: Mapping[str, Any]  # of the experiment: not the seed, nor places


def read_run(place: Path, peers: Sequence[Mapping[str, Any]]) -> Curve:
    """A finished run, with the levels of `peers` that were measured on its tasks. Raises RecordError."""
    result, args = (read_json(place / f"{name}.json") for name in ("result", "args"))
    if result.get("script") != "amortised_clustering":
        raise RecordError(f"{place} is no finished run of amortised_clustering.py")
    same = {"tasks": args["tasks"], "seed": args["seed"]}
    levels = {row["method"]: row["adjusted_rand_index"] for row in peers if row["data"] == same and "run" not in row}
    if not levels and "k_means" in result:
        levels = {f"{K_MEANS}, {result['k_means']['starts']} starts": result["k_means"]["adjusted_rand_index"]}
    label = f"{args['type']}, {args['n_hidden']} hidden units, {result['parameters']:,} parameters"
    if str(result.get("device")).startswith("cuda"):
        label += f", {args['gpu']}"
    loss = {name: result[name]["cross_entropy"] for name in ("oracle", "chance")}
    rand_index = levels | {"oracle": result["oracle"]["rand_index"]}
    own = {name: value for name, value in args.items() if name not in NOT_OPTIONS}
    return Curve(place.name, label, read_metrics(place / "metrics.csv"), loss, rand_index, own)


def read_stages(places: str, peers: Sequence[Mapping[str, Any]]) -> Curve:
    """Runs, separated by commas, that each went on with the best model of the one before, as one. Raises RecordError.

    Steps and minutes go on, too. Of all but the last, metrics.csv is enough.
    """
    *earlier, last = (Path(place) for place in places.split(","))
    curve, metrics, rates = read_run(last, peers), dict[str, list[float]](), list[str]()
    for place in (*earlier, last):
        rows = read_metrics(place / "metrics.csv")
        for name, values in rows.items():
            column = metrics.setdefault(name, [])
            before = column[-1] if column and name in ("epoch", "step", "seconds") else 0
            column += [before + value for value in values]
        rates += [f"{rate:g}" for rate in rows.get("lr", [])[:1]]
    own = {**curve.options, **({"lr": ", ".join(rates)} if earlier else {})}
    return replace(curve, metrics=metrics, options=own)


def tell_apart(curves: Sequence[Curve]) -> list[Curve]:
    """The curves, with the options in which they differ in their labels: repeats are those that differ in their seed alone."""
    names = {name: None for curve in curves for name in curve.options if name not in ("type", "n_hidden", "wc", "max_epochs")}
    varying = [name for name in names if len({str(curve.options[name]) for curve in curves if name in curve.options}) > 1]
    said = [[f", -{name} {curve.options[name]}" for name in varying if name in curve.options] for curve in curves]
    return [replace(curve, label=curve.label + "".join(more)) for curve, more in zip(curves, said, strict=True)]


def read_original(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Minutes and validation losses by program: lines that begin with # are comments."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    programs = dict.fromkeys(row["program"] for row in rows)
    return {
        program: (
            [float(row["minutes"]) for row in rows if row["program"] == program],
            [float(row["val_loss"]) for row in rows if row["program"] == program],
        )
        for program in programs
    }


def passes(curve: Curve) -> list[str]:
    """Sentences: after how many steps the run is above each k-means, first and for good, or how far below it ends."""
    steps, seconds, values = (curve.metrics[name] for name in ("step", "seconds", "val_rand_index"))
    sentences = []
    for name, level in curve.rand_index.items():
        if not name.startswith(K_MEANS):
            continue
        above = [value >= level for value in values]
        if not any(above):
            best = max((value for value in values if value == value), default=math.nan)  # an epoch may have diverged
            sentences.append(
                f"does not pass {name} ({level:.3f}): {best:.3f} at best, {level - best:.3f} below, "
                f"in {steps[-1]:,.0f} steps ({seconds[-1] / 60:.1f} min)"
            )
            continue
        first = above.index(True)
        last_below = len(above) - 1 - above[::-1].index(False) if False in above else -1
        for_good = f"for good from step {steps[last_below + 1]:,.0f}" if last_below + 1 < len(above) else "not for good"
        sentences.append(
            f"passes {name} ({level:.3f}) after {steps[first]:,.0f} steps ({seconds[first] / 60:.1f} min), {for_good}; "
            f"ends with {values[-1]:.3f} after {steps[-1]:,.0f}"
        )
    return sentences


# ---- the figure ------------------------------------------------------------------------------------------------------------


def draw_levels(axes: Axes, levels: Sequence[Mapping[str, float]]) -> None:
    """Horizontal lines: the mean of each level over runs."""
    names = dict.fromkeys(name for own in levels for name in own)
    for i, name in enumerate(names):
        mean = statistics.fmean(own[name] for own in levels if name in own)
        style = ("--", ":", "-.", (0, (1, 3)), (0, (5, 5)), (0, (3, 1, 1, 1)))[i % 6]
        axes.axhline(mean, color=BASELINE, linestyle=style, linewidth=1.2, label=f"{name} {mean:.3f}")


def plot(path: Path, curves: Sequence[Curve], original: Mapping[str, tuple[list[float], list[float]]], log: bool) -> None:
    """Loss and adjusted Rand index over minutes; runs that differ in their seed alone have one colour."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    losses, indices = figure.subplots(1, 2)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        colour, first = (
            PALETTE[labels.index(curve.label) % len(PALETTE)],
            curve is next(c for c in curves if c.label == curve.label),
        )
        n = sum(other.label == curve.label for other in curves)
        name = textwrap.fill(curve.label + (f" ({n} runs)" if n > 1 else ""), 80) if first else None
        minutes = [seconds / 60 for seconds in curve.metrics["seconds"]]
        for axes, column in ((losses, "val_loss"), (indices, "val_rand_index")):
            draw_curve(axes, minutes, curve.metrics[column], color=colour, linewidth=1.2, label=name)
    for (program, (minutes, values)), line in zip(original.items(), ("-", "--"), strict=False):
        name = "original program" if program == "original" else f"{program}, at the same time as the original"
        draw_curve(losses, minutes, values, color="#000000", linewidth=1.5, linestyle=line, label=name)
    draw_levels(losses, [curve.loss for curve in curves])
    most = max(len(curve.rand_index) for curve in curves)  # without peers, a run knows one level of k-means
    draw_levels(indices, [curve.rand_index for curve in curves if len(curve.rand_index) == most])
    losses.set(ylabel="validation loss (nats per point)", yscale="log")
    indices.set(ylabel="adjusted Rand index of validation tasks")
    for axes in (losses, indices):
        axes.set(xlabel="minutes of training", xscale="log" if log else "linear")
        axes.grid(alpha=0.25)
    drawn = [axes.get_legend_handles_labels() for axes in (losses, indices)]
    handles = {name: line for lines, names in drawn for line, name in zip(lines, names, strict=True)}  # a run is in both
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN[,RUN...]")
    parser.add_argument("--original", type=Path, metavar="CSV", default=FOLDER / "original_hour.csv", help="[%(default)s]")
    parser.add_argument("--peers", type=Path, metavar="JSON", default=FOLDER / "peers.json", help="[%(default)s]")
    parser.add_argument("--log", action="store_true", help="minutes on a logarithmic axis")
    parser.add_argument("--out", type=Path, metavar="PNG", default=FOLDER / "loss_over_time.png", help="[%(default)s]")
    options = parser.parse_args(argv)
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no directory {options.out.parent}")
    try:
        peers = read_json(options.peers)["rows"] if options.peers.exists() else []
        curves = tell_apart([read_stages(places, peers) for places in options.runs])
        original = read_original(options.original)
    except (RecordError, OSError) as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(f"a file of another kind, without {error}: look at the runs, --peers and --original")
    for curve in curves:
        print(curve.name)
        for sentence in passes(curve) or ["no level of k-means is known: benchmarks.clustering_peers measures it"]:
            print(f"    {sentence}")
    plot(options.out, curves, original, options.log)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
