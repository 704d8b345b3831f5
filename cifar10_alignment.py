"""Alignment (Godfrey et al., NeurIPS 2022, section 5): how similar the layers of two networks of a zoo are.

Up to permutations and scales, the symmetries of ReLU (procrustes, cka), or up to rotations (ortho_procrustes, ortho_cka). The
published runs, on test images and random pairs of a zoo (train_zoo.py):

    python cifar10_alignment.py --repeats=16 --arch=mCNN --similarity=cka

leave their figures in results/cifar10_alignment/, and

    python cifar10_alignment.py --compare results/cifar10_alignment/*

draws the diagonals of several beside each other. README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from common import paper_figures
from common.datasets import images
from common.datasets.augmentation import Preprocessing, as_rgb_32
from common.datasets.images import DataError, ImageSet
from common.models import zoo
from common.models.zoo import ZooError
from common.paper_figures import layer_labels
from common.run import checkpoint, options
from common.run.directory import RunDirectory
from common.run.ending import EXIT_RESUMABLE, has_finished, open_run, refusing, say, surviving_full_disks, tell
from common.run.interruption import Interrupted, Interruption
from common.run.memory import keep_freed_memory
from common.run.options import at_least
from common.run.records import RecordError, read_results, write_json, write_table
from common.seeds import seed_of
from common.symmetry.measures import ESTIMATORS, features_of
from common.symmetry.similarity import layer_similarities
from common.symmetry.stitching import Place, joints_of

# the original's names; the last is the suite's own
MEASURES = {
    "procrustes": "wreath_procrustes",
    "cka": "wreath_cka",
    "ortho_procrustes": "ortho_procrustes",
    "ortho_cka": "ortho_cka",
    "linear_cka": "linear_cka",
}
PUBLISHED_PAIRS = {"procrustes": 32, "ortho_procrustes": 32}  # with others, 16
FREE = ("results_dir", "data_dir", "resume", "overwrite", "progress", "dry_run", "batched", "block")
UNNAMED = (*FREE, "zoo", "name", "compare", "arch", "similarity", "repeats", "pairs")
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
    own.add_argument("--zoo", metavar="DIR", help="where train_zoo.py has put the networks [results/zoo/DATASET-ARCH]")
    own.add_argument("--dataset", choices=tuple(images.BY_OPTION), default="cifar10", help="[%(default)s]")
    own.add_argument("--data-dir", metavar="DIR", default="data", help="where the data set lies [%(default)s]")
    own.add_argument("--results-dir", metavar="DIR", default="results", help="where run directories are made [%(default)s]")
    own.add_argument("--name", type=options.run_id, help="of the run [architecture and similarity]")
    own.add_argument("--images", type=at_least(4), metavar="N", help="compare on the first N test images [all]")
    own.add_argument("--block", type=at_least(1), default=400, help="images whose features are held at a time [%(default)s]")
    own.add_argument("--layers", type=at_least(1), nargs="+", help="indices of layers [all]")
    own.add_argument("--pairs", nargs="+", metavar="I-J", help="numbers of networks [drawn by the seed]")
    own.add_argument("--seed", type=at_least(0), default=0, help="of pairs, and of untrained networks [%(default)s]")
    own.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help="go on with a run that was interrupted")
    own.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    own.add_argument("--dry-run", action="store_true", help="check the options, print the run's name and exit")
    own.add_argument("--compare", nargs="+", metavar="RUN", help="instead: figures of finished runs beside each other")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options that can work together, or the parser's error."""
    args = parser.parse_args(argv)
    if args.compare:
        return args
    if args.arch is None:
        parser.error(f"--arch is missing: choose from {', '.join(zoo.ARCHITECTURES)}")
    args.similarity = args.similarity or "procrustes"
    if args.estimator != "max" and args.similarity != "cka":
        parser.error(f"--estimator {args.estimator} is for --similarity cka")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it: choose one")
    args.zoo = args.zoo or f"results/zoo/{args.dataset}-{args.arch}"
    args.repeats = args.repeats or PUBLISHED_PAIRS.get(args.similarity, 16)
    return args


