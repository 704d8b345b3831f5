"""Training with several processes against one with as many threads: steps a second, and what communication takes of them.

    python -m benchmarks.parallel --threads 2            # 2 processes of a thread, and one of two: about 4 minutes on two cores
    python -m benchmarks.parallel --threads 2 --quick    # a fifth of the sets, fewer images

A step is forward, loss, backward, the sum of the gradients over the processes, Adam. The batch is that of all processes, dealt
out as the scripts do it.

(a) The published clustering line: 50 sets of up to 594 entities, n_hidden 128, n_iter 10.
(b) The published command of images: 10 images of 28x28, n_hidden 256, n_iter 10.

"communication" is what the first process spends in the sum, the wait for the others in it; "a step's reduction" is its size.
With two GPUs or more, the same on one and on all of them (NCCL); processes on CPUs speak through Gloo.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import swarm_layer, swarm_transformer
from benchmarks.measure import Bench, Kind, run_benchmark
from benchmarks.train_ssl import synchronise
from common import matching, parallel
from common.datasets.clustering import N_LABELS, batches_by_size, make_tasks, padded_batch
from common.models.image_transformer import cross_entropy
from common.models.swarm import SwarmLayer
from common.run.memory import tune_malloc

FLAGS = 3  # numbers that go along with the gradients: the loss, a signal, the end of the time
WORKS = {"clustering": "clustering step, 128 hidden", "images": "image step, 256 hidden"}


def clustering(n: int, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A layer, and the loss of this process's share of a batch of n sets."""
    torch.manual_seed(0)
    tasks = make_tasks(40 * n, seed=0)
    batches = batches_by_size(tasks, torch.arange(len(tasks)), n)
    batch = min(batches, key=lambda indices: abs(int(tasks.sizes[indices].max()) - 594))
    points, labels, mask = (t.to(device) for t in padded_batch(tasks, batch[parallel.deal(tasks.sizes[batch])]))
    model = SwarmLayer(2, N_LABELS, swarm_layer.N_HIDDEN, swarm_layer.N_ITER).to(device)

    def loss() -> Tensor:
        log_p = model(points, mask).log_softmax(2)
        return matching.matched_cross_entropy(log_p, labels, mask).sum() / len(batch)

    return model, loss


def images(n: int, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model of images, and the loss of this process's share of a batch of n."""
    model = swarm_transformer.make_model("layer", swarm_transformer.SIZE, device)
    own = swarm_transformer.random_images(n, swarm_transformer.SIZE, device)[parallel.shard(n)]
    return model, lambda: cross_entropy(model(own), own).sum() / n


MAKE = {"clustering": clustering, "images": images}


class TrainingStep:
    """A training step; returns the seconds of its parts."""

    def __init__(self, kind: str, n: int, device: str):
        self.model, self.loss = MAKE[kind](n, device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters)

    def __call__(self) -> dict[str, float]:
        began = now()
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        computed = now()
        (loss, *_) = parallel.sum_gradients(self.parameters, loss.detach(), *[0.0] * (FLAGS - 1))
        summed = now()
        self.optimizer.step()
        loss.item()
        return {"computation": computed - began + now() - summed, "communication": summed - computed}


def now() -> float:
    synchronise()
    return time.perf_counter()


def join(rank: int, n_processes: int, threads: int, place: str, device: str) -> str:
    """Become a process of a group; gives its device."""
    torch.set_num_threads(threads)
    tune_malloc()
    if device == "cuda":
        torch.cuda.set_device(rank)
    if n_processes > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{place}", rank=rank, world_size=n_processes)
    return f"cuda:{rank}" if device == "cuda" else device


def serve(connection: Connection, rank: int, n_processes: int, place: str, kind: str, n: int, device: str) -> None:
    """Another process of a group: takes a step at each message, until the first one has gone."""
    step = TrainingStep(kind, n, join(rank, n_processes, 1, place, device))
    try:
        while connection.recv():
            step()
    except (EOFError, OSError, RuntimeError):
        pass


def make_step(kind: str, n: int, n_processes: int, threads: int, device: str = "cpu") -> Callable[[], dict[str, float]]:
    """A step of a group, whose first process this one becomes; the others are its children."""
    context, others = multiprocessing.get_context("spawn"), []
    place = tempfile.mkdtemp() + "/store"
    for rank in range(1, n_processes):
        end, other_end = context.Pipe()
        arguments = (other_end, rank, n_processes, place, kind, n, device)
        context.Process(target=serve, args=arguments, daemon=True).start()
        other_end.close()
        others.append(end)
    step = TrainingStep(kind, n, join(0, n_processes, threads, place, device))

    def all_step() -> dict[str, float]:
        for end in others:
            end.send(True)
        return step()

    return all_step


def compare(bench: Bench, kind: str, n: int, counts: dict[str, tuple[int, int]], device: str) -> None:
    """Time the same step with so many processes and threads."""
    where = "" if device == "cpu" else " on GPUs"
    kinds = {name: Kind(partial(make_step, kind, n, *count, device)) for name, count in counts.items()}
    baselines = tuple(name for name, (n_processes, _) in counts.items() if n_processes == 1)
    timings = bench.compare(WORKS[kind] + where, kinds, 2 if bench.quick else 5, baselines, (), operations="")
    for name, values in timings.items():
        rate = 1 / statistics.median(values.wall)
        bench.add(f"steps a second, {WORKS[kind]}{where}, batch of {n}", name, value=rate, unit="a second")
    model, _ = MAKE[kind](2, "cpu")
    mib = 4 * (FLAGS + sum(p.numel() for p in model.parameters() if p.requires_grad)) / 2**20
    bench.add(f"a step's reduction, {WORKS[kind]}{where}", "gradients and flags", value=mib, unit="MiB")


def run(bench: Bench) -> None:
    many = bench.threads = bench.record["threads"] = max(2, bench.threads)  # ratios are of wall time
    on_cpu = {"1 process, 1 thread": (1, 1), f"1 process, {many} threads": (1, many), f"{many} processes": (many, 1)}
    gpus = torch.cuda.device_count()
    for kind, n in {"clustering": 10 if bench.quick else swarm_layer.BATCH, "images": 4 if bench.quick else 10}.items():
        compare(bench, kind, n, on_cpu, "cpu")
        if gpus > 1:
            compare(bench, kind, n * gpus, {"1 GPU": (1, 1), f"{gpus} GPUs": (gpus, 1)}, "cuda")


if __name__ == "__main__":
    sys.exit(run_benchmark("parallel", run, __doc__))
