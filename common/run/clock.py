"""A wall-clock budget that counts training only: it can be paused, and a resumed run continues it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds used of a budget; runs from its making, or the loading of its state."""

    def __init__(self, budget: float = math.inf):
        self.budget = budget
        self._used = 0.0
        self._since: float | None = time.monotonic()

    def used(self) -> float:
        """Seconds that have counted so far, with all work that a GPU was given, for which it waits."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return self._now()

    def _now(self) -> float:
        return self._used + (0.0 if self._since is None else time.monotonic() - self._since)

    def left(self) -> float:
        """Seconds left, not below zero. A GPU may be some steps behind: neither this nor `is_up` waits for it."""
        return max(0.0, self.budget - self._now())

    def is_up(self) -> bool:
        return self._now() >= self.budget

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the clock in a `with` block, as for plots and samples."""
        self._used, self._since = self.used(), None
        try:
            yield
        finally:
            self._since = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.used()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._used, self._since = float(state["seconds"]), time.monotonic()
