"""Speed and memory of a training step of a stitching layer between two mCNNs, against autograd through both halves.

    python -m benchmarks.stitching             # about 3 minutes on two cores
    python -m benchmarks.stitching --quick     # narrow networks, few rounds: a look in half a minute

(a) Seconds per step (forward, loss, backward, optimiser, projection) with a Birkhoff layer, batch 32: "both halves" is the same
    network with all its weights trainable, of which only the layer is in the optimiser, as the original does; "stitched" is
    this suite's; "channels last" that with maps in the layout (B, H, W, C). In turn, in one process; medians, and medians of
    the ratios round by round.
(b) Peak memory of the same steps, each in a process of its own, less that of a process that has only the networks and images.
    Behind layer 3 there is nearly the whole network, whose maps gradients need whether or not weights learn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.swarm_layer import peak_resident, seconds
from common.models import zoo
from common.run.memory import tune_malloc
from common.symmetry.stitching import stitch
from common.symmetry.stitching_layers import Birkhoff
from common.symmetry.train import make_optimizers, training_step

KINDS = ("both halves", "stitched", "channels last")
CHANNELS = {3: 1, 6: 2, 10: 4, 14: 8}  # of the layers, in widths
BATCH = 32


def make_step(kind: str, layer: int, width: int, device: str) -> Callable[[], object]:
    """A training step of one kind at one layer."""
    torch.manual_seed(0)
    models = (zoo.make("mCNN", width=width) for _ in range(2))
    stitching_layer = Birkhoff(CHANNELS[layer] * width, alpha=0.1)
    stitched = stitch(*models, layer, stitching_layer).to(device).train()
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.arange(BATCH, device=device) % 10
    if kind == "channels last":
        stitched.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    (optimizer,) = make_optimizers(stitching_layer, 0.01)
    if kind == "both halves":
        stitched.requires_grad_(True)  # gradients of weights add up, as nobody sets them to zero

    def step() -> None:
        training_step(stitched, images, labels, optimizer).item()

    return step


def peak_memory(kind: str, layer: int, width: int, threads: int) -> float:
    """Peak resident memory of two steps in a process of their own, in MiB ("nothing": of the process without a step)."""
    options = ["--memory", kind, str(layer), "--width", str(width), "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.stitching", *options]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # what is freed goes back: only what is in use counts
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def measure_memory(kind: str, layer: int, width: int) -> None:
    step = make_step("stitched" if kind == "nothing" else kind, layer, width, "cpu")
    if kind != "nothing":
        step()
        step()
    print(json.dumps(peak_resident()))


def compare_steps(layers: list[int], width: int, rounds: int, device: str) -> None:
    print(f"\n(a) seconds per step: mCNN of width {width}, {BATCH} images; median of {rounds}")
    print(f"{'layer':>6}" + "".join(f"{kind:>14}" for kind in KINDS) + "    times as fast")
    for layer in layers:
        steps = {kind: make_step(kind, layer, width, device) for kind in KINDS}
        for step in steps.values():
            step()
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind, step in steps.items():
                times[kind].append(seconds(step))
        row = "".join(f"{statistics.median(times[kind]):14.4f}" for kind in KINDS)
        gains = [statistics.median(a / b for a, b in zip(times["both halves"], times[kind], strict=True)) for kind in KINDS[1:]]
        print(f"{layer:6}{row}    " + "  ".join(f"{gain:.2f}x" for gain in gains), flush=True)


def compare_memory(layers: list[int], width: int, threads: int) -> None:
    print("\n(b) peak memory of a step, MiB beyond imports, networks and images")
    for layer in layers:
        nothing = peak_memory("nothing", layer, width, threads)
        peaks = {kind: peak_memory(kind, layer, width, threads) - nothing for kind in KINDS}
        shares = (f"{kind} {mib:,.0f} ({mib / peaks['both halves']:.2f} of both)" for kind, mib in peaks.items())
        print(f"{layer:6}  " + "  ".join(shares), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="narrow networks, two rounds")
    parser.add_argument("--layers", type=int, nargs="+", choices=CHANNELS, default=[3, 14], help="%(default)s")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "LAYER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        measure_memory(args.memory[0], int(args.memory[1]), args.width)
        return 0
    tune_malloc()
    if args.quick:
        args.width, args.rounds = 8, 2
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}")
    compare_steps(args.layers, args.width, args.rounds, args.device)
    if args.device == "cpu":
        compare_memory(args.layers, args.width, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
