"""Alignment (Godfrey et al., NeurIPS 2022, section 5): how similar the layers of two networks of a zoo are.

Up to permutations and scales, the symmetries of ReLU (procrustes, cka), or up to rotations (ortho_procrustes, ortho_cka). The
published runs, on test images and random pairs of a zoo (train_zoo.py):

    python cifar10_alignment.py --repeats=16 --arch=mCNN --similarity=cka

leave their results in results/cifar10_alignment/, and

    python cifar10_alignment.py --compare results/cifar10_alignment/*

draws the diagonals of several beside each other. README.md says what each metric means.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import checkpoint, paper_figures
from common.datasets import images
from common.datasets.augmentation import Preprocessing, as_rgb_32
from common.datasets.images import DataError, ImageSet
from common.errors import Failed, InputError
from common.models import zoo
from common.paper_figures import layer_labels
from common.run import options, zoo_pairs
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.jobs import Job, check_files, failures, pending
from common.run.memory import tune_malloc
from common.run.options import at_least
from common.run.records import read_results, write_table
from common.run.run import Run
from common.seeds import seed_of
from common.symmetry.measures import ESTIMATORS, features_of
from common.symmetry.similarity import layer_similarities
from common.symmetry.stitching import Place

# the original's names; the last is the suite's own
MEASURES = {
    "procrustes": "wreath_procrustes",
    "cka": "wreath_cka",
    "ortho_procrustes": "ortho_procrustes",
    "ortho_cka": "ortho_cka",
    "linear_cka": "linear_cka",
}
PUBLISHED_PAIRS = {"procrustes": 32, "ortho_procrustes": 32}  # with others, 16
MAY_CHANGE = (*zoo_pairs.MAY_CHANGE, "batched", "block")
FILES = ("untrained.*", "run[0-9]*.*", "similarity.*")  # beside those of every run
VALUES = ("published", "live")  # with dead channels, as published, and without


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="cifar10_alignment.py", description=__doc__)
    paper = parser.add_argument_group("options of the original")
    paper.add_argument("--repeats", type=at_least(1), help="pairs of networks [32 for Procrustes, 16 for CKA]")
    paper.add_argument("--progress", action="store_true", help="show bars")
    paper.add_argument("--batched", action="store_true", help="features come in blocks of images; always so here")
    paper.add_argument("--arch", choices=zoo.ARCHITECTURES, metavar="ARCH", help=f"{', '.join(zoo.ARCHITECTURES)}")
    paper.add_argument("--similarity", choices=tuple(MEASURES), help="[procrustes]")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--estimator", choices=ESTIMATORS, default="max", help="of cka, over channels [%(default)s]")
    zoo_pairs.add_options(own, "run", layers="layers [all]")
    own.add_argument("--name", type=options.run_id, help="of the run [architecture and similarity]")
    own.add_argument("--images", type=at_least(4), metavar="N", help="compare on the first N test images [all]")
    own.add_argument("--block", type=at_least(1), default=400, help="images whose features are held at a time [%(default)s]")
    own.add_argument("--seed", type=at_least(0), default=0, help="of pairs, and of untrained networks [%(default)s]")
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


@dataclass(frozen=True)
class Data:
    """Test images of 32x32 in three channels, uint8, on the device."""

    test: ImageSet
    preprocessing: Preprocessing


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The test images that are compared on. Raises DataError."""
    name = images.BY_OPTION[args.dataset]
    test = images.load(name, "test", args.data_dir, download=True)
    if args.images is not None and args.images > len(test):
        raise DataError(f"--images {args.images} is more than the {len(test)} test images of {args.dataset}")
    return Data(as_rgb_32(test[: args.images]).to(device), Preprocessing(name, device))


def untrained(args: argparse.Namespace, like: nn.Module, number: int) -> nn.Module:
    """A network with random weights, of a saved one's width and classes: what similarities are judged by."""
    tensors = list(like.state_dict().values())
    width = tensors[0].shape[0] if args.arch in zoo.CNNS else None
    torch.manual_seed(seed_of(args.seed, number))
    return zoo.make(args.arch, tensors[-1].shape[0], width).eval()


# ---- one pair --------------------------------------------------------------------------------------------------------------


