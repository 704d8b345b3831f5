"""Decisions that learn by the gradient of expected reward: REINFORCE and its baselines, actor-critics, WPL.

Channel 0 of a state is always the log-probabilities; value kinds keep theirs in the last channel. l, p and G below are
log-probability, probability and return of the action taken; targets and weights are held constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.routing.decision import Decision, Transition, chosen, greedy_with, temperature_of

MAX_WEIGHT = 10.0  # of an importance weight


class REINFORCE(Decision):
    """-l G (Williams 1992).

    Actions are drawn from softmax(logits / T). T is 1 unless `set_pg_temp` makes `set_exploration` set it, to 0.1 ... 10.
    """

    tempered = True  # whether set_pg_temp has a meaning

    def log_probabilities(self, x: Tensor, agents: Tensor) -> Tensor:
        """(N, K)."""
        return F.log_softmax(self.policy(x, agents) / self.temperature, 1)

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        return self.log_probabilities(x, agents)[:, :, None]

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 0].exp()

    def loss(self, t: Transition) -> Tensor:
        return -chosen(t.state[:, :, 0], t.action) * t.cum_return

    def set_exploration(self, exploration: float) -> None:
        super().set_exploration(exploration)
        if self.set_pg_temp and self.tempered:
            self.temperature = temperature_of(exploration)


class EGreedyREINFORCE(REINFORCE):
    """-l G p/s: REINFORCE, corrected for actions that are drawn from s, not from p (Degris, White & Sutton 2012).

    s is p with probability `exploration`, and greedy else. Channels: log p, p, s (p in evaluation). `set_exploration(e)`
    explores with 3 e, as published.
    """

    tempered = False

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        log_p = self.log_probabilities(x, agents)
        p = log_p.exp()
        return torch.stack([log_p, p, mixed(p, self.exploration) if self.training else p], 2)

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 2]

    def loss(self, t: Transition) -> Tensor:
        return super().loss(t) * importance(t)

    def set_exploration(self, exploration: float) -> None:
        super().set_exploration(exploration)
        self.exploration = min(1.0, 3 * exploration)


def mixed(p: Tensor, exploration: float) -> Tensor:
    """e p + (1 - e) [greedy], (N, K)."""
    return exploration * p + (1 - exploration) * greedy_with(0.0, p)


def importance(t: Transition) -> Tensor:
    """p/s of actions, (N), of channels 1 and 2."""
    return (chosen(t.state[:, :, 1], t.action) / chosen(t.state[:, :, 2], t.action)).detach()


class WithActionValues(REINFORCE):
    """Log-probabilities, and a value Q of each selection: two channels. sum p Q is what the state is worth."""

    values = "actions"

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        assert self.value is not None
        return torch.stack([self.log_probabilities(x, agents), self.value(x, agents)], 2)

    def worth(self, state: Tensor) -> Tensor:
        """sum p Q, (N), without a gradient."""
        return (state[:, :, 0].exp() * state[:, :, 1]).sum(1).detach()

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return self.worth(state)

    def value_loss(self, t: Transition, target: Tensor) -> Tensor:
        """(Q(a) - target)^2."""
        return (chosen(t.state[:, :, 1], t.action) - target).square()


class REINFORCEBl1(WithActionValues):
    """-l (G - sum p Q) + (Q(a) - G)^2: REINFORCE with the policy's mean value as its baseline (Sutton & Barto 2018, 13.4)."""

    tempered = False  # as published

    def loss(self, t: Transition) -> Tensor:
        advantage = t.cum_return - self.worth(t.state)
        return -chosen(t.state[:, :, 0], t.action) * advantage + self.value_loss(t, t.cum_return)


class REINFORCEBl2(REINFORCEBl1):
    """-l w (G - sum p Q) + (Q(a) - G)^2, w = 1 / (K p): every selection counts as if all were drawn equally often.

    The original's own. w is unbounded for rare actions, and is cut off at 10 here.
    """

    def loss(self, t: Transition) -> Tensor:
        log_p = chosen(t.state[:, :, 0], t.action)
        weight = (1 / (self.num_selections * log_p.detach().exp())).clamp(max=MAX_WEIGHT)
        advantage = t.cum_return - self.worth(t.state)
        return -log_p * weight * advantage + self.value_loss(t, t.cum_return)


class ActorCritic(WithActionValues):
    """-l d + (Q(a) - r - V')^2, d = r + V' - V, with V = sum p Q: one-step actor-critic (Sutton & Barto 2018, 13.5)."""

    bootstraps = True

    def loss(self, t: Transition) -> Tensor:
        target = t.reward + t.next_value
        return -chosen(t.state[:, :, 0], t.action) * (target - self.worth(t.state)) + self.value_loss(t, target)


class WPL(REINFORCEBl1):
    """-l e w + (Q(a) - G)^2, e = G - sum p Q, w = p if e < 0 else 1 - p: weighted policy learner (Abdallah & Lesser 2008).

    Steps towards an action shrink as its probability nears 1, steps away from it as that nears 0; this makes agents that
    learn beside each other converge. The step is along the gradient of log p of the action taken.
    """

    def loss(self, t: Transition) -> Tensor:
        log_p = chosen(t.state[:, :, 0], t.action)
        p, e = log_p.detach().exp(), t.cum_return - self.worth(t.state)
        return -log_p * e * (1 - p).where(e >= 0, p) + self.value_loss(t, t.cum_return)


class AAC(Decision):
    """-l (G - V) + (V - G)^2: advantage actor-critic with Monte Carlo returns (Mnih et al. 2016). Channels: log p, V."""

    values = "state"

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        assert self.value is not None
        log_p = F.log_softmax(self.policy(x, agents), 1)
        return torch.stack([log_p, self.value(x, agents).expand_as(log_p)], 2)

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 0].exp()

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return state[:, 0, -1].detach()

    def loss(self, t: Transition) -> Tensor:
        advantage = t.cum_return - t.state[:, 0, -1]
        return -chosen(t.state[:, :, 0], t.action) * advantage.detach() + advantage.square()


class BootstrapAAC(AAC):
    """-l d + d^2, d = r + V' - V: the same with one-step targets."""

    bootstraps = True

    def loss(self, t: Transition) -> Tensor:
        advantage = t.reward + t.next_value - t.state[:, 0, -1]
        return -chosen(t.state[:, :, 0], t.action) * advantage.detach() + advantage.square()


class EGreedyAAC(AAC):
    """-l (G - V) p/s + (V - G)^2, actions drawn as in EGreedyREINFORCE. Channels: log p, p, s, V."""

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        log_p, value = super().state(x, agents).unbind(2)
        p = log_p.exp()
        return torch.stack([log_p, p, mixed(p, self.exploration) if self.training else p, value], 2)

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 2]

    def loss(self, t: Transition) -> Tensor:
        advantage = t.cum_return - t.state[:, 0, -1]
        return -chosen(t.state[:, :, 0], t.action) * advantage.detach() * importance(t) + advantage.square()
