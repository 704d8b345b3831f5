"""Command lines that compare pairs of a zoo's networks: what stitching and alignment share of options, names and input."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from common.datasets import images
from common.errors import InputError
from common.models import zoo
from common.run import options
from common.run.options import at_least
from common.run.run import Run
from common.symmetry.stitching import Place, joints_of

MAY_CHANGE = ("results_dir", "data_dir", "resume", "retry_failed", "overwrite", "progress", "dry_run")
NOT_IN_NAME = (*MAY_CHANGE, "arch", "name", "zoo", "compare", "layers", "pairs")


def add_options(group: argparse._ArgumentGroup, what: str, layers: str) -> None:
    """Options of networks, images, jobs and the run, which is called `what`; `layers` says which there are."""
    group.add_argument("--zoo", metavar="DIR", help="where train_zoo.py has put the networks [results/zoo/DATASET-ARCH]")
    group.add_argument("--dataset", choices=tuple(images.BY_OPTION), default="cifar10", help="[%(default)s]")
    group.add_argument("--data-dir", metavar="DIR", default="data", help="where the data set lies [%(default)s]")
    group.add_argument("--layers", type=at_least(1), nargs="+", help=f"indices of {layers}")
    group.add_argument("--pairs", nargs="+", metavar="I-J", help="numbers of networks [drawn by the seed]")
    options.add_run_options(group, what)
    group.add_argument("--retry-failed", action="store_true", help="repeat jobs that failed")
    group.add_argument("--compare", nargs="+", metavar="RUN", help="instead: tables and figures of finished runs")


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in the place of the networks, or end with the parser's error if their architecture is missing."""
    if args.arch is None:
        parser.error(f"--arch is missing: choose from {', '.join(zoo.ARCHITECTURES)}")
    args.zoo = args.zoo or f"results/zoo/{args.dataset}-{args.arch}"


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


def load(args: argparse.Namespace, pairs: Sequence[tuple[int, int]]) -> tuple[dict[int, nn.Module], list[Place]]:
    """The networks of all pairs, by number, and the layers that were asked for. Raises InputError."""
    n_classes = images.N_CLASSES[images.BY_OPTION[args.dataset]]
    networks = zoo.load_members(args.zoo, args.arch, {number for pair in pairs for number in pair}, n_classes)
    places = {place.index: place for place in joints_of(next(iter(networks.values())))}
    for layer in args.layers or ():
        if layer not in places:
            raise InputError(f"--layers {layer}: {args.arch} has {' '.join(map(str, places))}")
    return networks, [place for place in places.values() if not args.layers or place.index in args.layers]


def where_to_look(run: Run, result: Mapping[str, Any]) -> str:
    """The last line of a run that has finished."""
    failed = f"{len(result['failed'])} jobs failed, --retry-failed repeats them; " if "failed" in result else ""
    return f"{failed}result.json and pictures: {run.final}; --compare draws several runs beside each other"
