"""The sections of benchmarks/gpu.py: each is a function that yields named values, from cheap to dear.

    python -m benchmarks.gpu_sections SECTION FILE.json [--smoke]

writes the values of a section to a file, again after each of them, so that a section that is cut keeps what it has. Steps are
those of the scripts, built from their published command lines. `--smoke` makes everything tiny.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import gpu_device as gpu
from benchmarks.gpu_device import Step, measure
from common import checkpoint, parallel
from common.datasets import augmentation, clustering, images
from common.datasets.augmentation import Preprocessing
from common.datasets.images import ImageSet
from common.models import routed, zoo
from common.models.cct import CCT
from common.models.image_transformer import ImageTransformer
from common.models.resnet import CifarResNet
from common.models.sets import MODEL_TYPES, make_set_model
from common.run import dotted
from common.run.memory import tune_malloc
from common.run.records import write_json
from common.routing import WPL
from common.ssl.duet import DUET
from common.ssl.essl import ESSL
from common.ssl.simclr import SimCLR
from common.symmetry.measures import features_of
from common.symmetry.similarity import layer_similarities
from common.symmetry.stitching import stitch, stitch_points
from common.symmetry.stitching_layers import Birkhoff, Full, Lasso, LowRank, Wreath
from common.symmetry.train import make_optimizers, training_step
from common.zoo import training as zoo_training

Values = Iterator[tuple[str, Any]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS = ("fp32", "tf32", "bf16", "bf16 compiled")

CLUSTERING = "-type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50 -wc 60"
IMAGES = "-data MNIST -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50"
SSL = (
    "--model duet --encoder cifar10_resnet32 --dataset cifar10 --batch-size 1024 --test-every 10 --warmup-epochs 10 --epochs 800 "
    "--center-crop --tx sca rot --equi-tx rot --duet-target vm --duet-lambda 1000"
)


def bounded(value: float, at_most: float, *, must: bool = False) -> dict[str, Any]:
    """A value with its target; with `must`, missing it is a failure of the section."""
    return {"value": value, "at most": at_most, "met": value <= at_most, "must": must}


def set_precision(kind: str) -> str:
    """Set the flags of fp32 products; returns the scripts' --precision for a kind of step."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    return "bf16" if "bf16" in kind else "fp32"


def measure_kinds(make_step: Callable[[str, bool], Step], n: int) -> Values:
    """A training step in each of KINDS; `make_step` takes a precision, and whether to compile."""
    for kind in KINDS:
        precision = set_precision(kind)
        if "compiled" in kind:
            gpu.not_simulated(gpu.COMPILE)
        yield kind, measure(make_step(precision, "compiled" in kind), n)


# ---- versions ------------------------------------------------------------------------------------------------------------


