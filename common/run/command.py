"""The end of a command: its exit status, its last line, and the signals that stop it early.

| status | when |
| --- | --- |
| 0 | finished |
| 1 | failed: a loss that is not finite, an error in the program (with its traceback) |
| 2 | refused: input that cannot be used |
| 75 | stopped by a signal, a file that could not be written, or the end of another process; resumable (EX_TEMPFAIL) |
| 130 | stopped by Ctrl-C, where nothing is to be resumed |
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

from tqdm import tqdm

from common import parallel
from common.errors import Failed, InputError, Interrupted, one_line, warn
from common.run.memory import is_out_of_memory

REFUSED, RESUMABLE, STOPPED = 2, 75, 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # preemption, time limit ahead, Ctrl-C


class Command:
    """`with Command("train_zoo") as command:` notes signals and turns errors into exit statuses.

    A signal only sets `command.signal`, which the work looks at between steps: no write is ever cut in half by it. A second
    Ctrl-C stops at once. Until `begun` is set, an OSError or too little memory is the input's fault (status 2).
    """

    def __init__(self, script: str, *, dash: str = "--"):
        self.script, self.dash = script, dash  # as the script spells its options
        self.next = f"{dash}resume auto continues from there"  # a hint, where the command stops early
        batch = "-bs" if dash == "-" else "--batch-size"
        self.saves_memory = f"{dash}precision bf16, or a smaller {batch}"  # a hint, where memory runs out
        self.signals: tuple[signal.Signals, ...] = SIGNALS  # those that are noted
        self.signal: str | None = None
        self.begun = False

    def __enter__(self) -> Command:
        open_missing_streams()
        self._handlers = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self._end_with(error)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _end_with(self, error: BaseException) -> None:
        """Exit with the status of an expected error. Returns for others, which keep their traceback."""
        if isinstance(error, Interrupted):
            by = self.signal or "a signal to another process"
            self.log(f"stopped by {by} {error}: {self.next}")
            sys.exit(RESUMABLE)
        if isinstance(error, KeyboardInterrupt) and not self.signals:
            warn(f"{self.script}.py: stopped by Ctrl-C")
            sys.exit(STOPPED)
        if isinstance(error, InputError):
            self._refuse(error)
        if isinstance(error, Failed):
            self._say(f"{self.script}.py: failed: {one_line(error)}")
            sys.exit(1)
        if isinstance(error, OSError) and self.begun:
            what = f"cannot write {error.filename or 'a file'}: {error.strerror}"
            self._say(f"stopped: {what}; what was saved is intact, {self.next}")
            sys.exit(RESUMABLE)
        if isinstance(error, OSError):
            self._refuse(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")
        if is_out_of_memory(error) and self.begun:
            self._say(f"{self.script}.py: failed: out of memory; less is needed with {self.saves_memory}")
            sys.exit(1)
        first, *_ = str(error).splitlines() or [type(error).__name__]
        if parallel.is_lost(error) and not is_out_of_memory(error):
            sentence = one_line(first.partition(". ")[0])  # Gloo adds advice
            gone = f"another process has gone, or cannot be reached ({sentence})"
            if not self.begun:
                self._refuse(gone)  # unless it has said why
            self.log(f"stopped, as {gone}: {self.next}")
            sys.exit(RESUMABLE)
        too_large = is_out_of_memory(error) or "overflow" in str(error)  # of a size in bytes
        if isinstance(error, MemoryError | RuntimeError) and too_large and not self.begun:
            self._refuse(f"cannot make the model or its data, are they too large? {first}")

    def check_signal(self, where: str) -> None:
        """Raises Interrupted if a signal has come; `where` says where the work stands, which needs no saving."""
        if self.signal is not None:
            raise Interrupted(where)

    def _refuse(self, reason: object) -> NoReturn:
        self._say(f"{self.script}.py: error: {one_line(reason)}")
        sys.exit(REFUSED)

    def _say(self, text: str) -> None:
        """Print the reason of the end on stderr: of several processes, in the one that comes to it first."""
        if parallel.speaks():
            warn(text)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def log(self, text: str) -> None:
        echo(text)


def open_missing_streams() -> None:
    """Open /dev/null for standard streams that are closed, so that no file of the run takes their place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", closefd=False))


def echo(text: str) -> None:
    """Print, above progress bars, in the first process.

    A reader who has gone (`| head`) is no failure, and neither is a full or closed stdout.
    """
    if sys.stdout is None or not parallel.is_main():
        return
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            warn(f"cannot print: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # also for what is flushed at the end
