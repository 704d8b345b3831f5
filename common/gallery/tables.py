"""Tables over seeds: runs of an experiment that differ by their seed alone are one row."""

from __future__ import annotations

import re
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import one_line
from common.gallery.key_metrics import KeyMetric
from common.gallery.runs import Run
from common.run.records import write_table, write_text

Row = dict[str, Any]


@dataclass
class Group:
    """Runs of an experiment that differ by their seed alone."""

    runs: list[Run]

    @property
    def options(self) -> dict[str, Any]:
        return self.runs[0].options

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "finished"]

    def key_metric(self, name: str) -> KeyMetric | None:
        """Mean, deviation and n over runs; of a single run, over what it repeats within itself."""
        metrics = [run.key_metrics[name] for run in self.finished if name in run.key_metrics]
        if len(metrics) < 2:
            return metrics[0] if metrics else None
        means = [metric.mean for metric in metrics]
        return KeyMetric(statistics.fmean(means), statistics.stdev(means), len(means))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs."""
    groups: dict[str, Group] = {}
    for run in runs:
        key = repr(sorted((name, repr(value)) for name, value in run.options.items()))
        groups.setdefault(key, Group([])).runs.append(run)
    return list(groups.values())


def varying_options(runs: Sequence[Run]) -> list[str]:
    """Names of options that are not the same in all runs, in the order of the command line's help."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Names of all key metrics that some run has."""
    return list(dict.fromkeys(name for run in runs for name in run.key_metrics))


def rows_over_seeds(runs: Sequence[Run]) -> list[Row]:
    """A row for each group: options that vary, numbers of runs, key metrics, parameters, training time, device."""
    options, metrics, rows = varying_options(runs), metric_names(runs), []
    for group in group_runs(runs):
        minutes = [run.minutes for run in group.finished if run.minutes is not None]
        row: Row = {name: group.options.get(name) for name in options}
        row |= {"runs": len(group.finished), "not finished": len(group.runs) - len(group.finished)}
        row |= {name: group.key_metric(name) for name in metrics}
        row["parameters"] = next((run.parameters for run in group.finished if run.parameters), None)
        row["minutes"] = statistics.fmean(minutes) if minutes else None
        row["device"] = ", ".join(sorted({run.about["device"] for run in group.runs if run.about.get("device")}))
        rows.append(row)
    return rows


def write_tables(path: Path, rows: Sequence[Row]) -> list[list[str]]:
    """Write PATH.csv, with all digits, and PATH.md. Returns the cells of the latter, its head first. Raises OSError."""
    write_table(path.with_name(f"{path.name}.csv"), [for_csv(row) for row in rows])
    cells = [[one_line(name) for name in rows[0]], *([as_text(value, name) for name, value in row.items()] for row in rows)]
    # characters with a meaning in Markdown are escaped
    lines = [[re.sub(r"([\\|<>&~*`\[\]])", r"\\\1", cell) for cell in line] for line in cells]
    lines.insert(1, ["---"] * len(rows[0]))
    write_text(path.with_name(f"{path.name}.md"), "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return cells


def for_csv(row: Row) -> Row:
    """A row in which a key metric has become three columns."""
    flat: Row = {}
    for name, value in row.items():
        flat[name] = value
        if isinstance(value, KeyMetric):
            flat |= {name: value.mean, f"{name}, deviation": value.deviation, f"{name}, n": value.n}
    return flat


def as_text(value: Any, name: str = "") -> str:
    """A cell for people: an option exactly, a measurement rounded."""
    if value is None:
        return ""
    if isinstance(value, KeyMetric):
        return rounded(value.mean, 4) + ("" if value.deviation is None else f" ± {rounded(value.deviation, 2)}")
    if isinstance(value, float):
        return rounded(value, 3 if name == "minutes" else 12)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return one_line(value, 300)


def rounded(value: float, digits: int) -> str:
    """A number with some significant digits, 12,346 with all before the point."""
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e12 else f"{value:.{digits}g}"


def file_stem(text: str) -> str:
    """A text as part of a file's name. A checksum is added to a text that had to be changed for that."""
    if re.fullmatch(r"\w{1,80}", text, re.ASCII):
        return text
    return f"{re.sub(r'[^a-zA-Z0-9]+', '_', text)[:60]}-{zlib.crc32(text.encode(errors='replace')):08x}"
