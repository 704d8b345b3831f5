"""An LSTM cell with routed projections (the RNN prefab of the original)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.decision import Decision, Trajectories
from common.routing.layers import Selection
from common.routing.masks import active_samples


class RoutedProjection(nn.Module):
    """A stack of linear layers (B, D) -> (B, width); a router chooses the weights of each layer among several."""

    def __init__(
        self, sizes: list[int], num_selections: int, make_router: Callable[[int], Decision], nonlin: Callable[[Tensor], Tensor]
    ):
        super().__init__()
        self.nonlin = nonlin
        self.routers = nn.ModuleList(make_router(n_in) for n_in in sizes[:-1])
        self.selections = nn.ModuleList(
            Selection(*(nn.Linear(n_in, n_out) for _ in range(num_selections))) for n_in, n_out in pairwise(sizes)
        )

    def forward(self, x: Tensor, records: Trajectories, task_actions: Tensor | None, mask: Tensor | None) -> Tensor:
        for layer, (router, selection) in enumerate(zip(self.routers, self.selections, strict=True)):
            x = self.nonlin(x) if layer else x
            x, records, actions = router(x, records, task_actions, mask)
            x, records, _ = selection(x, records, actions, mask)
        return x


class RoutedLSTMCell(nn.Module):
    """An LSTM cell with routed input (`route_i2h`) and hidden (`route_h2h`) projections: x, (h, c), records -> (h, c), records.

    Gates are in the order input, forget, output, candidate (torch's: input, forget, candidate, output). A routed projection has
    `depth_routing` layers. `routing_agent` is a class of decisions, its `decision_options` are num_agents, exploration, ...
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
        nonlin: Callable[[Tensor], Tensor] = F.relu,
        **decision_options: Any,
    ):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("depth_routing", depth_routing)):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1")
        self.hidden_size = hidden_size

        def project(n_in: int, routed: bool) -> nn.Module:
            if not routed:
                return nn.Linear(n_in, 4 * hidden_size)
            sizes = [n_in, *[4 * hidden_size] * depth_routing]
            make_router = lambda n: routing_agent(num_selections, n, **decision_options)  # noqa: E731
            return RoutedProjection(sizes, num_selections, make_router, nonlin)

        self.i2h, self.h2h = project(in_features, route_i2h), project(hidden_size, route_h2h)
        bound = hidden_size**-0.5  # as torch's LSTM; policies keep their own initial weights
        for name, parameter in self.named_parameters():
            if "routers" not in name.split("."):
                nn.init.uniform_(parameter, -bound, bound)

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
        if active_samples(mask, len(x)) is None:
            mask = None
        agents = None if task_actions is None else torch.as_tensor(task_actions, device=x.device)

        def project(part: nn.Module, inputs: Tensor) -> Tensor:
            return part(inputs, records, agents, mask) if isinstance(part, RoutedProjection) else part(inputs)

        gates = project(self.i2h, x) + project(self.h2h, h)  # (B, 4 H)
        i, f, o, candidate = gates.chunk(4, 1)
        new_c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        if mask is not None:
            new_h, new_c = (torch.where(mask.bool()[:, None], new, old) for new, old in ((new_h, h), (new_c, c)))
        return (new_h, new_c), records
