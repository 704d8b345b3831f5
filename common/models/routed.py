"""Multi-task image networks: a shared convolutional trunk, and fully connected layers that are shared, owned, routed or mixed.

Every fully connected layer has several modules of equal size; the models differ in how the module of a sample is chosen
(Rosenbaum et al., ICLR 2018; names as in the original's example models).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common.routing as routing
from common.models.deterministic import max_pool2d
from common.routing import Decision, Initialization, PassThrough, PerTaskAssignment, Selection, StackedLinear, Trajectories

CHANNELS = 32
DECISIONS: dict[str, type[Decision]] = {
    decision.__name__: decision
    for decision in (
        routing.WPL, routing.REINFORCE, routing.REINFORCEBl1, routing.REINFORCEBl2, routing.EGreedyREINFORCE,
        routing.ActorCritic, routing.AAC, routing.BootstrapAAC, routing.EGreedyAAC, routing.QLearning, routing.SARSA,
        routing.AdvantageLearning, routing.BootstrapAdvantageLearning, routing.GumbelSoftmax, routing.RELAX,
    )
}  # fmt: skip


class Trunk(nn.Module):
    """Four blocks of 3x3 convolution, ReLU and max-pooling, then batch norm: (B, C, H, W) -> (B, 32 (H/16) (W/16))."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(n, CHANNELS, 3, padding=1) for n in (in_channels, *[CHANNELS] * 3))
        self.batchnorm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.conv:
            x = F.relu(max_pool2d(conv(x), 2))  # same as ReLU first, on a quarter of the numbers
        return self.batchnorm(x).flatten(1)