class PairJob(Job):
    """The comparison of a pair of networks or, if it is None, of two untrained ones."""

    def __init__(self, folder: Path, name: str, pair: tuple[int, int] | None):
        super().__init__(folder, name, keeps=("pt",))
        self.pair, self.matrix = pair, folder / f"{name}.pt"
        self.title = "two untrained networks" if pair is None else f"pair {pair[0]}-{pair[1]}"


def jobs_of(folder: Path, pairs: list[tuple[int, int]]) -> list[PairJob]:
    """The untrained networks, then run by run, as published."""
    return [PairJob(folder, "untrained", None), *(PairJob(folder, f"run{i}", pair) for i, pair in enumerate(pairs))]


def run_job(
    args: argparse.Namespace, job: PairJob, networks: dict[int, nn.Module], places: list[Place], data: Data, run: Run
) -> dict[str, Any]:
    """Compare a job's networks and write their matrix; the job's record."""
    clock, some = Clock(), next(iter(networks.values()))
    both = [networks[n] for n in job.pair] if job.pair else [untrained(args, some, number) for number in (1, 2)]
    metrics = compare_networks(args, job, both, places, data, run)
    checkpoint.save(torch.tensor(metrics["published"]), job.matrix)
    return {"pair": job.pair, "seconds": clock.used(), **metrics}


def compare_networks(
    args: argparse.Namespace, job: PairJob, networks: list[nn.Module], places: list[Place], data: Data, run: Run
) -> dict[str, Any]:
    """All layers of one network with all of the other. Raises Interrupted if a signal comes, Failed if they do not compare."""
    names = [place.name for place in places]

    def features(network: nn.Module, part: slice) -> list[Tensor]:
        run.check_signal(f"in {job.name}")
        x = data.preprocessing.normalise(data.test.images[part])
        return [tokens_as_maps(maps) for maps in features_of(network, x, names)]

    first, second = (partial(features, network.to(data.test.labels.device)) for network in networks)
    settings = {name: getattr(args, name) for name in ("estimator", "block", "progress")}
    try:
        similarities = layer_similarities(MEASURES[args.similarity], first, second, len(data.test), **settings)
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


# ---- the run ---------------------------------------------------------------------------------------------------------------


def line_of(args: argparse.Namespace, job: PairJob, record: dict[str, Any], reference: Job) -> str:
    """The diagonal of a pair for the log, beside that of the untrained networks, if they could be compared."""

    def diagonal(record: dict[str, Any]) -> str:
        return ", ".join(f"{value:.3f}" for value in diagonal_of(record, "published"))

    beside = f" (untrained {diagonal(reference.read())})" if reference.done and job is not reference else ""
    dead = sum(map(sum, record["dead"]))
    return f"{job.title}: {args.similarity} of layers with themselves {diagonal(record)}{beside}; dead channels {dead}"


def report(args: argparse.Namespace, jobs: list[PairJob], places: list[Place], run: Run) -> dict[str, Any]:
    """The result of a run: metrics over the pairs that could be compared."""
    reference = jobs[0].read() if jobs[0].done else {"published": None}
    records, failed = [job.read() for job in jobs[1:] if job.done], failures(jobs)
    return {
        "script": "cifar10_alignment",
        "name": run.name,
        "arch": args.arch,
        "dataset": args.dataset,
        "similarity": args.similarity,
        "measure": MEASURES[args.similarity],
        "estimator": args.estimator if args.similarity == "cka" else None,
        "seed": args.seed,
        "zoo": args.zoo,
        "test_images": args.images or "all",
        "seconds": sum(record.get("seconds", 0.0) for record in [reference, *records]),
        "pairs": [record["pair"] for record in records],
        **over_pairs(records, places),
        "untrained": reference["published"],
        **({"failed": failed} if failed else {}),
    }


def over_pairs(records: list[dict[str, Any]], places: list[Place]) -> dict[str, Any]:
    """Layers, and means and deviations (n - 1) of similarities over pairs; of no pairs there are none."""
    if not records:
        return {"layers": [], **{name: [] for name in VALUES}, **{f"{name}_deviation": None for name in VALUES}}
    dead = np.mean([record["dead"] for record in records], axis=0)  # of the first networks of pairs, and of the second ones
    layers = [
        {name: getattr(place, name) for name in ("index", "name", "inside_block", "channels")} | {"dead_channels": counts}
        for place, counts in zip(places, dead.T.tolist(), strict=True)
    ]
    values = {name: np.array([record[name] for record in records], float) for name in VALUES}  # null becomes NaN
    means = {name: values[name].mean(0).tolist() for name in VALUES}
    several = len(records) > 1
    deviations = {f"{name}_deviation": values[name].std(0, ddof=1).tolist() if several else None for name in VALUES}
    return {"layers": layers, **means, **deviations}


