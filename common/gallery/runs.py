"""Run directories as they lie on a disk: finished, running, stopped, failed or broken.

Reading a run raises nothing. Whatever is wrong with it makes it a broken run, whose note says why.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import one_line
from common.gallery.files import MAX_NAMES, is_regular, open_regular, read_json_if_exists
from common.gallery.key_metrics import KeyMetric, is_number, key_metrics, last_row, read_rows, value_at
from common.run.apply import IMAGES_OPTIONS, POINTS_OPTIONS
from common.run.lock import is_locked
from common.run.options import RUN_OPTIONS
from common.run.records import RecordError
from common.run.run import ARGS, BEST, FAILED_LINE, LAST, LOCK, PICTURES, RESULT

METRICS, LOG = "metrics.csv", "log"
ZOO_FILE = re.compile(r"([0-9]{1,9})\.(json|last\.pkl|failed\.json)")
LOG_BYTES = 8_000  # shown, of the end of a log
N_POINTS = 200  # of a curve
# where and how to run, the machine and its versions, what was drawn, the use of trained models: no options of an experiment
NOT_OPTIONS = {
    *RUN_OPTIONS, *POINTS_OPTIONS, *IMAGES_OPTIONS, "script", "seed", "run", "name", "data_dir", "dataset_root", "save_dir",
    "out", "no_cuda", "to_stdout", "compare", "update_interval", "keep_all", "python", "torch", "gpu", "cpu_threads",
    "processes", "fp32_products", "platform", "git_revision", "networks", "drawn_pairs",
}  # fmt: skip


@dataclass
class Run:
    """A run, or a model of a zoo."""

    path: str  # below the directory that was searched
    script: str
    folder: Path  # where its files are
    state: str = "broken"  # finished; running; stopped: can be resumed; failed; broken: cannot be read
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # plain values
    seed: int | None = None
    result: dict[str, Any] = field(default_factory=dict)  # as it was read
    key_metrics: dict[str, KeyMetric] = field(default_factory=dict)
    parameters: int | None = None
    minutes: float | None = None
    about: dict[str, str] = field(default_factory=dict)  # device, protocol, revision of the code, time of the last change
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    log: str = ""
    files: list[str] = field(default_factory=list)


def find_runs(root: Path) -> Iterator[Run]:
    """All runs below a directory, sorted by path. Links are not followed; copies of the code (slurm/) are left out."""
    folders = [root]
    while folders:
        folder = folders.pop()
        subfolders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for one in entries:
                    (subfolders if one.is_dir(follow_symlinks=False) else files).append(one.name)
        except FileNotFoundError:  # it has gone meanwhile: a run that has finished has another name
            pass
        except OSError as error:
            yield Run(str(folder.relative_to(root)), "unknown", folder, note=f"it cannot be searched: {error.strerror}")
            continue
        if folder != root and is_run(folder, files):
            yield read_run(folder, root)
            continue
        for name in sorted(subfolders, reverse=True):
            if not (name.startswith((".", "figures-")) or (folder == root and name == "slurm")):
                folders.append(folder / name)
        for index in sorted({match[1] for match in map(ZOO_FILE.fullmatch, files) if match}, key=int):
            run = Run(str((folder / index).relative_to(root)), "train_zoo", folder)
            contain(run, read_model, index)
            is_model = any(f"{index}.{kind}" in files for kind in ("pt", "last.pkl", "failed.json"))
            if is_model or run.result.get("script") == "train_zoo":
                yield run


def is_run(path: Path, files: list[str]) -> bool:
    """True if a directory with these files is a run's."""
    return path.suffix == ".part" or not {ARGS, RESULT, LAST, BEST}.isdisjoint(files)


def contain(run: Run, read: Callable[..., None], *args: str) -> None:
    """Fill in a run by a function. Whatever that raises makes the run a broken one, and costs no other run."""
    try:
        read(run, *args)
    except Exception as error:
        run.state, run.note, run.key_metrics = "broken", why_broken(error), {}


def why_broken(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError):
        return one_line(f"{os.path.basename(error.filename or 'a file')} cannot be read: {error.strerror}", 300)
    return one_line(error if isinstance(error, RecordError) else f"{type(error).__name__}: {error}", 300)


def read_run(folder: Path, root: Path) -> Run:
    """The run in a directory; if it gets its final name while it is read, under that one."""
    run = Run(str(folder.relative_to(root)), folder.parent.name if folder.parent != root else "unknown", folder)
    contain(run, read_directory)
    final = folder.with_suffix("")
    if folder.suffix == ".part" and not os.path.exists(folder) and os.path.isdir(final):
        return read_run(final, root)
    return run


