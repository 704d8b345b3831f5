"""Alignment (Godfrey et al., NeurIPS 2022, section 5): how similar the layers of two networks of a zoo are.

Similarity is up to permutations and scales, the symmetries of ReLU (procrustes, cka), or up to rotations (ortho_procrustes,
linear_cka). The published runs, on test images and random pairs of a zoo (train_zoo.py):

    python cifar10_alignment.py --repeats=16 --arch=mCNN --similarity=cka

leave their results in results/cifar10_alignment/, and

    python cifar10_alignment.py --compare results/cifar10_alignment/*

draws the diagonals of several next to each other. docs/alignment_and_rotations.md says what each option and metric means.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import checkpoint
from common.datasets import images
from common.datasets.augmentation import Preprocessing, as_rgb_32
from common.datasets.images import DataError, ImageSet
from common.errors import Failed, InputError
from common.models import zoo
from common.precision import set_backend_flags
from common.run import options, progress
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.jobs import pending
from common.run.memory import tune_malloc
from common.run.options import at_least
from common.run.records import read_json, read_results, write_table
from common.run.run import Run
from common.run.workers import Worker, share
from common.seeds import seed_of
from common.symmetry import pictures
from common.symmetry.measures import ESTIMATORS, features_of
from common.symmetry.pictures import layer_labels
from common.symmetry.similarity import layer_similarities
from common.symmetry.stitching import StitchPoint
from common.zoo import pairs as zoo_pairs
from common.zoo.pairs import Pair
from common.zoo.sweeps import CheckedJob, make_result, open_run, read_records, spread

# the original's names; the last is the suite's own
MEASURES = {
    "procrustes": "wreath_procrustes",
    "cka": "wreath_cka",
    "ortho_procrustes": "ortho_procrustes",
    "ortho_cka": "ortho_cka",
    "linear_cka": "linear_cka",
}
PUBLISHED_PAIRS = {"procrustes": 32, "ortho_procrustes": 32}  # with others, 16
MAY_CHANGE_ON_RESUME = (*zoo_pairs.MAY_CHANGE_ON_RESUME, "batched", "block")
FILES = ("untrained.*", "run[0-9]*.*", "similarity.*")  # besides those of every run
VALUES = ("published", "live")  # with dead channels, as published, and without


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="cifar10_alignment.py", description=__doc__)
    paper = parser.add_argument_group("options of the original", "example: --arch mCNN --similarity cka --repeats 16")
    paper.add_argument("--repeats", type=at_least(1), metavar="N", help="pairs of networks [Procrustes: 32, CKA: 16]")
    paper.add_argument("--progress", action="store_true", help="show progress bars also where there is no terminal")
    paper.add_argument("--batched", action="store_true", help="no effect: features always come in blocks of images")
    paper.add_argument("--arch", choices=zoo.ARCHITECTURES, metavar="ARCH", help=f"one of {', '.join(zoo.ARCHITECTURES)}")
    paper.add_argument("--similarity", choices=tuple(MEASURES), help="similarity of two layers [procrustes]")
    own = parser.add_argument_group("options of this suite", "example: --zoo results/zoo/mCNN --images 2000 --resume")
    own.add_argument("--estimator", choices=ESTIMATORS, default="max", help="cka: over channels [%(default)s]")
    zoo_pairs.add_options(own, "run", layers="layers [all]")
    own.add_argument("--name", type=options.run_id, help="name of the run [architecture and similarity]")
    own.add_argument("--images", type=at_least(4), metavar="N", help="compare on the first N test images [all]")
    own.add_argument("--block", type=at_least(1), default=400, metavar="N", help="images in memory at a time [%(default)s]")
    own.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of pairs and untrained networks [%(default)s]"
    )
    own.add_argument("--device", choices=("cpu", "cuda"), help="processor [cuda when available]")
    options.add_jobs_option(own, "pairs")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options that can work together, or the parser's error."""
    args = parser.parse_args(argv)
    if args.compare:
        return args
    zoo_pairs.complete(parser, args)
    args.similarity = args.similarity or "procrustes"
    if args.estimator != "max" and args.similarity != "cka":
        parser.error(f"--estimator {args.estimator} is for --similarity cka")
    args.repeats = args.repeats or PUBLISHED_PAIRS.get(args.similarity, 16)
    return args


