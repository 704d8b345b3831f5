"""Speed and memory of a training step of the Set Transformer and the LSTM, against the original's formulation.

    python -m benchmarks.set_models             # about 2 minutes
    python -m benchmarks.set_models --quick     # a look in half a minute

A training step (forward, loss under the best matching, backward, Adam) of 50 sets of up to 594 entities, with the default
sizes: 128 hidden units, one layer; 4 heads and 10 inducing points in the Set Transformer. The plain formulation
(benchmarks/plain_sets.py) runs as the original does, with the C library's memory policy, and with that of the scripts
(common/run/memory.py), as this suite's models do. Each kind has its own process, and they take a step in turn; medians of CPU
seconds, and of the ratios round by round. Peak memory is that beyond imports and data.
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
from torch import nn

from benchmarks.plain_sets import PlainLSTM, PlainSetTransformer
from benchmarks.swarm_layer import a_batch, peak_resident
from common.datasets.clustering import N_LABELS
from common.matching import matched_cross_entropy
from common.models.sets import make_set_model
from common.run.memory import tune_malloc

ENTITIES = 594
MODELS = {"SetTransformer": PlainSetTransformer, "LSTM": PlainLSTM}
KINDS = {  # kind: memory policy of the scripts, and bfloat16
    "original": (False, False),
    "plain": (True, False),
    "suite": (True, False),
    "suite bf16": (True, True),
}


def make_step(name: str, kind: str) -> Callable[[], object]:
    """A training step of a model in one of KINDS."""
    torch.manual_seed(0)
    points, labels, mask = a_batch(ENTITIES)
    bf16 = KINDS[kind][1]
    suite = kind.startswith("suite")
    model: nn.Module = make_set_model(name, 2, N_LABELS) if suite else MODELS[name](2, N_LABELS)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(points, mask)
        loss = matched_cross_entropy(logits.float().log_softmax(2), labels, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def work(name: str, kind: str) -> None:
    """Take a step for each line of stdin; print its CPU seconds, and the peak memory so far."""
    if KINDS[kind][0]:
        tune_malloc()
    step, nothing = make_step(name, kind), peak_resident()
    for _ in sys.stdin:
        began = time.process_time()
        step()
        print(json.dumps([time.process_time() - began, peak_resident() - nothing]), flush=True)


def start(name: str, kind: str, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.set_models", "--work", name, kind, "--threads", str(threads)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def take_step(worker: subprocess.Popen[str]) -> tuple[float, float]:
    """CPU seconds and peak memory of a worker's next step."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    seconds, mib = json.loads(worker.stdout.readline())
    return seconds, mib


def compare(name: str, rounds: int, threads: int) -> None:
    print(f"\n{name}, 50 sets of up to {ENTITIES} entities; median of {rounds}")
    workers = {kind: start(name, kind, threads) for kind in KINDS}
    measured: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(2 + rounds):  # two to warm up
        for kind, worker in workers.items():
            measured[kind].append(take_step(worker))
    for worker in workers.values():
        worker.communicate()
    times = {kind: [seconds for seconds, _ in steps[2:]] for kind, steps in measured.items()}
    for kind in KINDS:
        ratio = statistics.median(a / b for a, b in zip(times["original"], times[kind], strict=True))
        peak, peak_original = measured[kind][-1][1], measured["original"][-1][1]
        print(
            f"{kind:>12}: {1000 * statistics.median(times[kind]):7.0f} ms  {ratio:5.2f}x as fast as the original  "
            f"{peak:5,.0f} MiB ({peak / peak_original:.2f} of the original)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", nargs=2, metavar=("MODEL", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        work(*args.work)
        return
    print(f"torch {torch.__version__}, CPU, {args.threads} threads")
    for name in MODELS:
        compare(name, 3 if args.quick else args.rounds, args.threads)


if __name__ == "__main__":
    main()
