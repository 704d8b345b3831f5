"""Exploration that changes as training goes on."""

from __future__ import annotations

from torch import nn

from common.routing.decision import Decision


def annealed(start: float, end: float, progress: float, kind: str = "linear") -> float:
    """Exploration at a share `progress` (0 to 1) of the training, linear or exponential from `start` to `end`.

    Raises ValueError for another kind, and for an exponential that begins or ends at 0.

    >>> annealed(0.5, 0.1, 0.5), round(annealed(0.4, 0.1, 0.5, "exponential"), 6)
    (0.3, 0.2)
    """
    if kind == "linear":
        return start + (end - start) * progress
    if kind != "exponential":
        raise ValueError(f"kind is {kind!r}: linear or exponential")
    if min(start, end) <= 0:
        raise ValueError(f"an exponential from {start} to {end} is not possible: both need to be above 0")
    return start * (end / start) ** progress


def set_exploration(model: nn.Module, exploration: float) -> None:
    """Set the exploration of every decision layer in a model. Raises ValueError outside 0 to 1."""
    for layer in model.modules():
        if isinstance(layer, Decision):
            layer.set_exploration(exploration)
