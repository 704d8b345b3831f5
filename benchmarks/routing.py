"""Speed and memory of a routed network, against the same sample by sample and against its convolutions alone.

    python -m benchmarks.routing             # about a minute

RoutedAllFC of the paper: WPL with tables, 20 tasks, 20 modules of 128 -> 48 -> 48 -> 5, 3 decisions, collaboration rewards, in
training mode.

(a) Everything outside the convolutions (decisions, selections, loss, backward), on given features (B, 128): "plain" loops over
    samples (benchmarks/plain_routing.py), "layers" is common.routing.
(b) The whole step on images (64, 3, 32, 32), with clipping and SGD, against forward and backward of the trunk alone.
(c) Bytes that a forward pass with its loss keeps for the backward pass, parameters left out, by batch and by depth.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from benchmarks.plain_routing import plain_forward, plain_loss
from common.models import routed
from common.models.routed import RoutedNet
from common.routing import WPL, CollaborationReward, Loss, NegLossReward

N_TASKS = N_MODULES = 20


def make_net(depth: int = 3) -> RoutedNet:
    """RoutedAllFC(WPL)."""
    torch.manual_seed(0)

    def make_decision(n: int, n_in: int, n_agents: int, storage: str) -> WPL:
        reward = CollaborationReward(0.3, num_actions=n)
        return WPL(n, n_in, n_agents, policy_storage_type=storage, additional_reward_func=reward)

    net = routed.make("routed-all-fc", 3, routed.layer_sizes(32, depth, 48, 5), N_TASKS, N_MODULES, N_TASKS, make_decision)
    assert isinstance(net, RoutedNet)
    return net


def make_batch(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, 128), tasks and labels (B)."""
    gen = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 128, generator=gen).requires_grad_()
    return features, torch.randint(0, N_TASKS, (batch,), generator=gen), torch.randint(0, 5, (batch,), generator=gen)


def layers_step(batch: int) -> Step:
    """Everything outside the convolutions, by common.routing."""
    net = make_net()
    net.trunk = nn.Identity()  # type: ignore[assignment]
    features, tasks, labels = make_batch(batch)
    loss_func = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def step() -> None:
        estimates, records = net(features, tasks)
        module_loss, routing_loss = loss_func(estimates, labels, records)
        (module_loss + routing_loss).backward()

    return step


def plain_step(batch: int) -> Step:
    """The same, sample by sample."""
    net = make_net()
    features, tasks, labels = make_batch(batch)
    history: list[list[int]] = [[] for _ in net.routers]

    def step() -> None:
        estimates, records = plain_forward(net, features, tasks, history)
        module_loss, routing_loss = plain_loss(net, estimates, labels, records, history)
        (module_loss + routing_loss).backward()

    return step


def trunk_step(batch: int) -> Step:
    """Forward and backward pass of the convolutions."""
    trunk = make_net().to(memory_format=torch.channels_last).trunk
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    parameters = list(trunk.parameters())
    return lambda: torch.autograd.grad(trunk(x).sum(), parameters)


def whole_step(batch: int) -> Step:
    """A training step with everything."""
    net = make_net().to(memory_format=torch.channels_last)
    _, tasks, labels = make_batch(batch)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    loss_func = Loss(nn.CrossEntropyLoss(), NegLossReward())
    optimizer = torch.optim.SGD(net.parameters(), 0.003, fused=True)

    def step() -> None:
        estimates, records = net(x, tasks)
        module_loss, routing_loss = loss_func(estimates, labels, records)
        optimizer.zero_grad()
        (module_loss + routing_loss).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 40.0)
        optimizer.step()

    return step


def kept_bytes(batch: int, depth: int) -> int:
    """Bytes that autograd keeps of a forward pass with its loss, on given features; parameters left out."""
    net = make_net(depth)
    net.trunk = nn.Identity()  # type: ignore[assignment]
    features, tasks, labels = make_batch(batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        estimates, records = net(features, tasks)
        Loss(nn.CrossEntropyLoss(), NegLossReward())(estimates, labels, records)
    return sum(kept.values())


def run(bench: Bench, batches: tuple[int, ...] = (64, 512)) -> None:
    rounds = 2 if bench.quick else 5
    for batch in batches:
        kinds = {"plain": Kind(partial(plain_step, batch), tuned=False), "layers": Kind(partial(layers_step, batch))}
        bench.compare(f"routing outside the convolutions, batch of {batch}", kinds, rounds)
    kinds = {"trunk": Kind(partial(trunk_step, batches[0])), "whole": Kind(partial(whole_step, batches[0]))}
    bench.compare(f"routing step, batch of {batches[0]}", kinds, rounds, floors=("trunk",), operations="trunk")
    for batch in batches:
        for depth in (1, 2, 4, 8):
            kib = kept_bytes(batch, depth) / 1024
            bench.add(f"kept for the backward pass, batch of {batch}", f"depth {depth}", value=kib, unit="KiB")


if __name__ == "__main__":
    sys.exit(run_benchmark("routing", run, __doc__))
