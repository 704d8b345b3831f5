"""Run directories as somebody finds them who did not make them: finished, at work, stopped, failed or broken.

Whatever is in them, reading them raises nothing: what cannot be read is said in the run's note.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.run.figures import Figure, figures_of, last_row, value_at
from common.run.lock import is_locked
from common.run.run import ARGS, BEST, FAILED_LINE, LAST, LOCK, RESULT

METRICS, LOG = "metrics.csv", "log"
MODEL = re.compile(r"(\d+)\.(json|last\.pkl|failed\.json)")  # of a zoo
PICTURES = ("metrics.png", "weights.png", "samples.png")  # in this order, then others
LOG_BYTES = 8_000  # of the end of a log
N_ROWS = 200  # of metrics.csv
# no options of the experiment: where things are and what is shown, the machine and versions, what a result is called
NO_OPTIONS = (
    "seed", "run", "name", "results_dir", "data_dir", "dataset_root", "save_dir", "out", "device", "no_cuda", "resume",
    "overwrite", "dry_run", "to_stdout", "progress", "compare", "draw", "update_interval", "keep_all", "tensorboard",
    "wandb_project", "python", "torch", "gpu", "cpu_threads", "platform", "git_revision", "networks", "drawn_pairs",
)  # fmt: skip
# what a file of somebody else's making may raise in whoever trusts its form
MISSHAPEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, csv.Error)


@dataclass
class Run:
    """One run, or one model of a zoo; `path` is relative to where it was looked for."""

    path: str
    script: str
    state: str  # finished; running; stopped, to be gone on with; failed; broken: what is there cannot be
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    result: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    log: str = ""
    files: list[str] = field(default_factory=list)  # names in `folder`
    folder: str = ""
    parameters: int | None = None
    minutes: float | None = None
    device: str = ""
    revision: str = ""
    protocol: str = ""
    modified: float = 0  # seconds since 1970

    @property
    def name(self) -> str:
        """The path, without what all runs of the script have in it."""
        return self.path.removeprefix(f"{self.script}/").removesuffix(".part")

    @property
    def written(self) -> str:
        """When, in local time."""
        return datetime.fromtimestamp(self.modified).strftime("%Y-%m-%d %H:%M") if self.modified else ""


def find_runs(place: Path) -> Iterator[Run]:
    """All runs below a directory, in the order of their paths. Links are not followed, and snapshots of the code not read."""
    for folder, below, files in os.walk(place):
        path = Path(folder)
        if path != place and is_run(path, files):
            below.clear()
            yield read_run(path, place)
            continue
        below[:] = sorted(
            name for name in below if not (name.startswith((".", "figures-")) or (path == place and name == "slurm"))
        )
        for index in sorted({found[1] for found in map(MODEL.fullmatch, files) if found}, key=int):
            run = guarded(read_model, path, place, index)
            known = any(f"{index}.{kind}" in files for kind in ("pt", "last.pkl", "failed.json"))
            if known or run.result.get("script") == "train_zoo":
                yield run


def is_run(path: Path, files: list[str]) -> bool:
    return path.suffix == ".part" or not {ARGS, RESULT, LAST, BEST}.isdisjoint(files)


def read_run(path: Path, place: Path) -> Run:
    """A run's directory; if it gets its final name while it is read, under that one."""
    run, final = guarded(look_at, path, place), path.with_suffix("")
    if path.suffix == ".part" and not os.path.exists(path) and os.path.isdir(final):
        return guarded(look_at, final, place)
    return run


def guarded(read: Callable[..., Run], path: Path, place: Path, *more: str) -> Run:
    """What a reader says of a path, or a broken run if that is too much for it."""
    try:
        return read(path, place, *more)
    except (*MISSHAPEN, OSError) as error:
        where = str(path.joinpath(*more).relative_to(place))
        return Run(where, path.parent.name, "broken", f"cannot be read: {type(error).__name__}: {error}"[:300], folder=where)


def look_at(path: Path, place: Path) -> Run:
    """A run's directory as it stands. Raises OSError, or one of MISSHAPEN."""
    run = Run(str(path.relative_to(place)), script=path.parent.name if path.parent != place else "unknown", state="broken")
    run.folder = run.path
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    run.files = [*(name for name in PICTURES if name in files), *(name for name in files if name not in PICTURES)]
    complaints: list[str] = []
    options = read_json(path / ARGS, complaints) if ARGS in files else {}
    run.result = read_json(path / RESULT, complaints) if RESULT in files else {}
    run.log = tail(path / LOG) if LOG in files else ""
    last_line = run.log.rstrip().rpartition("\n")[2]
    if complaints:
        run.note = "; ".join(complaints)
    elif run.result:
        failed = run.result.get("failed")
        run.state, run.note = "finished", f"{len(failed)} of its jobs failed" if failed and isinstance(failed, dict) else ""
    elif path.suffix != ".part":
        run.note = f"no {RESULT} in a directory that has the name of a finished run"
    elif is_locked(path / LOCK):
        run.state = "running"
        run.note = attempt(lambda: last_row(path / METRICS, options), "")
    elif last_line.startswith(FAILED_LINE):
        run.state, run.note = "failed", last_line
    elif LAST in files:
        run.state = "stopped"
        run.note = attempt(lambda: last_row(path / METRICS, options), "")
    else:
        run.state, run.note = "failed", "ended before it saved anything to go on from"
    fill_in(run, options, path / METRICS)
    return run


