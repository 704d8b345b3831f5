"""Speed and memory of similarity measures, against their plain formulation and against their matrix products alone.

    python -m benchmarks.similarity                       # about 8 minutes on one core
    python -m benchmarks.similarity --quick               # small ones, few rounds: a look in half a minute
    python -m benchmarks.similarity --only f --full       # (f) by CKA, too: 20 minutes more

(a) Seconds for wreath_cka of two layers: "plain" compares one image with all earlier ones at a time and holds whole kernels
    (benchmarks/plain_similarity.py), "suite" is common/symmetry/similarity.py, and "products" are the latter's matrix
    products alone. In turn, in one process; medians, and medians of the ratios round by round.
(b) Seconds for wreath_cka by number of images and of channels: it must grow as N^2 C.
(c) The same for wreath_procrustes; "floor" is one matrix product, of features that lie ready for it, and the assignment.
(d) Values and seconds of libraries that have the same measure: orthogonal Procrustes in scipy, linear CKA in pytorch-cka.
(e) Peak memory of both measures beyond the features, each in a process of its own.
(f) All pairs of layers of two resnet20 with random weights on 10,000 random images: seconds, and peak memory of the process.
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
from scipy.spatial import procrustes
from torch import Tensor

from benchmarks.plain_similarity import plain_wreath_cka, plain_wreath_procrustes
from benchmarks.swarm_layer import peak_resident, seconds
from common.matching import best_matching
from common.models import zoo
from common.processor import product
from common.run.memory import tune_malloc
from common.symmetry.cka import COLUMNS
from common.symmetry.measures import features_of
from common.symmetry.similarity import (
    layer_similarities,
    linear_cka,
    ortho_procrustes,
    wreath_cka,
    wreath_procrustes,
)
from common.symmetry.stitching import stitch_points

Shape = tuple[int, int, int, int]


def a_layer(shape: Shape, seed: int) -> Tensor:
    """Random features after a ReLU, (N, C, H, W), of which images have some in common whatever the seed."""
    common = torch.randn(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + seed)).add_(common).relu_()


def cka_products(*layers: Tensor) -> None:
    """The matrix products of wreath_cka alone, of features that lie ready: per channel, all rows below a strip of columns."""
    for x in layers:  # (C, N, P)
        for left in range(0, x.shape[1], COLUMNS):
            for rows, columns in zip(x[:, left:], x[:, left : left + COLUMNS].mT, strict=True):
                product(rows, columns)


def medians(kinds: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind, round by round, in turn, after one round that does not count."""
    for call in kinds.values():
        call()
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, call in kinds.items():
            times[kind].append(seconds(call))
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def print_row(shape: Shape, times: dict[str, list[float]], floor: str) -> None:
    values = "".join(f"{statistics.median(times[kind]):10.4f}" for kind in times)
    name = "x".join(map(str, shape))
    gain, over = ratio(times, "plain", "suite"), ratio(times, "suite", floor)
    print(f"{name:>16}{values}    {gain:6.1f}x as fast as plain, {over:.2f} times the {floor}", flush=True)


def compare_cka(shapes: list[Shape], rounds: int) -> None:
    print(f"\n(a) wreath_cka, seconds; median of {rounds}\n{'N x C x H x W':>16}{'plain':>10}{'suite':>10}{'products':>10}")
    for shape in shapes:
        x, y = a_layer(shape, 0), a_layer(shape, 1)
        a, b = (z.flatten(2).transpose(0, 1).contiguous() for z in (x, y))
        kinds = {
            "plain": lambda x=x, y=y: plain_wreath_cka(x, y),
            "suite": lambda x=x, y=y: wreath_cka(x, y),
            "products": lambda a=a, b=b: cka_products(a, b),
        }
        print_row(shape, medians(kinds, rounds), "products")
        print(f"{'':16}  off by {abs(plain_wreath_cka(x, y) - wreath_cka(x, y)):.1e}", flush=True)


def growth(n_images: list[int], channels: list[int], rounds: int) -> None:
    print(f"\n(b) wreath_cka of 8x8 maps, seconds, and ns per (pair of images, channel); median of {rounds}")
    for N, C in [(N, 32) for N in n_images] + [(1000, C) for C in channels]:
        x, y = a_layer((N, C, 8, 8), 0), a_layer((N, C, 8, 8), 1)
        time = statistics.median(medians({"suite": lambda x=x, y=y: wreath_cka(x, y)}, rounds)["suite"])
        print(f"N {N:6}  C {C:4}  {time:8.4f} s  {time / (N * N * C) * 1e9:6.2f} ns", flush=True)


def compare_procrustes(shapes: list[Shape], rounds: int) -> None:
    print(f"\n(c) wreath_procrustes, seconds; median of {rounds}\n{'N x C x H x W':>16}{'plain':>10}{'suite':>10}{'floor':>10}")
    for shape in shapes:
        x, y = a_layer(shape, 0), a_layer(shape, 1)
        a, b = (z.transpose(0, 1).flatten(1) for z in (x, y))
        kinds = {
            "plain": lambda x=x, y=y: plain_wreath_procrustes(x, y),
            "suite": lambda x=x, y=y: wreath_procrustes(x, y),
            "floor": lambda a=a, b=b: best_matching(product(a, b.T)[None]),
        }
        print_row(shape, medians(kinds, rounds), "floor")
        print(f"{'':16}  off by {abs(plain_wreath_procrustes(x, y) - wreath_procrustes(x, y)):.1e}", flush=True)