def name_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The run's name: architecture and similarity (or --name), and other options that are not at their defaults."""
    parts = [args.name or f"{args.arch}-{args.similarity}", *options.not_defaults(parser, args, (*UNNAMED, "layers"))]
    for option in ("layers", "pairs"):
        if getattr(args, option):
            parts.append(".".join([option, *map(str, getattr(args, option))]))
    if not args.pairs:
        parts.append(f"repeats.{args.repeats}")
    name = "-".join(parts)
    options.check_length(parser, name)
    return name


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


def places_of(args: argparse.Namespace, network: nn.Module) -> list[Place]:
    """The layers that were asked for: activations, and a transformer's blocks. Raises ValueError for one there is not."""
    places = joints_of(network)
    unknown = [layer for layer in args.layers or [] if layer not in [place.index for place in places]]
    if unknown:
        raise ValueError(f"--layers {unknown[0]}: {args.arch} has {' '.join(str(place.index) for place in places)}")
    return [place for place in places if not args.layers or place.index in args.layers]


def untrained(args: argparse.Namespace, like: nn.Module, number: int) -> nn.Module:
    """A network with random weights, of a saved one's width and classes: what similarities are judged by."""
    tensors = list(like.state_dict().values())
    width = tensors[0].shape[0] if args.arch in zoo.CNNS else None
    torch.manual_seed(seed_of(args.seed, number))
    return zoo.make(args.arch, tensors[-1].shape[0], width).eval()


# ---- one pair --------------------------------------------------------------------------------------------------------------


def compare_networks(
    args: argparse.Namespace,
    networks: tuple[nn.Module, nn.Module],
    places: list[Place],
    data: Data,
    interruption: Interruption,
) -> dict[str, Any]:
    """All layers of one network with all of the other: figures of one cell. Raises Interrupted if a signal comes."""
    device = data.test.labels.device
    on_device = [network.to(device) for network in networks]
    names = [place.name for place in places]

    def features(network: nn.Module, part: slice) -> list[Tensor]:
        interruption.check()
        x = data.preprocessing.normalise(data.test.images[part])
        return [tokens_as_maps(of) for of in features_of(network, x, names)]

    found = layer_similarities(
        MEASURES[args.similarity],
        lambda part: features(on_device[0], part),
        lambda part: features(on_device[1], part),
        len(data.test),
        estimator=args.estimator,
        block=args.block,
        progress=args.progress,
    )
    matrices = {"published": found.published.tolist(), "live": found.live.tolist()}
    return matrices | {"dead": [found.dead1.tolist(), found.dead2.tolist()]}


