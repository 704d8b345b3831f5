"""Files of the benchmarks in results/benchmarks: a JSON file for each processor.

    {"machine": {...}, "runs": [{"benchmark", "threads", "date", "revision", "torch", "quick", "peak", "measurements"}]}

A run that was not written by a benchmark has a "source", one that failed an "error". A measurement has "work", "kind" and
some of: "n" (rounds), "seconds" and "cpu_seconds" (medians), "mib" (peak memory beyond model and data), "speedup" (times as
fast as other kinds), "overhead" (times the time of others; "peak": of its products at the processor's peak), "at_peak"
(those seconds), "parts" (seconds by name), "value" with "unit", "sd".
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from common.run.records import read_json, write_json

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "benchmarks"


def new(benchmark: str, threads: int, quick: bool, peak: dict[str, float]) -> dict[str, Any]:
    """The record of a run that begins."""
    return {
        "benchmark": benchmark,
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "revision": revision(),
        "torch": torch.__version__,
        "quick": quick,
        "load": round(os.getloadavg()[0], 2),
        "peak": peak,
        "error": None,
        "measurements": [],
    }


def revision() -> str:
    """The commit of the code, with a + if files have been changed since; empty outside git."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"], capture_output=True)
    return commit.stdout.strip() + "+" * (changed.returncode == 1)


def title(machine: dict[str, Any]) -> str:
    """A machine in a few words."""
    family = f" (family {machine['family']}, model {machine['model']})" if machine["family"] else ""
    cores = f", {machine['cores']} cores" if machine["cores"] else ""
    return machine["name"] + family + cores


def path_of(machine: dict[str, Any], quick: bool = False, folder: Path = FOLDER) -> Path:
    """The machine's file: the first of SLUG.json, SLUG_2.json, ... that is not another machine's."""
    slug = re.sub("[^a-z0-9]+", "_", title(machine).lower()).strip("_")
    number = 1
    while True:
        path = folder / f"{slug}{'' if number == 1 else f'_{number}'}{'_quick' if quick else ''}.json"
        if not path.exists() or read_json(path)["machine"] == machine:
            return path
        number += 1


def save(machine: dict[str, Any], record: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Put a run into its machine's file, in the place of the last one of this benchmark and number of threads."""
    path = path_of(machine, record["quick"], folder)
    runs = read_json(path)["runs"] if path.exists() else []
    key = (record["benchmark"], record["threads"])
    runs = [run for run in runs if (run["benchmark"], run["threads"]) != key] + [record]
    runs.sort(key=lambda run: (run["benchmark"], run["threads"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _rounded({"machine": machine, "runs": runs}))
    return path


def load(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Contents of the files of all machines by file name. Quick ones are left out where there is a full one."""
    files = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    return {name: file for name, file in files.items() if name.removesuffix("_quick") == name or name[:-6] not in files}


def _rounded(value: Any) -> Any:
    """Floats with four significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def describe(values: dict[str, Any]) -> str:
    """The values of a measurement in a line."""
    words = []
    if "value" in values:
        words.append(f"{values['value']:,.4g} {values['unit']}" + (f" ± {values['sd']:.2g}" if "sd" in values else ""))
    if "seconds" in values:
        words.append(f"{values['seconds']:10.4f} s")
    if "cpu_seconds" in values:
        words.append(f"{values['cpu_seconds']:10.4f} CPU s")
    if "mib" in values:
        words.append(f"{values['mib']:8,.0f} MiB")
    words += [f"{ratio:.3g}x as fast as {other}" for other, ratio in values.get("speedup", {}).items()]
    words += [f"{ratio:.3g} times the {other}" for other, ratio in values.get("overhead", {}).items()]
    if "at_peak" in values:
        words[-1] += f" ({values['at_peak']:.4g} s)"
    parts = values.get("parts", {})
    words += [f"{name} {100 * part / sum(parts.values()):.2g} %" for name, part in parts.items()]
    return ", ".join(words)


def in_short(measurement: dict[str, Any]) -> str:
    """The values of a measurement for a cell of a table."""
    words = []
    if "value" in measurement:
        deviation = f" ± {measurement['sd']:.2g}" if "sd" in measurement else ""
        words.append(f"{measurement['value']:,.4g}{deviation} {measurement['unit']}".rstrip())
    if "seconds" in measurement or "cpu_seconds" in measurement:
        words.append(f"{measurement.get('seconds', measurement.get('cpu_seconds')):.3g} s")
    if "mib" in measurement:
        words.append(f"{measurement['mib']:,.0f} MiB")
    words += [f"{ratio:.3g}x {other}" for other, ratio in measurement.get("speedup", {}).items()]
    words += [f"{ratio:.3g} of {other}" for other, ratio in measurement.get("overhead", {}).items()]
    return ", ".join(words)