def versions(smoke: bool) -> Values:
    """Card, versions, and the flags that PyTorch starts with."""
    properties = torch.cuda.get_device_properties(0)
    yield "card", torch.cuda.get_device_name()
    yield "capability, GiB", f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f}"
    yield "driver", gpu.driver()
    yield "torch, CUDA, cuDNN", f"{torch.__version__}, {torch.version.cuda}, {torch.backends.cudnn.version()}"
    yield "Python, CPUs", f"{platform.python_version()}, {os.cpu_count()}"
    flags = {
        "matmul tf32": torch.backends.cuda.matmul.allow_tf32,
        "cuDNN tf32": torch.backends.cudnn.allow_tf32,
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    yield "flags", ", ".join(f"{name} {value}" for name, value in flags.items())


# ---- agreement of CPU and GPU --------------------------------------------------------------------------------------------

Case = Callable[[torch.device, torch.dtype], tuple[nn.Module, Any]]  # a model, and what it gives for some inputs


def on_sets(kind: str, pooling: str = "MEAN") -> Case:
    """Sets of 40, 25, 1 and 0 valid entities: the last is fully masked."""

    def case(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        model = make_set_model(kind, 2, 10, n_hidden=32, pooling=pooling).to(device, dtype)
        mask = torch.arange(40) < torch.tensor([40, 25, 1, 0])[:, None]
        return model, model(torch.randn(4, 40, 2).to(device, dtype), mask.to(device))

    return case


def on_images(make: Callable[[], nn.Module], n: int = 8) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        model = make().to(device, dtype)
        if isinstance(model, CCT):
            model.eval()  # in training it drops attention weights at random
        return model, model(torch.randn(n, 3, 32, 32).to(device, dtype))

    return case


def image_transformer(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    model = ImageTransformer(shape=(3, 6, 8), n_hidden=16, n_classes=5).to(device, dtype)
    values, classes = torch.randint(0, 256, (4, 3, 6, 8), dtype=torch.uint8), torch.arange(4)
    return model, model(values.to(device), classes.to(device))


def routed_net(name: str) -> Case:
    """In evaluation mode: decisions are greedy, they draw nothing."""

    def case(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        def decision(n: int, n_in: int, n_agents: int, storage: str) -> WPL:
            return WPL(n, n_in, n_agents, policy_storage_type=storage)

        model = routed.make(name, 3, routed.layer_sizes(32, 3, 16, 5), 4, 4, 4, decision).to(device, dtype).eval()
        return model, model(torch.randn(8, 3, 32, 32).to(device, dtype), (torch.arange(8) % 4).to(device))[0]

    return case


def views_of(make: Callable[[CifarResNet], Any]) -> Case:
    """The outputs and the loss of a self-supervised method, on views that are made on the device."""

    def case(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        model = make(CifarResNet((1, 1, 1), width=8)).to(device, dtype)
        pixels = torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8).to(device)
        labels, indices = (torch.arange(8) % 3).to(device), torch.arange(8, device=device)
        batch = model.make_batch(pixels, labels, indices, torch.Generator().manual_seed(0), training=True)
        out = model([view.to(dtype) for view in batch.views])
        return model, [*out.values(), model.loss(out, batch, training=True)[0]]

    return case


def stitched(make_layer: Callable[[int], Any]) -> Case:
    def make() -> nn.Module:
        return stitch(zoo.make("mCNN", width=8), zoo.make("mCNN", width=8), 6, make_layer(16)).train()

    return on_images(make)


def cases(smoke: bool) -> dict[str, Case]:
    architectures = ("mCNN", "cct_2_3x2_32") if smoke else zoo.ARCHITECTURES
    layers = {"Birkhoff": Birkhoff, "Full": Full, "LowRank": lambda n: LowRank(n, 3), "Lasso": Lasso, "Wreath": Wreath}
    ssl = {"size": 16, "n_classes": 3}
    return {
        **{f"sets, {kind}": on_sets(kind) for kind in MODEL_TYPES},
        "sets, Swarm POMA": on_sets("Swarm", "POMA"),
        "image transformer": image_transformer,
        **{f"zoo, {arch}": on_images(lambda arch=arch: zoo.make(arch, width=16 if arch in zoo.CNNS else None)) for arch in architectures},
        "resnet20 of DUET": on_images(lambda: CifarResNet((3, 3, 3), width=16)),
        **{f"stitching, {name}": stitched(layer) for name, layer in layers.items()},
        **{f"routing, {name}": routed_net(name) for name in routed.MODELS},
        "DUET": views_of(lambda encoder: DUET(encoder, ("sca", "rot"), structure="rot", target="vm", **ssl)),
        "ESSL": views_of(lambda encoder: ESSL(encoder, ("sca",), predicted="ron", **ssl)),
        "SimCLR": views_of(lambda encoder: SimCLR(encoder, ("sca", "fli"), **ssl)),
    }


def results_of(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of all parameters, flat, in float64 on the CPU; the loss is a fixed mixture of all outputs."""
    torch.manual_seed(0)
    model, outputs = case(device, dtype)
    flat = torch.cat([rows.flatten() for rows in (outputs if isinstance(outputs, list) else [outputs])])
    (flat * torch.arange(len(flat), dtype=torch.float64).cos().to(flat)).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"outputs": flat.detach().cpu().double(), "gradients": gradients.cpu().double()}


def agreement(smoke: bool) -> Values:
    """Distance of outputs and gradients in strict fp32 from those in fp64 on a CPU, relative to their norm.

    The bound is 1e-5, or 3 times what fp32 on the CPU is away: deep networks are no better there.
    """
    set_precision("fp32")
    for name, case in cases(smoke).items():
        exact, host, device = (
            results_of(case, *place) for place in ((CPU, torch.float64), (CPU, torch.float32), (CUDA, torch.float32))
        )

        def distance(results: dict[str, Tensor], part: str, exact: dict[str, Tensor] = exact) -> float:
            return float((results[part] - exact[part]).norm() / exact[part].norm())

        bounds = {part: max(1e-5, 3 * distance(host, part)) for part in exact}
        yield name, {part: bounded(distance(device, part), bounds[part], must=True) for part in exact}


# ---- whole scripts: waits, and resuming ----------------------------------------------------------------------------------


def write_data(folder: Path, n: int = 120) -> Path:
    """Random images in the published formats: MNIST's idx files, and CIFAR's pickled batches; 20 of them for tests."""
    rng, sizes = np.random.default_rng(0), {"train": n, "test": 20}
    for split, prefix in images.MNIST_PREFIXES.items():
        (folder / "MNIST/raw").mkdir(parents=True, exist_ok=True)
        for kind, shape in (("images-idx3", (sizes[split], 28, 28)), ("labels-idx1", (sizes[split],))):
            header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            content = rng.integers(0, 10 if len(shape) == 1 else 256, shape, np.uint8)
            (folder / f"MNIST/raw/{prefix}-{kind}-ubyte").write_bytes(header + content.tobytes())
    for name, cifar in images.CIFAR.items():
        (folder / cifar.folder).mkdir(parents=True, exist_ok=True)
        classes = [f"class {i}" for i in range(images.N_CLASSES[name])]
        (folder / cifar.folder / cifar.meta).write_bytes(pickle.dumps({cifar.class_names: classes}, protocol=4))
        for split, batches in cifar.batches.items():
            for batch in batches:
                size = sizes[split] // len(batches)
                labels = (np.arange(size) % len(classes)).tolist()
                content = {cifar.labels: labels, "data": rng.integers(0, 256, (size, 3072), np.uint8)}
                (folder / cifar.folder / batch).write_bytes(pickle.dumps(content, protocol=4))
    return folder


# script, options, and the largest number of waits in a usual step
LINES = {
    "clustering, Swarm": ("amortised_clustering", "-type Swarm -n_hidden 8 -n_iter 2 {sets}", 2),
    "clustering, SetTransformer": ("amortised_clustering", "-type SetTransformer -n_hidden 8 {sets}", 2),
    "clustering, LSTM": ("amortised_clustering", "-type LSTM -n_hidden 8 {sets}", 3),
    "image transformer": ("swarm_transformer", "-data MNIST -n_hidden 8 -n_iter 2 -bs 20 -max_epochs 1 -n_samples 1 {swarm}", 0),
    "DUET": ("train_ssl", "--model duet --tx sca rot --equi-tx rot {ssl}", 0),
    "ESSL": ("train_ssl", "--model essl --tx sca --equi-tx ron {ssl}", 0),
    "SimCLR": ("train_ssl", "--model simclr --tx sca fli {ssl}", 0),
    "zoo": ("train_zoo", "--arch mCNN --num_models 2 --epochs 1 --out {results}/zoo {cifar}", 0),
    "stitching": ("cifar10_stitching", "--arch mCNN --zoo {results}/zoo --pairs 0-1 --layers 3 --stitch_epochs 1 --birkhoff {cifar}", 0),
    "rotations": ("cifar10_projections", "--repeats 1 --layers 0 --activations relu --groups orthogonal --epochs 1 {cifar}", 0),
    "routing, WPL": ("routing_networks", "--data CIFAR100-MTL --epochs 1 --width 8 --batch-size 20 {data}", 2),
}  # fmt: skip
RESUMED = ("clustering, Swarm", "image transformer", "DUET", "zoo", "routing, WPL")


def command_line(line: str, results: Path, data: Path) -> list[str]:
    """The words of a line of LINES, with places and sizes filled in."""
    places = {"data": f"--data-dir {data} --results-dir {results}", "swarm": f"-wc 9 -results_dir {results} -data_dir {data}"}
    places["sets"] = f"-tasks 60 -bs 9 -max_epochs 1 -wc 9 -results_dir {results}"
    places["cifar"] = f"--batch-size 20 {places['data']}" + (" --width 4" if "--zoo" not in line else "")
    places["ssl"] = (
        "--encoder cifar10_resnet20 --encoder-width 2 --image-size 16 --batch-size 20 --epochs 1 --warmup-epochs 0 "
        f"--dataset-root {data} --results-dir {results}"
    )
    return line.format(results=results, **places).split()


def run_script(script: str, words: list[str]) -> int:
    """Run a script in this process; its exit status."""
    try:
        return import_module(script).main(words)
    except SystemExit as stopped:
        return 1 if isinstance(stopped.code, str) else int(stopped.code or 0)


def waits(smoke: bool) -> Values:
    """How often the host waits for the device in a usual step of each script, against the number that it may."""
    with tempfile.TemporaryDirectory() as name:
        results, data = Path(name), write_data(Path(name) / "data")
        for title, (script, line, at_most) in LINES.items():
            statuses: list[int] = []

            def run(script: str = script, line: str = line, statuses: list[int] = statuses) -> None:
                statuses.append(run_script(script, command_line(line, results, data)))

            counted = gpu.count_waits(run)
            if statuses != [0]:
                raise RuntimeError(f"{script} {line} ended with status {statuses[0]}")
            yield title, bounded(counted["waits"], at_most) | {"places": counted["places"]}


def weights(results: Path) -> dict[str, Tensor]:
    """All floating-point weights in the files below a directory of results."""
    states = {path.relative_to(results): checkpoint.read(path) for path in sorted(results.rglob("*")) if path.suffix in (".pkl", ".pt")}
    found = {}
    for path, state in states.items():
        tensors = state["model"] if "model" in state else state
        found |= {f"{path} {key}": value for key, value in tensors.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return found


def resume(smoke: bool, deterministic: bool = False) -> Values:
    """The largest difference between the weights of a run as a whole, and stopped by SIGTERM and resumed, over the largest.

    Without --deterministic it is for information, with it both have to be equal.
    """
    with tempfile.TemporaryDirectory() as name:
        data = write_data(Path(name) / "data")
        for title in RESUMED[::4] if smoke else RESUMED:
            script, line, _ = LINES[title]
            whole, stopped = (Path(name) / script / kind for kind in ("whole", "stopped"))
            dash = "-" if "{s" in line and "{ssl" not in line else "--"
            words = [*command_line(line, whole, data), *([f"{dash}deterministic"] if deterministic else [])]
            again = [word.replace(str(whole), str(stopped)) for word in words]
            statuses = [run_script(script, words)]
            with sigterm_after(3):
                statuses.append(run_script(script, again))
            statuses.append(run_script(script, [*again, f"{dash}resume", "auto"]))
            if statuses != [0, 75, 0]:
                raise RuntimeError(f"{script}: statuses {statuses} of whole, stopped and resumed runs, not 0, 75, 0")
            ours, theirs = weights(whole), weights(stopped)
            largest = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
            difference = largest / max(float(value.abs().max()) for value in ours.values())
            yield title, bounded(difference, 0.0, must=True) if deterministic else difference


@contextlib.contextmanager
def sigterm_after(n: int) -> Iterator[None]:
    """Let SIGTERM come after the n-th optimiser step."""
    left = iter(range(n - 1, -1, -1))

    def count(*_: object) -> None:
        if next(left, -1) == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def resume_deterministic(smoke: bool) -> Values:
    yield from resume(smoke, deterministic=True)


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
    """A step of each kind beside its products; the target is for bf16, compiled."""
    products = {}
    for kind in ("fp32", "tf32", "bf16"):
        dtype = torch.bfloat16 if set_precision(kind) == "bf16" else torch.float32
        products[kind] = measure(swarm_products(*sizes, dtype), n)
        yield f"products alone, {kind}", products[kind]
    for kind, measured in measure_kinds(make_step, n):
        yield kind, measured
    yield "bf16 compiled / its products", bounded(measured["ms"] / products["bf16"]["ms"], 2.5)


def clustering_step(precision: str, compile: bool, smoke: bool) -> tuple[Step, tuple[int, ...]]:
    """A step of amortised_clustering.py on a batch of middle size, and the number of its entities and sets."""
    import amortised_clustering as script

    line = CLUSTERING.replace("128", "8").replace("-n_iter 10", "-n_iter 2") if smoke else CLUSTERING
    words = [*line.split(), "-precision", precision, *(["-compile"] if compile else [])]
    args, _, _ = dotted.parse(script.get_parser(), words, script.NOT_IN_NAME)
    model = script.make_model(args)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    tasks = clustering.make_tasks(100 if smoke else 2000, args.seed).to(CUDA)
    batches = clustering.batches_by_size(tasks, torch.arange(len(tasks)), args.bs)
    indices = batches[len(batches) // 2]

    def step() -> None:
        points, labels, mask = clustering.padded_batch(tasks, indices)
        log_p = script.log_probs(model, points, mask, args.precision)
        loss = script.matching.matched_cross_entropy(log_p, labels, mask, args.loss).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    N, E, _ = clustering.padded_batch(tasks, indices)[0].shape
    return step, (N * E, 2, args.n_hidden, clustering.N_LABELS, args.n_iter, N)


def clustering_section(smoke: bool) -> Values:
    """The published clustering line: a step beside its matrix products."""
    _, sizes = clustering_step("fp32", False, smoke)
    yield from compare_with_products(lambda *kind: clustering_step(*kind, smoke)[0], 2 if smoke else 20, *sizes)


def images_section(smoke: bool) -> Values:
    """The published image line for MNIST: sampling, and a step beside its matrix products."""
    import swarm_transformer as script

    def make(precision: str, compile: bool) -> tuple[Any, ImageTransformer]:
        words = [*IMAGES.split(), "-precision", precision, *(["-compile"] if compile else [])]
        args = script.parse(script.get_parser(), words)
        if smoke:
            args.n_hidden, args.n_iter, args.bs = 8, 2, 4
        return args, script.make_model(args)

    def make_step(precision: str, compile: bool) -> Step:
        args, model = make(precision, compile)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        batch = ImageSet(torch.randint(0, 256, (args.bs, 1, 28, 28), dtype=torch.uint8).to(CUDA), torch.zeros(args.bs, device=CUDA), ())

        def step() -> None:
            script.accumulate_gradients(model, batch, args.precision, args.bs)
            optimizer.step()

        return step

    args, model = make("fp32", False)
    model.shape = (1, 2, 28) if smoke else model.shape  # sampling ends after two rows
    set_precision("fp32")
    measured = measure(lambda: model.sample(2 if smoke else 12), 1 if smoke else 3, warm_up=1)
    yield "sampling 12 images", measured
    yield "seconds for 12 images", bounded(measured["ms"] / 1000, 0.5)
    n = args.bs * 28 * 28
    sizes = (n, args.n_hidden, args.n_hidden, 256, args.n_iter, n)
    yield from compare_with_products(make_step, 2 if smoke else 10, *sizes)


# ---- routing, stitching, similarity --------------------------------------------------------------------------------------


def routing(smoke: bool) -> Values:
    """A step of routing_networks.py as published (WPL, 20 tasks) against forward and backward of its trunk, by batch."""
    import routing_networks as script

    args, _ = script.parse(script.get_parser(), [])
    set_precision("fp32")
    for batch in (10,) if smoke else (10, 512):  # 10 is published
        x = torch.randn(batch, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
        tasks, labels = (torch.randint(0, n, (batch,)).to(CUDA) for n in (20, 5))
        model = script.make_model(args, SimpleNamespace(train=SimpleNamespace(images=x), n_tasks=20, n_labels=5))
        optimizer, parameters = script.make_optimizer(args, model), list(model.trunk.parameters())

        def trunk(model: Any = model, x: Tensor = x, parameters: list[nn.Parameter] = parameters) -> None:
            torch.autograd.grad(model.trunk(x).sum(), parameters)

        def whole(model: Any = model, optimizer: Any = optimizer, inputs: Any = (x, tasks, labels)) -> None:
            _, module_loss, routing_loss, _ = script.forward(args, model, *inputs)
            optimizer.zero_grad()
            (module_loss + routing_loss).backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], script.MAX_NORM)
            optimizer.step()

        times = {name: measure(step, 2 if smoke else 30) for name, step in (("trunk", trunk), ("step", whole))}
        yield f"batch {batch}", times
        yield f"batch {batch}: step / trunk", bounded(times["step"]["ms"] / times["trunk"]["ms"], 2.0)


def stitching(smoke: bool) -> Values:
    """A step of a Birkhoff layer between two mCNNs, batch 32: as it is, its projection alone, and as a CUDA graph."""
    set_precision("fp32")
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
    set_precision("fp32")
    arch, n = ("mCNN", 8) if smoke else ("resnet20", 1000)
    networks = [zoo.make(arch, width=2 if smoke else None).to(CUDA).eval() for _ in range(2)]
    pixels, names = torch.randn(n, 3, 32, 32, device=CUDA), [point.name for point in stitch_points(networks[0])]
    for measure_name, power in (("wreath_procrustes", 1), ("wreath_cka", 2)):
        features = [lambda part, network=network: features_of(network, pixels[part], names) for network in networks]
        measured = measure(lambda m=measure_name, f=features: layer_similarities(m, *f, n), 1, warm_up=int(power == 1))
        yield f"{measure_name}, {n} images", measured
        yield f"{measure_name}, minutes for 10,000 images", measured["ms"] / 60_000 * (10_000 / n) ** power


# ---- one GPU of several processes ----------------------------------------------------------------------------------------


def torchrun(smoke: bool) -> Values:
    """One process of torchrun, with an explicit all-reduce of 2^20 floats."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = gpu.command_of("-m", "benchmarks.gpu_sections", "all-reduce", str(out))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python", *words]
        ended = subprocess.run(launch, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"torchrun ended with status {ended.returncode}: {ended.stderr[-1500:]}")
        reduced = json.loads(out.read_text())
    gpu.missing.update(reduced.pop("missing"))
    yield "error of the sum", bounded(reduced.pop("error"), 0.0, must=True)
    yield "all-reduce", reduced


def all_reduce(out: Path) -> None:
    """The process that torchrun starts."""
    type = "cpu" if gpu.not_simulated(gpu.NCCL) else "cuda"
    with parallel.process_group(type) as device:
        x = torch.full((2**20,), 3.0, device=device)
        dist.all_reduce(x)
        error = float((x - 3 * dist.get_world_size()).abs().max())
        write_json(out, {"error": error, "missing": sorted(gpu.missing), **measure(lambda: dist.all_reduce(x), 20)})


def zoo_step(smoke: bool, precision: str = "fp32", transform: Callable[[nn.Module], Any] = lambda model: None) -> tuple[Step, Step]:
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
    command = gpu.command_of("-m", "benchmarks.gpu_sections", "zoo-process", str(seconds))
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
    set_precision("fp32")
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
    for processes in (1, 2) if smoke else (1, 4, 8):
        yield f"hours for 100 mCNNs, {processes} processes", hours(steps_per_second(processes, 0.2 if smoke else 3))
    load, train = zoo_step(smoke, transform=lambda model: model.compile(mode="reduce-overhead"))
    gpu.not_simulated(gpu.COMPILE)
    yield "step, fp32, reduce-overhead", measure(both(load, train), n)


# ---- DUET ----------------------------------------------------------------------------------------------------------------


def duet(smoke: bool) -> Values:
    """DUET's published line: images a second, and the share of the convolutions in a bf16 step."""
    import train_ssl as script

    def make(precision: str, compile: bool) -> tuple[Any, Any]:
        sizes = ["--encoder-width", "4", "--batch-size", "8", "--encoder", "cifar10_resnet20"] if smoke else []
        words = [*SSL.split(), *sizes, "--precision", precision, *(["--compile"] if compile else [])]
        args, _ = script.parse(script.get_parser(), words)
        return args, script.make_model(args, CUDA).train()

    def make_step(precision: str, compile: bool) -> Step:
        args, model = make(precision, compile)
        optimizer, gen = script.make_optimizer(model, args.lr), torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4 * args.batch_size, 3, 36, 36), dtype=torch.uint8, device=CUDA)
        labels, indices = torch.zeros(len(pixels), dtype=torch.long, device=CUDA), torch.arange(args.batch_size, device=CUDA)

        def step() -> None:
            batch = model.make_batch(pixels, labels, indices, gen, training=True)
            loss, _ = script.loss_of(args, model, batch, training=True)
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
        status = run_script("amortised_clustering", [*CLUSTERING.split(), *sizes.split(), "-results_dir", results])
        if status:
            raise RuntimeError(f"amortised_clustering ended with status {status}")
        (path,) = Path(results).rglob("result.json")
        result = json.loads(path.read_text())
    for name in ("epochs", "steps", "seconds"):
        yield name, result[name]
    for name in ("model", "chance", "oracle"):
        yield name, result[name]


SECTIONS: dict[str, Callable[[bool], Values]] = {
    "versions": versions,
    "agreement": agreement,
    "torchrun": torchrun,
    "waits": waits,
    "clustering": clustering_section,
    "images": images_section,
    "routing": routing,
    "stitching": stitching,
    "similarity": similarity,
    "resume": resume,
    "resume, deterministic": resume_deterministic,
    "zoo": zoo_section,
    "DUET": duet,
    "long": long,
}


def main(argv: list[str]) -> int:
    name, place, *smoke = argv
    tune_malloc()
    if name == "zoo-process":
        zoo_process(float(place))
    elif name == "all-reduce":
        all_reduce(Path(place))
    else:
        values: dict[str, Any] = {}
        for key, value in SECTIONS[name](bool(smoke)):
            values[key] = value
            write_json(Path(place), {"not simulated": sorted(gpu.missing), "values": values})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
