"""Backtracking: return to the best model and lower the learning rate when validation has not improved for too long.

The rule of the SWARM experiments (Vollgraf 2019). A history of validation losses starts with infinity. After epoch e
(from 0), let `last_worse` be the last entry that is strictly worse than this epoch's loss: how far back one must go to find
the model doing worse than now. Backtrack if last_worse < min(e (1 - horizon), e - 5). Then the best loss is entered into the
history instead of this epoch's, so a run that stagnates goes back in nearly every epoch and its rate decays by alpha each time.
"""

from __future__ import annotations

import math
from typing import Any

PATIENCE = 5  # epochs back that it looks at least


class Backtracking:
    """Judges each epoch's validation loss: `judge` says "best" (save it), "back" (load the best, lower the rate) or "keep"."""

    def __init__(self, horizon: float):
        self.horizon = horizon
        self.history = [math.inf]
        self.best = math.inf

    def judge(self, loss: float, *, last_epoch: bool = False) -> str:
        """Enter an epoch's loss. There is no way back from the last epoch. NaN and infinity are worse than everything."""
        epoch = len(self.history) - 1
        finite = math.isfinite(loss)
        last_worse = max((i for i, entry in enumerate(self.history) if entry > loss), default=0)
        stagnates = last_worse < min(epoch * (1 - self.horizon), epoch - PATIENCE)
        if (stagnates or not finite) and not last_epoch:
            self.history.append(self.best)
            return "back"
        self.history.append(loss if finite else self.best)
        if finite and loss < self.best:
            self.best = loss
            return "best"
        return "keep"

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.best = list(state["history"]), state["best"]
