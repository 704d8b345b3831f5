"""A run: directory, lock and log, from the check of the options to the final name.

    with Run("train_ssl", name, args, another="--seed N") as run:
        ...                   # input is read and checked; nothing has been made: errors end with one line and status 2
        run.open()
        ...                   # work; signals and files that cannot be written end with status 75
        return run.finish(result)

`<results_dir>/<script>/<name>.part` is renamed to `<name>` when the run has finished. A run that has begun is never overwritten
silently, and never by two processes at once: a process holds the lock of the file `lock` from its first look to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Container
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from common import parallel, processor
from common.checkpoint import sync_directory
from common.errors import InputError, Interrupted, warn
from common.run import trackers
from common.run.command import Command, echo
from common.run.lock import is_locked, release_lock, take_lock
from common.run.memory import is_out_of_memory
from common.run.options import check_same_options, device_of, name_error
from common.run.records import RecordError, read_json, write_json

ARGS, BEST, LAST, RESULT, LOCK = "args.json", "best.pkl", "last.pkl", "result.json", "lock"  # a result means finished
PICTURES = ("metrics.png", "weights.png", "samples.png")
# what any script may leave
FILES = (ARGS, BEST, LAST, RESULT, LOCK, "log", "metrics.csv", "*.new", *PICTURES, *trackers.FILES)
REPLACED = "replaced"  # in a new run's directory: the run that it replaces, on its way out
FAILED_LINE = "failed: "  # begins the last line of the log of a run that ended in an error
ROOT = Path(__file__).resolve().parents[2]


class RunError(InputError):
    """A run that cannot be started as asked."""


class Run(Command):
    """Files of one run. Nothing is created before `open`.

    `args` has results_dir, overwrite, and perhaps resume, retry_failed and to_stdout. `another` is the option that gives the
    same command line another name, for hints. `may_change` are options that a resumed run may have other values of, `files`
    patterns of what the script leaves in the directory beyond FILES. `quiet` keeps `log` from printing, too.
    Raises RunError for a name that is not one component of a path.
    """

    def __init__(
        self,
        script: str,
        name: str,
        args: argparse.Namespace,
        *,
        another: str,
        may_change: Container[str] = (),
        files: tuple[str, ...] = (),
        quiet: bool = False,
    ):
        super().__init__(script, dash="-" * (len(another) - len(another.lstrip("-"))))
        parent = Path(args.results_dir) / script
        self.name, self.args, self.may_change, self.files = name, args, may_change, (*FILES, f"{REPLACED}/*", *files)
        self.final, self.part = parent / name, parent / f"{name}.part"
        self.resumes = getattr(args, "resume", None) == "auto" or getattr(args, "retry_failed", False)
        self.another, self.hints = another, f"{self.dash}overwrite replaces it, {another} starts another"
        self.quiet, self.trackers = quiet, trackers.Trackers(args, self.part, name)
        if not hasattr(args, "resume"):  # nothing is saved on the way: signals end it as they end any program
            self.next, self.signals = "the same line begins again", ()
        self.status = "new"  # or "unfinished" (there is a last.pkl to resume from), or "finished"
        self._log: TextIO | None = None
        self._lock: TextIO | None = None

    def __enter__(self) -> Run:
        super().__enter__()
        try:
            parallel.check_joined()
            self.status = parallel.run_on_main(self._look, InputError, OSError)
            if self.status == "finished":
                sys.exit(self._finish_again())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        short = error is not None and is_out_of_memory(error)
        expected = isinstance(error, Interrupted | OSError) or (parallel.is_lost(error) and not short)
        if isinstance(error, Exception) and not expected and self._log is not None:
            reason = "out of memory" if short else " ".join(str(error).split()) or type(error).__name__
            self._write(FAILED_LINE + reason)  # for readers of the directory
        try:
            super().__exit__(kind, error, trace)
        finally:
            self.close()

    # ---- the first look --------------------------------------------------------------------------------------------------

    def _look(self) -> str:
        """The status. A directory that exists stays locked from here on, so its content cannot change."""
        if reason := name_error(self.name):
            raise RunError(f"{self.name!r} cannot be a run's name: {reason}")
        resume = getattr(self.args, "resume", None)
        if self.args.overwrite and self.resumes:
            raise RunError(f"{self.dash}overwrite replaces the run, {self.dash}resume auto continues it: choose one")
        if resume not in (None, "auto") and not Path(str(resume)).is_file():
            raise RunError(f"there is no checkpoint {resume}")
        if self.args.overwrite:
            for place in (self.final, self.part):
                self._check_removable(place)  # first: what is not a run is not even locked
                if resume is not None and place.resolve() in Path(resume).resolve().parents:
                    raise RunError(f"{self.dash}overwrite would delete {resume}: {self.hints}")
        if self.part.exists():
            self._take_lock(self.part)
        if self.args.overwrite:
            return "new"
        if self.final.exists() and (self.part / LAST).exists():
            raise RunError(f"{self.final} and {self.part} are both there: move one of them away")
        if self.final.exists():
            if not self.resumes:
                raise RunError(f"the run {self.final} has finished: {self.hints}")
            check_same_options(self._noted(), self.options, f"{self.path} was made", self.hints)
            if not self._is_to_be_retried():
                return "finished"
            self._take_lock(self.final)
            return "unfinished"
        if self._lock is None:
            return "new"
        if not self.resumes and hasattr(self.args, "resume"):
            raise RunError(f"the run {self.part} was started before: {self.dash}resume auto continues it, {self.hints}")
        check_same_options(self._noted(), self.options, f"{self.path} was made", self.hints)
        if (self.part / RESULT).exists():
            return "unfinished" if self._is_to_be_retried() else "finished"
        if self.last.exists() and not (self.part / ARGS).exists():
            raise RunError(f"{self.part} has a {LAST} but no {ARGS}, which says what it is: {self.hints}")
        if self.last.exists():
            return "unfinished"
        if self.best.exists():
            raise RunError(f"{self.part} has a {BEST} but no {LAST} to resume from: {self.hints}")
        source = self._noted().get("resume")
        if source not in (None, "auto"):
            raise RunError(
                f"{self.part} was to start from {source} and has not begun: "
                f"{self.dash}overwrite {self.dash}resume {source} starts it"
            )
        return "new"

    def _noted(self) -> dict[str, Any]:
        """The content of args.json; nothing if there is none. Raises RecordError if it is damaged."""
        return read_json(self.path / ARGS) if (self.path / ARGS).exists() else {}

    def _is_to_be_retried(self) -> bool:
        return bool(getattr(self.args, "retry_failed", False) and read_json(self.path / RESULT).get("failed"))

    def _finish_again(self) -> int:
        """The exit status of a run that has finished. One that was killed before it got its name gets it."""
        if not parallel.is_main():
            return 0
        if not self.final.exists():
            self._rename(self.part, self.final)
        elif not is_locked(self.final / LOCK):  # left by a kill right after the rename
            (self.final / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a start that was to replace it, killed before it had begun
            (self.part / LOCK).unlink(missing_ok=True)
            self.part.rmdir()
        failed = read_json(self.final / RESULT).get("failed")
        more = f", but {len(failed)} jobs failed: {self.dash}retry-failed repeats them" if failed else ": nothing to do"
        echo(f"the run {self.final} has finished{more}")
        return 1 if failed else 0

    def _check_removable(self, place: Path) -> None:
        """Raises RunError if a directory is not clearly a run of this script: only such a one is ever removed."""
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise RunError(f"{place} is no directory: {self.dash}overwrite removes nothing else")
        try:
            script = read_json(place / ARGS).get("script")
        except RecordError:
            script = None
        if script == self.script:
            return
        files = [str(path.relative_to(place)) for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]
        foreign = [file for file in files if not any(fnmatch(file, pattern) for pattern in self.files)]
        if script is not None or foreign:  # an older, damaged or half-made one goes by its files
            what = f"it holds {foreign[0]}" if script is None else f"its {ARGS} is of {script}"
            raise RunError(f"{place} is no run of {self.script}.py, {what}: move it away, or use another name")

    def _take_lock(self, place: Path) -> None:
        self._lock, self._locked = take_lock(place / LOCK), place
        if self._lock is None:
            raise RunError(f"{place} is in use by another process: wait for it; {self.another} starts another run")

    def _rename(self, place: Path, target: Path) -> None:
        place.rename(target)
        self._locked = target  # the lock moves along

    # ---- the directory ---------------------------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """The options that make the run what it is: it is resumed only with the same ones."""
        return {name: value for name, value in vars(self.args).items() if name not in self.may_change}

    @property
    def path(self) -> Path:
        """The directory where the files are now."""
        return self.final if self.final.exists() else self.part

    @property
    def best(self) -> Path:
        return self.part / BEST

    @property
    def last(self) -> Path:
        return self.part / LAST

    def open(self, **made_from: Any) -> None:
        """Make the directory, or resume it; note the options, and what else the run is `made_from`; start the log.

        Raises RunError if it cannot be written to, or was begun from something else.
        """
        parallel.run_on_main(lambda: self._open(made_from), InputError)
        self.begun = True
        if self.quiet:
            echo(f"running in {self.part}")

    def _open(self, made_from: dict[str, Any]) -> None:
        if not self.args.overwrite:
            check_same_options(self._noted(), made_from, f"{self.path} was made", self.hints)
        try:
            if self.final.exists() and self.status == "unfinished":  # jobs that failed are repeated
                self._rename(self.final, self.part)
            elif self._lock is None:
                self.part.mkdir(parents=True, exist_ok=True)
                self._take_lock(self.part)
                if not self.args.overwrite and (self.final.exists() or (self.part / ARGS).exists()):
                    self.close()
                    with contextlib.suppress(OSError):  # it is empty if the other process has finished
                        self.part.rmdir()
                    raise RunError(f"another process has made {self.path} meanwhile: start again to see how it stands")
            if self.args.overwrite:
                self._clear()
            for stale in (self.part / RESULT, *self.part.glob("*.new")):  # before jobs are repeated; left by a kill
                stale.unlink(missing_ok=True)
            shutil.rmtree(self.part / REPLACED, ignore_errors=True)
            begun = (self.part / LAST).exists()  # without a state, the files of an earlier start are replaced
            if not begun:
                record = {"script": self.script, **vars(self.args), **made_from}
                write_json(self.part / ARGS, record | environment(device_of(self.args)))
            if not getattr(self.args, "to_stdout", False):
                self._log = open(self.part / "log", "a" if begun else "w", encoding="utf-8", errors="backslashreplace")
            if begun:
                self._write("started again")
            self.trackers.open()
        except OSError as error:
            raise RunError(
                f"cannot write to {error.filename or self.part}: {error.strerror}; name another place for results"
            ) from None

    def _clear(self) -> None:
        """Remove the run that is there. A kill on the way leaves nothing that looks like a finished run."""
        if self.final.exists():
            lock = take_lock(self.final / LOCK)
            if lock is None:
                raise RunError(f"{self.final} is in use by another process: wait for it")
            self.final.rename(self.part / REPLACED)
            lock.close()
        for old in sorted(self.part.iterdir(), key=lambda path: path.name not in (RESULT, BEST, LAST)):  # these first
            if old.name != LOCK:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()

    def log(self, text: str = "") -> None:
        """Write to the log and, unless the run is `quiet`, print."""
        if not parallel.is_main():
            return
        self._write(text)
        if self._log is None or not self.quiet:
            echo(text)

    def _write(self, text: str) -> None:
        """A line of the log. A full disk silences the log, not the run."""
        if self._log is None:
            return
        try:
            print(text, file=self._log, flush=True)
        except OSError as error:
            warn(f"log: {error.strerror}: {text}")

    def finish(self, result: dict[str, Any]) -> int:
        """Write the result, last of all, and give the directory its name. Returns the exit status: 1 if a job failed."""
        if not parallel.is_main():
            return 1 if result.get("failed") else 0
        self.trackers.close()
        write_json(self.part / RESULT, result)
        self._rename(self.part, self.final)  # still locked: nobody else can take it for a run to be resumed
        self.close()
        sync_directory(self.final.parent)
        return 1 if result.get("failed") else 0

    def close(self) -> None:
        """Let go of trackers, log and lock (which also end with the process)."""
        self.trackers.close()
        if self._log is not None:
            with contextlib.suppress(OSError):  # of lines that a full disk has not taken
                self._log.close()
            self._log = None
        if self._lock is not None:
            release_lock(self._lock, self._locked / LOCK)
            self._lock = None

    def where_to_look(self, **pictures: str) -> str:
        """The files of a finished run that a person wants to see, a line each."""
        files = {"log": "log", "learning curves": "metrics.png", "weight traces": "weights.png", **pictures}
        return "\n".join(f"{what:>16}: {self.final / file}" for what, file in files.items() if (self.final / file).exists())


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine of a run on this device, for the record. A run on a CPU leaves GPUs alone."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu_threads": torch.get_num_threads(),
        "processes": parallel.world_size(),
        "fp32_products": processor.fp32_products(),
        "platform": platform.platform(),
        "git_revision": git_revision(),
    }


def git_revision() -> str:
    """The commit of this code: in a copy (slurm/submit.sh makes such) the file REVISION says it, else git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return (ROOT / "REVISION").read_text().strip()
    except OSError:
        pass
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
