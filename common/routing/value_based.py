"""Decisions that learn values of actions, and take the best one: Q learning, SARSA, advantage learning.

In training an action is drawn uniformly instead with probability `exploration`. Each class begins with its loss: r is the
reward of the action taken (a), Q' and V' are values of the next state, G is the return; targets are held constant.
The only state of a table is its agent: for a one-step target to tell good actions from bad ones, earlier actions have to show
in the input (approx), or in the agent (prior actions that name them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.routing.decision import Decision, Transition, at_action, epsilon_greedy


class QLearning(Decision):
    """(Q(a) - r - max Q')^2 (Watkins & Dayan 1992). One channel: Q."""

    bootstraps = True

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        return self.policy(x, agents)[:, :, None]

    def behaviour(self, state: Tensor) -> Tensor:
        return epsilon_greedy(self.exploration if self.training else 0.0, state[:, :, 0])

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return state[:, :, 0].max(1).values.detach()

    def loss(self, t: Transition) -> Tensor:
        return (at_action(t.state[:, :, 0], t.action) - t.reward - t.next_value).square()


class SARSA(QLearning):
    """(Q(a) - r - Q'(a'))^2, a' being the next action (Rummery & Niranjan 1994)."""

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return at_action(state[:, :, 0], action).detach()


class AdvantageLearning(QLearning):
    """(V - G)^2 + (A(a) - (G - V))^2: advantages and a state value (after Baird 1993). Channels: A, V."""

    values = "state"
    bootstraps = False

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        assert self.value is not None
        advantages = self.policy(x, agents)
        return torch.stack([advantages, self.value(x, agents).expand_as(advantages)], 2)

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return state[:, 0, 1].detach()

    def loss(self, t: Transition) -> Tensor:
        return self.loss_for(t.cum_return, t)

    def loss_for(self, target: Tensor, t: Transition) -> Tensor:
        """(V - target)^2 + (A(a) - (target - V))^2, (N)."""
        value, advantage = t.state[:, 0, 1], at_action(t.state[:, :, 0], t.action)
        return (value - target).square() + (advantage - (target - value.detach())).square()


class BootstrapAdvantageLearning(AdvantageLearning):
    """The same with the one-step target r + V' instead of G."""

    bootstraps = True

    def loss(self, t: Transition) -> Tensor:
        return self.loss_for(t.reward + t.next_value, t)
