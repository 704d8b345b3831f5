"""Decisions whose samples are functions of logits and noise: Gumbel-softmax (concrete), and RELAX."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.decision import Choice, Decision, Transition, chosen, temperature_of
from common.routing.policies import Networks
from common.routing.trajectories import Trajectories


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform noise."""
    return -(-(uniform + 1e-20).log() + 1e-20).log()


def conditional_scores(log_p: Tensor, action: Tensor, uniform: Tensor) -> Tensor:
    """Scores log p + Gumbel noise (N, K), given that the largest is that of `action` (N).

    Grathwohl et al. 2018, appendix B: the largest is a Gumbel variable itself, the others are cut off below it.
    """
    top = gumbel(uniform.gather(1, action[:, None]))  # (N, 1)
    exponential = -(uniform + 1e-20).log() / log_p.exp()
    others = -(exponential + (-top).exp() + 1e-20).log()
    return torch.where(F.one_hot(action, log_p.shape[1]).bool(), top, others)


def relaxed_samples(logits: Tensor, uniform: Tensor, uniform2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """A draw from softmax(logits), (N), its relaxation, and one that is drawn given the action, (N, K) both."""
    log_p = F.log_softmax(logits, 1)
    scores = log_p + gumbel(uniform)
    action = scores.argmax(1)
    conditional = conditional_scores(log_p, action, uniform2)
    return action, F.softmax(scores / temperature, 1), F.softmax(conditional / temperature, 1)


class Sampled(Decision):
    """Actions are the largest of logits + Gumbel noise, so that they are drawn from softmax(logits). Channel 0: logits."""

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        return self.policy(x, agents)[:, :, None]

    def behaviour(self, state: Tensor) -> Tensor:
        return F.softmax(state[:, :, 0], 1)

    def uniform(self, logits: Tensor) -> Tensor:
        """Uniform noise of the logits' shape."""
        return torch.rand_like(logits)

    def set_exploration(self, exploration: float) -> None:
        super().set_exploration(exploration)
        self.temperature = temperature_of(exploration)


class GumbelSoftmax(Sampled):
    """Straight-through Gumbel-softmax (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017); learns from the module loss alone.

    The action is hard; the soft sample y, at temperature 0.1 + 9.9 exploration, lets the gradient in by a factor
    1 + y(a) - const, 1 in value: on the input of what is selected (`scale` input, published), or on its output (output),
    where dL/dy(a) is what a larger output of the module would change. Of a loss that is linear in that output, the gradient
    tends to half of the exact one as the temperature falls: each boundary between two actions is seen from one side.
    """

    def __init__(self, *args: Any, scale: str = "input", **options: Any):
        if scale not in ("input", "output"):
            raise ValueError(f"scale is {scale!r}: input or output")
        super().__init__(*args, **options)
        self.scale = scale
        self.temperature = temperature_of(self.exploration)

    def decide(self, x: Tensor, agents: Tensor) -> Choice:
        state = self.state(x, agents)
        logits = state[:, :, 0]
        if not self.training:
            return Choice(state, logits.argmax(1))
        soft = F.softmax((logits + gumbel(self.uniform(logits))) / self.temperature, 1)
        action = soft.argmax(1)
        y = chosen(soft, action)
        return Choice(state, action, gate=1 + y - y.detach())

    def loss(self, t: Transition) -> Tensor:
        return torch.zeros_like(t.cum_return)

    def _pass_gate(self, ys: Tensor, records: Trajectories, gate: Tensor) -> Tensor:
        if self.scale == "input":
            return super()._pass_gate(ys, records, gate)
        records.gate = gate if records.gate is None else records.gate * gate
        return ys


class RELAX(Sampled):
    """RELAX (Grathwohl et al. 2018, arXiv 1711.00123, eq. 8): an unbiased gradient, with a learned control variate c.

    With b ~ softmax(logits), z its relaxation, and z' drawn given b, the gradient of E[f(b)], f = -G, is estimated by

        g = (f - c(z')) d log p(b) + d c(z) - d c(z'),

    d being with respect to the logits; c, the value net, sees the input (not with tables) and the relaxed sample, and
    minimises |g|^2 (times `value_coef`). `entropy_coef` rewards entropy of the policy, which biases it; 0 leaves that out.
    The loss has g as its gradient; its value means nothing. Channels: logits, c(z), c(z').
    """

    def __init__(self, *args: Any, value_coef: float = 0.5, entropy_coef: float = 0.01, **options: Any):
        super().__init__(*args, **options)
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self.temperature = 0.5

    def _value_agents(self, policy_net: nn.Module | None, value_net: nn.Module | None) -> nn.Module | None:
        inputs = 0 if self.tabular or self.in_features is None else self.in_features
        return Networks(self.num_agents, inputs + self.num_selections, 1, self.hidden, value_net)

    def control_value(self, x: Tensor, agents: Tensor, soft: Tensor) -> Tensor:
        """c of relaxed samples (N, K): (N)."""
        assert self.value is not None
        return self.value(soft if self.tabular else torch.cat([x.detach(), soft], 1), agents)[:, 0]

    def decide(self, x: Tensor, agents: Tensor) -> Choice:
        logits = self.policy(x, agents)
        if not (self.training and torch.is_grad_enabled()):
            state = F.pad(logits[:, :, None], (0, 2))
            action = self.behaviour(state).multinomial(1)[:, 0] if self.training else logits.argmax(1)
            return Choice(state, action)
        # a leaf: what is minimised by c must not reach the policy
        leaf = logits.detach().requires_grad_()
        action, soft, conditional = relaxed_samples(leaf, self.uniform(leaf), self.uniform(leaf), self.temperature)
        c, c_conditional = self.control_value(x, agents, soft), self.control_value(x, agents, conditional)
        (control,) = torch.autograd.grad((c - c_conditional).sum(), leaf, create_graph=True)
        state = torch.stack([logits, c[:, None].expand_as(logits), c_conditional[:, None].expand_as(logits)], 2)
        return Choice(state, action, control=control)

    def estimate(self, t: Transition) -> Tensor:
        """The gradient g with respect to the logits, (N, K), as a function of c's parameters."""
        assert t.control is not None
        score = F.one_hot(t.action, t.state.shape[1]) - F.softmax(t.state[:, :, 0].detach(), 1)
        return (-t.cum_return - t.state[:, 0, 2])[:, None] * score + t.control

    def loss(self, t: Transition) -> Tensor:
        if t.control is None:  # decided without gradients
            return torch.zeros_like(t.cum_return)
        logits, g = t.state[:, :, 0], self.estimate(t)
        entropy = -(F.softmax(logits, 1) * F.log_softmax(logits, 1)).sum(1)
        return (g.detach() * logits).sum(1) + self.value_coef * g.square().sum(1) - self.entropy_coef * entropy
