"""Runs that consist of jobs: opening one, and the common parts of its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common import checkpoint
from common.run.jobs import Job, check_files, failures
from common.run.records import write_table
from common.run.run import Run

J = TypeVar("J", bound=Job)


def open_run(run: Run, make_jobs: Callable[[Path], Sequence[J]], **made_from: Any) -> Sequence[J]:
    """Open a run and make its jobs; `make_jobs` takes the run's directory. For `made_from`, see Run.open.

    Raises InputError, before anything is written, if the files of a job that is to be resumed are damaged.
    """
    if run.status == "unfinished":
        check_files(make_jobs(run.path))
    run.open(**made_from)
    checkpoint.save({"name": run.name}, run.last)  # there is something to resume
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


def selection_of(select: str, n_images: int) -> str:
    """The images that chose an epoch, in words."""
    return "the test images" if select == "test" else f"{n_images} training images that were left out"


def spread(deviation: float | None, digits: int) -> str:
    """A deviation for a table; nothing where there is none (None, NaN)."""
    return "" if deviation is None or deviation != deviation else f" +- {deviation:.{digits}f}"
