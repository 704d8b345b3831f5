"""The table of machines, results/benchmarks/README.md, from the JSON files next to it.

python -m benchmarks.table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.peak import multiplies_bf16
from benchmarks.records import FOLDER
from common.run.records import write_text

HEAD = """# Benchmarks by machine

`make bench` measures the machine that it runs on, writes its file here, and makes this page from all files (`make bench-quick`:
less of it, in five minutes). Other machines stay as they were last measured.

Ratios are medians over rounds in which the kinds alternate, each in a process of its own; CPU time with one thread, wall time
with two. "plain" is the original's formulation with the C library's memory policy, in which the original runs. "The peak" is
the time of a step's products at the most floating-point operations a second that PyTorch reaches on the processor.
"""


@dataclass(frozen=True)
class Target:
    """A target: a value of a measurement, at least or at most so much, on processors that multiply bfloat16 and on others."""

    title: str
    benchmark: str
    work: str
    kind: str
    value: str  # "speedup", "overhead", "seconds" or "value"
    other: str  # that a ratio is against
    with_bf16: float | None
    without: float | None

    def measured(self, run: dict[str, Any]) -> float | None:
        for measurement in run["measurements"]:
            if (measurement["work"], measurement["kind"]) == (self.work, self.kind):
                value = measurement.get(self.value)
                return value.get(self.other) if isinstance(value, dict) else value
        return None

    def bound(self, machine: dict[str, Any]) -> float | None:
        return self.with_bf16 if multiplies_bf16(machine) else self.without

    def missed(self, value: float, machine: dict[str, Any]) -> bool:
        bound = self.bound(machine)
        if bound is None:
            return False
        return value < bound if self.value == "speedup" else value > bound

    def words(self, bound: float | None) -> str:
        if bound is None:
            return ""
        return ("at least " if self.value == "speedup" else "at most ") + self.quantity(bound)

    def quantity(self, value: float) -> str:
        unit = {"seconds": " s", "speedup": "x", "overhead": "x", "value": ""}[self.value]
        return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


CLUSTERING, IMAGES = ("swarm_layer", "clustering step, 128 hidden"), ("swarm_transformer", "image step, 256 hidden")
PRECISION_LOSS = ("precision", "clustering, 32 hidden: validation loss")
PRECISION_ACCURACY = ("precision", "zoo, mCNN of width 16: test accuracy")
# targets without bfloat16 products: no loss against what the Xeon had, and some of their own
TARGETS = (
    Target("clustering step, 128 hidden, fp32", *CLUSTERING, "layer", "speedup", "plain", 3.5, 2.87),
    Target("... time of its products at the peak", *CLUSTERING, "layer", "overhead", "peak", 1.9, None),
    Target("the same, bf16", *CLUSTERING, "bf16", "speedup", "plain", 6, None),
    Target("... validation loss against fp32's", *PRECISION_LOSS, "bf16", "overhead", "fp32", 1.02, None),
    Target("clustering step, 32 hidden", "swarm_layer", "clustering step, 32 hidden", "layer", "speedup", "plain", 3, 2.5),
    Target("image step, 256 hidden, fp32", *IMAGES, "layer", "speedup", "plain", 2.5, None),
    Target("... against plain with the scripts' memory policy", *IMAGES, "layer", "speedup", "plain, tuned", None, 1.62),
    Target("the same, bf16", *IMAGES, "bf16", "speedup", "plain", 4, None),
    Target("sampling 12 images", "swarm_transformer", "sampling 12 images", "incremental", "speedup", "plain", 1000, 655),
    Target("wreath CKA, 500x16x32x32", "similarity", "wreath_cka, 500x16x32x32", "suite", "speedup", "plain", 18, 25),
    Target("wreath CKA, 2000x32x8x8", "similarity", "wreath_cka, 2000x32x8x8", "suite", "speedup", "plain", 18, 19),
    Target(
        "wreath Procrustes, 1000x32x8x8, time of its products",
        "similarity", "wreath_procrustes, 1000x32x8x8", "suite", "overhead", "products", 2, 2,
    ),
    Target(
        "wreath Procrustes, 1000x64x8x8, time of its products",
        "similarity", "wreath_procrustes, 1000x64x8x8", "suite", "overhead", "products", 2, 2,
    ),
    Target("SetTransformer step", "set_models", "SetTransformer step", "suite", "speedup", "plain", 1.5, 1),
    Target("LSTM step", "set_models", "LSTM step", "suite", "speedup", "plain", 1.5, 1),
    Target("DUET step, bf16 against fp32", "train_ssl", "DUET step", "suite, bf16", "speedup", "suite", 1.8, None),
    Target(
        "zoo step, bf16 against fp32", "zoo", "zoo step, mCNN, published",
        "bf16, channels-last", "speedup", "fp32, channels-last", 1.8, None,
    ),
    Target("... accuracy lost by bf16, in standard deviations", *PRECISION_ACCURACY, "bf16 below fp32", "value", "", 1, None),
    Target(
        "start to first step",
        "clustering_data", "start of amortised_clustering.py to its first step", "suite", "seconds", "", 3, 3,
    ),
)  # fmt: skip


def cell(target: Target, file: dict[str, Any]) -> str:
    """A machine's values of a target by number of threads, and whether they miss it."""
    words = []
    for run in file["runs"]:
        value = target.measured(run) if run["benchmark"] == target.benchmark else None
        if value is not None:
            missed = " **missed**" if target.missed(value, file["machine"]) else ""
            words.append(f"{target.quantity(value)} ({run['threads']}){missed}")
    return ", ".join(words)


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", row(head), row(["---"] * len(head)), *map(row, rows)]


