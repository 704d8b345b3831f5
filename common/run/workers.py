"""Several processes on one machine that share the jobs of a run: --jobs N.

share(run, jobs, args, work)    # in the run's process: it hands out jobs, logs, and passes signals on

def work(worker, args):         # in each of the others, which begin from nothing: load what jobs need, then
    for i, job in worker.jobs():
        with job:
            job.finish(figures)

A process is at one job at a time, whose lock it holds; with the run's process it also holds the lock of the run. So no
other start opens a run while any of them lives. The results of a job depend neither on its process nor on other jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import torch

from common.errors import Failed, Interrupted
from common.run import options, progress
from common.run.command import REFUSED, RESUMABLE, SIGNALS, Command
from common.run.jobs import Job, pending, why_not
from common.run.memory import tune_malloc
from common.run.run import Run

LOOK_SECONDS = 0.2  # between two looks for signals
SAVING_SECONDS = 20.0  # that a process has to save its job when the run's process was killed


# ---- a process that does jobs --------------------------------------------------------------------------------------------


class Worker(Command):
    """The command of a process that `share` has started: what it logs, and rows for trackers, go to the run's process."""

    def __init__(self, parent: Command, link: Connection, lock: Connection | None):
        super().__init__(parent.script, dash=parent.dash)
        self.next, self.saves_memory = parent.next, f"fewer {parent.dash}jobs, {parent.saves_memory}"
        self.signals = (signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C comes to all processes, and is passed on
        self.options = parent.options if isinstance(parent, Run) else {}
        self.link, self.lock = link, lock

    def jobs(self) -> Iterator[tuple[int, Any]]:
        """The jobs that this process gets, each locked, with their numbers from 1; each is to be used in a `with`."""
        while given := self._ask():
            number, job, retry_failed = given
            for _, locked in pending(self, [job], retry_failed=retry_failed):
                yield number, locked

    def _ask(self) -> tuple[int, Job, bool] | None:
        """A job; None if there is none left."""
        try:
            self.link.send(("ask",))
            return self.link.recv()
        except (EOFError, OSError):
            raise Interrupted("between two jobs") from None

    def log(self, text: str = "") -> None:
        self._send("log", text)

    @property
    def trackers(self) -> SimpleNamespace:
        """Those of the run."""
        return SimpleNamespace(log=lambda row, step, group="": self._send("row", row, step, group))

    def _send(self, *message: object) -> None:
        with contextlib.suppress(OSError):  # nobody is there any more: the work is saved all the same
            self.link.send(message)

    def _end_with(self, error: BaseException) -> None:
        if isinstance(error, Interrupted):
            self.log(f"stopped {error}")  # the run's process says by which signal
            sys.exit(RESUMABLE)
        super()._end_with(error)


def _begin(worker: Worker, gpu: str | None, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The life of a process. Signals are blocked at its start."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # PyTorch has not looked for GPUs yet
    torch.set_num_threads(threads)
    tune_malloc()
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with worker:
        worker.begun = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        work(worker, *arguments)


def _leave_with_the_parent() -> None:
    """When the run's process has been killed, save as after a signal; end in any case."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVING_SECONDS)
    os._exit(RESUMABLE)


# ---- the run's process ---------------------------------------------------------------------------------------------------


@dataclass
class Handle:
    """A worker as the run's process sees it: its process, the pipe to it, and its job."""

    process: BaseProcess
    link: Connection
    job: Job | None = None
    asks: bool = False  # for a job


def share(
    command: Command, jobs: Sequence[Job], args: argparse.Namespace, work: Callable[..., None], *more: Any,
    retry_failed: bool,
) -> None:  # fmt: skip
    """Let --jobs processes do the jobs that are left, as `pending` names them. Each calls work(worker, args, *more).

    `work` is a function of a module, and what it takes can be pickled. Raises Interrupted if a signal has come, and when all
    other jobs are done Failed if a process has died; SystemExit with the status of a process that has ended otherwise.
    """
    left = list(enumerate(jobs, 1))
    n = max(1, min(args.jobs, sum(not job.done for job in jobs)))
    threads = max(1, torch.get_num_threads() // n)
    gpus = visible_gpus() if options.device_of(args).type == "cuda" else []
    on = f"on GPU {', '.join(gpus[:n])}, " if gpus else ""
    command.log(f"{n} process{'es' * (n > 1)}, {on}each with {threads} CPU thread{'s' * (threads > 1)}")
    handles: list[Handle] = []
    reasons: dict[str, str] = {}  # of jobs that failed, by name
    ended: list[tuple[Handle, int]] = []
    told, at = False, None
    try:
        for k in range(n):
            handles.append(_start(command, gpus[k % len(gpus)] if gpus else None, threads, work, (args, *more)))
        with progress.bar(args, title="jobs", total=len(jobs)) as shown:
            while handles:
                for link in connection.wait([handle.link for handle in handles], LOOK_SECONDS):
                    handle = next(handle for handle in handles if handle.link is link)
                    if not _listen(command, handle, reasons):
                        handles.remove(handle)
                        ended.append((handle, handle.process.exitcode or 0))
                if command.signal and not told:
                    told = True
                    _pass_on(command.signal, handles)
                for handle in handles:
                    if handle.asks:
                        _hand_out(command, handle, handles, left, reasons, retry_failed)
                if (names := [handle.job.name for handle in handles if handle.job]) != at:
                    at, shown.n = names, len(jobs) - len(left) - len(names)
                    shown.set_postfix_str(f"at {', '.join(names)}")
    finally:
        for handle in handles:  # a second Ctrl-C, or an error
            handle.process.kill()
    _judge(command, jobs, ended, all_begun=not left)


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    n = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:n] if named else [str(index) for index in range(n)]


def _start(
    command: Command, gpu: str | None, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> Handle:  # fmt: skip
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used threads, or a GPU, hangs
    own, other = context.Pipe()
    held = command._lock if isinstance(command, Run) else None
    lock = Connection(os.dup(held.fileno())) if held else None  # a descriptor that goes along
    process = context.Process(target=_begin, args=(Worker(command, other, lock), gpu, threads, work, arguments))
    resource_tracker.ensure_running()  # it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it can note them
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()  # so that its end is noticed
        if lock is not None:
            lock.close()
    return Handle(process, own)


def _listen(command: Command, handle: Handle, reasons: dict[str, str]) -> bool:
    """Take a message of a process; False if it has ended."""
    try:
        kind, *content = handle.link.recv()
    except (EOFError, OSError):
        handle.process.join()
        if handle.job is not None:
            reasons[handle.job.name] = "its process has ended"
        return False
    if kind == "log":
        command.log(*content)
    elif kind == "row" and isinstance(command, Run):
        row, step, group = content
        command.trackers.log(row, step, group=group)
    elif kind == "ask":
        if handle.job is not None and (reason := why_not(handle.job, reasons)):
            reasons[handle.job.name] = reason
        handle.job, handle.asks = None, True
    return True


def _pass_on(name: str, handles: Sequence[Handle]) -> None:
    """Pass a signal on; Ctrl-C as SIGTERM, since a terminal sends it to all, who ignore it."""
    number = signal.SIGTERM if name == "SIGINT" else signal.Signals[name]
    for handle in handles:
        assert handle.process.pid is not None
        os.kill(handle.process.pid, number)


def _hand_out(
    command: Command, handle: Handle, handles: Sequence[Handle], left: list[tuple[int, Job]], reasons: dict[str, str],
    retry_failed: bool,
) -> None:  # fmt: skip
    """Give a process that asks for one the first job that can begin; None if there will be no other."""
    for number, job in list(left):
        if any(name in reasons for name in job.needs) and (reason := why_not(job, reasons)):
            reasons[job.name] = reason
            command.log(f"{job.name} failed: {reason}")
            left.remove((number, job))
    open_jobs = {job.name for _, job in left} | {other.job.name for other in handles if other.job}
    ready = [(number, job) for number, job in left if not open_jobs.intersection(job.needs)]
    if left and not ready and not command.signal:
        return  # what they need is being done
    handle.asks = False
    with contextlib.suppress(OSError):  # it has died: the next look says so
        if ready and not command.signal:
            left.remove(ready[0])
            handle.job = ready[0][1]
            handle.link.send((*ready[0], retry_failed))
        else:
            handle.link.send(None)


def _judge(command: Command, jobs: Sequence[Job], ended: Sequence[tuple[Handle, int]], *, all_begun: bool) -> None:
    """Raise what the ends of the processes mean for the run."""
    done = f"with {sum(job.done for job in jobs)} of {len(jobs)} jobs done"
    statuses = {status for _, status in ended}
    if command.signal and not (all_begun and statuses == {0}):
        raise Interrupted(done)
    died = [(handle, status) for handle, status in ended if status not in (0, REFUSED, RESUMABLE)]
    if died:
        ends = ", ".join(f"{_how(status)} at {handle.job.name if handle.job else 'no job'}" for handle, status in died)
        raise Failed(f"{ends}, {done}: {command.dash}resume goes on")
    if REFUSED in statuses:  # the process has said why
        sys.exit(REFUSED)
    if RESUMABLE in statuses:
        command.log(f"stopped {done}: {command.next}")
        sys.exit(RESUMABLE)


def _how(status: int) -> str:
    return f"a process was killed by {signal.Signals(-status).name}" if status < 0 else f"a process failed (status {status})"
