"""Speed and memory of the SWARM image transformer, against the plain formulation and against its matrix products alone.

    python -m benchmarks.swarm_transformer            # about 3 minutes on two cores
    python -m benchmarks.swarm_transformer --quick    # without (c), a minute

All with n_hidden 256, n_iter 10, one layer, as the published commands for MNIST have it.

(a) A training step (forward, loss, backward, Adam) of 10 images of 28x28: the plain formulation (1x1 convolutions, the input
    product in every iteration, autograd), this suite's layer, and the layer's matrix products alone, with the input product
    computed once. "plain" has the C library's memory policy, "plain, tuned" and all others that of the scripts.
(b) Sampling 12 images of 28x28. The original runs the whole network once per pixel: such a forward pass is timed, in the plain
    formulation and with this suite's layer, and multiplied by 784.
(c) Time and memory of a step of 4 images with 14x14 to 64x64 pixels: both must grow linearly.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from benchmarks.plain_swarm import PlainSwarmLayer
from common.models.image_transformer import N_VALUES, ImageTransformer, cross_entropy

N_HIDDEN, N_ITER, BATCH, SIZE, N_SAMPLES = 256, 10, 10, 28, 12


class PlainOnGrid(PlainSwarmLayer):
    """The plain layer on a grid of pixels, channels last."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def make_model(kind: str, size: int, device: str) -> ImageTransformer:
    torch.manual_seed(0)
    model = ImageTransformer(shape=(1, size, size), n_hidden=N_HIDDEN, n_iter=N_ITER)
    if "plain" in kind:
        model.cells[0] = PlainOnGrid(N_HIDDEN, N_VALUES, N_HIDDEN, N_ITER, pooling="CAUSAL")
    return model.to(device)


def random_images(n: int, size: int, device: str) -> Tensor:
    return torch.randint(0, N_VALUES, (n, 1, size, size), generator=torch.Generator().manual_seed(0)).to(device)


def make_step(kind: str, n: int, size: int, device: str = "cpu") -> Step:
    """A training step of one kind: plain, layer, bf16, products, or bf16 products."""
    bf16 = "bf16" in kind
    if "products" in kind:
        return partial(products, n * size * size, device, torch.bfloat16 if bf16 else torch.float32)
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


def make_sampling(n: int, size: int) -> Step:
    """Sampling of n images, incrementally."""
    model = make_model("layer", size, "cpu")
    return lambda: model.sample(n).sum().item()


def make_forward(kind: str, n: int, size: int) -> Step:
    """A forward pass of n images, as a pixel takes it where nothing is kept."""
    model, images = make_model(kind, size, "cpu"), random_images(n, size, "cpu")

    @torch.no_grad()
    def forward() -> None:
        model(images).sum().item()

    return forward


def run(bench: Bench) -> None:
    names = ["plain", "plain, tuned", "layer", "bf16", "products", "bf16 products"]
    kinds = {name: Kind(partial(make_step, name, BATCH, SIZE), tuned=name != "plain") for name in names}
    baselines, floors = ("plain", "plain, tuned"), ("products", "bf16 products")
    bench.compare("image step, 256 hidden", kinds, 2 if bench.quick else 3, baselines, floors)

    pixels = SIZE * SIZE
    kinds = {
        "incremental": Kind(partial(make_sampling, N_SAMPLES, SIZE)),
        "plain": Kind(partial(make_forward, "plain", N_SAMPLES, SIZE), tuned=False, times=pixels),
        "layer": Kind(partial(make_forward, "layer", N_SAMPLES, SIZE), times=pixels),
    }
    bench.compare("sampling 12 images", kinds, 1 if bench.quick else 2, ("plain", "layer"))
    if not bench.quick:
        for size in (14, 28, 64):
            kinds = {"layer": Kind(partial(make_step, "layer", 4, size))}
            bench.compare(f"image step, 4 images of {size}x{size}", kinds, 3)


if __name__ == "__main__":
    sys.exit(run_benchmark("swarm_transformer", run, __doc__))
