"""The main numbers of a run, as a paper's table has them: of a finished run, and of one that is being trained."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.gallery.files import MAX_NAMES, read_bytes
from common.run.records import RecordError


class KeyMetric(NamedTuple):
    """A mean; where it was repeated, its standard deviation (n - 1) and how often."""

    mean: float
    deviation: float | None = None
    n: int = 1


# paths in result.json, with dots
PATHS = {
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
    "amortised_mog": {
        "log-likelihood": "log_likelihood.model",
        "of true mixture": "log_likelihood.oracle",
        "of single Gaussian": "log_likelihood.single Gaussian",
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
# columns of metrics.csv that are shown while a run trains: the first two that it has
COLUMNS = (
    "val_accuracy", "val_bits", "validation_accuracy", "test_accuracy", "test_track_head_top_1_mean", "train_total_loss",
    "train_loss",
)  # fmt: skip
LARGEST = 1e100  # beyond, a number is a mistake, and arithmetic with it overflows


def key_metrics(result: Mapping[str, Any]) -> dict[str, KeyMetric]:
    """Key metrics of a result.json by name. Raises RecordError if it is not as its script writes it."""
    script = str(result.get("script"))
    try:
        metrics = read_key_metrics(script, result)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RecordError(f"result.json is not as {script:.100}.py writes it: {reason:.200}") from None
    if len(metrics) > MAX_NAMES:
        raise RecordError(f"result.json has {len(metrics)} key metrics, more than {MAX_NAMES}")
    return metrics


def read_key_metrics(script: str, result: Mapping[str, Any]) -> dict[str, KeyMetric]:
    """`key_metrics`, whose errors are those of looking into any JSON."""
    if script == "cifar10_stitching":
        return {f"penalty, layer {row['layer']}": penalty(row) for row in result["layers"]}
    if script == "cifar10_projections":
        return {f"penalty, {row['activation']} {row['layer']}, {row['group']}": penalty(row) for row in result["penalties"]}
    if script == "cifar10_alignment":
        means, deviations, n = result["published"], result["published_deviation"], len(result["pairs"])
        return {
            f"similarity, layer {layer['index']}": key_metric(means[i][i], deviations and deviations[i][i], n)
            for i, layer in enumerate(result["layers"])
            if means[i][i] is not None  # null: a dead layer
        }
    values = {name: value_at(result, path) for name, path in PATHS.get(script, {}).items()}
    return {name: KeyMetric(value) for name, value in values.items() if value is not None}


def penalty(row: Mapping[str, Any]) -> KeyMetric:
    """The penalty of a row of result.json: its mean, deviation and n."""
    return key_metric(row["penalty"], row["deviation"], row["n"])


def key_metric(mean: Any, deviation: Any, n: Any) -> KeyMetric:
    """A key metric from values of a file. Raises ValueError if they are no numbers."""
    if not (is_number(mean) and (deviation is None or is_number(deviation)) and isinstance(n, int)):
        raise ValueError(f"{mean!r:.50} ± {deviation!r:.50} (n = {n!r:.50}) is no measurement")
    return KeyMetric(float(mean), deviation, n)


def is_number(value: Any) -> bool:
    """True if a value is a finite number of a sensible size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def value_at(result: Mapping[str, Any], path: str) -> float | None:
    """The number at a path, None if there is none."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if is_number(value) else None


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; the last one is left out if it is half-written. Raises OSError, csv.Error."""
    rows = list(csv.DictReader(read_bytes(path).decode(errors="replace").splitlines()))
    return rows[:-1] if rows and None in (*rows[-1], *rows[-1].values()) else rows


def last_row(path: Path, options: Mapping[str, Any]) -> str:
    """Epoch, metrics and minutes of the last row of metrics.csv, and minutes left by the run's options; "" if there is none."""
    try:
        row = read_rows(path)[-1]
        epoch, seconds = float(row["epoch"]), float(row["seconds"])
        shown = [f"{name} {float(row[name]):.4g}" for name in COLUMNS if row.get(name, "nan") != "nan"][:2]
        minutes, left = seconds / 60, []  # by each budget
        if options.get("wc"):
            left.append(max(0.0, options["wc"] - minutes))
        done = epoch + ("test_track_head_top_1_mean" in row)  # train_ssl.py counts epochs from 0
        if done and (epochs := options.get("max_epochs") or options.get("epochs")):
            left.append(minutes / done * max(0.0, epochs - done))
        return ", ".join([f"epoch {epoch:g}", *shown, f"{minutes:.1f} min" + (f", {min(left):.1f} to go" if left else "")])
    except (OSError, csv.Error, ValueError, LookupError, TypeError, OverflowError):
        return ""
