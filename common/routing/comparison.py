"""Tables of several finished runs: means and confidence intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the two-sided 95 % confidence interval by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return values[0], None
    return statistics.fmean(values), float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


def with_interval(values: Sequence[float]) -> str:
    """Mean and half of the interval as text."""
    mean, half = interval(values)
    return f"{mean:.2f}" + ("" if half is None else f" ± {half:.2f}")


def comparison_table(groups: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown of groups of results by label: a table of accuracies over all tasks, then the accuracy of each task."""
    lines = ["| run | n | accuracy % (95 %) | parameters | modules used | overlap | minutes |", "| --- " * 7 + "|"]
    for label, runs in groups.items():
        accuracy = with_interval([100 * run["test"]["accuracy"] for run in runs])
        used, overlap = (statistics.fmean(run["test"][name] for run in runs) for name in ("modules_used", "task_overlap"))
        minutes = statistics.fmean(run["seconds"] for run in runs) / 60
        metrics = f"{runs[0]['parameters']['total']:,} | {used:.2f} | {overlap:.2f} | {minutes:.1f}"
        lines.append(f"| {label} | {len(runs)} | {accuracy} | {metrics} |")
    for label, runs in groups.items():
        lines += ["", f"{label}, accuracy % by task (chance {100 * runs[0]['chance_accuracy']:g}):", ""]
        by_task = [run["test"]["accuracy_by_task"] for run in runs]
        lines.append("; ".join(f"{task} {with_interval([100 * run[task] for run in by_task])}" for task in by_task[0]))
    return "\n".join(lines)
