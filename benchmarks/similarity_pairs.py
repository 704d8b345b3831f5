"""Memory and time of all pairs of layers of two ResNet-20 with random weights, on 10,000 random images.

    python -m benchmarks.similarity_pairs --quick     # Procrustes alone, 4 minutes on one core; with CKA half an hour

Not a part of `make bench`.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from common.models import zoo
from common.symmetry.measures import features_of
from common.symmetry.similarity import layer_similarities
from common.symmetry.stitching import stitch_points


def make_step(measure: str, n_images: int) -> Step:
    torch.manual_seed(0)
    images = torch.randn(n_images, 3, 32, 32)
    networks = [zoo.make("resnet20").eval() for _ in range(2)]
    layers = [point.name for point in stitch_points(networks[0])]
    features = [lambda part, net=net: features_of(net, images[part], layers) for net in networks]
    return lambda: layer_similarities(measure, *features, n_images)


def run(bench: Bench, n_images: int = 10_000) -> None:
    for measure in ["wreath_procrustes", "ortho_procrustes"] + ["wreath_cka"] * (not bench.quick):
        kinds = {"suite": Kind(partial(make_step, measure, n_images), warm=False)}
        bench.compare(f"{measure}, all pairs of 19 layers of two resnet20, {n_images} images", kinds, rounds=1)


if __name__ == "__main__":
    sys.exit(run_benchmark("similarity_pairs", run, __doc__))