def read_model(folder: Path, place: Path, index: str) -> Run:
    """A model of a zoo: INDEX.json beside its weights when it has finished, INDEX.last.pkl while it trains.

    INDEX.failed.json says why it cannot be trained.
    """
    run = Run(str((folder / index).relative_to(place)), script="train_zoo", state="broken")
    run.folder = str(folder.relative_to(place))
    run.files = [f"{index}.{kind}" for kind in ("json", "csv", "failed.json") if (folder / f"{index}.{kind}").is_file()]
    complaints: list[str] = []
    metrics = folder / f"{index}.csv"
    if (folder / f"{index}.last.pkl").exists():
        run.state = "running" if is_locked(folder / f"{index}.lock") else "stopped"
        run.note = attempt(lambda: last_row(metrics, {}), "")
    elif f"{index}.failed.json" in run.files and f"{index}.json" not in run.files:
        reason = read_json(folder / f"{index}.failed.json", complaints).get("reason")
        run.state, run.note = ("broken", complaints[0]) if complaints else ("failed", f"failed: {reason}"[:300])
    else:
        run.result = read_json(folder / f"{index}.json", complaints)
        run.state, run.note = ("broken", complaints[0]) if complaints else ("finished", "")
    fill_in(run, run.result, metrics)
    return run


def fill_in(run: Run, args: dict[str, Any], metrics: Path) -> None:
    """What options, result and metrics tell. A result that is misshapen makes the run a broken one."""
    result = run.result
    if isinstance(result.get("script"), str):
        run.script = result["script"]
    named = args["options"] if isinstance(args.get("options"), dict) else args
    kept = {name: value for name, value in named.items() if name not in NO_OPTIONS and not is_fingerprint(value)}
    run.options = {name: plain(value) for name, value in kept.items()}
    seed = result.get("model") if run.script == "train_zoo" else args.get("seed")
    run.seed = seed if isinstance(seed, int) else None
    machine = args | result
    n_threads = machine.get("cpu_threads", "")
    run.device = str(machine.get("gpu") or f"CPU, {n_threads} thread{'s' * (n_threads != 1)}") if n_threads else ""
    run.revision, run.protocol = (str(machine.get(name, "")) for name in ("git_revision", "protocol"))
    parameters = value_at(result, "parameters") or value_at(result, "parameters.total")
    run.parameters = None if parameters is None else int(parameters)
    if metrics.is_file():
        run.metrics = attempt(lambda: read_curves(metrics), {})
    try:
        run.figures = figures_of(result)
    except MISSHAPEN as error:
        run.state = "broken"
        run.note = f"{RESULT} is not as {run.script}.py writes it: {type(error).__name__}: {error}"[:300]
    seconds = value_at(result, "seconds") or next((s for s in reversed(run.metrics.get("seconds", [])) if s is not None), None)
    run.minutes = None if seconds is None else seconds / 60
    run.modified = max((modified(metrics.parent / name) for name in run.files), default=0)


def modified(path: Path) -> float:
    """When a file was last written; 0 for one that has just gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def plain(value: Any) -> Any:
    """An option as a cell shows it: words of a list one after the other, anything deeper as JSON."""
    if isinstance(value, list) and not any(isinstance(word, list | dict) for word in value):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, list | dict) else value


def is_fingerprint(value: Any) -> bool:
    """Whether a value is no option, but tells data or networks apart."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
    """What a file says that may be half-written, or is missing."""
    try:
        return read()
    except (*MISSHAPEN, OSError):
        return otherwise


def read_json(path: Path, complaints: list[str]) -> dict[str, Any]:
    """A JSON object; if there is none, {} and a complaint."""
    try:
        if path.exists() and not path.is_file():  # opening it may take forever
            raise OSError(0, "it is no file")
        content = json.loads(path.read_text())
    except OSError as error:
        complaints.append(f"{path.name} cannot be read: {error.strerror}")
    except (ValueError, RecursionError):
        complaints.append(f"{path.name} is damaged: it is no JSON")
    else:
        if isinstance(content, dict) and content:
            return content
        complaints.append(f"{path.name} is damaged: it holds no options or figures")
    return {}


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """metrics.csv by column, each thinned out evenly to about 200 values; {} if its rows do not follow each other in time."""
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    if rows and None in (*rows[-1], *rows[-1].values()):
        rows.pop()  # half-written
    if not rows:
        return {}
    columns = {name: [number(row[name]) for row in rows] for name in rows[0]}
    time = next((columns[name] for name in ("step", "epoch") if name in columns), [])
    if not time or any(a is None or b is None or a >= b for a, b in pairwise(time)):
        return {}  # rows of several trainings
    kept: set[int] = set()
    for values in columns.values():  # each by itself: one that is measured every tenth epoch keeps all that there is
        known = [i for i, value in enumerate(values) if value is not None]
        kept |= set(
            known if len(known) <= N_ROWS else (known[round(i * (len(known) - 1) / (N_ROWS - 1))] for i in range(N_ROWS))
        )
    return {name: [values[i] for i in sorted(kept)] for name, values in columns.items() if any(v is not None for v in values)}


def number(text: str | None) -> float | None:
    """What a cell says; None for what is no finite number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def tail(path: Path) -> str:
    """The end of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read(LOG_BYTES).decode(errors="replace")
    except OSError:
        return ""
