"""The loop over the jobs of a run: models of a zoo, stitching layers, pairs of networks.

for i, job in pending(run, jobs):
    with job:
        job.finish(figures)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

from common import checkpoint
from common.errors import Failed, InputError
from common.run import progress
from common.run.command import Command
from common.run.lock import release_lock, take_lock
from common.run.records import read_json, write_json


class Job:
    """A piece of work that is done once and kept; it comes after the jobs in `needs`, by name.

    Its files in `folder`: NAME.json, its record, whose presence means done; NAME.last.pkl while it trains; NAME.failed.json
    with the reason why it cannot be completed; NAME.lock. `with job:` keeps the lock, which `pending` has taken, to its end,
    and notes a Failed.
    """

    def __init__(self, folder: Path, name: str, needs: tuple[str, ...] = (), keeps: tuple[str, ...] = ()):
        self.folder, self.name, self.needs = folder, name, needs
        self.keeps = [folder / f"{name}.{kind}" for kind in keeps]  # checkpoints that belong to the record
        self.options: dict[str, Any] = {}  # where those of a folder's jobs may differ
        self.record, self.last, self.failed, self.lock = (
            folder / f"{name}.{kind}" for kind in ("json", "last.pkl", "failed.json", "lock")
        )
        self._lock: TextIO | None = None

    @property
    def done(self) -> bool:
        return self.record.exists()

    def read(self) -> dict[str, Any]:
        """The record of a job that is done."""
        return read_json(self.record)

    def finish(self, record: Mapping[str, Any]) -> None:
        write_json(self.record, record)
        self.last.unlink(missing_ok=True)

    def take(self) -> bool:
        """Lock the job for this process. False if another process has it."""
        self._lock = take_lock(self.lock)
        if self._lock is None:
            return False
        for half in self.folder.glob(f"{self.name}.*.new"):  # left by a kill
            half.unlink()
        return True

    def release(self) -> None:
        if self._lock is not None:
            release_lock(self._lock, self.lock)
            self._lock = None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            if isinstance(error, Failed):
                write_json(self.failed, {"job": self.name, "reason": str(error), "options": self.options})
                self.last.unlink(missing_ok=True)
            return isinstance(error, Failed)
        finally:
            self.release()


J = TypeVar("J", bound=Job)


def pending(command: Command, jobs: Sequence[J], *, retry_failed: bool = False, bar: bool = False) -> Iterator[tuple[int, J]]:
    """The jobs that are left, each locked, with their numbers from 1. Raises Interrupted between two, if a signal has come.

    Left out are jobs that are done or that another process has, and, without `retry_failed`, those that failed or need one
    that did. Each is to be used in a `with`.
    """
    reasons: dict[str, str] = {}
    for i, job in enumerate(progress.bar(argparse.Namespace(progress=bar), jobs, "jobs"), 1):
        command.check_signal(f"before {job.name}")
        if not job.take():
            command.log(f"{job.name} is left to another process, which is at it")
            continue
        if retry_failed:
            job.failed.unlink(missing_ok=True)
        reason = why_not(job, reasons)
        if job.done or reason:
            job.last.unlink(missing_ok=True)  # of a process that was killed at its very end
            job.release()
        else:
            yield i, job
            reason = why_not(job, reasons)
        if reason:
            reasons[job.name] = reason
            command.log(f"{job.name} failed: {reason}")


def why_not(job: Job, reasons: Mapping[str, str]) -> str | None:
    """The reason why a job cannot be completed, if any: its own failure, or that of a job it needs."""
    if job.done:
        return None
    failed = read_json(job.failed) if job.failed.exists() else {}
    if failed and failed.get("options") == job.options:
        return str(failed.get("reason"))
    return next((f"it needs {name}, which failed: {reasons[name]}" for name in job.needs if name in reasons), None)


def check_files(jobs: Sequence[Job]) -> None:
    """Raises InputError if a file that resuming needs is missing or damaged."""
    for job in jobs:
        try:
            if job.done:
                job.read()
            for path in job.keeps if job.done else [job.last] if job.last.exists() else []:
                checkpoint.read(path)
        except InputError as error:
            raise InputError(f"{error}; without {job.name}.json and {job.last.name} this job begins again") from None


def failures(jobs: Sequence[Job]) -> dict[str, str]:
    """The reasons of all jobs that could not be completed, by name."""
    reasons: dict[str, str] = {}
    for job in jobs:
        if reason := why_not(job, reasons):
            reasons[job.name] = reason
    return reasons
