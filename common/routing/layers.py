"""The layers around decisions. What goes from layer to layer is a triple: the batch, its trajectories, the last actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.routing.decision import Decision
from common.routing.fixed import PassThrough, PerTaskAssignment
from common.routing.grouped import StackedLinear, apply_grouped
from common.routing.rewards import refuse_unknown
from common.routing.trajectories import Trajectories, check_range, checked_mask, spread


class Initialization(nn.Module):
    """Begins the trajectories of a batch: xs (B, ...), a task a sample or none -> (xs, trajectories, no actions yet).

    >>> xs, records, actions = Initialization()(torch.zeros(3, 6), tasks=[0, 1, 1])
    >>> len(records), int(records[2].task), actions
    (3, 1, None)
    """

    def forward(self, xs: Tensor, tasks: Tensor | Sequence[int] = ()) -> tuple[Tensor, Trajectories, None]:
        """Raises ValueError for an empty batch, or another number of tasks than of samples."""
        if len(xs) == 0:
            raise ValueError("xs is an empty batch: there is nothing to route")
        labels = torch.as_tensor(tasks, dtype=torch.int64, device=xs.device)
        if len(labels) not in (0, len(xs)):
            raise ValueError(f"tasks names {len(labels)} tasks: the batch has {len(xs)} samples")
        return xs, Trajectories(len(xs), labels if len(labels) else None, xs.device), None


class Selection(nn.Module):
    """Sends each sample through the module that was decided for it: xs (B, ...), actions (B) -> ys (B, ...).

    Modules are given one by one, or as a StackedLinear. Inactive samples become zeros or, with `pass_inactive`, stay what they
    are.

    >>> selection = Selection(nn.Identity(), nn.Tanh())
    >>> xs, records, actions = Initialization()(torch.tensor([[5.0], [0.0]]))
    >>> selection(xs, records, torch.tensor([0, 1]))[0]
    tensor([[5.],
            [0.]])
    """

    def __init__(
        self,
        *modules: nn.Module,
        name: str = "",
        store_module_pointers: bool = False,
        pass_inactive: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown(unknown, "Selection")
        if not modules:
            raise ValueError("modules is empty: Selection needs at least one module")
        self.stack = modules[0] if isinstance(modules[0], StackedLinear) and len(modules) == 1 else None
        if self.stack is not None and store_module_pointers:
            raise ValueError("store_module_pointers is True: a StackedLinear has no modules to point to")
        self.selectable = nn.ModuleList(() if self.stack is not None else modules)
        self.name, self.store_module_pointers, self.pass_inactive = name, store_module_pointers, pass_inactive
        self._log: set[int] | None = None  # of modules that were run
        self._old: set[int] = set()

    def forward(
        self, xs: Tensor, records: Trajectories, actions: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Trajectories, Tensor]:
        """Raises ValueError for actions that are missing or name no module, or a mask without an active sample."""
        if actions is None:
            raise ValueError("actions is None: a decision needs to come before a Selection")
        mask = checked_mask(mask, len(xs))
        x, chosen = (xs, actions) if mask is None else (xs[mask], actions[mask])
        check_range("actions", chosen, len(self.stack or self.selectable), "modules")
        ys = apply_grouped(list(self.selectable), x, chosen) if self.stack is None else self.stack(x, chosen)
        ys = spread(ys, mask)
        if mask is not None and self.pass_inactive:
            if ys.shape != xs.shape:
                raise ValueError(f"pass_inactive: modules make {tuple(ys.shape)} of {tuple(xs.shape)}")
            ys = torch.where(mask.view(-1, *[1] * (xs.ndim - 1)), ys, xs)
        if records.gate is not None:
            ys = ys * records.gate.view(-1, *[1] * (ys.ndim - 1))
            records.gate = None
        if self._log is not None:
            self._log.update(chosen.unique().tolist())
        if self.store_module_pointers and records.steps:
            records.steps[-1].modules = list(self.selectable)
        return ys, records, actions

    def start_logging_selections(self) -> None:
        """From now on, remember which modules are run."""
        self._log = set()

    def stop_logging_and_get_selections(self, add_to_old: bool = False) -> list[int]:
        """The modules that were run since the log was started; with `add_to_old`, also in logs before that one."""
        self._old = (self._old if add_to_old else set()) | (self._log or set())
        self._log = None
        return sorted(self._old)


class Sequential(nn.Module):
    """Layers one after the other: (xs, tasks) -> (ys, trajectories). Layers that know no triple see the batch alone.

    A decision is given the actions of the layer before it, to be dispatched by.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.initialization = Initialization()
        self.layers = nn.ModuleList(layer for layer in modules if not isinstance(layer, Initialization))

    def forward(self, x: Tensor, tasks: Tensor | Sequence[int] = ()) -> tuple[Tensor, Trajectories]:
        records: Trajectories
        actions: Tensor | None
        x, records, actions = self.initialization(x, tasks)
        for layer in self.layers:
            if isinstance(layer, Decision | Selection | PerTaskAssignment | PassThrough):
                x, records, actions = layer(x, records, actions)
            else:
                x = layer(x)
        return x, records
