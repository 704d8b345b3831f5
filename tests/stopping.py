"""Signals at counted places; as a program, train_ssl.py, one process of which gets one.

torchrun --nproc-per-node=2 tests/stopping.py RANK N --model duet ...  # SIGTERM to process RANK at its N-th look for one
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable

import pytest

from common.run.command import Command
from common.run.state import State


def signal_at(n: int) -> Callable[[State], None]:
    """A State.check_signal for which SIGTERM comes at the n-th call: after a step, or before a batch of a test."""
    check_signal, calls = State.check_signal, itertools.count(1)

    def check(self: State) -> None:
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        check_signal(self)

    return check


class Signals:
    """Sends this process a signal when `Command.signal` is looked at for the n-th time: between steps, batches, jobs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.left, self.number = 0, signal.SIGTERM
        monkeypatch.setattr(Command, "signal", property(self.look, self.note), raising=False)

    def look(self, command: Command) -> str | None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return command.__dict__.get("_came")

    def note(self, command: Command, name: str | None) -> None:
        command.__dict__["_came"] = name


if __name__ == "__main__":
    import train_ssl

    if os.environ["RANK"] == sys.argv[1]:
        State.check_signal = signal_at(int(sys.argv[2]))  # type: ignore[method-assign]
    sys.exit(train_ssl.main(sys.argv[3:]))
