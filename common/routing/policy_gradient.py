"""Decisions that learn by policy gradient: REINFORCE and its baselines, actor-critics, WPL.

Each class begins with its loss for one sample and one decision, and ends with `loss`, which is that formula. In the formulas

    l, p    log-probability and probability of the action taken       log_p, p = log_prob(t), log_prob(t).exp()
    G       return: the rewards from this action on                   t.cum_return
    r, V'   reward of this action, value of the next state            t.reward, t.next_value
    Q(a)    value of the action taken (ActionValues)                  at_action(t.state[:, :, 1], t.action)
    V       value of the state: sum p Q over all actions, or the output of a value net

Weights, baselines and targets are held constant. Channel 0 of a state is always log p.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.routing.decision import Decision, Transition, at_action, epsilon_greedy, temperature_for

MAX_WEIGHT = 10.0  # of an importance weight


def log_prob(t: Transition) -> Tensor:
    """l, (N)."""
    return at_action(t.state[:, :, 0], t.action)


class REINFORCE(Decision):
    """-l G (Williams 1992).

    Actions are drawn from softmax(logits / T). T is 1 unless `set_pg_temp` makes `set_exploration` set it, to 0.1 ... 10.
    """

    uses_temperature = True  # whether set_pg_temp has an effect

    def log_probabilities(self, x: Tensor, agents: Tensor) -> Tensor:
        """(N, K)."""
        return F.log_softmax(self.policy(x, agents) / self.temperature, 1)

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        return self.log_probabilities(x, agents)[:, :, None]

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 0].exp()

    def set_exploration(self, exploration: float) -> None:
        super().set_exploration(exploration)
        if self.set_pg_temp and self.uses_temperature:
            self.temperature = temperature_for(exploration)

    def loss(self, t: Transition) -> Tensor:
        return -log_prob(t) * t.cum_return


class EGreedyREINFORCE(REINFORCE):
    """-l G p/s: REINFORCE, corrected for actions that are drawn from s instead of p (Degris, White & Sutton 2012).

    s is p with probability `exploration`, and greedy otherwise. Channels: log p, p, s (p in evaluation). `set_exploration(e)`
    explores with 3 e, as published.
    """

    uses_temperature = False

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        log_p = self.log_probabilities(x, agents)
        p = log_p.exp()
        return torch.stack([log_p, p, egreedy_policy(p, self.exploration) if self.training else p], 2)

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 2]

    def set_exploration(self, exploration: float) -> None:
        super().set_exploration(exploration)
        self.exploration = min(1.0, 3 * exploration)

    def loss(self, t: Transition) -> Tensor:
        return -log_prob(t) * t.cum_return * importance_weight(t)


def egreedy_policy(p: Tensor, exploration: float) -> Tensor:
    """e p + (1 - e) [greedy], (N, K)."""
    return exploration * p + (1 - exploration) * epsilon_greedy(0.0, p)


def importance_weight(t: Transition) -> Tensor:
    """p/s, (N), from channels 1 and 2."""
    return (at_action(t.state[:, :, 1], t.action) / at_action(t.state[:, :, 2], t.action)).detach()


# ---- with a value of each action -----------------------------------------------------------------------------------------


class ActionValues(REINFORCE):
    """Log-probabilities and a value Q of each action: two channels. The value of a state is V = sum p Q."""

    values = "actions"

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        assert self.value is not None
        return torch.stack([self.log_probabilities(x, agents), self.value(x, agents)], 2)

    def state_value(self, state: Tensor) -> Tensor:
        """V = sum p Q, (N), without a gradient."""
        return (state[:, :, 0].exp() * state[:, :, 1]).sum(1).detach()

    def bootstrap(self, state: Tensor, action: Tensor) -> Tensor | None:
        return self.state_value(state)

    def value_loss(self, t: Transition, target: Tensor) -> Tensor:
        """(Q(a) - target)^2, (N)."""
        return (at_action(t.state[:, :, 1], t.action) - target).square()


class REINFORCEBl1(ActionValues):
    """-l (G - V) + (Q(a) - G)^2: REINFORCE with a baseline (Sutton & Barto 2018, 13.4)."""

    uses_temperature = False  # as published

    def loss(self, t: Transition) -> Tensor:
        advantage = t.cum_return - self.state_value(t.state)
        return -log_prob(t) * advantage + self.value_loss(t, t.cum_return)


class REINFORCEBl2(REINFORCEBl1):
    """-l w (G - V) + (Q(a) - G)^2, w = 1 / (K p): actions count as if all were drawn equally often.

    Not in the literature; w is unbounded for rare actions, and is at most 10 here.
    """

    def loss(self, t: Transition) -> Tensor:
        log_p, advantage = log_prob(t), t.cum_return - self.state_value(t.state)
        weight = (1 / (self.num_selections * log_p.detach().exp())).clamp(max=MAX_WEIGHT)
        return -log_p * weight * advantage + self.value_loss(t, t.cum_return)


class ActorCritic(ActionValues):
    """-l (G - V) + (Q(a) - r - V')^2: the policy learns from returns, the critic from one-step targets.

    With r + V' in place of G (Sutton & Barto 2018, 13.5; here BootstrapAAC) the policy is biased wherever V' does not depend on
    the action: in tables, whose only state is the agent.
    """

    bootstraps = True

    def loss(self, t: Transition) -> Tensor:
        advantage = t.cum_return - self.state_value(t.state)
        return -log_prob(t) * advantage + self.value_loss(t, t.reward + t.next_value)


class WPL(REINFORCEBl1):
    """-l (G - V) w + (Q(a) - G)^2, w = 1 - p if G >= V else p: weighted policy learner (Abdallah & Lesser 2008).

    Steps towards an action shrink as its probability nears 1, steps away from it as its probability nears 0; this lets agents
    that learn at the same time converge. The step is along the gradient of log p of the action taken.
    """

    def loss(self, t: Transition) -> Tensor:
        log_p, advantage = log_prob(t), t.cum_return - self.state_value(t.state)
        p = log_p.detach().exp()
        weight = torch.where(advantage >= 0, 1 - p, p)
        return -log_p * advantage * weight + self.value_loss(t, t.cum_return)


# ---- with a value net of the state ---------------------------------------------------------------------------------------


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
        return -log_prob(t) * advantage.detach() + advantage.square()


class BootstrapAAC(AAC):
    """-l d + d^2, d = r + V' - V: one-step actor-critic (Sutton & Barto 2018, 13.5)."""

    bootstraps = True

    def loss(self, t: Transition) -> Tensor:
        advantage = t.reward + t.next_value - t.state[:, 0, -1]
        return -log_prob(t) * advantage.detach() + advantage.square()


class EGreedyAAC(AAC):
    """-l (G - V) p/s + (V - G)^2, actions drawn as in EGreedyREINFORCE. Channels: log p, p, s, V."""

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        log_p, value = super().state(x, agents).unbind(2)
        p = log_p.exp()
        return torch.stack([log_p, p, egreedy_policy(p, self.exploration) if self.training else p, value], 2)

    def behaviour(self, state: Tensor) -> Tensor:
        return state[:, :, 2]

    def loss(self, t: Transition) -> Tensor:
        advantage = t.cum_return - t.state[:, 0, -1]
        return -log_prob(t) * advantage.detach() * importance_weight(t) + advantage.square()