def layer_sizes(side: int, depth: int, width: int, n_out: int) -> list[tuple[int, int]]:
    """Input and output sizes of the fully connected layers behind a trunk, for images of side x side pixels."""
    return list(pairwise([CHANNELS * (side // 16) ** 2, *[width] * (depth - 1), n_out]))


class RoutedNet(nn.Module):
    """Trunk, then layers of a router and a selection of modules: x (B, C, H, W), tasks (B) -> (B, n_out), trajectories.

    The agent of a sample is its task's or, with a `dispatcher`, the one that the dispatcher decides for.
    """

    def __init__(
        self,
        in_channels: int,
        sizes: list[tuple[int, int]],
        routers: Sequence[nn.Module],  # Decision, PerTaskAssignment or PassThrough
        n_modules: list[int],
        dispatcher: Decision | None = None,
    ):
        super().__init__()
        self.trunk, self.initialization = Trunk(in_channels), Initialization()
        self.dispatcher, self.routers, self.n_modules = dispatcher, nn.ModuleList(routers), n_modules
        self.selections = nn.ModuleList(Selection(StackedLinear(n, *size)) for size, n in zip(sizes, n_modules, strict=True))

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectories]:
        x, records, _ = self.initialization(self.trunk(x), tasks)
        agents = tasks
        if self.dispatcher is not None:
            x, records, agents = self.dispatcher(x, records)
        for layer, (router, selection) in enumerate(zip(self.routers, self.selections, strict=True)):
            x = F.relu(x) if layer else x
            x, records, actions = router(x, records, agents)
            x, records, _ = selection(x, records, actions)
        return x, records

    def routing(self, records: Trajectories, tasks: Tensor) -> list[Tensor]:
        """The module of each sample, one-hot, for each layer: (B, modules)."""
        steps = iter(records.steps if self.dispatcher is None else records.steps[1:])
        routes = []
        for router, n in zip(self.routers, self.n_modules, strict=True):
            if isinstance(router, Decision):
                actions = next(steps).actions
            else:
                actions = torch.zeros_like(tasks) if isinstance(router, PassThrough) else tasks
            routes.append(F.one_hot(actions, n))
        return routes

    def routing_parameters(self) -> list[nn.Parameter]:
        """The parameters of all decisions."""
        parts = [self.dispatcher, *self.routers]
        return [p for part in parts if part is not None for p in part.parameters()]


class MixedLayer(nn.Module):
    """sum_k w_k (W_k x + b_k), w a softmax of the task's learned row: inputs (B, D), tasks (B) -> (B, E)."""

    def __init__(self, n_in: int, n_out: int, n_modules: int, n_tasks: int):
        super().__init__()
        self.maps = StackedLinear(n_modules, n_in, n_out)
        self.table = nn.Parameter(torch.zeros(n_tasks, n_modules))

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        outputs = torch.einsum("bd,ked->bke", x, self.maps.weight) + self.maps.bias
        return (F.softmax(self.table, 1)[tasks][:, :, None] * outputs).sum(1)


class SoftMixture(nn.Module):
    """Trunk, then layers that mix the outputs of all their modules with the task's weights, without decisions."""

    def __init__(self, in_channels: int, sizes: list[tuple[int, int]], n_modules: int, n_tasks: int):
        super().__init__()
        self.trunk, self.initialization = Trunk(in_channels), Initialization()
        self.layers = nn.ModuleList(MixedLayer(*size, n_modules, n_tasks) for size in sizes)

    def forward(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, Trajectories]:
        x, records, _ = self.initialization(self.trunk(x), tasks)
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x, tasks)
        return x, records

    def routing(self, records: Trajectories, tasks: Tensor) -> list[Tensor]:
        """The weight of each module for each sample, for each layer: (B, modules)."""
        return [F.softmax(table.detach(), 1)[tasks] for table in self.routing_parameters()]

    def routing_parameters(self) -> list[nn.Parameter]:
        """The tables of weights."""
        return [layer.table for layer in self.layers if isinstance(layer, MixedLayer)]


MODELS = ("per-task-all-fc", "per-task-1-fc", "routed-all-fc", "dispatched", "single-agent", "soft-mixture")


def make(
    model: str,
    in_channels: int,
    sizes: list[tuple[int, int]],
    n_tasks: int,
    n_modules: int,
    n_agents: int,
    make_decision: Callable[..., Decision],
) -> RoutedNet | SoftMixture:
    """Make one of MODELS. `make_decision(n, in_features, n_agents, storage)` makes a layer that decides among n modules.

    Per-task models have a module for each task. The dispatcher of `dispatched` sees the features, its agents have tables;
    the agent of `single-agent` sees the input of each layer; neither knows the task. Raises ValueError for another name.
    """
    depth = len(sizes)
    if model == "soft-mixture":
        return SoftMixture(in_channels, sizes, n_modules, n_tasks)
    if model == "per-task-all-fc":
        return RoutedNet(in_channels, sizes, [PerTaskAssignment()] * depth, [n_tasks] * depth)
    if model == "per-task-1-fc":
        routers = [*[PassThrough()] * (depth - 1), PerTaskAssignment()]
        return RoutedNet(in_channels, sizes, routers, [*[1] * (depth - 1), n_tasks])
    if model == "routed-all-fc":
        decisions = [make_decision(n_modules, n_in, n_tasks, "tabular") for n_in, _ in sizes]
        return RoutedNet(in_channels, sizes, decisions, [n_modules] * depth)
    if model == "dispatched":
        dispatcher = make_decision(n_agents, sizes[0][0], 1, "approx")
        decisions = [make_decision(n_modules, n_in, n_agents, "tabular") for n_in, _ in sizes]
        return RoutedNet(in_channels, sizes, decisions, [n_modules] * depth, dispatcher)
    if model == "single-agent":
        decisions = [make_decision(n_modules, n_in, 1, "approx") for n_in, _ in sizes]
        return RoutedNet(in_channels, sizes, decisions, [n_modules] * depth)
    raise ValueError(f"there is no model {model!r}: choose from {', '.join(MODELS)}")


def make_routed(
    model: str,
    *,
    in_channels: int,
    sizes: list[tuple[int, int]],
    n_tasks: int,
    n_modules: int,
    n_agents: int,
    decision: str,
    exploration: float,
    collaboration: float,
) -> RoutedNet | SoftMixture:
    """Make one of MODELS whose layers decide as one of DECISIONS, rewarded for popular modules by a share `collaboration`.

    Raises ValueError for other names, and values out of range.
    """
    if decision not in DECISIONS:
        raise ValueError(f"there is no decision {decision!r}: choose from {', '.join(DECISIONS)}")

    def make_decision(n: int, in_features: int, n_agents: int, storage: str) -> Decision:
        # on the output, the gradient of the factor is the effect of a larger output of the module
        more: dict[str, Any] = {"scale": "output"} if decision == "GumbelSoftmax" else {}
        reward = routing.CollaborationReward(collaboration, num_actions=n)
        return DECISIONS[decision](n, in_features, n_agents, exploration, storage, additional_reward_func=reward, **more)

    return make(model, in_channels, sizes, n_tasks, n_modules, n_agents, make_decision)