def name_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The run's name: architecture and similarity (or --name), and other options that are not at their defaults."""
    first = [args.name or f"{args.arch}-{args.similarity}"]
    return zoo_pairs.name_of(parser, args, first, ("batched", "block", "similarity"), "repeats")


# ---- networks and images ---------------------------------------------------------------------------------------------------


def load_images(args: argparse.Namespace) -> ImageSet:
    """The test images that are compared on, on the device: (N, 3, 32, 32) uint8. Raises DataError."""
    test = images.load(images.BY_OPTION[args.dataset], "test", args.data_dir, download=True)
    if args.images is not None and args.images > len(test):
        raise DataError(f"--images {args.images} is more than the {len(test)} test images of {args.dataset}")
    return as_rgb_32(test[: args.images]).to(options.device_of(args))


def untrained(args: argparse.Namespace, like: nn.Module, number: int) -> nn.Module:
    """A network with random weights, of the sizes of a saved one: the baseline of similarities."""
    torch.manual_seed(seed_of(args.seed, number))
    return zoo.make(args.arch, *zoo.sizes_of(like.state_dict(), args.arch)).eval()


# ---- one pair --------------------------------------------------------------------------------------------------------------


class PairJob(CheckedJob):
    """The comparison of a pair of networks or, if it is None, of two untrained ones."""

    def __init__(self, folder: Path, name: str, pair: Pair | None, n_layers: int):
        super().__init__(folder, name, keeps=("pt",))
        self.pair, self.matrix = pair, folder / f"{name}.pt"
        self.title = "two untrained networks" if pair is None else f"pair {pair[0]}-{pair[1]}"
        matrix = [[(float, None)] * n_layers] * n_layers
        self.pattern = {"pair": pair and list(pair), **dict.fromkeys(VALUES, matrix), "dead": [[int] * n_layers] * 2}


def make_jobs(folder: Path, pairs: list[Pair], n_layers: int) -> list[PairJob]:
    """The untrained networks, then run by run, as published."""
    runs = [PairJob(folder, f"run{i}", pair, n_layers) for i, pair in enumerate(pairs)]
    return [PairJob(folder, "untrained", None, n_layers), *runs]


def run_job(
    args: argparse.Namespace, job: PairJob, networks: dict[int, nn.Module], points: list[StitchPoint], test: ImageSet,
    run: Run | Worker,
) -> dict[str, Any]:  # fmt: skip
    """Compare a job's networks and write their matrix; the job's record."""
    clock, some = Clock(), next(iter(networks.values()))
    both = [networks[n] for n in job.pair] if job.pair else [untrained(args, some, number) for number in (1, 2)]
    metrics = compare_networks(args, job, both, points, test, run)
    checkpoint.save(torch.tensor(metrics["published"]), job.matrix)
    return {"pair": job.pair, "seconds": clock.used(), **metrics}


def compare_networks(
    args: argparse.Namespace, job: PairJob, networks: list[nn.Module], points: list[StitchPoint], test: ImageSet,
    run: Run | Worker,
) -> dict[str, Any]:  # fmt: skip
    """All layers of one network with all of the other. Raises Interrupted if a signal comes, Failed if they do not compare."""
    names, device = [point.name for point in points], test.labels.device
    preprocessing = Preprocessing(images.BY_OPTION[args.dataset], device)

    def features(network: nn.Module, part: slice) -> list[Tensor]:
        run.check_signal(f"in {job.name}")
        x = preprocessing.normalise(test.images[part])
        return [tokens_as_maps(maps) for maps in features_of(network, x, names)]

    first, second = (partial(features, network.to(device)) for network in networks)
    settings = {"estimator": args.estimator, "block": args.block, "progress": progress.wanted(args)}
    try:
        similarities = layer_similarities(MEASURES[args.similarity], first, second, len(test), **settings)
    except ValueError as error:
        raise Failed(f"{job.title} cannot be compared: {error}") from None
    matrices = {name: getattr(similarities, name).tolist() for name in VALUES}
    return matrices | {"dead": [similarities.dead1.tolist(), similarities.dead2.tolist()]}


