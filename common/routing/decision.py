"""Decisions: layers of agents that choose a module for each sample, and the trajectories that they leave.

A kind of decision defines `state` (what its agents compute for a sample), `behaviour` (the distribution that training actions
are drawn from), `loss` (how it learns from rewards), and `bootstrap` (the value of a state, for the decision before it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.masks import active_samples, check_index, spread
from common.routing.policies import Networks, Tables
from common.routing.rewards import PerActionBaseReward


@dataclass
class Step:
    """One decision for a batch of B samples, some of which are active."""

    decision: Decision  # its loss judges the step
    actions: Tensor  # (B) int64, 0 where not active
    active: Tensor  # (B) bool
    states: Tensor  # (B, K, C), 0 where not active; the class of the decision says what its channels are
    is_exploratory: Tensor  # (B) bool: the action is not the greedy one
    control: Tensor | None = None  # (B, K), for RELAX only


class Trajectories:
    """The steps of a batch of B samples on their way through a routed network, one for each decision."""

    def __init__(self, batch_size: int, tasks: Tensor | None, device: torch.device):
        self.batch_size, self.tasks, self.device = batch_size, tasks, device
        self.steps: list[Step] = []
        self.gate: Tensor | None = None  # (B): 1 in value, multiplies the next selected output; see GumbelSoftmax
        self.add_rewards: Tensor | None = None  # (T, B): the caller's own rewards for each step

    def __len__(self) -> int:
        return self.batch_size

    def actions(self) -> Tensor:
        """Actions of all steps, (T, B)."""
        return self._stacked([step.actions for step in self.steps], torch.int64)

    def active(self) -> Tensor:
        """Masks of active samples of all steps, (T, B) bool."""
        return self._stacked([step.active for step in self.steps], torch.bool)

    def _stacked(self, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(rows) if rows else torch.zeros(0, len(self), dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Transition:
    """Input of a decision's loss for N samples; everything but `state` (and `control`) is held constant."""

    state: Tensor  # (N, K, C)
    action: Tensor  # (N)
    reward: Tensor  # (N), of this action; the last action's includes the final reward
    cum_return: Tensor  # (N), sum of the rewards from this action on
    next_value: Tensor  # (N), value of the next state; 0 after the last action
    control: Tensor | None = None  # (N, K), for RELAX only


@dataclass(frozen=True)
class Choice:
    """The decision for N samples."""

    state: Tensor  # (N, K, C)
    action: Tensor  # (N)
    drawn_from: Tensor | None = None  # (N, K), distributions of the actions, if they were made
    gate: Tensor | None = None  # (N), 1 in value: carries the gradient of a reparameterised sample
    control: Tensor | None = None  # (N, K), for RELAX only


def temperature_for(exploration: float) -> float:
    """The published temperature for an exploration from 0 to 1: 0.1 to 10."""
    return 0.1 + 9.9 * exploration


def at_action(values: Tensor, action: Tensor) -> Tensor:
    """The value of each sample's action: (N, K), (N) -> (N)."""
    return values.gather(1, action[:, None])[:, 0]


