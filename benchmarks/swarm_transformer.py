"""Speed and memory of the SWARM image transformer, against the plain formulation and against its matrix products alone.

    python -m benchmarks.swarm_transformer            # about 6 minutes on two cores
    python -m benchmarks.swarm_transformer --quick    # a look in a minute

All with n_hidden 256, n_iter 10, one layer, as the published lines for MNIST have it.

(a) Sampling 12 images of 28x28. The original runs the whole network once per pixel: such forward passes are timed for a few
    pixels, in the plain formulation and with this suite's layer, and multiplied by 784.
(b) A training step (forward, loss, backward, Adam) of 10 images of 28x28: the plain formulation (1x1 convolutions, the input
    product in every iteration, autograd), this suite's layer, and the layer's matrix products alone, with the input product
    computed once. In turn, in one process; medians, and medians of the ratios round by round. Peak memory of the same steps,
    each in its own process, less that of a process that has only imported.
(c) Time and memory of a step of 4 images with 14x14 to 64x64 pixels: both must grow linearly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.plain_swarm import PlainSwarmLayer
from benchmarks.swarm_layer import has_bf16, peak_resident, seconds
from common.models.image_transformer import N_VALUES, ImageTransformer, cross_entropy
from common.run.memory import tune_malloc

N_HIDDEN, N_ITER, BATCH, SIZE, N_SAMPLES = 256, 10, 10, 28, 12


class PlainOnGrid(PlainSwarmLayer):
    """The plain layer on a grid of pixels, channels last."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def make_model(kind: str, size: int, device: str) -> ImageTransformer:
    torch.manual_seed(0)
    model = ImageTransformer(shape=(1, size, size), n_hidden=N_HIDDEN, n_iter=N_ITER, fuse="fused" in kind)
    if kind == "plain":
        model.cells[0] = PlainOnGrid(N_HIDDEN, N_VALUES, N_HIDDEN, N_ITER, pooling="CAUSAL")
    return model.to(device)


def random_images(n: int, size: int, device: str) -> Tensor:
    return torch.randint(0, N_VALUES, (n, 1, size, size), generator=torch.Generator().manual_seed(0)).to(device)


def make_step(kind: str, n: int, size: int, device: str) -> Callable[[], object]:
    """A training step of one kind: plain, layer, fused, bf16, bf16 fused, products, or bf16 products."""
    bf16 = "bf16" in kind
    if "products" in kind:
        return lambda: products(n * size * size, device, torch.bfloat16 if bf16 else torch.float32)
    images, model = random_images(n, size, device), make_model(kind, size, device)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss = cross_entropy(logits, images).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def products(n: int, device: str, dtype: torch.dtype) -> None:
    """The matrix products of a training step over n entities alone, all buffers reused over the iterations."""
    H = N_HIDDEN

    def new(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, device=device, dtype=dtype)

    x, h, p, hc, gates, y = new(n, H), new(n, H), new(n, H), new(n, 2 * H), new(n, 4 * H), new(n, N_VALUES)
    Wih, Whh, Whp, ffwd = new(4 * H, H), new(4 * H, H), new(4 * H, H), new(N_VALUES, 2 * H)
    torch.mm(x, Wih.T, out=gates)
    for _ in range(N_ITER - 1):
        torch.mm(h, Whh.T, out=gates)
        torch.mm(p, Whp.T, out=gates)
    torch.mm(hc, ffwd.T, out=y)
    torch.mm(y, ffwd, out=hc), torch.mm(y.T, hc)
    for _ in range(N_ITER - 1):
        torch.mm(gates, Whh, out=h), torch.mm(gates.T, h)
        torch.mm(gates, Whp, out=p), torch.mm(gates.T, p)
    torch.mm(gates, Wih, out=x), torch.mm(gates.T, x)
    if device == "cuda":
        torch.cuda.synchronize()