def tokens_as_maps(features: Tensor) -> Tensor:
    """Channels second: tokens of a transformer (B, h w, C) become the square maps (B, C, h, w) that they were."""
    if features.ndim != 3:
        return features
    side = math.isqrt(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


def compare_all(
    args: argparse.Namespace, networks: dict[int, nn.Module], points: list[StitchPoint], test: ImageSet, run: Run | Worker,
    jobs: Iterable[tuple[int, PairJob]], n_pairs: int,
) -> None:  # fmt: skip
    """Compare the networks of jobs that are locked."""
    for i, job in jobs:
        with job:
            record = run_job(args, job, networks, points, test, run)
            job.finish(record)
            run.log(f"[{i - 1}/{n_pairs}] {describe(args, job, record)}")


def work(worker: Worker, args: argparse.Namespace, pairs: list[Pair]) -> None:
    """Compare networks in one of several processes."""
    set_backend_flags("fp32")
    networks, points = zoo_pairs.load(args, pairs)
    compare_all(args, networks, points, load_images(args), worker, worker.jobs(), len(pairs))


# ---- the run ---------------------------------------------------------------------------------------------------------------


def describe(args: argparse.Namespace, job: PairJob, record: dict[str, Any]) -> str:
    """The diagonal of a pair for the log, and that of the untrained networks, if they could be compared."""

    def diagonal(record: dict[str, Any]) -> str:
        return ", ".join(f"{value:.3f}" for value in diagonal_of(record, "published"))

    reference = job.folder / "untrained.json"
    untrained = f" (untrained {diagonal(read_json(reference))})" if job.pair is not None and reference.exists() else ""
    dead = sum(map(sum, record["dead"]))
    return f"{job.title}: {args.similarity} of layers with themselves {diagonal(record)}{untrained}; dead channels {dead}"


def report(args: argparse.Namespace, jobs: Sequence[PairJob], points: list[StitchPoint], run: Run) -> dict[str, Any]:
    """The result of a run: metrics over the pairs that could be compared."""
    records, seconds = read_records(jobs)
    baseline = [record["published"] for record in records if record["pair"] is None]
    records = [record for record in records if record["pair"] is not None]
    return make_result(
        run, ("arch", "dataset", "similarity", "seed", "zoo"), jobs,
        measure=MEASURES[args.similarity], estimator=args.estimator if args.similarity == "cka" else None,
        test_images=args.images or "all", seconds=seconds, pairs=[record["pair"] for record in records],
        **over_pairs(records, points), untrained=baseline[0] if baseline else None,
    )  # fmt: skip


def over_pairs(records: list[dict[str, Any]], points: list[StitchPoint]) -> dict[str, Any]:
    """Layers, and means and deviations (n - 1) of similarities over pairs; nothing without pairs."""
    if not records:
        return {"layers": [], **{name: [] for name in VALUES}, **{f"{name}_deviation": None for name in VALUES}}
    dead = np.mean([record["dead"] for record in records], axis=0)  # of the first networks of pairs, and of the second ones
    layers = [
        {name: getattr(point, name) for name in ("index", "name", "inside_block", "channels")} | {"dead_channels": counts}
        for point, counts in zip(points, dead.T.tolist(), strict=True)
    ]
    values = {name: np.array([record[name] for record in records], float) for name in VALUES}  # null becomes NaN
    means = {name: values[name].mean(0).tolist() for name in VALUES}
    several = len(records) > 1
    deviations = {f"{name}_deviation": values[name].std(0, ddof=1).tolist() if several else None for name in VALUES}
    return {"layers": layers, **means, **deviations}


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write similarity.csv, a row per pair of layers, and the heat map similarity.png, from a run's result alone."""
    rows = []
    labels = layer_labels(result["layers"])
    columns = [f"{name}{suffix}" for name in VALUES for suffix in ("", "_deviation")] + ["untrained"]
    for i, row_label in enumerate(labels):
        for j, column_label in enumerate(labels):
            row = {"layer_of_network_1": row_label, "layer_of_network_2": column_label}
            rows.append(row | {name: result[name] and result[name][i][j] for name in columns})
    write_table(folder / "similarity.csv", rows)
    n = len(result["pairs"])
    title = f"{result['arch']} on {result['dataset']}, mean of {n} pair{'s' * (n > 1)}"
    pictures.plot_heat_maps(folder / "similarity.png", title, labels, {result["similarity"]: as_array(result["published"])})


def as_array(matrix: list[list[float | None]]) -> NDArray[np.floating]:
    """A matrix of a record or result; null becomes NaN."""
    return np.array(matrix, float)


def diagonal_of(record: dict[str, Any], name: str) -> NDArray[np.floating]:
    """Layers with themselves (L), of a record or result; NaN for null, and for a deviation that there is not."""
    return np.full(len(record["published"]), np.nan) if record[name] is None else as_array(record[name]).diagonal()


def report_table(result: dict[str, Any]) -> str:
    """The diagonal as text."""
    names = ("published", "published_deviation", "live", "untrained")
    diagonals = np.stack([diagonal_of(result, name) for name in names], axis=1)  # a row a layer
    lines = [
        f"{result['similarity']} of layers with themselves: mean, deviation, live channels alone, untrained (* inside a block)"
    ]
    layers = result["layers"]
    for label, layer, (mean, deviation, live, untrained) in zip(layer_labels(layers), layers, diagonals, strict=True):
        lines.append(
            f"  layer {label:>4} {mean:.3f}{spread(deviation, 3)}  live {live:.3f}  untrained {untrained:.3f}  "
            f"({np.mean(layer['dead_channels']):.3g} of {layer['channels']} channels dead)"
        )
    return "\n".join(lines)


# ---- figures of several runs -----------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> int:
    """--compare: diagonals.csv and .png of several finished runs of one architecture, and all their heat maps in one figure."""
    results = read_results(args.compare, "cifar10_alignment")
    if not all(result["pairs"] for result in results):
        raise InputError("one of these runs has no pair that could be compared: leave it out")
    if len({(result["arch"], result["dataset"], tuple(layer_labels(result["layers"]))) for result in results}) > 1:
        raise InputError("these runs are not of the same layers of one architecture on one data set: compare like with like")
    results.sort(key=lambda result: (tuple(MEASURES).index(result["similarity"]), result["estimator"] or ""))
    names = [result["similarity"] + (" (median)" if result["estimator"] == "median" else "") for result in results]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two of these runs are of {name}: compare one of each")
    folder, title = zoo_pairs.make_figures_folder(args, results[0])
    labels = layer_labels(results[0]["layers"])
    columns = {"mean": "published", "deviation": "published_deviation", "live": "live", "untrained": "untrained"}
    rows: list[dict[str, Any]] = []
    for name, result in zip(names, results, strict=True):
        diagonals = {column: diagonal_of(result, key) for column, key in columns.items()}
        for i, label in enumerate(labels):
            values = {column: diagonal[i] for column, diagonal in diagonals.items()}
            rows.append({"similarity": name, "layer": label, **values, "n": len(result["pairs"])})
    write_table(folder / "diagonals.csv", rows)
    pictures.plot_diagonals(folder / "diagonals.png", f"{title}: layers with themselves", labels, rows)
    maps = {name: as_array(result["published"]) for name, result in zip(names, results, strict=True)}
    pictures.plot_heat_maps(folder / "similarities.png", f"{title}, means of pairs", labels, maps)
    for result in results:
        echo(report_table(result))
    echo(f"figures: {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    if args.compare:
        with Command("cifar10_alignment"):
            return compare(args)
    name = name_of(parser, args)
    if args.dry_run:
        echo(name)
        return 0
    tune_malloc()
    set_backend_flags("fp32")  # similarities know no other
    with Run("cifar10_alignment", name, args, another="--name NAME", may_change=MAY_CHANGE_ON_RESUME, files=FILES) as run:
        run.saves_memory = "a smaller --block"
        pairs = zoo_pairs.pairs_of(args, args.repeats)
        networks, points = zoo_pairs.load(args, pairs)
        test = load_images(args)
        made_from = {"drawn_pairs": pairs, "networks": zoo.fingerprint(networks), "data": test.fingerprint()}
        jobs = open_run(run, lambda folder: make_jobs(folder, pairs, len(points)), **made_from)
        run.log(f"{len(pairs)} pairs, {len(points)} layers, {len(test)} images on {test.labels.device}: {args.similarity}")
        if args.jobs > 1:
            share(run, jobs, args, work, pairs, retry_failed=args.retry_failed)
        else:
            left = pending(run, jobs, retry_failed=args.retry_failed, bar=args.progress)
            compare_all(args, networks, points, test, run, left, len(pairs))
        result = report(args, jobs, points, run)
        if result["pairs"]:
            draw(result, run.part)
            run.log(report_table(result))
        status = run.finish(result)
    echo(zoo_pairs.where_to_look(run, result))
    return status


if __name__ == "__main__":
    sys.exit(main())
