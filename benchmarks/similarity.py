"""Speed and memory of similarity measures, against their plain formulation and against their matrix products alone.

    python -m benchmarks.similarity                       # about 2 minutes
    python -m benchmarks.similarity --quick               # the most important sizes, half a minute

(a) wreath_cka of two layers: "plain" compares one image with all earlier ones at a time and holds whole kernels
    (benchmarks/plain_similarity.py), "suite" is common/symmetry/similarity.py, and "products" are the latter's matrix
    products alone.
(b) wreath_procrustes likewise; "products" is one matrix product, of features that lie ready for it, and the assignment.
(c) wreath_cka by number of images and of channels: it must grow as N^2 C.
(d) Libraries that have the same measure: orthogonal Procrustes in scipy, linear CKA in pytorch-cka.

All pairs of layers of two networks: benchmarks/similarity_pairs.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import torch
from scipy.spatial import procrustes
from torch import Tensor

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from benchmarks.plain_similarity import plain_wreath_cka, plain_wreath_procrustes
from common.matching import best_matching
from common.processor import product
from common.symmetry.cka import COLUMNS
from common.symmetry.similarity import linear_cka, ortho_procrustes, wreath_cka, wreath_procrustes

Shape = tuple[int, int, int, int]


def a_layer(shape: Shape, seed: int) -> Tensor:
    """Random features after a ReLU, (N, C, H, W), of which images have some in common whatever the seed."""
    common = torch.randn(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + seed)).add_(common).relu_()


def cka_products(*layers: Tensor) -> None:
    """The matrix products of wreath_cka alone, of features that lie ready: per channel, all rows below a strip of columns."""
    for x in layers:  # (C, N, positions)
        for left in range(0, x.shape[1], COLUMNS):
            for rows, columns in zip(x[:, left:], x[:, left : left + COLUMNS].mT, strict=True):
                product(rows, columns)


def procrustes_products(a: Tensor, b: Tensor) -> None:
    """The matrix product of wreath_procrustes, of features (C, positions) that lie ready for it, and the assignment."""
    best_matching(product(a, b.T)[None])


def scipy_procrustes(x: Tensor, y: Tensor) -> float:
    """ortho_procrustes by scipy, whose disparity is 1 - |C|_nuclear^2: centred (N, C, H, W) twice -> a similarity."""
    a, b = (z.movedim(1, -1).flatten(0, -2).double().numpy() for z in (x, y))
    nuclear = max(0.0, 1 - procrustes(a, b)[2]) ** 0.5
    return 1 - max(0.0, (1 - nuclear) / 2) ** 0.5


def library_cka(x: Tensor, y: Tensor) -> float:
    """linear_cka by pytorch-cka."""
    from cka import cka_from_features  # an optional package

    return cka_from_features(x.flatten(1), y.flatten(1)).item()


def centred(x: Tensor) -> Tensor:
    return x - x.mean((0, 2, 3), keepdim=True)


def by_channel(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) -> (C, N, H W)."""
    return x.flatten(2).transpose(0, 1).contiguous()


def matrix(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) -> (C, N H W)."""
    return x.transpose(0, 1).flatten(1)


def make_step(measure: Callable[[Tensor, Tensor], object], shape: Shape, *prepare: Callable[[Tensor], Tensor]) -> Step:
    """A measure of two layers (N, C, H, W), prepared outside the step."""
    x, y = a_layer(shape, 0), a_layer(shape, 1)
    for function in prepare:
        x, y = function(x), function(y)
    return lambda: measure(x, y)


def size(shape: Shape) -> str:
    return "x".join(map(str, shape))


def compare_cka(bench: Bench, shapes: list[Shape], rounds: int) -> None:
    for shape in shapes:
        kinds = {
            "plain": Kind(partial(make_step, plain_wreath_cka, shape), tuned=False),
            "suite": Kind(partial(make_step, wreath_cka, shape)),
            "products": Kind(partial(make_step, cka_products, shape, by_channel)),
        }
        bench.compare(f"wreath_cka, {size(shape)}", kinds, rounds)


def compare_procrustes(bench: Bench, shapes: list[Shape], rounds: int) -> None:
    for shape in shapes:
        kinds = {
            "plain": Kind(partial(make_step, plain_wreath_procrustes, shape), tuned=False),
            "suite": Kind(partial(make_step, wreath_procrustes, shape)),
            "products": Kind(partial(make_step, procrustes_products, shape, matrix)),
        }
        bench.compare(f"wreath_procrustes, {size(shape)}", kinds, rounds)


def compare_libraries(bench: Bench, shape: Shape, rounds: int) -> None:
    libraries = [("ortho_procrustes", ortho_procrustes, "scipy", scipy_procrustes)]
    if importlib.util.find_spec("cka") is None:
        print("pytorch-cka is not installed (requirements-dev.txt): no linear CKA to compare with")
    else:
        libraries.append(("linear_cka", linear_cka, "pytorch-cka", library_cka))
    for name, measure, library, other in libraries:
        kinds = {"suite": measure, library: other}
        kinds = {kind: Kind(partial(make_step, function, shape, centred)) for kind, function in kinds.items()}
        bench.compare(f"{name}, {size(shape)}", kinds, rounds, baselines=(library,))


def run(bench: Bench) -> None:
    shapes = [(2000, 32, 8, 8), (500, 16, 32, 32), (1000, 64, 8, 8), (500, 512, 4, 4)]
    compare_cka(bench, shapes[:2] if bench.quick else shapes, 1 if bench.quick else 2)
    shapes = [(1000, 32, 8, 8), (1000, 64, 8, 8), (1000, 64, 32, 32), (1000, 512, 4, 4)]
    compare_procrustes(bench, shapes[:2] if bench.quick else shapes, 3)
    if bench.quick:
        return
    for shape in [(N, 32, 8, 8) for N in (500, 1000, 4000)] + [(1000, C, 8, 8) for C in (16, 128, 256)]:
        kinds = {"suite": Kind(partial(make_step, wreath_cka, shape))}
        bench.compare(f"wreath_cka, {size(shape)}", kinds, rounds=3)
    compare_libraries(bench, (1000, 32, 8, 8), 3)


if __name__ == "__main__":
    sys.exit(run_benchmark("similarity", run, __doc__))
