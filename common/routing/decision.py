"""What all learned decisions share: agents, dispatching, masks, exploration, and the step that goes into the trajectories.

A kind of decision says in `state` what its agents compute for a sample, in `behaviour` what training actions are drawn from, in
`loss` how it learns from rewards, and in `bootstrap` what a state is worth to the decision before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.policies import Networks, Tables
from common.routing.rewards import PerActionBaseReward, refuse_unknown
from common.routing.trajectories import Step, Trajectories, check_range, checked_mask, spread


@dataclass(frozen=True)
class Transition:
    """What a loss is made of, for N samples; everything but `state` (and `control`) is held constant."""

    state: Tensor  # (N, K, C)
    action: Tensor  # (N)
    reward: Tensor  # (N), of this action; the last one's holds the final reward
    cum_return: Tensor  # (N), discounted sum of rewards from this action on
    next_value: Tensor  # (N), what the next state is worth, discounted; 0 after the last action
    control: Tensor | None = None  # (N, K), of RELAX alone


@dataclass(frozen=True)
class Choice:
    """What N samples were decided to do."""

    state: Tensor  # (N, K, C)
    action: Tensor  # (N)
    gate: Tensor | None = None  # (N), 1 in value: carries the gradient of a reparameterised sample
    control: Tensor | None = None


def temperature_of(exploration: float) -> float:
    """The published temperature for an exploration from 0 to 1: 0.1 to 10."""
    return 0.1 + 9.9 * exploration


def chosen(values: Tensor, action: Tensor) -> Tensor:
    """The entry of each row that its action names: (N, K), (N) -> (N)."""
    return values.gather(1, action[:, None])[:, 0]


def greedy_with(exploration: float, scores: Tensor) -> Tensor:
    """The distribution that is uniform with probability `exploration`, and greedy else: (N, K) -> (N, K)."""
    greedy = F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)
    return exploration / scores.shape[1] + (1 - exploration) * greedy


class Decision(nn.Module, ABC):
    """A layer of agents that decide, for each sample, which of `num_selections` modules comes next.

    `num_agents` share the layer; the prior actions say which agent has which sample. `policy_storage_type` is approx (a
    network of `in_features` inputs with `approx_hidden_dims`, or copies of `policy_net`) or tabular (a row of numbers an agent,
    whatever the input). With `detach` no gradient flows from agents into the input. `exploration` is from 0 to 1.
    `value_net` (also `qvalue_net`) is for kinds that estimate values. `additional_reward_func` rewards single actions; each
    layer has its own unless it is given one. `approx_module` and `additional_reward_class`, `additional_reward_args` are
    other published names of `policy_net` and `additional_reward_func`. Raises ValueError for values that make no sense.
    """

    values: Literal["none", "actions", "state"] = "none"  # what the value nets estimate: one output a selection, or one
    bootstraps = False  # whether the loss looks at next_value

    def __init__(
        self,
        num_selections: int,
        in_features: int | None = None,
        num_agents: int = 1,
        exploration: float = 0.1,
        policy_storage_type: str = "approx",
        detach: bool = True,
        approx_hidden_dims: Sequence[int] = (),
        policy_net: nn.Module | None = None,
        additional_reward_func: PerActionBaseReward | None = None,
        set_pg_temp: bool = False,
        *,
        value_net: nn.Module | None = None,
        qvalue_net: nn.Module | None = None,
        approx_module: nn.Module | None = None,
        additional_reward_class: type[PerActionBaseReward] | None = None,
        additional_reward_args: dict[str, Any] | None = None,
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown(unknown, type(self).__name__)
        for name, value in (("num_selections", num_selections), ("num_agents", num_agents)):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1")
        if policy_storage_type not in ("approx", "tabular"):
            raise ValueError(f"policy_storage_type is {policy_storage_type!r}: approx or tabular")
        policy_net = approx_module if policy_net is None else policy_net
        if policy_storage_type == "approx" and policy_net is None and (in_features is None or in_features < 1):
            raise ValueError(f"in_features is {in_features}: an approx policy needs to know how many there are")
        self.num_selections, self.num_agents, self.in_features = num_selections, num_agents, in_features
        self.tabular, self.detach, self.set_pg_temp = policy_storage_type == "tabular", detach, set_pg_temp
        self.hidden = tuple(approx_hidden_dims)
        self.policy = self._agents(num_selections, 1 / num_selections, policy_net)
        self.value = self._value_agents(policy_net, qvalue_net if value_net is None else value_net)
        if additional_reward_func is None:
            additional_reward_func = (additional_reward_class or PerActionBaseReward)(**(additional_reward_args or {}))
        self.reward_func = additional_reward_func
        self.reward_func.bind(num_selections)
        self.temperature = 1.0
        self._set_exploration(exploration)

    def _agents(self, n_out: int, initial: float, net: nn.Module | None = None, extra_inputs: int = 0) -> Networks | Tables:
        """A table or network of `n_out` outputs for each agent."""
        if self.tabular:
            return Tables(self.num_agents, n_out, initial)
        return Networks(self.num_agents, (self.in_features or 0) + extra_inputs, n_out, self.hidden, net)

    def _value_agents(self, policy_net: nn.Module | None, value_net: nn.Module | None) -> nn.Module | None:
        """What estimates values; where those are of actions, a given policy net serves as a model for it."""
        if self.values == "none":
            return None
        if self.values == "actions":
            return self._agents(self.num_selections, 1 / self.num_selections, policy_net if value_net is None else value_net)
        if value_net is None and not self.tabular and self.in_features is None:
            raise ValueError("in_features is None: value nets need it, unless value_net is given, too")
        return self._agents(1, 0.0, value_net)

    # ---- what a kind of decision defines ----

    @abstractmethod
    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        """What agents (N) compute of inputs (N, D): (N, K, C). The largest entry of channel 0 is the greedy action."""

    @abstractmethod
    def behaviour(self, state: Tensor) -> Tensor:
        """The distributions (N, K) that actions are drawn from in training."""

    @abstractmethod
    def loss(self, t: Transition) -> Tensor:
        """What to minimise, by sample: (N)."""

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        """What states (N, K, C) are worth, (N), action (N) having been taken there; None if the decision knows no values."""
        return None

    def decide(self, x: Tensor, agents: Tensor) -> Choice:
        """Draw actions (N) in training, take the greedy ones in evaluation."""
        state = self.state(x, agents)
        if not self.training:
            return Choice(state, state[:, :, 0].argmax(1))
        return Choice(state, torch.multinomial(self.behaviour(state.detach()), 1)[:, 0])

    def set_exploration(self, exploration: float) -> None:
        """Explore as much as that from now on, from 0 to 1. Raises ValueError outside."""
        self._set_exploration(exploration)

    def _set_exploration(self, exploration: float) -> None:
        if not 0 <= exploration <= 1:
            raise ValueError(f"exploration is {exploration}: from 0 to 1")
        self.exploration = exploration

    # ---- the layer ----

    def forward(
        self,
        xs: Tensor,
        records: Trajectories,
        prior_actions: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        update_target: Tensor | None = None,
    ) -> tuple[Tensor, Trajectories, Tensor]:
        """Decide for a batch (B, ...): what goes on (`update_target`, or xs), the trajectories, actions (B).

        Prior actions (B) name each sample's agent, if there are several. Samples outside the mask get action 0 and no step.
        Raises ValueError for prior actions that are missing or name no agent, and a mask without an active sample.
        """
        mask = checked_mask(mask, len(xs))
        inputs, agents = self._inputs(xs), self._chosen_agents(prior_actions, xs)
        choice = self.decide(inputs, agents) if mask is None else self.decide(inputs[mask], agents[mask])
        actions = spread(choice.action, mask)
        records.steps.append(
            Step(
                self,
                actions,
                torch.ones(len(xs), dtype=torch.bool, device=xs.device) if mask is None else mask,
                spread(choice.state, mask),
                spread(choice.action != choice.state[:, :, 0].argmax(1), mask),
                None if choice.control is None else spread(choice.control, mask),
            )
        )
        if self.training:  # evaluation leaves no trace
            self.reward_func.register(self.behaviour(choice.state.detach()), choice.action)
        ys = xs if update_target is None else update_target
        if choice.gate is not None:
            ys = self._pass_gate(ys, records, 1 + spread(choice.gate - 1, mask))
        return ys, records, actions

    def _pass_gate(self, ys: Tensor, records: Trajectories, gate: Tensor) -> Tensor:
        """Let the gradient of a reparameterised sample in: here, by the input of what is selected."""
        return ys * gate.view(-1, *[1] * (ys.ndim - 1))

    def _inputs(self, xs: Tensor) -> Tensor:
        return xs.detach().flatten(1) if self.detach else xs.flatten(1)

    def _chosen_agents(self, prior_actions: Tensor | Sequence[int] | None, xs: Tensor) -> Tensor:
        """Each sample's agent, (B)."""
        if self.num_agents == 1:
            return torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
        if prior_actions is None or len(prior_actions) == 0:
            raise ValueError(
                f"prior_actions is {prior_actions}: with {self.num_agents} agents, each sample needs to name its own"
            )
        agents = torch.as_tensor(prior_actions, dtype=torch.int64, device=xs.device)
        if agents.shape != (len(xs),):
            raise ValueError(f"prior_actions has the shape {tuple(agents.shape)}: the batch has {len(xs)} samples")
        check_range("prior_actions", agents, self.num_agents, "agents")
        return agents
