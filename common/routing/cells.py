"""A recurrent cell whose projections are routed (the RNN prefab of the original)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.decision import Decision
from common.routing.layers import Selection
from common.routing.trajectories import Trajectories, checked_mask


class RoutedProjection(nn.Module):
    """A linear map (B, D) -> (B, width) of which each of `depth` layers is chosen among `num_selections`.

    With `recurrent`, a fixed map comes first, then one decision and one set of maps are used `depth` times; action 0 ends the
    routing of a sample, whose projection stays what it is by then.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        num_selections: int,
        depth: int,
        make_decision: Callable[[int], Decision],
        nonlin: Callable[[Tensor], Tensor],
        *,
        recurrent: bool,
    ):
        super().__init__()
        if recurrent and num_selections < 2:
            raise ValueError(f"num_selections is {num_selections}: recurrent routing needs an end and at least one module")
        self.depth, self.recurrent, self.nonlin = depth, recurrent, nonlin
        self.entry = nn.Linear(in_features, width) if recurrent else None
        sizes = [width] if recurrent else [in_features] + [width] * (depth - 1)
        self.routers = nn.ModuleList(make_decision(size) for size in sizes)
        self.selections = nn.ModuleList(
            Selection(
                *([nn.Identity()] if recurrent else []),  # the end
                *(nn.Linear(size, width) for _ in range(num_selections - recurrent)),
                pass_inactive=recurrent,
            )
            for size in sizes
        )

    def forward(self, x: Tensor, records: Trajectories, task_actions: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.entry is not None:
            x = self.entry(x)
        for layer in range(self.depth):
            router, selection = (layers[0 if self.recurrent else layer] for layers in (self.routers, self.selections))
            x = self.nonlin(x) if layer and not self.recurrent else x
            y, records, actions = router(x, records, task_actions, mask)
            y, records, actions = selection(self.nonlin(y) if self.recurrent else y, records, actions, mask)
            if not self.recurrent:
                x = y
                continue
            goes_on = actions != 0 if mask is None else mask & (actions != 0)
            x = torch.where(goes_on[:, None], y, x)
            mask = goes_on
            if not mask.any():
                break
        return x


class RoutedLSTMCell(nn.Module):
    """An LSTM cell with routed input (`route_i2h`) and hidden (`route_h2h`) projections: x, (h, c), records -> (h, c), records.

    Gates are in the order input, forget, output, candidate (torch's: input, forget, candidate, output). `routing_agent` is a
    class of decisions, which gets `decision_options` (num_agents, exploration, policy_storage_type, ...). See RoutedProjection.
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        num_selections: int,
        depth_routing: int,
        routing_agent: type[Decision],
        route_i2h: bool = False,
        route_h2h: bool = True,
        recurrent: bool = False,
        nonlin: Callable[[Tensor], Tensor] = F.relu,
        **decision_options: Any,
    ):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("depth_routing", depth_routing)):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1")
        self.hidden_size = hidden_size

        def project(size: int, routed: bool) -> nn.Module:
            if not routed:
                return nn.Linear(size, 4 * hidden_size)
            return RoutedProjection(
                size,
                4 * hidden_size,
                num_selections,
                depth_routing,
                lambda inputs: routing_agent(num_selections, inputs, **decision_options),
                nonlin,
                recurrent=recurrent,
            )

        self.i2h, self.h2h = project(in_features, route_i2h), project(hidden_size, route_h2h)
        bound = hidden_size**-0.5  # as torch's LSTM; policies keep their own initial state
        for module in self.modules():
            if isinstance(module, nn.Linear) and not self._is_a_routers(module):
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -bound, bound)

    def _is_a_routers(self, module: nn.Module) -> bool:
        routers = [layer for layer in self.modules() if isinstance(layer, Decision)]
        return any(module is part for router in routers for part in router.modules())

    def forward(
        self,
        x: Tensor,
        hidden: tuple[Tensor, Tensor] | None,
        records: Trajectories,
        task_actions: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Trajectories]:
        """One step of x (B, D); `hidden` is (h, c), (B, H) each, or None for zeros. Samples outside the mask keep theirs."""
        if hidden is None:
            hidden = (x.new_zeros(len(x), self.hidden_size), x.new_zeros(len(x), self.hidden_size))
        h, c = hidden
        active = checked_mask(mask, len(x))
        agents = None if task_actions is None else torch.as_tensor(task_actions, device=x.device)
        gates = self._project(self.i2h, x, records, agents, active) + self._project(self.h2h, h, records, agents, active)
        i, f, o, candidate = gates.chunk(4, 1)
        new_c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        if active is not None:
            new_h, new_c = (torch.where(active[:, None], new, old) for new, old in ((new_h, h), (new_c, c)))
        return (new_h, new_c), records

    @staticmethod
    def _project(part: nn.Module, x: Tensor, records: Trajectories, agents: Tensor | None, mask: Tensor | None) -> Tensor:
        return part(x, records, agents, mask) if isinstance(part, RoutedProjection) else part(x)
