"""Speed and memory of a training step of the paper's clustering model, against two measures.

    python -m benchmarks.swarm_layer             # about 6 minutes on two cores
    python -m benchmarks.swarm_layer --quick     # a look in half a minute

(a) A training step (forward, loss under the best matching, backward, Adam) with n_hidden 128, n_iter 10, 50 sets of up to E
    entities: the plain formulation (benchmarks/plain_swarm.py), this suite's layer, and the layer's matrix products alone, a
    lower bound for any implementation. In turn, in one process; medians, and medians of the ratios round by round.
(b) Peak memory of the same steps, each in its own process, less that of a process that has only imported and made data.
(c) Time and memory of a step with one set of E = 100 ... 100,000 entities: both must grow linearly.

The plain formulation runs as the original does, with the C library's memory policy, and with that of the scripts
(common/run/memory.py), which is faster; the layer with the latter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.plain_swarm import PlainSwarmLayer
from common.datasets.clustering import N_LABELS, batches_by_size, make_tasks, padded_batch
from common.matching import matched_cross_entropy
from common.models.swarm import SwarmLayer
from common.run.memory import tune_malloc

N_HIDDEN, N_ITER, BATCH = 128, 10, 50
Batch = tuple[Tensor, Tensor, Tensor]


def make_step(kind: str, batch: Batch, device: str) -> Callable[[], object]:
    """A training step of one kind: plain, layer, fused, bf16, bf16 fused, or products."""
    torch.manual_seed(0)
    points, labels, mask = (tensor.to(device) for tensor in batch)
    if kind == "products":
        return lambda: products(points)
    fuse, bf16 = "fused" in kind, "bf16" in kind
    model: nn.Module = (
        PlainSwarmLayer(2, N_LABELS, N_HIDDEN, N_ITER)
        if kind == "plain"
        else SwarmLayer(2, N_LABELS, N_HIDDEN, N_ITER, fuse=fuse)
    )
    model.to(device)
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


def products(points: Tensor) -> None:
    """The matrix products of a training step alone, the pooled one once per set, all buffers reused over the iterations."""
    (N, E, n_in), H = points.shape, N_HIDDEN
    x = points.view(N * E, n_in)
    new = points.new_empty
    h, hc, gates, y = new(N * E, H), new(N * E, 2 * H), new(N * E, 4 * H), new(N * E, N_LABELS)
    p, dp = new(N, H), new(N, 4 * H)
    Wih, Whh, Whp, ffwd = (
        torch.randn(a, b, device=points.device) for a, b in ((4 * H, n_in), (4 * H, H), (4 * H, H), (N_LABELS, 2 * H))
    )
    for tensor in (h, hc, gates, y, p, dp):
        tensor.fill_(0.5)
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


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def a_batch(entities: int) -> Batch:
    """The batch of 50 real tasks whose largest set has about that many entities."""
    tasks = make_tasks(2000, seed=0)
    batches = batches_by_size(tasks, torch.arange(2000), BATCH)
    return padded_batch(tasks, min(batches, key=lambda indices: abs(int(tasks.sizes[indices].max()) - entities)))


def one_set(entities: int) -> Batch:
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, N_LABELS, (1, entities), generator=gen)
    return torch.randn(1, entities, 2, generator=gen), labels, torch.ones(1, entities, dtype=torch.bool)


def peak_memory(kind: str, batch: str, entities: int, threads: int) -> float:
    """Peak resident memory of two steps in their own process, in MiB ("nothing": of the process without a step)."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.swarm_layer",
        "--memory",
        kind,
        batch,
        str(entities),
        "--threads",
        str(threads),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(kind: str, batch: str, entities: int) -> None:
    if kind not in ("plain", "nothing"):
        tune_malloc()
    data = a_batch(entities) if batch == "sets" else one_set(entities)
    if kind != "nothing":
        step = make_step(kind, data, "cpu")
        step()
        step()
    print(json.dumps(peak_resident()))


