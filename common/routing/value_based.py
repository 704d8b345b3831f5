"""Decisions that learn what selections are worth, and take the best: Q learning, SARSA, advantage learning.

In training, with probability `exploration`, an action is drawn uniformly instead. Targets are held constant.
A table's only state is its agent: for a one-step target to tell good actions from bad, what was done before has to show in
the input (approx), or in the agent (prior actions that name what was done).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.routing.decision import Decision, Transition, chosen, greedy_with


class QLearning(Decision):
    """(Q(a) - r - max Q')^2 (Watkins & Dayan 1992). One channel: Q."""

    bootstraps = True

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        return self.policy(x, agents)[:, :, None]

    def behaviour(self, state: Tensor) -> Tensor:
        return greedy_with(self.exploration if self.training else 0.0, state[:, :, 0])

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return state[:, :, 0].max(1).values.detach()

    def loss(self, t: Transition) -> Tensor:
        return (chosen(t.state[:, :, 0], t.action) - t.reward - t.next_value).square()


class SARSA(QLearning):
    """(Q(a) - r - Q'(a'))^2, a' being what was done next (Rummery & Niranjan 1994)."""

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return chosen(state[:, :, 0], action).detach()


class AdvantageLearning(QLearning):
    """(V - G)^2 + (A(a) - (G - V))^2: advantages beside a state value (after Baird 1993). Channels: A, V."""

    values = "state"
    bootstraps = False

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        assert self.value is not None
        advantages = self.policy(x, agents)
        return torch.stack([advantages, self.value(x, agents).expand_as(advantages)], 2)

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return state[:, 0, 1].detach()

    def loss(self, t: Transition) -> Tensor:
        return self._towards(t.cum_return, t)

    def _towards(self, target: Tensor, t: Transition) -> Tensor:
        value, advantage = t.state[:, 0, 1], chosen(t.state[:, :, 0], t.action)
        return (value - target).square() + (advantage - (target - value.detach())).square()


class BootstrapAdvantageLearning(AdvantageLearning):
    """The same with the one-step target r + V' instead of G."""

    bootstraps = True

    def loss(self, t: Transition) -> Tensor:
        return self._towards(t.reward + t.next_value, t)