def scipy_procrustes(x: Tensor, y: Tensor) -> float:
    """ortho_procrustes by scipy, whose disparity is 1 - |C|_nuclear^2: centred (N, C, H, W) twice -> a similarity."""
    a, b = (z.movedim(1, -1).flatten(0, -2).double().numpy() for z in (x, y))
    nuclear = max(0.0, 1 - procrustes(a, b)[2]) ** 0.5
    return 1 - max(0.0, (1 - nuclear) / 2) ** 0.5


def compare_libraries(shape: Shape, rounds: int) -> None:
    try:
        from cka import cka_from_features
    except ImportError:
        sys.exit("(d) compares with pytorch-cka: pip install -r requirements-dev.txt")
    x, y = (z - z.mean((0, 2, 3), keepdim=True) for z in (a_layer(shape, 0), a_layer(shape, 1)))
    print(f"\n(d) against libraries, {'x'.join(map(str, shape))}, centred; median of {rounds}")
    for name, ours, other in (
        ("ortho_procrustes, scipy", ortho_procrustes, scipy_procrustes),
        ("linear_cka, pytorch-cka", linear_cka, lambda x, y: cka_from_features(x.flatten(1), y.flatten(1)).item()),
    ):
        times = medians({"plain": lambda of=other: of(x, y), "suite": lambda of=ours: of(x, y)}, rounds)
        library, suite = (statistics.median(times[kind]) for kind in ("plain", "suite"))
        print(f"{name}: {library:.4f} s, here {suite:.4f} s; values {other(x, y):.6f}, {ours(x, y):.6f}", flush=True)


def resnet20_similarities(measure: str, n_images: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(n_images, 3, 32, 32)
    networks = [zoo.make("resnet20").eval() for _ in range(2)]
    layers = [point.name for point in stitch_points(networks[0])]
    features = [lambda part, net=net: features_of(net, images[part], layers) for net in networks]
    layer_similarities(measure, *features, n_images)


def measure_in_own_process(kind: str, shape: Shape) -> tuple[float, float]:
    """Peak resident memory in MiB and seconds; `kind`: a measure, "features" (nothing but them), or "resnet20 <measure>"."""
    command = [sys.executable, "-m", "benchmarks.similarity", "--measure", kind, *map(str, shape)]
    command += ["--threads", str(torch.get_num_threads())]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # what is freed goes back: only what is in use counts
    peak, time = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    return peak, time


def report_measure(kind: str, shape: Shape) -> None:
    if kind.startswith("resnet20"):
        time = seconds(lambda: resnet20_similarities(kind.split()[1], shape[0]))
    else:
        x, y = a_layer(shape, 0), a_layer(shape, 1)
        of = {"wreath_cka": wreath_cka, "wreath_procrustes": wreath_procrustes, "features": lambda x, y: None}[kind]
        time = seconds(lambda: of(x, y))
    print(json.dumps([peak_resident(), time]))


def memory(cases: list[tuple[str, Shape]]) -> None:
    print("\n(e) peak memory beyond the features")
    for measure, shape in cases:
        peak, time = measure_in_own_process(measure, shape)
        beyond = peak - measure_in_own_process("features", shape)[0]
        print(f"{measure}, {'x'.join(map(str, shape))}: {beyond:,.0f} MiB, {time:.1f} s", flush=True)


def all_pairs(measures: list[str], n_images: int) -> None:
    print(f"\n(f) all pairs of 19 layers of two resnet20, {n_images} images: peak of the whole process, seconds")
    for measure in measures:
        peak, time = measure_in_own_process(f"resnet20 {measure}", (n_images, 0, 0, 0))
        print(f"{measure}: {peak:,.0f} MiB, {time:,.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers, two rounds")
    parser.add_argument("--full", action="store_true", help="(f) by wreath_cka, too")
    parser.add_argument("--only", default="abcdef", help="sections [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--measure", nargs=5, metavar=("KIND", "N", "C", "H", "W"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.measure:
        n, c, h, w = map(int, args.measure[1:])
        report_measure(args.measure[0], (n, c, h, w))
        return 0
    tune_malloc()
    print(f"torch {torch.__version__}, CPU, {args.threads} threads, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rounds = 2 if args.quick else args.rounds
    n = 10 if args.quick else 1  # how many times fewer images
    if "a" in args.only:
        shapes = [(2000, 32, 8, 8), (500, 16, 32, 32), (1000, 64, 8, 8), (500, 512, 4, 4)]
        compare_cka([(N // n, *others) for N, *others in shapes], rounds)
    if "b" in args.only:
        growth([500 // n, 1000 // n, 2000 // n, 4000 // n, 8000 // n], [16, 64, 128, 256], rounds)
    if "c" in args.only:
        shapes = [(1000, 32, 8, 8), (1000, 64, 8, 8), (1000, 64, 32, 32), (1000, 512, 4, 4)]
        compare_procrustes([(N // n, *others) for N, *others in shapes], rounds)
    if "d" in args.only:
        compare_libraries((1000 // n, 32, 8, 8), rounds)
    if "e" in args.only:
        memory([("wreath_cka", (10_000 // n, 32, 8, 8)), ("wreath_procrustes", (1000 // n, 64, 32, 32))])
    if "f" in args.only:
        measures = ["wreath_procrustes", "ortho_procrustes"] + ["wreath_cka"] * args.full
        all_pairs(measures, 10_000 // n)
    return 0


if __name__ == "__main__":
    sys.exit(main())
