"""Speed and memory of a routed network, against the same sample by sample and against its convolutions alone.

    python -m benchmarks.routing             # about 2 minutes on one core

RoutedAllFC of the paper: WPL with tables, 20 tasks, 20 modules of 128 -> 48 -> 48 -> 5, 3 decisions, collaboration rewards, in
training mode. One thread; times are the process's CPU time, so that other processes disturb little; medians, and kinds in turn.

(a) Everything outside the convolutions (decisions, selections, loss, backward), on given features (B, 128): "plain" loops over
    samples (benchmarks/plain_routing.py), "layers" is common.routing.
(b) The whole step on images (64, 3, 32, 32), with clipping and SGD, against forward and backward of the trunk alone.
(c) Bytes that a forward pass with its loss keeps for the backward pass, parameters left out, by batch and by depth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.plain_routing import plain_forward, plain_loss
from common.models import routed
from common.models.routed import RoutedNet
from common.routing import WPL, CollaborationReward, Loss, NegLossReward
from common.run.memory import tune_malloc

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


def seconds(step: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - began) / repeats


def make_batch(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, 128), tasks and labels (B)."""
    gen = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 128, generator=gen).requires_grad_()
    return features, torch.randint(0, N_TASKS, (batch,), generator=gen), torch.randint(0, 5, (batch,), generator=gen)


def layers_step(net: RoutedNet, batch: int) -> Callable[[], None]:
    """Everything outside the convolutions, by common.routing."""
    net.trunk = nn.Identity()  # type: ignore[assignment]
    features, tasks, labels = make_batch(batch)
    loss_func = Loss(nn.CrossEntropyLoss(), NegLossReward())

    def step() -> None:
        estimates, records = net(features, tasks)
        module_loss, routing_loss = loss_func(estimates, labels, records)
        (module_loss + routing_loss).backward()

    return step


def plain_step(net: RoutedNet, batch: int) -> Callable[[], None]:
    """The same, sample by sample."""
    features, tasks, labels = make_batch(batch)
    history: list[list[int]] = [[] for _ in net.routers]

    def step() -> None:
        estimates, records = plain_forward(net, features, tasks, history)
        module_loss, routing_loss = plain_loss(net, estimates, labels, records, history)
        (module_loss + routing_loss).backward()

    return step


def compare_with_plain(batches: list[int], rounds: int) -> None:
    print("\n(a) outside the convolutions, CPU ms per step")
    print(f"{'batch':>6}{'plain':>10}{'layers':>10}    times as fast")
    times: dict[int, float] = {}
    for batch in batches:
        steps = {"plain": plain_step(make_net(), batch), "layers": layers_step(make_net(), batch)}
        for step in steps.values():
            step()
        measured: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(rounds):
            measured["plain"].append(seconds(steps["plain"]))
            measured["layers"].append(seconds(steps["layers"], 10))
        plain, times[batch] = (statistics.median(measured[kind]) for kind in steps)
        print(f"{batch:>6}{1000 * plain:>10.1f}{1000 * times[batch]:>10.2f}    {plain / times[batch]:.1f}x", flush=True)
    first, last = batches[0], batches[-1]
    print(f"from a batch of {first} to {last}: {times[last] / times[first]:.2f} times the time")


def compare_with_trunk(batch: int, rounds: int) -> None:
    net = make_net().to(memory_format=torch.channels_last)
    _, tasks, labels = make_batch(batch)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    loss_func = Loss(nn.CrossEntropyLoss(), NegLossReward())
    optimizer = torch.optim.SGD(net.parameters(), 0.003, fused=True)
    trunk_parameters = list(net.trunk.parameters())

    def trunk() -> None:
        torch.autograd.grad(net.trunk(x).sum(), trunk_parameters)

    def whole() -> None:
        estimates, records = net(x, tasks)
        module_loss, routing_loss = loss_func(estimates, labels, records)
        optimizer.zero_grad()
        (module_loss + routing_loss).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 40.0)
        optimizer.step()

    times: dict[str, list[float]] = {"trunk": [], "whole": []}
    for kind, step in (("trunk", trunk), ("whole", whole)) * (rounds + 2):
        times[kind].append(seconds(step, 3))
    medians = {kind: 1000 * statistics.median(values[2:]) for kind, values in times.items()}
    ratio = statistics.median(w / t for w, t in zip(times["whole"][2:], times["trunk"][2:], strict=True))
    print(
        f"\n(b) batch of {batch}, CPU ms: trunk alone {medians['trunk']:.1f}, whole step {medians['whole']:.1f}: {ratio:.2f}x"
    )


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


def show_memory() -> None:
    print("\n(c) KiB kept for the backward pass")
    print(f"{'batch':>6}" + "".join(f"  depth {depth:>2}" for depth in (1, 2, 4, 8)))
    for batch in (64, 128, 256, 512):
        print(f"{batch:>6}" + "".join(f"{kept_bytes(batch, depth) / 1024:>10.0f}" for depth in (1, 2, 4, 8)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="[%(default)s]")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512], help="of part (a) [%(default)s]")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tune_malloc()
    print(f"torch {torch.__version__}, CPU, 1 thread, medians of {args.rounds} rounds")
    compare_with_plain(args.batches, args.rounds)
    compare_with_trunk(64, args.rounds)
    show_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
