"""Signals that end a run early: SIGTERM (preemption), SIGUSR1 (time limit ahead), SIGINT (Ctrl-C).

A signal only sets a flag. The training loop looks at it between steps, saves, and leaves with exit status 75; so no write is
ever cut in half by it. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):
    """A signal came: what was at work, and is not saved by halves, is begun again another time."""


class Interruption:
    """Within `with Interruption() as interruption:`, `interruption.signal` is the name of the signal that came, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