def describe_machines(files: dict[str, dict[str, Any]]) -> list[str]:
    """A row a machine: its caches, instructions and peak; date and versions of its measurements."""
    rows = []
    for stem, file in files.items():
        machine, runs = file["machine"], file["runs"]
        peaks: dict[tuple[int, str], float] = {}  # the highest that one of the runs has measured
        for run in runs:
            for precision, rate in (run["peak"] or {}).items():
                key = run["threads"], precision
                peaks[key] = max(rate, peaks.get(key, 0))
        peak = [f"{precision} {rate:,.0f} ({n})" for (n, precision), rate in peaks.items()]
        dates, revisions, torches = ({str(run[key]) for run in runs} for key in ("date", "revision", "torch"))
        notes = sorted(
            {run["source"].split(":")[0] for run in runs if run.get("source")} | {"quick" for run in runs if run["quick"]}
        )
        notes += [f"{run['benchmark']} ({run['threads']}) failed: {run['error']}" for run in runs if run.get("error")]
        caches = ", ".join(f"{cache} {size}" for cache, size in machine["caches"].items())
        link = f"[{records.title(machine)}]({stem}.json)"
        measured = " to ".join(sorted({min(dates), max(dates)}))
        versions = [", ".join(sorted(revisions)), ", ".join(sorted(torches))]
        rows.append([link, caches, " ".join(machine["instructions"]), ", ".join(peak), measured, *versions, "; ".join(notes)])
    head = ["machine", "caches", "instructions", "peak, GFLOP/s (threads)", "measured", "revision", "torch", "notes"]
    return table(head, rows)


def describe_all(files: dict[str, dict[str, Any]]) -> list[str]:
    """A table for each benchmark: all measurements that are seconds or values, a column a machine and number of threads."""
    lines = []
    for benchmark in sorted({run["benchmark"] for file in files.values() for run in file["runs"]}):
        columns: dict[str, dict[tuple[str, str], str]] = {}
        for file in files.values():
            for run in file["runs"]:
                if run["benchmark"] == benchmark:
                    column = f"{records.title(file['machine'])}, {run['threads']} thread{'s' * (run['threads'] > 1)}"
                    columns[column] = {(m["work"], m["kind"]): records.in_short(m) for m in run["measurements"]}
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        lines += ["", f"### {benchmark}"]
        rows = [[*key, *(column.get(key, "") for column in columns.values())] for key in keys]
        lines += table(["work", "kind", *columns], rows)
    return lines


def markdown(folder: Path = FOLDER) -> str:
    """The page of all machines whose files are in the folder."""
    files = records.load(folder)
    lines = [HEAD.rstrip(), *describe_machines(files)]
    lines += [
        "",
        "## Targets",
        "",
        "Values, with the number of threads in brackets. Processors without bfloat16 products have targets of their own.",
    ]
    titles = [records.title(file["machine"]) for file in files.values()]
    rows = [
        [target.title, target.words(target.with_bf16), target.words(target.without), *(cell(target, f) for f in files.values())]
        for target in TARGETS
    ]
    lines += table(["work", "target", "target without bf16 products", *titles], rows)
    lines += ["", "## All measurements", "", "Seconds, peak memory in MiB beyond model and data, and ratios."]
    return "\n".join(lines + describe_all(files)) + "\n"


def write(folder: Path = FOLDER) -> None:
    write_text(folder / "README.md", markdown(folder))


if __name__ == "__main__":
    write()