def draw(result: dict[str, Any], folder: Path) -> None:
    """similarity.csv, a row per pair of layers, and the heat map similarity.png, from a run's result alone."""
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
    maps = {result["similarity"]: np.array(result["published"], float)}
    paper_figures.plot_heat_maps(folder / "similarity.png", title, labels, maps)


def diagonal_of(record: dict[str, Any], name: str) -> NDArray[np.floating]:
    """Layers with themselves (L), of a record that was read: null is NaN there, and so is a deviation where there is none."""
    if record[name] is None:
        return np.full(len(record["published"]), np.nan)
    return np.array(record[name], float).diagonal()


def report_table(result: dict[str, Any]) -> str:
    """The diagonal as text."""
    names = ("published", "published_deviation", "live", "untrained")
    lines = [
        f"{result['similarity']} of layers with themselves: mean, deviation, live channels alone, untrained (* inside a block)"
    ]
    columns = zip(*(diagonal_of(result, name) for name in names), strict=True)
    for label, layer, (mean, deviation, live, untrained) in zip(
        layer_labels(result["layers"]), result["layers"], columns, strict=True
    ):
        spread = "" if np.isnan(deviation) else f" +- {deviation:.3f}"
        lines.append(
            f"  layer {label:>4} {mean:.3f}{spread}  live {live:.3f}  untrained {untrained:.3f}  "
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
    title, labels = f"{results[0]['arch']} on {results[0]['dataset']}", layer_labels(results[0]["layers"])
    folder = Path(args.results_dir) / "cifar10_alignment" / f"figures-{results[0]['arch']}-{results[0]['dataset']}"
    columns = {"mean": "published", "deviation": "published_deviation", "live": "live", "untrained": "untrained"}
    rows: list[dict[str, Any]] = []
    for name, result in zip(names, results, strict=True):
        diagonals = zip(*(diagonal_of(result, of) for of in columns.values()), strict=True)
        for label, values in zip(labels, diagonals, strict=True):
            row = {"similarity": name, "layer": label, **dict(zip(columns, values, strict=True))}
            rows.append(row | {"n": len(result["pairs"])})
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "diagonals.csv", rows)
    paper_figures.plot_diagonals(folder / "diagonals.png", f"{title}: layers with themselves", labels, rows)
    maps = {name: np.array(result["published"], float) for name, result in zip(names, results, strict=True)}
    paper_figures.plot_heat_maps(folder / "similarities.png", f"{title}, means of pairs", labels, maps)
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
        print(name)
        return 0
    tune_malloc()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Run("cifar10_alignment", name, args, another="--name NAME", may_change=MAY_CHANGE, files=FILES) as run:
        pairs = zoo.pairs_of(args.zoo, args.pairs, args.repeats, args.seed)
        networks, places = zoo_pairs.load(args, pairs)
        data = load_data(args, device)
        if run.status == "unfinished":
            check_files(jobs_of(run.path, pairs))
        run.open(drawn_pairs=pairs, networks=zoo.fingerprint(networks), data=data.test.fingerprint())
        checkpoint.save({"name": run.name}, run.last)  # there is something to resume
        run.log(f"{len(pairs)} pairs, {len(places)} layers, {len(data.test)} images on {device}: {args.similarity}")
        jobs = jobs_of(run.part, pairs)
        for i, job in pending(run, jobs, retry_failed=args.retry_failed, bar=args.progress):
            with job:
                record = run_job(args, job, networks, places, data, run)
                job.finish(record)
                run.log(f"[{i - 1}/{len(pairs)}] {line_of(args, job, record, reference=jobs[0])}")
        result = report(args, jobs, places, run)
        if result["pairs"]:
            draw(result, run.part)
            run.log(report_table(result))
        status = run.finish(result)
    echo(zoo_pairs.where_to_look(run, result))
    return status


if __name__ == "__main__":
    sys.exit(main())