def read_directory(run: Run) -> None:
    """Fill in a run from its directory. Raises OSError, RecordError and others."""
    names = sorted(path.name for path in run.folder.iterdir() if is_regular(path))
    read_files(run, [*(name for name in PICTURES if name in names), *(name for name in names if name not in PICTURES)], METRICS)
    run.log = tail(run.folder / LOG) if LOG in names else ""
    args = read_json_if_exists(run.folder / ARGS)
    add_options(run, args.get("options", args), args, "seed")
    add_result(run, read_json_if_exists(run.folder / RESULT))
    last_line = run.log.rstrip().rpartition("\n")[2]
    if run.result:
        failed = run.result.get("failed")
        run.state, run.note = "finished", f"{len(failed)} of its jobs failed" if failed and isinstance(failed, dict) else ""
    elif run.folder.suffix != ".part":
        raise RecordError(f"no {RESULT} in a directory that has the name of a finished run")
    elif LOCK in names and is_locked(run.folder / LOCK):
        run.state, run.note = "running", last_row(run.folder / METRICS, args)
    elif last_line.startswith(FAILED_LINE):
        run.state, run.note = "failed", one_line(last_line, 300)
    elif LAST in names:
        run.state, run.note = "stopped", last_row(run.folder / METRICS, args)
    else:
        run.state, run.note = "failed", "ended before it saved anything to resume from"


def read_model(run: Run, index: str) -> None:
    """Fill in a model of a zoo: INDEX.last.pkl while it trains, then INDEX.json, or INDEX.failed.json with a reason.

    Raises OSError, RecordError and others.
    """
    kinds = ("json", "csv", "failed.json", "last.pkl", "lock")
    record, metrics, failure, last, lock = (run.folder / f"{index}.{kind}" for kind in kinds)
    read_files(run, [path.name for path in (record, metrics, failure) if is_regular(path)], metrics.name)
    if os.path.lexists(last):
        run.state = "running" if is_regular(lock) and is_locked(lock) else "stopped"
        run.note = last_row(metrics, {})
    elif os.path.lexists(failure) and not os.path.lexists(record):
        run.state, run.note = "failed", one_line(f"failed: {read_json_if_exists(failure).get('reason')}", 300)
    else:
        result = read_json_if_exists(record)
        if not result:
            raise RecordError(f"no {record.name}, which says what the model is")
        add_options(run, result.get("options", {}), result, "model")
        add_result(run, result)
        run.state = "finished"


def read_files(run: Run, names: list[str], metrics: str) -> None:
    """Fill in names and age of files, and the curves of the table of metrics."""
    run.files = names[:MAX_NAMES]
    changed = 0.0
    for name in run.files:
        with contextlib.suppress(FileNotFoundError):  # it has been replaced meanwhile
            changed = max(changed, os.lstat(run.folder / name).st_mtime)
    run.about["written"] = datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M") if changed else ""
    run.curves = read_curves(run.folder / metrics) if metrics in names else {}
    seconds = [value for value in run.curves.get("seconds", []) if value is not None]
    run.minutes = seconds[-1] / 60 if seconds else None


def add_options(run: Run, options: dict[str, Any], record: dict[str, Any], seed: str) -> None:
    """Fill in the options of a run; its script, seed, device and revision from the record that they are in."""
    if len(options) > MAX_NAMES:
        raise RecordError(f"{len(options)} options are more than {MAX_NAMES}")
    for name, value in options.items():
        is_fingerprint = isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)  # of data or networks
        if name not in NOT_OPTIONS and not is_fingerprint:
            words = value if isinstance(value, list) else [value]
            run.options[one_line(name, 80)] = " ".join(map(str, words)) if isinstance(value, list | dict) else value
    run.script = one_line(record.get("script") or run.script, 80)
    run.seed = record[seed] if isinstance(record.get(seed), int) else None
    run.about["code"] = str(record.get("git_revision", ""))
    n_threads = record.get("cpu_threads", 0)
    run.about["device"] = str(record.get("gpu") or (f"CPU, {n_threads} thread{'s' * (n_threads != 1)}" if n_threads else ""))


def add_result(run: Run, result: dict[str, Any]) -> None:
    """Fill in the results of a run, if it has any. Raises RecordError for those that its script does not write."""
    run.result = result
    run.script = one_line(result.get("script") or run.script, 80)
    run.about["protocol"] = str(result.get("protocol", ""))
    parameters = value_at(result, "parameters") or value_at(result, "parameters.total")
    run.parameters = None if parameters is None else int(parameters)
    if (seconds := value_at(result, "seconds")) is not None:
        run.minutes = seconds / 60
    run.key_metrics = key_metrics(result)


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """The columns of metrics.csv, each thinned out evenly to N_POINTS. {} for a damaged table, or one of several trainings."""
    try:
        rows = read_rows(path)
    except (OSError, csv.Error):
        return {}
    columns = {name: [number(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    if len(columns) > MAX_NAMES:
        return {}
    time = columns.get("step") or columns.get("epoch") or [None, None]
    if any(a is None or b is None or a >= b for a, b in pairwise(time)):
        return {}  # several trainings
    kept: set[int] = set()
    for values in columns.values():  # each on its own: a metric that is measured every tenth epoch keeps all its points
        known = [i for i, value in enumerate(values) if value is not None]
        n = min(N_POINTS, len(known))
        kept |= {known[round(i * (len(known) - 1) / max(1, n - 1))] for i in range(n)}
    return {name: [values[i] for i in sorted(kept)] for name, values in columns.items() if any(v is not None for v in values)}


def number(text: str) -> float | None:
    """The number in a cell, None for anything that is not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if is_number(value) else None


def tail(path: Path) -> str:
    """The end of a log."""
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
        return file.read(LOG_BYTES).decode(errors="replace")
