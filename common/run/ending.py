"""How a run ends: refused before it has begun (exit status 2), stopped early and resumable (75), or with a word to its user."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

from common.run.checkpoint import CheckpointError
from common.run.directory import RunDirectory, RunError
from common.run.memory import is_out_of_memory

EXIT_RESUMABLE = 75  # stopped early, to be resumed: EX_TEMPFAIL of sysexits.h


@contextmanager
def refusing(parser: argparse.ArgumentParser, *expected: type[Exception]) -> Iterator[None]:
    """What cannot be started as asked ends with one line and exit status 2. `expected` errors are told as they are.

    So do places that the system refuses, and what is too large for memory; any other error is shown as it is.
    """
    told: tuple[type[Exception], ...] = (RunError, CheckpointError, *expected)
    try:
        yield
    except told as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not (is_out_of_memory(error) or "overflow" in str(error)):  # of a size in bytes
            raise
        first, *_ = str(error).splitlines() or [type(error).__name__]
        parser.error(f"cannot make the model or its data, are they too large? {first}")


@contextmanager
def surviving_full_disks(run: RunDirectory) -> Iterator[None]:
    """A file that cannot be written stops the run as a signal does."""
    try:
        yield
    except OSError as error:
        what = f"cannot write {error.filename or run.path}: {error.strerror}"
        saved = "what was saved before is intact, and" if run.last.exists() else "nothing was saved yet;"
        print(f"stopped: {what}; {saved} {run.dash}resume auto goes on from there", file=sys.stderr)
        sys.exit(EXIT_RESUMABLE)


def has_finished(run: RunDirectory, args: argparse.Namespace, free: Container[str]) -> bool:
    """Whether there is nothing left to do, which is then said. Raises RunError if what is there is not to be gone on with.

    A run of the same name that was made with other options, those in `free` aside, is not taken for this one.
    """
    if run.check(resume=args.resume, overwrite=args.overwrite) != "finished":
        return False
    run.check_same(vars(args), free)
    run.finish_interrupted_rename()
    say(f"the run {run.final} has finished: nothing to do")
    return True


def open_run(run: RunDirectory, args: argparse.Namespace, made_from: dict[str, Any], free: Container[str]) -> None:
    """Open a run's directory for these options and what it is `made_from` (data, networks). Raises RunError.

    A run that was begun with others, options in `free` aside, is not gone on with.
    """
    noted = vars(args) | made_from
    if not args.overwrite:
        run.check_same(noted, free)
    run.open(noted, overwrite=args.overwrite, to_stdout=False)


def tell(run: RunDirectory, text: str) -> None:
    """Print, and put into the run's log."""
    run.log(text)
    say(text)


def say(text: str) -> None:
    """Print; a reader who has gone (`| head`) is no failure of the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also for what is flushed at the end
