"""What a batch remembers of its way through a routed network: who decided what, for which samples.

The original keeps an object per sample; here a decision is one step for the whole batch, kept as tensors, and what a single
sample has seen is a view: `records[i].task`, `records[i].steps[t].actions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from common.routing.decision import Decision


@dataclass
class Step:
    """One decision for a batch of B samples, of which the `active` ones took part."""

    decision: Decision  # whose loss judges it
    actions: Tensor  # (B) int64, 0 where not active
    active: Tensor  # (B) bool
    states: Tensor  # (B, K, C), 0 where not active; what the channels are is the decision's
    is_exploratory: Tensor  # (B) bool: another action than the greedy one
    control: Tensor | None = None  # (B, K), of RELAX alone
    modules: Sequence[nn.Module] | None = None  # what was selected from, if the Selection was asked to note it


@dataclass(frozen=True)
class SampleStep:
    """One decision about one sample."""

    actions: Tensor  # 0-dim int64
    is_exploratory: Tensor  # 0-dim bool
    states: Tensor  # (1, K, C)
    selected_modules: nn.Module | None


@dataclass(frozen=True)
class Record:
    """What one sample has seen."""

    task: Tensor | None  # 0-dim int64
    steps: list[SampleStep]


class Trajectories:
    """The steps of a batch of B samples. Has a length, can be indexed and iterated by sample."""

    def __init__(self, batch_size: int, tasks: Tensor | None, device: torch.device):
        self.batch_size, self.tasks, self.device = batch_size, tasks, device
        self.steps: list[Step] = []
        self.gate: Tensor | None = None  # (B): 1 in value, multiplies the next selected output; see GumbelSoftmax
        self.add_rewards: Tensor | None = None  # (T, B): rewards of the caller's own for each step

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, sample: int) -> Record:
        if not -len(self) <= sample < len(self):
            raise IndexError(f"there is no sample {sample}: the batch has {len(self)}")
        sample %= len(self)
        steps = [
            SampleStep(
                step.actions[sample],
                step.is_exploratory[sample],
                step.states[sample : sample + 1],
                None if step.modules is None else step.modules[int(step.actions[sample])],
            )
            for step in self.steps
            if step.active[sample]
        ]
        return Record(None if self.tasks is None else self.tasks[sample], steps)

    def __iter__(self) -> Iterator[Record]:
        return (self[sample] for sample in range(len(self)))

    def actions(self) -> Tensor:
        """Actions of all steps, (T, B)."""
        return self._stacked([step.actions for step in self.steps], torch.int64)

    def active(self) -> Tensor:
        """Which samples took part in which step, (T, B) bool."""
        return self._stacked([step.active for step in self.steps], torch.bool)

    def _stacked(self, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(rows) if rows else torch.zeros(0, len(self), dtype=dtype, device=self.device)


def check_range(argument: str, index: Tensor, n: int, what: str) -> None:
    """Raises ValueError, naming argument and value, if an entry of `index` is not in 0 ... n - 1."""
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"{argument} holds {low if low < 0 else high}: there are {n} {what}, from 0")


def checked_mask(mask: Tensor | None, batch_size: int) -> Tensor | None:
    """A mask (B) as bool, or None if every sample is active. Raises ValueError if none is, or for another length."""
    if mask is None:
        return None
    if mask.shape != (batch_size,):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}: the batch has {batch_size} samples")
    mask = mask.bool()
    n_active = int(mask.sum())
    if n_active == 0:
        raise ValueError("mask leaves no sample active: skip the layer instead")
    return None if n_active == batch_size else mask


def spread(values: Tensor, mask: Tensor | None) -> Tensor:
    """Put values (N, ...) of the N active samples into their places among zeros: (B, ...). Without a mask, as they are."""
    if mask is None:
        return values
    places = mask.nonzero()[:, 0]
    return values.new_zeros(len(mask), *values.shape[1:]).index_copy(0, places, values)
