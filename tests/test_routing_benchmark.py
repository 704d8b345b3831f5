"""The routed network agrees with itself written sample by sample, and memory grows linearly."""

import pytest
import torch
from torch import nn

from benchmarks import routing as benchmark
from benchmarks.plain_routing import plain_forward, plain_loss
from common.routing import Loss, NegLossReward
from tests.reference import assert_agrees

pytestmark = pytest.mark.slow


def test_layers_agree_with_loops_over_samples() -> None:
    """Estimates, losses and every gradient, with greedy actions and a window of collaboration that is half full."""
    gradients = []
    features, tasks, labels = benchmark.make_batch(50)
    net = benchmark.make_net().eval()
    net.trunk = nn.Identity()
    torch.manual_seed(0)
    for router in net.routers:
        router.policy.table.data.normal_()
        router.value.table.data.normal_()
    seen = torch.randint(0, 20, (3, 100))
    for router, actions in zip(net.routers, seen, strict=True):
        router.reward_func.register(torch.zeros(100, 20), actions)
    for how in ("plain", "layers"):
        net.zero_grad()
        features.grad = None
        if how == "plain":
            history = seen.tolist()
            estimates, records = plain_forward(net, features, tasks, history)
            losses = plain_loss(net, estimates, labels, records, history)
        else:
            estimates, records = net(features, tasks)
            losses = Loss(nn.CrossEntropyLoss(), NegLossReward())(estimates, labels, records)
        sum(losses).backward()
        parameters = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
        gradients.append([estimates.detach(), torch.stack(losses).detach(), features.grad.clone(), *parameters])
    for plain, layers in zip(*gradients, strict=True):
        assert_agrees(layers, plain, 1e-4)


def test_memory_is_linear_in_batch_and_depth() -> None:
    """At most: padding takes less of larger batches, and the last layer is a small one."""
    assert 3 < benchmark.kept_bytes(1600, 2) / benchmark.kept_bytes(400, 2) < 4.1
    by_depth = [benchmark.kept_bytes(200, depth) for depth in (2, 4, 8)]
    assert by_depth[2] - by_depth[1] == pytest.approx(2 * (by_depth[1] - by_depth[0]), rel=0.2)
