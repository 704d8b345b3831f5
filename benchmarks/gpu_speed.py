"""Sections of benchmarks/gpu.py that say how fast a GPU is, against lower bounds and targets.

Each is a function that yields named values. Steps are those of the scripts, with the options of their published
commands; `smoke` makes them tiny. As a module, this is one of several processes that train networks of a zoo at the same time.
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amortised_clustering
import amortised_mog
import routing_networks
import swarm_transformer
import train_ssl
from benchmarks import gpu_device as gpu
from benchmarks.gpu_device import Step, Values, bounded, measure
from common import matching
from common.datasets import augmentation, clustering
from common.datasets.augmentation import Preprocessing
from common.datasets.images import ImageSet
from common.graphs import GraphedModel
from common.models import zoo
from common.models.image_transformer import ImageTransformer
from common.precision import set_backend_flags
from common.run import dotted
from common.run.budget import make_adam
from common.symmetry.measures import features_of
from common.symmetry.similarity import layer_similarities
from common.symmetry.stitching import stitch, stitch_points
from common.symmetry.stitching_layers import Birkhoff
from common.symmetry.train import make_optimizers, training_step
from common.zoo import training as zoo_training

CUDA = torch.device("cuda")
KINDS = ("fp32", "tf32", "bf16", "bf16 compiled")

CLUSTERING = "-type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50 -wc 60"
IMAGES = "-data MNIST -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50"
SSL = (
    "--model duet --encoder cifar10_resnet32 --dataset cifar10 --batch-size 1024 --test-every 10 --warmup-epochs 10 "
    "--epochs 800 --center-crop --tx sca rot --equi-tx rot --duet-target vm --duet-lambda 1000"
)


def measure_kinds(make_step: Callable[[str, bool], Step], n: int) -> Values:
    """A training step of each of KINDS; `make_step` takes a precision and whether to compile."""
    for kind in KINDS:
        precision, compile = kind.split()[0], "compiled" in kind
        set_backend_flags(precision)
        if compile:
            gpu.not_simulated(gpu.COMPILE)
        yield kind, measure(make_step(precision, compile), n)


# ---- SWARM: clustering and images ----------------------------------------------------------------------------------------


def swarm_products(n: int, n_in: int, n_hidden: int, n_out: int, n_iter: int, n_pooled: int, dtype: torch.dtype) -> Step:
    """The matrix products of a training step of a SWARM layer alone, over n entities; `n_pooled` vectors are pooled."""

    def new(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, device=CUDA, dtype=dtype)

    H = n_hidden
    x, h, p, hc = new(n, n_in), new(n, H), new(n_pooled, H), new(n, 2 * H)
    gates, pooled_gates, y = new(n, 4 * H), new(n_pooled, 4 * H), new(n, n_out)
    Wih, Whh, Whp, ffwd = new(4 * H, n_in), new(4 * H, H), new(4 * H, H), new(n_out, 2 * H)

    def step() -> None:
        torch.mm(x, Wih.T, out=gates)
        for _ in range(n_iter - 1):
            torch.mm(h, Whh.T, out=gates), torch.mm(p, Whp.T, out=pooled_gates)
        torch.mm(hc, ffwd.T, out=y)
        torch.mm(y, ffwd, out=hc), torch.mm(y.T, hc)
        for _ in range(n_iter - 1):
            torch.mm(gates, Whh, out=h), torch.mm(gates.T, h)
            torch.mm(pooled_gates, Whp, out=p), torch.mm(pooled_gates.T, p)
        torch.mm(gates.T, x)
        if n_in == H:  # embeddings learn, coordinates do not
            torch.mm(gates, Wih, out=x)

    return step


def compare_with_products(make_step: Callable[[str, bool], Step], n: int, *sizes: int) -> Values:
    """A step of each kind next to its products; the target is for bf16, compiled."""
    products = {}
    for kind in ("fp32", "tf32", "bf16"):
        set_backend_flags(kind)
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        products[kind] = measure(swarm_products(*sizes, dtype), n)
        yield f"products alone, {kind}", products[kind]
    for kind, measured in measure_kinds(make_step, n):
        yield kind, measured
    yield "bf16 compiled / its products", bounded(measured["ms"] / products["bf16"]["ms"], 2.5)


def clustering_step(precision: str, compile: bool, smoke: bool) -> tuple[Step, tuple[int, ...]]:
    """A step of amortised_clustering.py on a batch of middle size, and the number of its entities and sets."""
    line = CLUSTERING.replace("128", "8").replace("-n_iter 10", "-n_iter 2") if smoke else CLUSTERING
    words = [*line.split(), "-precision", precision, *(["-compile"] if compile else [])]
    args, _, _ = dotted.parse(amortised_clustering.get_parser(), words, amortised_clustering.NOT_IN_NAME)
    model = amortised_clustering.make_model(args)
    optimizer, forward = make_adam(model, args.lr), GraphedModel(model)
    tasks = clustering.make_tasks(100 if smoke else 2000, args.seed).to(CUDA)
    batches = clustering.batches_by_size(tasks, torch.arange(len(tasks)), args.bs)
    indices = batches[len(batches) // 2]

    def step() -> None:
        points, labels, mask = clustering.padded_batch(tasks, indices, graphed=True)
        log_p = amortised_clustering.log_probs(forward, points, mask, args.precision)
        loss = matching.matched_cross_entropy(log_p, labels, mask, args.loss).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    N, E, _ = clustering.padded_batch(tasks, indices, graphed=True)[0].shape
    return step, (N * E, 2, args.n_hidden, clustering.N_LABELS, args.n_iter, N)


def clustering_section(smoke: bool) -> Values:
    """The published clustering line: a step next to its matrix products."""
    _, sizes = clustering_step("fp32", False, smoke)
    yield from compare_with_products(lambda *kind: clustering_step(*kind, smoke)[0], 2 if smoke else 20, *sizes)


def images_section(smoke: bool) -> Values:
    """The published image line for MNIST: sampling, and a step next to its matrix products."""

    def make(precision: str, compile: bool) -> tuple[Any, ImageTransformer]:
        words = [*IMAGES.split(), "-precision", precision, *(["-compile"] if compile else [])]
        args = swarm_transformer.parse(swarm_transformer.get_parser(), words)
        if smoke:
            args.n_hidden, args.n_iter, args.bs = 8, 2, 4
        return args, swarm_transformer.make_model(args)

    def make_step(precision: str, compile: bool) -> Step:
        args, model = make(precision, compile)
        optimizer, forward = make_adam(model, args.lr), GraphedModel(model)
        batch = ImageSet(
            torch.randint(0, 256, (args.bs, 1, 28, 28), dtype=torch.uint8).to(CUDA), torch.zeros(args.bs, device=CUDA), ()
        )

        def step() -> None:
            swarm_transformer.accumulate_gradients(model, batch, args.precision, args.bs, forward)
            optimizer.step()

        return step

    args, model = make("fp32", False)
    model.shape = (1, 2, 28) if smoke else model.shape  # sampling ends after two rows
    set_backend_flags("fp32")
    measured = measure(lambda: model.sample(2 if smoke else 12), 1 if smoke else 3, warm_up=1)
    yield "sampling 12 images", measured
    yield "seconds for 12 images", bounded(measured["ms"] / 1000, 0.5)
    n = args.bs * 28 * 28
    sizes = (n, args.n_hidden, args.n_hidden, 256, args.n_iter, n)
    yield from compare_with_products(make_step, 2 if smoke else 10, *sizes)


def mixture_section(smoke: bool) -> Values:
    """The default line of amortised_mog.py: whole steps, data included."""
    for kind in ("fp32", "bf16"):
        set_backend_flags(kind)
        args, _, _ = dotted.parse(amortised_mog.get_parser(), ["-precision", kind], amortised_mog.NOT_IN_NAME)
        model = amortised_mog.make_model(args)
        optimizer, forward, numbers = make_adam(model, args.lr), GraphedModel(model), itertools.count()

        def step(args: Any = args, optimizer: Any = optimizer, forward: Any = forward, numbers: Any = numbers) -> None:
            batch = amortised_mog.batch_of(args, amortised_mog.TRAINING, 0, next(numbers)).graphed(CUDA)
            optimizer.zero_grad()
            (-amortised_mog.likelihood(args, forward, batch).mean()).backward()
            optimizer.step()

        yield kind, measure(step, 2 if smoke else 50, warm_up=3 if smoke else 30)


# ---- routing, stitching, similarity --------------------------------------------------------------------------------------


def routing(smoke: bool) -> Values:
    """A step of routing_networks.py as published (WPL, 20 tasks) against forward and backward of its trunk, by batch."""
    args, _ = routing_networks.parse(routing_networks.get_parser(), [])
    set_backend_flags("fp32")
    for batch in (10,) if smoke else (10, 512):  # 10 is published
        x = torch.randn(batch, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
        tasks, labels = (torch.randint(0, n, (batch,)).to(CUDA) for n in (20, 5))
        model = routing_networks.make_model(args, SimpleNamespace(train=SimpleNamespace(images=x), n_tasks=20, n_labels=5))
        optimizer, parameters = routing_networks.make_optimizer(args, model), list(model.trunk.parameters())

        def trunk(model: Any = model, x: Tensor = x, parameters: list[nn.Parameter] = parameters) -> None:
            torch.autograd.grad(model.trunk(x).sum(), parameters)

        def whole(model: Any = model, optimizer: Any = optimizer, inputs: Any = (x, tasks, labels)) -> None:
            _, module_loss, routing_loss, _ = routing_networks.forward(args, model, *inputs)
            optimizer.zero_grad()
            (module_loss + routing_loss).backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], routing_networks.MAX_NORM)
            optimizer.step()

        times = {name: measure(step, 2 if smoke else 30) for name, step in (("trunk", trunk), ("step", whole))}
        yield f"batch {batch}", times
        yield f"batch {batch}: step / trunk", bounded(times["step"]["ms"] / times["trunk"]["ms"], 2.0)


def stitching(smoke: bool) -> Values:
    """A step of a Birkhoff layer between two mCNNs, batch 32: as it is, its projection alone, and as a CUDA graph."""
    set_backend_flags("fp32")
    width, n = (4, 2) if smoke else (64, 50)
    for index, channels in ((3, width),) if smoke else ((3, width), (14, 8 * width)):
        layer = Birkhoff(channels, alpha=0.1)
        model = stitch(zoo.make("mCNN", width=width), zoo.make("mCNN", width=width), index, layer).to(CUDA).train()
        (optimizer,) = make_optimizers(layer, 0.01)
        x, labels = torch.randn(32, 3, 32, 32, device=CUDA), (torch.arange(32) % 10).to(CUDA)

        def step(model: Any = model, optimizer: Any = optimizer, x: Tensor = x, labels: Tensor = labels) -> None:
            training_step(model, x, labels, optimizer)

        yield f"layer {index}", measure(step, n)
        yield f"layer {index}, projection alone", measure(layer.project, n)
        yield f"layer {index}, CUDA graph", measure(gpu.capture(step), n)


def similarity(smoke: bool) -> Values:
    """All pairs of layers of two resnet20 by wreath CKA and Procrustes, and what 10,000 images would take."""
    set_backend_flags("fp32")
    arch, n = ("mCNN", 8) if smoke else ("resnet20", 1000)
    networks = [zoo.make(arch, width=2 if smoke else None).to(CUDA).eval() for _ in range(2)]
    pixels, names = torch.randn(n, 3, 32, 32, device=CUDA), [point.name for point in stitch_points(networks[0])]
    for measure_name, power in (("wreath_procrustes", 1), ("wreath_cka", 2)):
        features = [lambda part, network=network: features_of(network, pixels[part], names) for network in networks]
        measured = measure(lambda m=measure_name, f=features: layer_similarities(m, *f, n), 1, warm_up=int(power == 1))
        yield f"{measure_name}, {n} images", measured
        yield f"{measure_name}, minutes for 10,000 images", measured["ms"] / 60_000 * (10_000 / n) ** power


# ---- a zoo -----------------------------------------------------------------------------------------------------------------


def zoo_step(
    smoke: bool, precision: str = "fp32", transform: Callable[[nn.Module], Any] = lambda model: None
) -> tuple[Step, Step]:
    """The two halves of a step of train_zoo.py with mCNN, as published: the next batch into its place, and training on it."""
    recipe, width = zoo_training.RECIPES["published"], 4 if smoke else 64
    batch = int(recipe["batch_size"])
    model = zoo.make("mCNN", width=width).to(CUDA, memory_format=torch.channels_last).train()
    transform(model)
    optimizer = zoo_training.make_optimizer(model, "published", recipe["lr"])
    for group in optimizer.param_groups:
        group["capturable"] = not gpu.is_simulated()
    pixels = torch.randint(0, 256, (8 * batch, 3, 32, 32), dtype=torch.uint8, device=CUDA)
    labels = torch.randint(0, 10, (8 * batch,), device=CUDA)
    preprocessing, gen = Preprocessing("CIFAR10", CUDA), torch.Generator().manual_seed(0)
    order, flip, offset = (draw.to(CUDA) for draw in augmentation.draw_epoch(len(pixels), gen))
    x = torch.empty(batch, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    y, starts = labels[:batch].clone(), iter(range(0, 10**9, batch))

    def load() -> None:
        start = next(starts) % len(pixels)
        part = slice(start, start + batch)
        x.copy_(preprocessing.augment(pixels[order[part]], flip[part], offset[part]))
        y.copy_(labels[order[part]])

    return load, lambda: zoo_training.training_step(model, optimizer, x, y, precision)


def both(first: Step, second: Step) -> Step:
    return lambda: (first(), second())


def stacked_step(n: int, smoke: bool) -> Step:
    """A prototype: n networks with weights of their own, stacked by torch.func, in one step of one batch each."""
    models = [zoo.make("mCNN", width=4 if smoke else 64).to(CUDA).train() for _ in range(n)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    optimizer = torch.optim.Adam(parameters.values(), 0.001, weight_decay=1e-4, fused=True)
    x, labels = torch.randn(n, 32, 3, 32, 32, device=CUDA), torch.randint(0, 10, (n, 32), device=CUDA)

    def loss_of(parameters: Any, buffers: Any, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(base, (parameters, buffers), (x,)), labels)

    def step() -> None:
        optimizer.zero_grad()
        torch.vmap(loss_of)(parameters, buffers, x, labels).sum().backward()
        optimizer.step()

    return step


def steps_per_second(processes: int, seconds: float) -> float:
    """Steps of zoo_step that several processes make on one GPU at the same time, in all."""
    command = gpu.command_of("-m", "benchmarks.gpu_speed", str(seconds))
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    for worker in workers:
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError("a process of the zoo ended before its first step")
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    return sum(float(worker.communicate()[0]) for worker in workers)


def zoo_process(seconds: float) -> None:
    """Warm up, say so, wait for a line, then make steps for some seconds; prints steps a second."""
    step = both(*zoo_step(smoke=gpu.is_simulated()))
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(1 if gpu.is_simulated() else 20):
            step()
            n += 1
        torch.cuda.synchronize()
    print(n / (time.perf_counter() - began))


def zoo_section(smoke: bool) -> Values:
    """Training mCNNs with the published recipe: how long 100 of them take on this card, training steps alone."""
    set_backend_flags("fp32")
    steps, n = 100 * 50 * (45_000 // 32), 3 if smoke else 100

    def hours(per_second: float) -> dict[str, Any]:
        return bounded(steps / per_second / 3600, 1.0) | {"steps a second": per_second}

    for precision in ("fp32", "bf16"):
        load, train = zoo_step(smoke, precision)
        yield f"step, {precision}", measure(both(load, train), n)
        load, train = zoo_step(smoke, precision)
        load()
        graph = gpu.capture(train)
        measured = measure(both(load, graph), n)
        yield f"step, {precision}, CUDA graph", measured
        yield f"hours for 100 mCNNs, {precision}, CUDA graph", hours(1000 / measured["ms"])
    measured = measure(stacked_step(2 if smoke else 8, smoke), n)
    yield "step of 8 networks, stacked", measured
    yield "hours for 100 mCNNs, stacked", hours((2 if smoke else 8) * 1000 / measured["ms"])
    for processes in (2,) if smoke else (1, 4, 8):
        yield f"hours for 100 mCNNs, {processes} processes", hours(steps_per_second(processes, 0.2 if smoke else 3))
    load, train = zoo_step(smoke, transform=lambda model: model.compile(mode="reduce-overhead"))
    gpu.not_simulated(gpu.COMPILE)
    yield "step, fp32, reduce-overhead", measure(both(load, train), n)


# ---- DUET ----------------------------------------------------------------------------------------------------------------


def duet(smoke: bool) -> Values:
    """DUET's published command: images a second, and the share of the convolutions in a bf16 step."""

    def make(precision: str, compile: bool) -> tuple[Any, Any]:
        sizes = ["--encoder-width", "4", "--batch-size", "8", "--encoder", "cifar10_resnet20"] if smoke else []
        words = [*SSL.split(), *sizes, "--precision", precision, *(["--compile"] if compile else [])]
        args, _ = train_ssl.parse(train_ssl.get_parser(), words)
        return args, train_ssl.make_model(args, CUDA).train()

    def make_step(precision: str, compile: bool) -> Step:
        args, model = make(precision, compile)
        optimizer, gen = train_ssl.make_optimizer(model, args.lr), torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4 * args.batch_size, 3, 36, 36), dtype=torch.uint8, device=CUDA)
        labels, indices = torch.zeros(len(pixels), dtype=torch.long, device=CUDA), torch.arange(args.batch_size, device=CUDA)

        def step() -> None:
            batch = model.make_batch(pixels, labels, indices, gen, training=True)
            loss, _ = train_ssl.loss_of(args, model, batch, training=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    n, steps = 2 if smoke else 5, {}
    for kind, measured in measure_kinds(make_step, n):
        steps[kind] = measured
        batch = 8 if smoke else 1024
        yield kind, measured | {"images/s": 1000 * batch / measured["ms"]}
    args, model = make("bf16", False)
    convolutions = convolution_ms(model.base_network, torch.randn(args.batch_size, 3, 32, 32, device=CUDA), n)
    yield "convolutions alone, bf16, ms", 2 * convolutions  # of two views
    for kind in ("bf16", "bf16 compiled"):
        yield f"step / convolutions, {kind}", bounded(steps[kind]["ms"] / (2 * convolutions), 1 / 0.6)


def convolution_ms(model: nn.Module, x: Tensor, n: int) -> float:
    """Milliseconds of forward and backward of a network's convolutions alone, in bfloat16."""
    shapes: list[tuple[nn.Conv2d, tuple[int, ...]]] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, _: shapes.append((module, tuple(inputs[0].shape))))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(x[:2])
    for hook in hooks:
        hook.remove()
    total = 0.0
    for conv, (_, *rest) in shapes:
        inputs = torch.randn(len(x), *rest, device=CUDA, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        conv = copy.deepcopy(conv).to(torch.bfloat16)
        inputs.requires_grad_(rest[0] != 3)  # pixels take no gradient
        gradient = torch.ones_like(conv(inputs))
        wanted = [conv.weight] + ([inputs] if inputs.requires_grad else [])
        total += measure(lambda c=conv, i=inputs, w=wanted, g=gradient: torch.autograd.grad(c(i), w, g), n, warm_up=1)["ms"]
    return total


# ---- the published clustering line, for real -----------------------------------------------------------------------------


def long(smoke: bool) -> Values:
    """The published clustering line as a whole, an hour of training (--smoke: a few steps)."""
    with tempfile.TemporaryDirectory() as results:
        sizes = "-tasks 60 -max_epochs 1 -n_hidden 8 -n_iter 2" if smoke else ""
        if status := amortised_clustering.main([*CLUSTERING.split(), *sizes.split(), "-results_dir", results]):
            raise RuntimeError(f"amortised_clustering ended with status {status}")
        (path,) = Path(results).rglob("result.json")
        result = json.loads(path.read_text())
    for name in ("epochs", "steps", "seconds"):
        yield name, result[name]
    for name in ("model", "chance", "oracle"):
        yield name, result[name]


if __name__ == "__main__":
    zoo_process(float(sys.argv[1]))