def tokens_as_maps(features: Tensor) -> Tensor:
    """Channels second: tokens of a transformer (B, h w, C) become the square maps (B, C, h, w) that they were."""
    if features.ndim != 3:
        return features
    side = math.isqrt(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


# ---- the run ---------------------------------------------------------------------------------------------------------------


def sweep(
    args: argparse.Namespace,
    pairs: list[tuple[int, int]],
    networks: dict[int, nn.Module],
    data: Data,
    run: RunDirectory,
    interruption: Interruption,
) -> bool:
    """Compare the pairs that are not there yet, and first two untrained networks; False if a signal came."""
    checkpoint.save({"name": run.name}, run.last)  # there is something to go on with
    some = next(iter(networks.values()))
    places = places_of(args, some)
    for i, stem in enumerate(tqdm(stems_of(pairs), disable=None if args.progress else True)):
        path = run.path / f"{stem}.json"
        if path.exists():
            continue
        pair = (-1, -2) if i == 0 else pairs[i - 1]
        both = (untrained(args, some, 1), untrained(args, some, 2)) if i == 0 else (networks[pair[0]], networks[pair[1]])
        began = time.monotonic()
        try:
            found = compare_networks(args, both, places, data, interruption)
        except Interrupted:
            return False
        except ValueError as error:
            raise SystemExit(f"{run.path}: pair {pair[0]}-{pair[1]} cannot be compared: {error}") from None
        matrix = torch.tensor(found["published"])
        checkpoint.save(matrix.float(), run.path / f"{stem}.pt")
        write_json(path, {"pair": None if i == 0 else list(pair), "seconds": time.monotonic() - began, **found})
        reference = diagonal_of(json.loads((run.path / "untrained.json").read_text()), "published")
        tell(
            run,
            f"[{i}/{len(pairs)}] {'two untrained networks' if i == 0 else f'pair {pair[0]}-{pair[1]}'}: "
            f"{args.similarity} of layers with themselves "
            + ", ".join(f"{matrix[k, k]:.3f}" for k in range(len(places)))
            + (f" (untrained {', '.join(f'{reference[k]:.3f}' for k in range(len(places)))})" if i else "")
            + f"; dead channels {sum(map(sum, found['dead']))}",
        )
        if interruption.signal:
            return False
    return True


def stems_of(pairs: list[tuple[int, int]]) -> list[str]:
    """What files of a run are called: the untrained networks, then run by run, as published."""
    return ["untrained", *(f"run{i}" for i in range(len(pairs)))]


def report(args: argparse.Namespace, pairs: list[tuple[int, int]], places: list[Place], run: RunDirectory) -> dict[str, Any]:
    """Mean and deviation (n - 1) over pairs of all figures."""
    reference, *found = [json.loads((run.path / f"{stem}.json").read_text()) for stem in stems_of(pairs)]
    values = {of: np.array([figures[of] for figures in found], float) for of in VALUES}  # null becomes NaN
    means = {of: values[of].mean(0) for of in VALUES}
    deviations = {of: values[of].std(0, ddof=1) if len(found) > 1 else None for of in VALUES}
    layers = [
        {"index": place.index, "name": place.name, "inside_block": place.inside_block, "channels": place.channels}
        for place in places
    ]
    dead = np.mean([figures["dead"] for figures in found], axis=0)
    for i, layer in enumerate(layers):
        layer["dead_channels"] = dead[:, i].tolist()  # of the first networks of pairs, and of the second ones
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
        "seconds": reference.get("seconds", 0.0) + sum(figures.get("seconds", 0.0) for figures in found),
        "pairs": [list(pair) for pair in pairs],
        "layers": layers,
        **{of: means[of].tolist() for of in VALUES},
        **{f"{of}_deviation": None if deviations[of] is None else deviations[of].tolist() for of in VALUES},
        "untrained": reference["published"],
    }


def draw(result: dict[str, Any], folder: Path) -> None:
    """similarity.csv, a row per pair of layers, and the heat map similarity.png, from a run's result alone."""
    rows = []
    labels = layer_labels(result["layers"])
    for i, row_label in enumerate(labels):
        for j, column_label in enumerate(labels):
            row = {"layer_of_network_1": row_label, "layer_of_network_2": column_label}
            for of in VALUES:
                deviation = result[f"{of}_deviation"]
                row |= {of: result[of][i][j], f"{of}_deviation": None if deviation is None else deviation[i][j]}
            rows.append(row | {"untrained": result["untrained"][i][j]})
    write_table(folder / "similarity.csv", rows)
    n = len(result["pairs"])
    title = f"{result['arch']} on {result['dataset']}, mean of {n} pair{'s' * (n > 1)}"
    paper_figures.plot_heat_maps(
        folder / "similarity.png", title, labels, {result["similarity"]: np.array(result["published"], float)}
    )


def diagonal_of(record: dict[str, Any], name: str) -> NDArray[np.floating]:
    """Layers with themselves (L), of a record that was read: null is NaN there, and so is a deviation where there is none."""
    if record[name] is None:
        return np.full(len(record["published"]), np.nan)
    return np.array(record[name], float).diagonal()