def draw(probabilities: Tensor) -> Tensor:
    """Draw from each row of (N, K): (N). As torch.multinomial does, without its look at values, which waits for a GPU."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(1)


def epsilon_greedy(exploration: float, scores: Tensor) -> Tensor:
    """The distribution that is uniform with probability `exploration` and greedy otherwise: (N, K) -> (N, K)."""
    greedy = F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)
    return exploration / scores.shape[1] + (1 - exploration) * greedy


def set_exploration(model: nn.Module, exploration: float) -> None:
    """Set the exploration of every decision layer in a model. Raises ValueError outside 0 to 1."""
    for layer in model.modules():
        if isinstance(layer, Decision):
            layer.set_exploration(exploration)


class Decision(nn.Module, ABC):
    """A layer of `num_agents` agents; a sample's agent chooses one of `num_selections` modules for it.

    Prior actions name the agent of each sample (dispatching). Policies are networks (`policy_storage_type` approx: an MLP of
    `in_features` inputs, for flattened samples, and `approx_hidden_dims`; or copies of `policy_net`, which gets samples as they
    are) or tables (tabular: a row for each agent, whatever the input). `value_net` is the same for the kinds that estimate
    values. With `detach` agents send no gradient to the input. `exploration` is from 0 to 1. `additional_reward_func` rewards
    single actions; each layer makes its own (`additional_reward_class`, `additional_reward_args`) unless it is given one.
    `approx_module` is the published name of `policy_net`. Raises ValueError for values that make no sense together.
    """

    values: Literal["none", "actions", "state"] = "none"  # output of the value nets: none, one for each selection, or one
    bootstraps = False  # whether the loss reads next_value

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
        approx_module: nn.Module | None = None,
        additional_reward_class: type[PerActionBaseReward] | None = None,
        additional_reward_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        for name, value in (("num_selections", num_selections), ("num_agents", num_agents)):
            if value < 1:
                raise ValueError(f"{name} is {value}: at least 1")
        if policy_storage_type not in ("approx", "tabular"):
            raise ValueError(f"policy_storage_type is {policy_storage_type!r}: approx or tabular")
        for name, one, other in (
            ("approx_module and policy_net", approx_module, policy_net),
            ("additional_reward_class and additional_reward_func", additional_reward_class, additional_reward_func),
        ):
            if one is not None and other is not None:
                raise ValueError(f"{name} are given: leave one out")
        policy_net = approx_module if policy_net is None else policy_net
        self.num_selections, self.num_agents, self.in_features = num_selections, num_agents, in_features
        self.tabular, self.detach, self.set_pg_temp = policy_storage_type == "tabular", detach, set_pg_temp
        self.hidden = tuple(approx_hidden_dims)
        self.policy = self._agents("policy_net", num_selections, 1 / num_selections, policy_net)
        self.value = self._value_agents(policy_net, value_net)
        if additional_reward_func is None:
            additional_reward_func = (additional_reward_class or PerActionBaseReward)(**(additional_reward_args or {}))
        self.reward_func = additional_reward_func
        self.reward_func.bind(num_selections)
        self.temperature = 1.0
        self._set_exploration(exploration)

    def _agents(self, name: str, n_out: int, initial: float, net: nn.Module | None) -> Networks | Tables:
        """A table or network of `n_out` outputs for each agent."""
        if self.tabular and net is not None:
            raise ValueError(f"{name} is given, but policy_storage_type is tabular: leave one out")
        if self.tabular:
            return Tables(self.num_agents, n_out, initial)
        if net is None and (self.in_features is None or self.in_features < 1):
            raise ValueError(f"in_features is {self.in_features}: an approx policy needs it to make a network; or give {name}")
        return Networks(self.num_agents, self.in_features or 0, n_out, self.hidden, net)

    def _value_agents(self, policy_net: nn.Module | None, value_net: nn.Module | None) -> nn.Module | None:
        """The value nets; where they have an output for each selection, a given policy net is copied for them, too."""
        if self.values == "none":
            if value_net is not None:
                raise ValueError(f"value_net is given, but {type(self).__name__} estimates no values")
            return None
        if self.values == "actions":
            value_net = policy_net if value_net is None else value_net
            return self._agents("value_net", self.num_selections, 1 / self.num_selections, value_net)
        return self._agents("value_net", 1, 0.0, value_net)

    # ---- what a kind of decision defines ----

    @abstractmethod
    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        """Outputs of the agents (N) for inputs (N, ...): (N, K, C). The largest entry of channel 0 is the greedy action."""

    @abstractmethod
    def behaviour(self, state: Tensor) -> Tensor:
        """The distributions (N, K) that actions are drawn from in training."""

    @abstractmethod
    def loss(self, t: Transition) -> Tensor:
        """The loss of each sample, (N)."""

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        """Values (N) of states (N, K, C) in which actions (N) were taken; None if the decision has no values."""
        return None

    def decide(self, x: Tensor, agents: Tensor) -> Choice:
        """Draw actions (N) in training, take the greedy ones in evaluation."""
        state = self.state(x, agents)
        if not self.training:
            return Choice(state, state[:, :, 0].argmax(1))
        distribution = self.behaviour(state.detach())
        return Choice(state, draw(distribution), distribution)

    def set_exploration(self, exploration: float) -> None:
        """Explore this much from now on, from 0 to 1. Raises ValueError outside."""
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
    ) -> tuple[Tensor, Trajectories, Tensor]:
        """Decide for a batch (B, ...) -> (the batch, its trajectories with one more step, actions (B)).

        Prior actions (B) name each sample's agent, if there are several. Samples outside the mask get action 0 and no step.
        Raises ValueError for prior actions that are missing or name no agent, and a mask without an active sample.
        """
        if len(records) != len(xs):
            raise ValueError(f"records are of {len(records)} samples: the batch has {len(xs)}")
        active, n = active_samples(mask, len(xs)), len(xs)
        inputs, agents = xs.detach() if self.detach else xs, self._agent_indices(prior_actions, xs)
        choice = self.decide(inputs, agents) if active is None else self.decide(inputs[active], agents[active])
        actions = spread(choice.action, active, n)
        records.steps.append(
            Step(
                self,
                actions,
                torch.ones(n, dtype=torch.bool, device=xs.device) if mask is None else mask.bool(),
                spread(choice.state, active, n),
                spread(choice.action != choice.state[:, :, 0].argmax(1), active, n),
                None if choice.control is None else spread(choice.control, active, n),
            )
        )
        if self.training:  # evaluation leaves no trace
            known = choice.drawn_from
            self.reward_func.register(self.behaviour(choice.state.detach()) if known is None else known, choice.action)
        ys = xs if choice.gate is None else self._pass_gate(xs, records, 1 + spread(choice.gate - 1, active, n))
        return ys, records, actions

    def _pass_gate(self, xs: Tensor, records: Trajectories, gate: Tensor) -> Tensor:
        """Let the gradient of a reparameterised sample in: here, by the input of the selected module."""
        return xs * gate.view(-1, *[1] * (xs.ndim - 1))

    def _agent_indices(self, prior_actions: Tensor | Sequence[int] | None, xs: Tensor) -> Tensor:
        """Each sample's agent, (B)."""
        if self.num_agents == 1:
            return torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
        if prior_actions is None or len(prior_actions) == 0:
            raise ValueError(
                f"prior_actions is {prior_actions}: with {self.num_agents} agents, each sample needs to name its own"
            )
        agents = torch.as_tensor(prior_actions, device=xs.device)
        check_index("prior_actions", agents, None, len(xs), self.num_agents, "agents")
        return agents.long()
