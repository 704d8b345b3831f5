"""What a run has come to, in the figures that a paper's table has: of a finished run, and of one that is at work."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A measure's mean; where it was repeated, its standard deviation (n - 1) and how often."""

    mean: float
    deviation: float | None = None
    n: int = 1


# places in result.json, by dots
PLACES = {
    "amortised_clustering": {
        "cross entropy": "model.cross_entropy",
        "accuracy": "model.accuracy",
        "Rand index": "model.rand_index",
        "cross entropy of oracle": "oracle.cross_entropy",
    },
    "swarm_transformer": {
        "test bits": "test.bits",
        "validation bits": "validation.bits",
        "test nats": "test.nats",
        "nats by position": "test.levels.by position",
    },
    "train_ssl": {
        "linear probe %": "linear_probe.top_1",
        "kNN %": "knn.top_1",
        "online head %": "test.track_head_top_1_mean",
        "rotation error, median degrees": "rotation_error_degrees.marginal.median",
        "divergence from target": "marginals.divergence_from_target",
    },
    "train_zoo": {"test accuracy": "test.accuracy", "chance": "chance_accuracy"},
    "routing_networks": {
        "test accuracy": "test.accuracy",
        "modules used": "test.modules_used",
        "overlap of tasks": "test.task_overlap",
        "chance": "chance_accuracy",
    },
    "deepsets_exercise": {
        "loss of DeepSet": "DeepSet.loss",
        "accuracy of DeepSet": "DeepSet.accuracy",
        "loss of MLP": "MLP.loss",
        "accuracy of MLP": "MLP.accuracy",
    },
}
# columns of metrics.csv worth a place in a line, the best first
COLUMNS = (
    "val_accuracy", "val_bits", "validation_accuracy", "test_accuracy", "test_track_head_top_1_mean", "train_total_loss",
    "train_loss",
)  # fmt: skip
N_COLUMNS = 2


def figures_of(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures of a result.json by name, those that it has.

    Raises KeyError, TypeError, IndexError, AttributeError or ValueError if it is not as its script writes it.
    """
    match result.get("script"):
        case "cifar10_stitching":
            return {
                f"penalty, layer {of['layer']}": checked(of["penalty"], of["deviation"], of["n"]) for of in result["layers"]
            }
        case "cifar10_alignment":
            deviations = result["published_deviation"]
            return {
                f"similarity, layer {layer['index']}": checked(value, deviations and deviations[i][i], len(result["pairs"]))
                for i, layer in enumerate(result["layers"])
                if (value := result["published"][i][i]) is not None  # null: it is dead
            }
        case "cifar10_projections":
            return {
                f"penalty, {of['activation']} {of['layer']}, {of['group']}": checked(of["penalty"], of["deviation"], of["n"])
                for of in result["penalties"]
            }
        case script:
            found = {name: value_at(result, place) for name, place in PLACES.get(str(script), {}).items()}
            return {name: Figure(value) for name, value in found.items() if value is not None}


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be reckoned with; NaN is none, and neither are numbers without measure."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def checked(mean: Any, deviation: Any, n: Any) -> Figure:
    """A figure of what a file says. Raises ValueError if it is none."""
    if not (is_number(mean) and (deviation is None or is_number(deviation)) and isinstance(n, int)):
        raise ValueError(f"{mean!r:.50} ± {deviation!r:.50} (n = {n!r:.50}) is no figure")
    return Figure(float(mean), deviation, n)


def value_at(result: Mapping[str, Any], place: str) -> float | None:
    """A number of a result by its place; None if it is not there, or no number."""
    value: Any = result
    for part in place.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if is_number(value) else None


def last_row(path: Path, options: Mapping[str, Any]) -> str:
    """Epoch, figures and time of the last row of a table of epochs; the time to go, where the options of the run tell it."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    if not rows or None in rows[-1].values() or not rows[-1].keys() >= {"epoch", "seconds"}:
        return ""
    row = rows[-1]
    epoch, seconds = float(row["epoch"]), float(row["seconds"])
    shown = [f"{name} {float(row[name]):.4g}" for name in COLUMNS if name in row and row[name] != "nan"][:N_COLUMNS]
    to_go = None
    if options.get("wc"):
        to_go = max(0.0, 60 * options["wc"] - seconds)
    elif options.get("epochs") and epoch:
        to_go = seconds / epoch * max(0.0, options["epochs"] - epoch)
    left = "" if to_go is None else f", {to_go / 60:.1f} to go"
    return f"epoch {epoch:g}, {', '.join(shown)}, {seconds / 60:.1f} min{left}"