def peak_resident() -> float:
    """Peak resident memory of this process, in MiB (Linux)."""
    status = open("/proc/self/status").read()  # not getrusage: its peak counts the parent's memory, too
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def compare_steps(kinds: list[str], sizes: list[int], rounds: int, device: str) -> None:
    print(f"\n(a) seconds per training step: n_hidden {N_HIDDEN}, n_iter {N_ITER}, {BATCH} sets; median of {rounds}")
    header = "".join(f"{kind:>12}" for kind in kinds)
    print(f"{'E':>6}{header}    ratios to plain (higher is better), then to products (lower is better)")
    for entities in sizes:
        batch = a_batch(entities)
        steps = {kind: make_step(kind, batch, device) for kind in kinds}
        for step in steps.values():
            step()
            step()
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, step in steps.items():
                times[kind].append(seconds(step))

        def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

        layers = [kind for kind in kinds if kind not in ("plain", "products")]
        row = "".join(f"{statistics.median(times[kind]):12.3f}" for kind in kinds)
        speedups = "  ".join(f"{kind} {ratio('plain', kind):.2f}x" for kind in layers)
        overheads = "  ".join(f"{kind} {ratio(kind, 'products'):.2f}x" for kind in layers)
        print(f"{batch[0].shape[1]:6}{row}    {speedups}  |  {overheads}", flush=True)


def compare_memory(kinds: list[str], entities: int, threads: int) -> None:
    print(f"\n(b) peak memory of a step, {BATCH} sets of up to {entities} entities, MiB beyond imports and data")
    nothing = peak_memory("nothing", "sets", entities, threads)
    peaks = {kind: peak_memory(kind, "sets", entities, threads) - nothing for kind in kinds if kind != "products"}
    print("   " + "  ".join(f"{kind} {mib:,.0f} ({mib / peaks['plain']:.2f} of plain)" for kind, mib in peaks.items()))


def show_growth(sizes: list[int], rounds: int, threads: int) -> None:
    print("\n(c) one set of E entities: milliseconds and MiB of a step, and both per 1,000 entities")
    titles = [title for kind in ("layer", "plain") for title in (f"{kind} ms", "per 1,000", f"{kind} MiB", "per 1,000")]
    print(f"{'E':>8}" + "".join(f"{title:>11}" for title in titles))
    nothing = peak_memory("nothing", "one", sizes[0], threads)
    for entities in sizes:
        row = []
        for kind in ("layer", "plain"):
            step = make_step(kind, one_set(entities), "cpu")
            step()
            milliseconds = 1e3 * statistics.median(seconds(step) for _ in range(rounds))
            mib = peak_memory(kind, "one", entities, threads) - nothing
            row += [milliseconds, 1000 * milliseconds / entities, mib, 1000 * mib / entities]
        print(f"{entities:8,}" + "".join(f"{value:11,.1f}" for value in row), flush=True)


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (Linux, x86)."""
    try:
        flags = open("/proc/cpuinfo").read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds, without compiled kinds and (c)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "BATCH", "E"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        measure_memory(args.memory[0], args.memory[1], int(args.memory[2]))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}; bfloat16 in hardware: {'yes' if args.device == 'cuda' or has_bf16() else 'no'}")
    kinds = (
        ["plain", "layer", "bf16", "products"] if args.quick else ["plain", "layer", "fused", "bf16", "bf16 fused", "products"]
    )
    print("\nwith the C library's own memory policy:")
    compare_steps(["plain", "products"], [599], 3 if args.quick else args.rounds, args.device)
    print("\nwith the scripts' memory policy:")
    tune_malloc()
    compare_steps(kinds, [599] if args.quick else [250, 599, 950], 3 if args.quick else args.rounds, args.device)
    if args.device == "cpu":
        compare_memory(kinds, 599, args.threads)
        if not args.quick:
            show_growth([100, 1_000, 10_000, 100_000], 3, args.threads)


if __name__ == "__main__":
    main()