def compare_sampling(n_pixels: int, rounds: int, device: str) -> None:
    print(f"\n(a) sampling {N_SAMPLES} images of {SIZE}x{SIZE}")
    model = make_model("layer", SIZE, device)
    images, total = random_images(N_SAMPLES, SIZE, device), SIZE * SIZE

    def sample() -> None:
        model.sample(N_SAMPLES).sum().item()

    sample()
    incremental = statistics.median(seconds(sample) for _ in range(rounds))
    print(f"  incremental: {incremental:.2f} s (median of {rounds})")
    for kind, title in (("plain", "plain formulation"), ("layer", "this suite's layer")):
        forward_model = make_model(kind, SIZE, device)

        @torch.no_grad()
        def forward(forward_model: ImageTransformer = forward_model) -> None:
            forward_model(images).sum().item()

        forward()
        whole = statistics.median(seconds(forward) for _ in range(n_pixels)) * total
        print(
            f"  {title}, a forward pass per pixel: {whole:,.0f} s (extrapolated from {n_pixels} of {total} pixels): "
            f"incremental is {whole / incremental:,.0f} times as fast",
            flush=True,
        )


def compare_steps(kinds: list[str], rounds: int, n: int, device: str) -> None:
    print(f"\n(b) a training step of {n} images of {SIZE}x{SIZE}; median of {rounds}")
    steps = {kind: make_step(kind, n, SIZE, device) for kind in kinds}
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, step in steps.items():
            times[kind].append(seconds(step))
    for kind in kinds:
        median = statistics.median(times[kind])
        line = f"{kind:>14}: {1000 * median:9.1f} ms  {n / median:9.1f} images/s"
        if "products" not in kind:
            floor = "bf16 products" if "bf16" in kind else "products"
            speedup = statistics.median(a / b for a, b in zip(times["plain"], times[kind], strict=True))
            overhead = statistics.median(a / b for a, b in zip(times[kind], times[floor], strict=True))
            line += f"  {speedup:6.2f}x as fast as plain  {overhead:6.2f}x the time of the {floor}"
        print(line, flush=True)


def peak_memory(kind: str, n: int, size: int) -> float:
    """Peak resident memory of two steps in their own process, in MiB ("nothing": of a process without a step)."""
    command = [sys.executable, "-m", "benchmarks.swarm_transformer", "--memory", kind, str(n), str(size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(kind: str, n: int, size: int) -> None:
    if kind not in ("plain", "nothing"):
        tune_malloc()
    if kind != "nothing":
        step = make_step(kind, n, size, "cpu")
        step(), step()
    print(json.dumps(peak_resident()))


def compare_memory(kinds: list[str]) -> None:
    nothing = peak_memory("nothing", BATCH, SIZE)
    peaks = {kind: peak_memory(kind, BATCH, SIZE) - nothing for kind in kinds if "products" not in kind}
    print("  peak memory, MiB beyond imports:")
    print("   " + "  ".join(f"{kind} {mib:,.0f} ({mib / peaks['plain']:.2f} of plain)" for kind, mib in peaks.items()))


def show_growth(sizes: list[int], rounds: int) -> None:
    print("\n(c) a training step of 4 images: milliseconds and MiB, and both per 1,000 pixels")
    nothing = peak_memory("nothing", 1, 1)
    for size in sizes:
        step = make_step("layer", 4, size, "cpu")
        step()
        milliseconds = 1e3 * statistics.median(seconds(step) for _ in range(rounds))
        mib, pixels = peak_memory("layer", 4, size) - nothing, 4 * size * size
        print(
            f"  {size}x{size}: {milliseconds:8,.0f} ms, {1000 * milliseconds / pixels:6.1f} per 1,000;"
            f" {mib:8,.0f} MiB, {1000 * mib / pixels:6.1f} per 1,000",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, without compiled kinds, memory and (c)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=BATCH, help="images a training step [%(default)s]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "N", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        measure_memory(args.memory[0], int(args.memory[1]), int(args.memory[2]))
        return
    tune_malloc()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}; bfloat16 in hardware: {'yes' if args.device == 'cuda' or has_bf16() else 'no'}")
    rounds = 3 if args.quick else args.rounds
    compare_sampling(3 if args.quick else 5, rounds, args.device)
    kinds = ["plain", "layer", "bf16", "products", "bf16 products"]
    if not args.quick:
        kinds[2:2] = ["fused"]
        kinds[4:4] = ["bf16 fused"]
    compare_steps(kinds, rounds, args.batch, args.device)
    if args.device == "cpu" and not args.quick:
        compare_memory(kinds)
        show_growth([14, 20, 28, 40, 64], 3)


if __name__ == "__main__":
    main()