def report_table(result: dict[str, Any]) -> str:
    """The diagonal as text."""
    lines = [
        f"{result['similarity']} of layers with themselves: mean, deviation, live channels alone, untrained (* inside a block)"
    ]
    columns = zip(
        *(diagonal_of(result, name) for name in ("published", "published_deviation", "live", "untrained")), strict=True
    )
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


def compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """--compare: diagonals.csv and .png of several finished runs of one architecture, and all their heat maps in one figure."""
    with refusing(parser, RecordError):
        results = read_results(args.compare, "cifar10_alignment")
    if len({(result["arch"], result["dataset"], tuple(layer_labels(result["layers"]))) for result in results}) > 1:
        parser.error("these runs are not of the same layers of one architecture on one data set: compare like with like")
    results.sort(key=lambda result: (tuple(MEASURES).index(result["similarity"]), result["estimator"] or ""))
    names = [result["similarity"] + (" (median)" if result["estimator"] == "median" else "") for result in results]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        parser.error(f"two of these runs are of {twice}: compare one of each")
    arch, dataset, labels = results[0]["arch"], results[0]["dataset"], layer_labels(results[0]["layers"])
    folder = Path(args.results_dir) / "cifar10_alignment" / f"figures-{arch}-{dataset}"
    rows = [
        {
            "similarity": name,
            "layer": label,
            "mean": diagonal_of(result, "published")[i],
            "deviation": diagonal_of(result, "published_deviation")[i],
            "live": diagonal_of(result, "live")[i],
            "untrained": diagonal_of(result, "untrained")[i],
            "n": len(result["pairs"]),
        }
        for name, result in zip(names, results, strict=True)
        for i, label in enumerate(labels)
    ]
    with refusing(parser):
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "diagonals.csv", rows)
        paper_figures.plot_diagonals(folder / "diagonals.png", f"{arch} on {dataset}: layers with themselves", labels, rows)
        maps = {name: np.array(result["published"], float) for name, result in zip(names, results, strict=True)}
        paper_figures.plot_heat_maps(folder / "similarities.png", f"{arch} on {dataset}, means of pairs", labels, maps)
    for result in results:
        say(report_table(result))
    say(f"figures: {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    if args.compare:
        return compare(parser, args)
    name = name_of(parser, args)
    if args.dry_run:
        print(name)
        return 0
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        Interruption() as interruption,
        RunDirectory(args.results_dir, "cifar10_alignment", name, another="--name NAME") as run,
    ):
        with refusing(parser, DataError, ZooError, ValueError):
            if has_finished(run, args, FREE):
                return 0
            pairs = zoo.pairs_of(args.zoo, args.pairs, args.repeats, args.seed)
            n_classes = images.N_CLASSES[images.BY_OPTION[args.dataset]]
            networks = zoo.load_members(args.zoo, args.arch, {number for pair in pairs for number in pair}, n_classes)
            places = places_of(args, next(iter(networks.values())))
            data = load_data(args, device)
            made_from = {"drawn_pairs": pairs, "networks": zoo.fingerprint(networks), "data": data.test.fingerprint()}
            open_run(run, args, made_from, FREE)
        with surviving_full_disks(run):
            tell(run, f"{len(pairs)} pairs, {len(places)} layers, {len(data.test)} images on {device}: {args.similarity}")
            if not sweep(args, pairs, networks, data, run, interruption):
                tell(run, f"stopped by {interruption.signal}: --resume goes on from here")
                return EXIT_RESUMABLE
            result = report(args, pairs, places, run)
            draw(result, run.path)
            tell(run, report_table(result))
            run.finish(result)
    say(f"figures: {run.final / 'result.json'}, {run.final / 'similarity.png'}; --compare draws several runs beside each other")
    return 0


if __name__ == "__main__":
    sys.exit(main())
