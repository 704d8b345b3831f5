"""A wall-clock budget that counts training alone: it can be paused, and goes on where an interrupted run left it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent of a budget; runs from its making on."""

    def __init__(self, budget: float, used: float = 0.0):
        self.budget = budget
        self._used = used
        self._since: float | None = time.monotonic()

    def used(self) -> float:
        """Seconds that have counted so far."""
        return self._used + (0.0 if self._since is None else time.monotonic() - self._since)

    def left(self) -> float:
        """Seconds left, not below zero."""
        return max(0.0, self.budget - self.used())

    def is_up(self) -> bool:
        return self.used() >= self.budget

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count: plots, samples."""
        self._used, self._since = self.used(), None
        try:
            yield
        finally:
            self._since = time.monotonic()
