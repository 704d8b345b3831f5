"""A run's directory: `<results>/<script>/<name>.part` while it trains, renamed to `<name>` when it has finished.

A run that was started or has finished is never overwritten silently, and never by two processes at once: who looks at what is
in `<name>.part`, or writes there, holds the lock of the file `lock` in it, from the first look to the end.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from common.run.checkpoint import BEST, LAST, sync_directory
from common.run.lock import release_lock, take_lock
from common.run.records import write_json

ARGS, RESULT, LOCK = "args.json", "result.json", "lock"  # the presence of a result means finished
FAILED = "failed: "  # begins the last line of the log of a run that ended in an error
ROOT = Path(__file__).resolve().parents[2]


class RunError(Exception):
    """A run that cannot be started as asked; the message is one line and says what to do."""


class RunDirectory:
    """Files of one run. Nothing is created before `open`. `with RunDirectory(...) as run:` lets go of it in any case."""

    def __init__(self, results_dir: str | Path, script: str, name: str, *, another: str = "-run ID"):
        """`another` is the option that makes another run of the same command line, for the hints in errors."""
        parent = Path(results_dir) / script
        self.name, self.another = name, another
        self.dash = "-" * (len(another) - len(another.lstrip("-")))  # as the script spells its options
        self.final, self.part = parent / name, parent / f"{name}.part"
        self._log: TextIO | None = None
        self._lock: TextIO | None = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        failed = isinstance(error, Exception) or (isinstance(error, SystemExit) and isinstance(error.code, str))
        if failed and self._log is not None:  # for who looks at the directory alone
            self.log(f"{FAILED}{' '.join(str(error).split()) or type(error).__name__}")
        self.close()

    @property
    def path(self) -> Path:
        """Where the files are now."""
        return self.final if self.final.exists() else self.part

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def last(self) -> Path:
        return self.path / LAST

    def check(self, *, resume: str | None, overwrite: bool) -> str:
        """Say what a start would find: "new", "unfinished" (there is a last.pkl to go on from), or "finished".

        `resume` is "auto", a checkpoint to start from, or None. A directory that is there stays locked for this process until
        `close`: what is found in it, last.pkl above all, does not change any more. Raises RunError if there is something that
        neither `resume` nor `overwrite` lets it touch, another process has it, or `overwrite` would delete the checkpoint.
        """
        hints = f"{self.dash}overwrite replaces it, {self.another} starts another beside it"
        if self.part.exists():
            self._take_lock()
        if overwrite:
            if resume is not None and self.contains(resume):
                raise RunError(f"{self.dash}overwrite would delete {resume}: {self.another} starts another run from it")
            return "new"
        if self.final.exists():
            if resume == "auto":
                return "finished"
            raise RunError(f"the run {self.final} has finished: {hints}")
        if self._lock is None:
            return "new"
        if resume != "auto":
            raise RunError(f"the run {self.part} was started before: {self.dash}resume auto goes on with it, {hints}")
        if (self.part / RESULT).exists():
            return "finished"
        if not self.last.exists() and self.best.exists():
            raise RunError(f"{self.part} has a {BEST} but no {LAST} to go on from: {hints}")
        if not self.last.exists() and (self.part / ARGS).exists():
            source = json.loads((self.part / ARGS).read_text()).get("resume")
            if source not in (None, "auto"):
                raise RunError(
                    f"{self.part} was to start from {source} and has not begun: "
                    f"{self.dash}overwrite {self.dash}resume {source} starts it"
                )
        return "unfinished" if self.last.exists() else "new"

    def open(self, args: dict[str, Any], *, overwrite: bool, to_stdout: bool) -> None:
        """Make the directory, lock it for this process, note the options, start the log. Raises RunError if it cannot."""
        try:
            if self._lock is None:
                self.part.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                if not overwrite:
                    self._refuse_what_came_meanwhile()
            if overwrite:
                for old in self.part.iterdir():
                    if old.name != LOCK:
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
                if self.final.exists():
                    shutil.rmtree(self.final)
            begun = (self.part / LAST).exists()  # if not, what an earlier start has left behind says nothing about this run
            if not begun or not (self.part / ARGS).exists():
                write_json(self.part / ARGS, args | environment())
            if not to_stdout:
                self._log = open(self.part / "log", "a" if begun else "w", encoding="utf-8", errors="backslashreplace")
            if begun and self._log is not None:
                self.log("started again")
        except OSError as error:
            raise RunError(
                f"cannot write to {error.filename or self.part}: {error.strerror}; name another place for results"
            ) from None

    def _take_lock(self) -> None:
        """Lock the directory, which is there, for this process. Raises RunError if another process has it, OSError."""
        if self._lock is not None:
            return
        self._lock = take_lock(self.part / LOCK)
        if self._lock is None:
            raise RunError(f"{self.part} is in use by another process: wait for it, or {self.another} starts another run")

    def _refuse_what_came_meanwhile(self) -> None:
        """Raises RunError if another process has begun, or finished, the run since `check` found nothing."""
        if self.final.exists() or (self.part / LAST).exists() or (self.part / ARGS).exists():
            self.close()
            with contextlib.suppress(OSError):  # it is empty if the other process has finished
                self.part.rmdir()
            raise RunError(f"another process has made {self.path} meanwhile: start again to see how it stands")

    def finish_interrupted_rename(self) -> None:
        """Let go of a finished run; one that was killed after its result was written, before it was renamed, gets its name."""
        if self.part.exists() and not self.final.exists():
            self.part.rename(self.final)
        (self.final / LOCK).unlink(missing_ok=True)
        self._release(self.final)

    def contains(self, path: str) -> bool:
        """Whether a file lies in this run's directory."""
        return any(place.resolve() in Path(path).resolve().parents for place in (self.final, self.part))

    def where_to_look(self) -> str:
        """The files of a finished run that a person wants to see, a line each."""
        files = {"log": "log", "learning curves": "metrics.png", "weight traces": "weights.png", "samples": "samples.png"}
        # no log with -to_stdout
        return "\n".join(f"{what:>16}: {self.final / file}" for what, file in files.items() if (self.final / file).exists())

    def log(self, line: str = "") -> None:
        """Write a line to the log, or to stdout. A full disk silences the log, not the run."""
        try:
            print(line, file=self._log or sys.stdout, flush=True)
        except OSError as error:
            print(f"log: {error.strerror}: {line}", file=sys.stderr)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, last of all, and give the directory its name."""
        write_json(self.part / RESULT, result)
        self.part.rename(self.final)  # still locked: nobody else can take it for a run that is to be gone on with
        self._release(self.final)
        self.close()
        sync_directory(self.final.parent)

    def close(self) -> None:
        """Let go of the log and the lock (which also end with the process)."""
        if self._log is not None:
            self._log.close()
            self._log = None
        self._release(self.part)

    def _release(self, place: Path) -> None:
        """Let go of the lock, which lies in `place` now, if this process has it."""
        if self._lock is not None:
            release_lock(self._lock, place / LOCK)
            self._lock = None

    def check_same(self, args: dict[str, Any], free: Container[str]) -> None:
        """Raises RunError if what is there of the run was begun with other options than these, those in `free` aside."""
        path = self.path / ARGS
        if not path.exists():
            return
        before = json.loads(path.read_text())
        for name, value in args.items():
            if name not in free and name in before and before[name] != json.loads(json.dumps(value)):
                raise RunError(
                    f"{self.path} was begun with {name} {before.get(name)}, not {value}: {self.another} starts another"
                )


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": gpu,
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git_revision": git_revision(),
    }


def git_revision() -> str:
    """The commit that this code is of. In a copy (slurm/submit.sh makes such) a file REVISION says it, else git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return (ROOT / "REVISION").read_text().strip()
    except OSError:
        pass
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
