"""Command lines that compare pairs of a zoo's networks: options, names and input that stitching and alignment share."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import InputError
from common.models import zoo
from common.run import options
from common.run.options import at_least
from common.run.run import Run
from common.symmetry.stitching import StitchPoint, stitch_points
from common.zoo.training import add_data_options, n_classes

MAY_CHANGE_ON_RESUME = (*options.RUN_OPTIONS, "data_dir")
NOT_IN_NAME = (*MAY_CHANGE_ON_RESUME, "arch", "name", "zoo", "compare", "layers", "pairs")

Pair = tuple[int, int]  # numbers of two networks: the front's, the back's


def add_options(group: argparse._ArgumentGroup, run: str, layers: str) -> None:
    """Options of networks, images, jobs and the run, which the help calls `run`; `layers` says which layers there are."""
    group.add_argument("--zoo", metavar="DIR", help="directory of networks of train_zoo.py [results/zoo/DATASET-ARCH]")
    add_data_options(group)
    group.add_argument("--layers", type=at_least(1), nargs="+", metavar="INDEX", help=f"indices of {layers}")
    group.add_argument("--pairs", nargs="+", metavar="I-J", help="pairs of networks, by number: 0-1 2-3 [drawn by the seed]")
    options.add_run_options(group, run)
    group.add_argument("--retry-failed", action="store_true", help="repeat what has failed")
    group.add_argument("--compare", nargs="+", metavar="RUN", help="train nothing: tables and figures of finished runs")


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the zoo's place. Ends with the parser's error for options that no zoo could satisfy."""
    if args.arch is None:
        parser.error(f"--arch is missing: choose from {', '.join(zoo.ARCHITECTURES)}")
    args.zoo = args.zoo or f"results/zoo/{args.dataset}-{args.arch}"
    check(parser, read_pairs, args.pairs or ())
    if args.dry_run:  # a run looks at its own networks
        check(parser, points_of, args)


def check(parser: argparse.ArgumentParser, work: Callable[..., object], *arguments: object) -> None:
    """Do some work; its InputError ends the program as the parser's error."""
    try:
        work(*arguments)
    except InputError as error:
        parser.error(str(error))


def name_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, first: Sequence[str], not_in_name: Sequence[str], repeats: str
) -> str:
    """A run's name: the words `first`, options not at their defaults, layers, and pairs or (option `repeats`) their number."""
    parts = [*first, *options.not_defaults(parser, args, (*NOT_IN_NAME, *not_in_name, repeats))]
    parts += [".".join([option, *map(str, getattr(args, option))]) for option in ("layers", "pairs") if getattr(args, option)]
    if not args.pairs:
        parts.append(f"{repeats}.{getattr(args, repeats)}")
    name = "-".join(parts)
    options.check(parser, args, name)
    return name


# ---- pairs of networks ---------------------------------------------------------------------------------------------------


def read_pairs(texts: Sequence[str]) -> list[Pair]:
    """Pairs of numbers from texts like 0-1. Raises InputError for other texts, equal numbers, and a pair given twice."""
    pairs = []
    for text in texts:
        first, _, second = text.partition("-")
        if not (is_number(first) and is_number(second)) or int(first) == int(second):
            raise InputError(f"--pairs {text!r} is no pair of two networks: write it like 0-1")
        pairs.append((int(first), int(second)))
    if len(set(pairs)) < len(pairs):
        raise InputError(f"--pairs {' '.join(texts)} names a pair twice")
    return pairs


def is_number(text: str) -> bool:
    """True if a text is the number of a network, as in 0.pt."""
    return text.isascii() and text.isdigit()


def pairs_of(args: argparse.Namespace, n: int) -> list[Pair]:
    """The pairs of --pairs or, without them, n that the seed draws. Raises InputError if the zoo has not the networks."""
    numbers = sorted(int(path.stem) for path in Path(args.zoo).glob("*.pt") if is_number(path.stem))
    if len(numbers) < 2:
        raise InputError(f"{args.zoo} holds {len(numbers)} networks (0.pt, 1.pt, ...): two are needed; train_zoo.py makes them")
    if not args.pairs:
        return draw_pairs(numbers, n, args.seed)
    pairs = read_pairs(args.pairs)
    for pair in pairs:
        for number in pair:
            if number not in numbers:
                known = ", ".join(map(str, numbers))
                raise InputError(f"--pairs {pair[0]}-{pair[1]}: the zoo has no {number}.pt, only {known}")
    return pairs


def draw_pairs(numbers: list[int], n: int, seed: int) -> list[Pair]:
    """n ordered pairs, all different, in rounds in which no network comes twice. Raises InputError if there are not so many.

    >>> draw_pairs([0, 1, 2, 3], 2, seed=0)
    [(3, 1), (0, 2)]
    """
    if n > len(numbers) * (len(numbers) - 1):
        raise InputError(f"{len(numbers)} networks make {len(numbers) * (len(numbers) - 1)} pairs, not {n}")
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < n:
        order = rng.sample(numbers, len(numbers))
        pairs += [pair for pair in zip(order[::2], order[1::2], strict=False) if pair not in pairs]
    return pairs[:n]


# ---- networks and layers -------------------------------------------------------------------------------------------------


def points_of(args: argparse.Namespace, network: nn.Module | None = None) -> list[StitchPoint]:
    """The stitch points of --layers in a network or, without one, in the architecture at its default width.

    Raises InputError for a layer that is not there.
    """
    if network is None:
        with torch.device("meta"):
            network = zoo.make(args.arch)
    points = stitch_points(network)
    indices = [point.index for point in points]
    for layer in args.layers or ():
        if layer not in indices:
            raise InputError(f"--layers {layer}: {args.arch} has {' '.join(map(str, indices))}")
    return [point for point in points if not args.layers or point.index in args.layers]


def load(args: argparse.Namespace, pairs: Sequence[Pair]) -> tuple[dict[int, nn.Module], list[StitchPoint]]:
    """The networks of all pairs, by number, and the stitch points of --layers. Raises InputError."""
    networks = zoo.load_members(args.zoo, args.arch, {number for pair in pairs for number in pair})
    number, network = next(iter(networks.items()))
    classes, _ = zoo.sizes_of(network.state_dict(), args.arch)
    if classes != n_classes(args):
        raise InputError(
            f"{args.zoo}/{number}.pt tells {classes} classes apart, the images have {n_classes(args)}: see --dataset and --zoo"
        )
    return networks, points_of(args, network)


def make_figures_folder(args: argparse.Namespace, result: Mapping[str, Any]) -> tuple[Path, str]:
    """The directory for the figures of --compare, and their title, from one of the results. Makes the directory."""
    folder = Path(args.results_dir) / result["script"] / f"figures-{result['arch']}-{result['dataset']}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder, f"{result['arch']} on {result['dataset']}"


def where_to_look(run: Run, result: Mapping[str, Any]) -> str:
    """The last line of a run that has finished."""
    failed = f"{len(result['failed'])} jobs failed, --retry-failed repeats them; " if "failed" in result else ""
    return f"{failed}result.json and pictures: {run.final}; --compare draws several runs next to each other"
