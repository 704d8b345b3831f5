"""Decisions by reparameterised samples, functions of logits and noise: Gumbel-softmax (concrete) and RELAX."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.decision import Choice, Decision, Trajectories, Transition, at_action, draw, temperature_for
from common.routing.policies import Networks


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform noise."""
    return -(-(uniform + 1e-20).log() + 1e-20).log()


def conditional_scores(log_p: Tensor, action: Tensor, uniform: Tensor) -> Tensor:
    """Scores log p + Gumbel noise (N, K), given that `action` (N) has the largest.

    Grathwohl et al. 2018, appendix B: the largest is a Gumbel variable, the others are truncated below it.
    """
    top = gumbel(uniform.gather(1, action[:, None]))  # (N, 1)
    exponential = -(uniform + 1e-20).log() / log_p.exp()
    others = -(exponential + (-top).exp() + 1e-20).log()
    return torch.where(F.one_hot(action, log_p.shape[1]).bool(), top, others)


def relaxed_samples(logits: Tensor, uniform: Tensor, uniform2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Actions (N) drawn from softmax(logits), their relaxation, and a relaxation drawn given the action, (N, K) each."""
    log_p = F.log_softmax(logits, 1)
    scores = log_p + gumbel(uniform)
    action = scores.argmax(1)
    conditional = conditional_scores(log_p, action, uniform2)
    return action, F.softmax(scores / temperature, 1), F.softmax(conditional / temperature, 1)


class Sampled(Decision):
    """Actions are argmax(logits + Gumbel noise), draws from softmax(logits). Channel 0: logits."""

    def state(self, x: Tensor, agents: Tensor) -> Tensor:
        return self.policy(x, agents)[:, :, None]

    def behaviour(self, state: Tensor) -> Tensor:
        return F.softmax(state[:, :, 0], 1)

    def uniform(self, logits: Tensor) -> Tensor:
        """Uniform noise of the logits' shape."""
        return torch.rand_like(logits)

    def set_exploration(self, exploration: float) -> None:
        super().set_exploration(exploration)
        self.temperature = temperature_for(exploration)


class GumbelSoftmax(Sampled):
    """Straight-through Gumbel-softmax (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017); learns from the module loss alone.

    The action is hard; the soft sample y, at temperature 0.1 + 9.9 exploration, passes the gradient through a factor
    1 + y(a) - const, 1 in value, on the input of the selected module (`scale` input, published), or on its output (output),
    where dL/dy(a) is the effect of a larger output. For a loss that is linear in that output, the gradient tends to half of
    the exact one as the temperature falls: each boundary between two actions is seen from one side. The gradient is biased, and
    may settle on wrong actions: in the bandit of tests/test_routing.py (three decisions, exploration 0.1, 20 seeds) networks
    get 0.92 of the decisions right with scale output, tables 1.00; with scale input networks 0.17, tables 0.00 (chance 0.33).
    """

    def __init__(self, *args: Any, scale: str = "input", **options: Any):
        if scale not in ("input", "output"):
            raise ValueError(f"scale is {scale!r}: input or output")
        super().__init__(*args, **options)
        self.scale = scale
        self.temperature = temperature_for(self.exploration)

    def decide(self, x: Tensor, agents: Tensor) -> Choice:
        state = self.state(x, agents)
        logits = state[:, :, 0]
        if not self.training:
            return Choice(state, logits.argmax(1))
        soft = F.softmax((logits + gumbel(self.uniform(logits))) / self.temperature, 1)
        action = soft.argmax(1)
        y = at_action(soft, action)
        return Choice(state, action, gate=1 + y - y.detach())

    def loss(self, t: Transition) -> Tensor:
        return torch.zeros_like(t.cum_return)

    def _pass_gate(self, xs: Tensor, records: Trajectories, gate: Tensor) -> Tensor:
        if self.scale == "input":
            return super()._pass_gate(xs, records, gate)
        records.gate = gate if records.gate is None else records.gate * gate
        return xs


class RELAX(Sampled):
    """RELAX (Grathwohl et al. 2018, arXiv 1711.00123, eq. 8): an unbiased gradient, with a learned control variate c.

    With b ~ softmax(logits), z its relaxation, and z' drawn given b, the gradient of E[f(b)], f = -G, is estimated by

        g = (f - c(z')) d log p(b) + d c(z) - d c(z'),

    with d the derivative with respect to the logits. The value net c sees the flattened input (not with tables) and the relaxed
    sample, and minimises |g|^2 (times `value_coef`). `entropy_coef` rewards entropy of the policy, which biases g unless 0.
    The gradient of the loss is g; its value has no meaning. Channels: logits, c(z), c(z').
    """

    def __init__(self, *args: Any, value_coef: float = 0.5, entropy_coef: float = 0.01, **options: Any):
        super().__init__(*args, **options)
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self.temperature = 0.5

    def _value_agents(self, policy_net: nn.Module | None, value_net: nn.Module | None) -> nn.Module | None:
        if not self.tabular and self.in_features is None and value_net is None:
            raise ValueError("in_features is None: the control of RELAX needs it to make a network; or give value_net")
        inputs = 0 if self.tabular else self.in_features or 0
        return Networks(self.num_agents, inputs + self.num_selections, 1, self.hidden, value_net)

    def control_value(self, x: Tensor, agents: Tensor, soft: Tensor) -> Tensor:
        """c of relaxed samples (N, K): (N)."""
        assert self.value is not None
        return self.value(soft if self.tabular else torch.cat([x.detach().flatten(1), soft], 1), agents)[:, 0]

    def decide(self, x: Tensor, agents: Tensor) -> Choice:
        logits = self.policy(x, agents)
        if not (self.training and torch.is_grad_enabled()):
            state = F.pad(logits[:, :, None], (0, 2))
            action = draw(self.behaviour(state)) if self.training else logits.argmax(1)
            return Choice(state, action)
        # a leaf: the loss of c must not reach the policy
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
