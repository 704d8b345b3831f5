"""A routed network sample by sample, as the original has it: reference of tests, baseline of benchmarks.

Loops over samples, with an object for each; decisions are WPL with tables, an agent for each task, and collaboration rewards.
It uses the parameters of a RoutedNet, so that outputs, losses and gradients can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.routed import RoutedNet
from common.routing import WPL


@dataclass
class PlainRecord:
    """The steps of one sample: index of the layer, log-probabilities (K), values (K) and action of each decision."""

    task: int
    steps: list[tuple[int, Tensor, Tensor, int]] = field(default_factory=list)


def plain_forward(
    net: RoutedNet, features: Tensor, tasks: Tensor, history: list[list[int]]
) -> tuple[Tensor, list[PlainRecord]]:
    """Features (B, D), tasks (B) -> estimates (B, E), records. In training, actions are drawn, and noted."""
    records = [PlainRecord(int(task)) for task in tasks]
    xs = list(features)
    for layer, (router, selection) in enumerate(zip(net.routers, net.selections, strict=True)):
        assert isinstance(router, WPL) and router.value is not None
        for i, record in enumerate(records):
            log_p = F.log_softmax(router.policy.table[record.task], 0)
            values = router.value.table[record.task]
            action = int(torch.multinomial(log_p.detach().exp(), 1)) if net.training else int(log_p.argmax())
            record.steps.append((layer, log_p, values, action))
            if net.training:
                history[layer] = [*history[layer], action][-256:]
            x = F.relu(xs[i]) if layer else xs[i]
            xs[i] = F.linear(x, selection.stack.weight[action], selection.stack.bias[action])
    return torch.stack(xs), records


def plain_loss(
    net: RoutedNet, estimates: Tensor, labels: Tensor, records: list[PlainRecord], history: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Mean module loss (cross entropy) and mean routing loss, with the negative loss as final reward."""
    module_losses, routing_losses = [], []
    for estimate, label, record in zip(estimates, labels, records, strict=True):
        module_loss = F.cross_entropy(estimate[None], label[None])
        final = -module_loss.item()
        n = len(record.steps)
        rewards = []
        for layer, _, _, action in record.steps:
            reward = net.routers[layer].reward_func
            seen = history[layer]
            frequency = sum(a == action for a in seen) / len(seen) if seen else 0.0
            rewards.append(reward.reward_ratio * frequency / n * abs(final))
        rewards[-1] += final
        routing_loss = torch.zeros(())
        for t, (_, log_p, values, action) in enumerate(record.steps):
            cum_return = sum(rewards[t:])
            p = log_p.detach().exp()
            advantage = cum_return - (p * values.detach()).sum()
            weight = 1 - p[action] if advantage >= 0 else p[action]
            routing_loss = routing_loss - log_p[action] * advantage * weight + (values[action] - cum_return) ** 2
        module_losses.append(module_loss)
        routing_losses.append(routing_loss)
    return torch.stack(module_losses).mean(), torch.stack(routing_losses).mean()
