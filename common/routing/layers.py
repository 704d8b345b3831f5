"""The layers around decisions. They pass on a triple: the batch, its trajectories, the last actions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.routing.decision import Trajectories
from common.routing.grouped import StackedLinear, apply_grouped
from common.routing.masks import active_samples, check_index, spread


class Initialization(nn.Module):
    """Begins the trajectories of a batch: xs (B, ...), tasks (B) or none -> (xs, trajectories, no actions yet).

    >>> xs, records, actions = Initialization()(torch.zeros(3, 6), tasks=[0, 1, 1])
    >>> len(records), records.tasks, actions
    (3, tensor([0, 1, 1]), None)
    """

    def forward(self, xs: Tensor, tasks: Tensor | Sequence[int] = ()) -> tuple[Tensor, Trajectories, None]:
        """Raises ValueError for an empty batch, and for another number of tasks than of samples."""
        if len(xs) == 0:
            raise ValueError("xs is an empty batch: there is nothing to route")
        if len(tasks) == 0:
            return xs, Trajectories(len(xs), None, xs.device), None
        labels = torch.as_tensor(tasks, device=xs.device)
        check_index("tasks", labels, None, len(xs), 2**63 - 1, "tasks")
        return xs, Trajectories(len(xs), labels.long(), xs.device), None


class Selection(nn.Module):
    """Sends each sample through the module that its action names: xs (B, ...), actions (B) -> ys (B, ...).

    Modules are given one by one, or as a StackedLinear. Inactive samples become zeros.

    >>> selection = Selection(nn.Identity(), nn.Tanh())
    >>> xs, records, actions = Initialization()(torch.tensor([[5.0], [0.0]]))
    >>> selection(xs, records, torch.tensor([0, 1]))[0]
    tensor([[5.],
            [0.]])
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        if not modules:
            raise ValueError("modules is empty: Selection needs at least one module")
        self.stack = modules[0] if isinstance(modules[0], StackedLinear) and len(modules) == 1 else None
        self.selectable = nn.ModuleList(() if self.stack is not None else modules)
        self._log: set[int] | None = None  # of modules that were run

    def forward(
        self, xs: Tensor, records: Trajectories, actions: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Trajectories, Tensor]:
        """Raises ValueError for actions that are missing, not (B), or name no module, and a mask without an active sample."""
        if actions is None:
            raise ValueError("actions is None: a decision needs to come before a Selection")
        active = active_samples(mask, len(xs))
        check_index("actions", actions, active, len(xs), len(self.stack or self.selectable), "modules")
        x, index = (xs, actions) if active is None else (xs[active], actions[active])
        ys = apply_grouped(list(self.selectable), x, index) if self.stack is None else self.stack(x, index)
        ys = spread(ys, active, len(xs))
        if records.gate is not None:
            ys = ys * records.gate.view(-1, *[1] * (ys.ndim - 1))
            records.gate = None
        if self._log is not None:
            self._log.update(index.unique().tolist())
        return ys, records, actions

    def start_logging_selections(self) -> None:
        """From now on, remember the modules that are run."""
        self._log = set()

    def stop_logging_and_get_selections(self) -> list[int]:
        """Indices of the modules that were run since the log was started."""
        log, self._log = self._log or set(), None
        return sorted(log)
