"""Runs that consist of jobs: opening one, and the common parts of its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from torch import Tensor

from common import checkpoint
from common.checkpoint import CheckpointError
from common.run.jobs import Job, check_files, failures
from common.run.records import RecordError, write_table
from common.run.run import Run


class CheckedJob(Job):
    """A job whose record must fit a pattern, {name: pattern of its value}; see `fits`."""

    pattern: dict[str, Any]

    def read(self) -> dict[str, Any]:
        """The record. Raises RecordError if it is damaged, or that of another job."""
        record = super().read()
        optional = {name: float for name in ("seconds", "sparsity") if name in record}
        for name, pattern in (self.pattern | optional).items():
            if name not in record:
                raise RecordError(f"{self.record} is damaged: it has no {name}")
            if not fits(record[name], pattern):
                raise RecordError(f"{self.record} is damaged: {name} is {record[name]!r:.60}")
        return record


def fits(value: Any, pattern: Any) -> bool:
    """True if a JSON value fits a pattern: a type (float: any number), a value, or a container of patterns.

    A list has as many patterns as elements, or is [pattern, ...] for any number of them. A dict may have further keys. A tuple
    has alternatives.

    >>> fits([1, None, 2.5], [(float, None), ...]), fits([True], [float]), fits({"a": 1, "b": 2}, {"a": 1})
    (True, False, True)
    """
    if isinstance(pattern, tuple):
        return any(fits(value, alternative) for alternative in pattern)
    if isinstance(pattern, list):
        patterns = pattern[:1] * len(value) if pattern[1:] == [...] and isinstance(value, list) else pattern
        return isinstance(value, list) and len(value) == len(patterns) and all(map(fits, value, patterns))
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], pattern[name]) for name in pattern)
    if isinstance(value, bool):
        return pattern is bool or value is pattern
    return isinstance(value, int | float if pattern is float else pattern) if isinstance(pattern, type) else value == pattern


J = TypeVar("J", bound=Job)


def open_run(run: Run, make_jobs: Callable[[Path], Sequence[J]], **made_from: Any) -> Sequence[J]:
    """Open a run and make its jobs; `make_jobs` takes the run's directory. For `made_from`, see Run.open.

    Raises InputError, before anything is written, if the files of a job that is to be resumed are damaged.
    """
    if run.status == "unfinished":
        check_files(make_jobs(run.path))
    run.open(**made_from)
    checkpoint.save({"name": run.name}, run.last)  # a mark: the states are those of the jobs
    jobs = make_jobs(run.part)
    jobs[0].folder.mkdir(exist_ok=True)
    return jobs


def read_records(jobs: Sequence[Job], table: Path | None = None, *key: str) -> tuple[list[dict[str, Any]], float]:
    """The records of the jobs that are done, without their times and epochs, and the sum of their times in seconds.

    The epochs become rows of `table`, each with the values `key` of its record.
    """
    records = [job.read() for job in jobs if job.done]
    seconds, rows = 0.0, []
    for record in records:
        seconds += record.pop("seconds", 0.0)
        own = {name: "-".join(map(str, record[name])) if name == "pair" else record[name] for name in key}
        rows += [own | epoch for epoch in record.pop("epochs", ())]
    if rows and table is not None:
        write_table(table, rows)
    return records, seconds


def make_result(run: Run, options: Sequence[str], jobs: Sequence[Job], **metrics: Any) -> dict[str, Any]:
    """A run's result.json: script and name, some of its options, metrics, and the reasons of jobs that failed."""
    result = {"script": run.script, "name": run.name, **{name: getattr(run.args, name) for name in options}, **metrics}
    failed = failures(jobs)
    return result | {"failed": failed} if failed else result


def read_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """Some tensors of a checkpoint, as arrays. Raises CheckpointError if one is missing or no tensor."""
    state = checkpoint.read(path)
    for name in names:
        if not isinstance(state, dict) or not isinstance(state.get(name), Tensor):
            raise CheckpointError(f"{path} is damaged, or of another version: it has no tensor {name!r}")
    return [state[name].numpy() for name in names]


def selection_of(select: str, n_images: int) -> str:
    """The images that chose an epoch, in words."""
    return "the test images" if select == "test" else f"{n_images} training images that were left out"


def spread(deviation: float | None, digits: int) -> str:
    """A deviation for a table; nothing where there is none (None, NaN)."""
    return "" if deviation is None or deviation != deviation else f" +- {deviation:.{digits}f}"
