"""Speed and memory of a training step of the paper's clustering model, against two measures.

    python -m benchmarks.swarm_layer             # about 3 minutes on two cores
    python -m benchmarks.swarm_layer --quick     # without compiled kinds and (b), half a minute

(a) A training step (forward, loss under the best matching, backward, Adam) with n_iter 10, 50 sets of up to 594 entities, and
    n_hidden 128 (published) and 32 (`make demo`): the plain formulation (benchmarks/plain_swarm.py), this suite's layer, and
    the layer's matrix products alone. "plain" runs as the original does, with the C library's memory policy; "plain, tuned"
    and all others with that of the scripts.
(b) One set of E = 100 ... 30,000 entities: time and memory must grow linearly.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from benchmarks.plain_swarm import PlainSwarmLayer
from common.datasets.clustering import N_LABELS, batches_by_size, make_tasks, padded_batch
from common.matching import matched_cross_entropy
from common.models.swarm import SwarmLayer

N_HIDDEN, N_ITER, BATCH = 128, 10, 50
Batch = tuple[Tensor, Tensor, Tensor]


def make_step(kind: str, batch: Batch, device: str = "cpu", n_hidden: int = N_HIDDEN) -> Step:
    """A training step of one kind: plain, layer, fused, bf16, bf16 fused, products, or bf16 products."""
    torch.manual_seed(0)
    points, labels, mask = (tensor.to(device) for tensor in batch)
    fuse, bf16 = "fused" in kind, "bf16" in kind
    if "products" in kind:
        return partial(products, points.to(torch.bfloat16 if bf16 else torch.float32), n_hidden)
    model: nn.Module = (
        PlainSwarmLayer(2, N_LABELS, n_hidden, N_ITER)
        if "plain" in kind
        else SwarmLayer(2, N_LABELS, n_hidden, N_ITER, fuse=fuse)
    )
    return training_step(model.to(device), (points, labels, mask), bf16)


def training_step(model: nn.Module, batch: Batch, bf16: bool) -> Step:
    """Forward pass, loss under the best matching, backward pass, Adam."""
    points, labels, mask = batch
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        with torch.autocast(points.device.type, torch.bfloat16, enabled=bf16):
            logits = model(points, mask)
        loss = matched_cross_entropy(logits.float().log_softmax(2), labels, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def products(points: Tensor, n_hidden: int) -> None:
    """The matrix products of a training step alone, the pooled one once per set, all buffers reused over the iterations."""
    (N, E, n_in), H = points.shape, n_hidden
    x = points.view(N * E, n_in)

    def new(*shape: int) -> Tensor:
        return points.new_full(shape, 0.5)

    h, hc, gates, y = new(N * E, H), new(N * E, 2 * H), new(N * E, 4 * H), new(N * E, N_LABELS)
    p, dp = new(N, H), new(N, 4 * H)
    Wih, Whh, Whp, ffwd = new(4 * H, n_in), new(4 * H, H), new(4 * H, H), new(N_LABELS, 2 * H)
    torch.mm(x, Wih.T, out=gates)
    for _ in range(N_ITER - 1):
        torch.mm(h, Whh.T, out=gates)
        torch.mm(p, Whp.T, out=dp)
    torch.mm(hc, ffwd.T, out=y)
    torch.mm(y, ffwd, out=hc), torch.mm(y.T, hc)
    for _ in range(N_ITER - 1):
        torch.mm(gates, Whh, out=h), torch.mm(gates.T, h)
        torch.mm(dp, Whp, out=p), torch.mm(dp.T, p)
    torch.mm(gates.T, x)
    if points.is_cuda:
        torch.cuda.synchronize()


def a_batch(entities: int) -> Batch:
    """The batch of 50 real tasks whose largest set has about that many entities."""
    tasks = make_tasks(2000, seed=0)
    batches = batches_by_size(tasks, torch.arange(2000), BATCH)
    return padded_batch(tasks, min(batches, key=lambda indices: abs(int(tasks.sizes[indices].max()) - entities)))


def one_set(entities: int) -> Batch:
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, N_LABELS, (1, entities), generator=gen)
    return torch.randn(1, entities, 2, generator=gen), labels, torch.ones(1, entities, dtype=torch.bool)


def step_on_batch(kind: str, entities: int, n_hidden: int) -> Step:
    return make_step(kind, a_batch(entities), n_hidden=n_hidden)


def step_on_one_set(kind: str, entities: int) -> Step:
    return make_step(kind, one_set(entities))


def compare(bench: Bench, work: str, names: list[str], entities: int, n_hidden: int, rounds: int) -> None:
    kinds = {name: Kind(partial(step_on_batch, name, entities, n_hidden), tuned=name != "plain") for name in names}
    bench.compare(work, kinds, rounds, ("plain", "plain, tuned"), ("products", "bf16 products"))


def run(bench: Bench) -> None:
    names = ["plain", "plain, tuned", "layer", "bf16", "products", "bf16 products"]
    rounds = 2 if bench.quick else 3
    more = [] if bench.quick else ["fused", "bf16 fused"]
    compare(bench, "clustering step, 128 hidden", names + more, 594, N_HIDDEN, rounds)
    compare(bench, "clustering step, 32 hidden", names, 594, 32, rounds)
    if bench.quick:
        return
    for entities in (100, 1_000, 10_000, 30_000):
        kinds = {"plain": Kind(partial(step_on_one_set, "plain", entities), tuned=False)} if entities <= 10_000 else {}
        kinds["layer"] = Kind(partial(step_on_one_set, "layer", entities))
        bench.compare(f"one set of {entities:,} entities", kinds, rounds=1 if entities > 10_000 else 5)


if __name__ == "__main__":
    sys.exit(run_benchmark("swarm_layer", run, __doc__))
