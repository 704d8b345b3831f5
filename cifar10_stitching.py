"""Stitching (Godfrey et al., NeurIPS 2022, section 4): the front of one network, a learned joint, the back of another.

How much accuracy is lost tells how much the two differ by more than the joint can undo. The published runs on a zoo of
networks (train_zoo.py), with joints of permutations and scales, and with any linear map:

    python cifar10_stitching.py --recipe Grelu --arch mCNN
    python cifar10_stitching.py --recipe standard --arch mCNN

leave their figures in results/cifar10_stitching/, and

    python cifar10_stitching.py --compare results/cifar10_stitching/*

draws them beside each other. README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common import paper_figures, plotting
from common.datasets import images
from common.datasets.classification import Splits, load_splits
from common.datasets.images import DataError
from common.models import zoo
from common.models.zoo import ZooError
from common.run import checkpoint, options
from common.run.checkpoint import write_in_one_step
from common.run.classifier import accuracy
from common.run.directory import RunDirectory
from common.run.ending import EXIT_RESUMABLE, has_finished, open_run, refusing, say, surviving_full_disks, tell
from common.run.interruption import Interrupted, Interruption
from common.run.memory import keep_freed_memory
from common.run.options import at_least, real
from common.run.penalties import by_layer, choose_runs, with_chunks_together
from common.run.records import RecordError, read_results, write_json, write_table
from common.seeds import generator_of, seed_of
from common.symmetry.joints import Birkhoff, Full, Joint, Lasso, LowRank, Wreath
from common.symmetry.stitching import Place, StitchedModel, joints_of, reestimate_statistics, restore_statistics, stitch
from common.symmetry.train import make_optimizers, make_schedule, published_lr, training_step

# what the original's batch files pass. All of them pass a rate of 0.001, too, which it ignores: see --stitch_lr
RECIPES: dict[str, dict[str, Any]] = {
    "Grelu": {"birkhoff": True, "alpha": 0.1, "stitch_repeats": 1, "stitch_epochs": 20, "noschedule": True, "bn_epoch": True},
    "standard": {"stitch_repeats": 1, "stitch_epochs": 20, "nopermwarmup": True, "noschedule": True},
    "lowrank": {"lowrank": True, "stitch_repeats": 1, "stitch_epochs": 20, "nopermwarmup": True, "noschedule": True},
    "lasso": {"lasso": True, "stitch_repeats": 1, "stitch_epochs": 20, "nopermwarmup": True, "noschedule": True},
    "crossval": {
        "birkhoff": True, "alpha": "crossval", "stitch_repeats": 5, "stitch_epochs": 5, "noschedule": True, "bn_epoch": True,
    },
}  # fmt: skip
PUBLISHED_PAIRS = {"mCNN": 32}  # of others, 16
UNNAMED = ("results_dir", "data_dir", "zoo", "resume", "overwrite", "dry_run", "progress", "compare", "name", "recipe", "arch")
FREE = ("results_dir", "data_dir", "resume", "overwrite", "progress", "dry_run")  # a sweep that goes on may have others
CROSSVAL_SHARE = 0.2  # of the training images, which validate


def alpha(text: str) -> float | str:
    """--alpha: a number, or the word for all of them."""
    return text if text == "crossval" else real(0)(text)


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="cifar10_stitching.py", description=__doc__)
    paper = parser.add_argument_group("options of the original")
    paper.add_argument("--arch", choices=zoo.ARCHITECTURES, metavar="ARCH", help=f"{', '.join(zoo.ARCHITECTURES)}")
    paper.add_argument("--name", type=options.run_id, help="of the run [architecture and kind of joint]")
    paper.add_argument("--retrain_repeats", type=at_least(1), help="pairs of networks [32 for mCNN, 16 for others]")
    paper.add_argument("--stitch_repeats", type=at_least(1), default=1, help="runs of a layer, or alphas [%(default)s]")
    paper.add_argument("--stitch_epochs", type=at_least(1), default=20, help="of a run, both halves together [%(default)s]")
    paper.add_argument("--progress", action="store_true", help="show a bar")
    paper.add_argument("--wreath", action="store_true", help="joint: softly sorted permutation times scales")
    paper.add_argument("--birkhoff", action="store_true", help="joint: doubly stochastic matrix times scales")
    paper.add_argument("--lowrank", action="store_true", help="joint: matrix of --rank [of neither kind: any matrix]")
    paper.add_argument("--lasso", action="store_true", help="joint: matrix with a penalty of --multiplier times sum |w|")
    paper.add_argument("--rank", type=at_least(1), help="of --lowrank")
    paper.add_argument("--multiplier", type=real(0), default=0.1, help="of --lasso [%(default)s]")
    paper.add_argument("--alpha", type=alpha, default=1e-3, help="weight of Birkhoff's penalty; crossval: chosen [%(default)s]")
    paper.add_argument("--nopermwarmup", action="store_true", help="train at once, not first without scales")
    paper.add_argument("--noschedule", action="store_true", help="keep the rate constant")
    paper.add_argument("--alternating", action="store_true", help="Birkhoff: each step moves the matrix or the scales")
    paper.add_argument("--pgd_hook", action="store_true", help="Birkhoff: fit gradients to the projection")
    paper.add_argument("--bn_epoch", action="store_true", help="re-estimate batch statistics before validation")
    paper.add_argument("--stitch_lr", type=real(0, 100, above=True), help="[0.01 for permutations, else 0.001]")
    paper.add_argument("--sr_offset", type=at_least(0), default=0, help="number of the first run of a layer [%(default)s]")
    paper.add_argument("--num_chunks", type=at_least(1), default=1, help="parts that the pairs are cut into [%(default)s]")
    paper.add_argument("--chunk", type=at_least(0), default=0, help="which of them, from 0 [%(default)s]")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--recipe", choices=tuple(RECIPES), help="what the published batch files pass; other options override it")
    own.add_argument("--zoo", metavar="DIR", help="where train_zoo.py has put the networks [results/zoo/DATASET-ARCH]")
    own.add_argument("--dataset", choices=tuple(images.BY_OPTION), default="cifar10", help="[%(default)s]")
    own.add_argument("--data-dir", metavar="DIR", default="data", help="where the data set lies [%(default)s]")
    own.add_argument("--results-dir", metavar="DIR", default="results", help="where run directories are made [%(default)s]")
    own.add_argument("--layers", type=at_least(1), nargs="+", help="indices of joints [all, the last first]")
    own.add_argument("--pairs", nargs="+", metavar="I-J", help="numbers of networks [drawn by the seed]")
    own.add_argument("--batch-size", type=at_least(2), default=32, help="[%(default)s]")
    own.add_argument(
        "--bn_batches", "--bn-batches", type=at_least(0), default=100, help="of --bn_epoch; 0: a whole epoch [%(default)s]"
    )
    own.add_argument(
        "--threshold", type=real(0), default=1e-3, help="of --lasso: smaller weights are 0 in evaluation [%(default)s]"
    )
    own.add_argument("--seed", type=at_least(0), default=0, help="of pairs, split, joints and order [%(default)s]")
    own.add_argument(
        "--subset",
        type=at_least(50),
        metavar="N",
        help="use N training images, those of a zoo with the same seed and subset [all]",
    )
    own.add_argument(
        "--select", choices=("validation", "test"), default="validation", help="what the best epoch is chosen by [%(default)s]"
    )
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="[%(default)s]")
    own.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help="go on with a sweep that was interrupted")
    own.add_argument("--overwrite", action="store_true", help="replace a sweep of the same name")
    own.add_argument("--dry-run", action="store_true", help="check the options, print the run's name and exit")
    own.add_argument("--compare", nargs="+", metavar="RUN", help="instead of stitching: tables and figures of finished runs")
    return parser


KINDS = ("wreath", "birkhoff", "lowrank", "lasso")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options that can work together, with those of the recipe, or the parser's error."""
    typed = parser.parse_args(argv)
    if typed.recipe is not None:
        defaults = RECIPES[typed.recipe]
        if any(getattr(typed, kind) and kind not in defaults for kind in KINDS):  # in place of the recipe's
            defaults = {name: value for name, value in defaults.items() if name not in (*KINDS, "alpha")}
        parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.compare:
        return args
    if args.arch is None:
        parser.error(f"--arch is missing: choose from {', '.join(zoo.ARCHITECTURES)}")
    kinds = [f"--{kind}" for kind in KINDS if getattr(args, kind)]
    if len(kinds) > 1:
        parser.error(f"{' and '.join(kinds)} are two kinds of joint: choose one")
    if args.lowrank != (args.rank is not None):
        parser.error("--lowrank and --rank R belong together")
    if args.chunk >= args.num_chunks:
        parser.error(
            f"--chunk {args.chunk} is beyond the last of --num_chunks {args.num_chunks}, which is {args.num_chunks - 1}"
        )
    for option in ("alternating", "pgd_hook"):
        if getattr(args, option) and not args.birkhoff:
            parser.error(f"--{option} is for --birkhoff")
    for option, of in (("alpha", "birkhoff"), ("multiplier", "lasso"), ("threshold", "lasso"), ("bn_batches", "bn_epoch")):
        if getattr(args, option) != parser.get_default(option) and not getattr(args, of):
            parser.error(f"--{option.replace('bn_', 'bn-')} {getattr(args, option)} is for --{of}")
    if args.stitch_epochs < 2 and has_warmup(args):
        parser.error("--stitch_epochs 1 cannot be halved: take at least 2, or --nopermwarmup")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a sweep, --overwrite replaces it: choose one")
    args.zoo = args.zoo or f"results/zoo/{args.dataset}-{args.arch}"
    args.retrain_repeats = args.retrain_repeats or PUBLISHED_PAIRS.get(args.arch, 16)
    return args


def has_warmup(args: argparse.Namespace) -> bool:
    """Whether a run has two halves: the first, of permutations, without scales."""
    return not args.nopermwarmup and args.alpha != "crossval"


def kind_of(args: argparse.Namespace) -> str:
    """The joint, in the words of the figures."""
    if args.lowrank:
        return f"rank {args.rank}"
    if args.lasso:
        return f"lasso {args.multiplier:g}"
    if args.birkhoff:
        return "permutation (cross-validated)" if args.alpha == "crossval" else "permutation"
    return "softsort" if args.wreath else "full"


def name_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The run's name: architecture and joint (or --name), recipe, and other options that are not at their defaults."""
    kind = kind_of(args).replace(" ", "").replace("(", "-").replace(")", "")
    parts = [args.name or f"{args.arch}-{kind}", *([f"recipe.{args.recipe}"] if args.recipe else [])]
    left_out = (*UNNAMED, *KINDS, "rank", "multiplier", "layers", "pairs", "retrain_repeats")
    parts += options.not_defaults(parser, args, left_out)
    for option in ("layers", "pairs"):
        if getattr(args, option):
            parts.append(".".join([option, *map(str, getattr(args, option))]))
    if not args.pairs:
        parts.append(f"retrain_repeats.{args.retrain_repeats}")
    name = "-".join(parts)
    options.check_length(parser, name)
    return name


# ---- images and pairs -------------------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, device: torch.device) -> Splits:
    """Images that train, choose and are reported. Raises DataError."""
    share = CROSSVAL_SHARE if args.alpha == "crossval" else None
    return load_splits(
        images.BY_OPTION[args.dataset],
        args.data_dir,
        device,
        seed=args.seed,
        batch_size=args.batch_size,
        subset=args.subset,
        select=args.select,
        validation_share=share,
    )


def pairs_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Pairs of numbers of networks, those of this chunk. Raises ZooError if the zoo has too few."""
    pairs = zoo.pairs_of(args.zoo, args.pairs, args.retrain_repeats, args.seed)
    chunk = pairs[len(pairs) * args.chunk // args.num_chunks : len(pairs) * (args.chunk + 1) // args.num_chunks]
    if not chunk:
        raise ZooError(
            f"chunk {args.chunk} of {args.num_chunks} has none of the {len(pairs)} pairs: fewer chunks, or more pairs"
        )
    return chunk


# ---- one cell: a pair, a layer, a run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What is trained at once, and kept in a file of its own."""

    pair: tuple[int, int]
    place: Place
    run: int

    @property
    def stem(self) -> str:
        return f"{self.pair[0]}-{self.pair[1]}_layer_{self.place.index}_run_{self.run}"


def make_joint(args: argparse.Namespace, channels: int, run: int) -> Joint:
    """The joint of the options. Raises ValueError for a rank above the number of channels."""
    if args.lowrank:
        return LowRank(channels, args.rank)
    if args.lasso:
        return Lasso(channels, args.multiplier, args.threshold)
    if args.wreath:
        return Wreath(channels)
    if args.birkhoff:
        grid = np.logspace(-3, 1, args.stitch_repeats)
        return Birkhoff(channels, float(grid[run - args.sr_offset]) if args.alpha == "crossval" else args.alpha)
    return Full(channels)


def train_cell(
    args: argparse.Namespace, cell: Cell, stitched: StitchedModel, data: Splits, interruption: Interruption
) -> dict[str, Any]:
    """Train a joint; leaves the best epoch's state, with the statistics that it was validated with. Its epochs' figures."""
    halves = 2 if has_warmup(args) else 1
    epochs = args.stitch_epochs // halves
    rows: list[dict[str, Any]] = []
    joint = stitched.joint
    best: dict[str, Any] = {"val_accuracy": -math.inf}
    for half in range(halves):
        if half:
            stitched.load_state_dict(best["state"])
        if isinstance(joint, Birkhoff | Wreath):
            joint.scalars = half == halves - 1
            best = {"val_accuracy": -math.inf}  # without scales it is another joint
        lr = args.stitch_lr or published_lr(joint)
        if half and not args.noschedule:
            lr /= 16
        optimizers = make_optimizers(joint, lr, alternating=args.alternating)
        schedules = [] if args.noschedule else [make_schedule(optimizer, epochs) for optimizer in optimizers]
        for epoch in range(epochs):
            rate = optimizers[0].param_groups[0]["lr"]
            loss = train_epoch(args, cell, stitched, data, optimizers, half * epochs + epoch, interruption)
            if not math.isfinite(loss):
                raise SystemExit(f"the loss of {cell.stem} in epoch {epoch} is not finite: a smaller --stitch_lr may help")
            for schedule in schedules:
                schedule.step()
            before = None
            if args.bn_epoch:
                key = (*cell.pair, cell.place.index, cell.run, half * epochs + epoch, 1)
                batches = data.batches(args.batch_size, generator_of(args.seed, *key))
                before = reestimate_statistics(stitched, (x for x, _ in islice(batches, args.bn_batches or None)))
            value = accuracy(stitched, data.selection, data.preprocessing)
            rows.append({"half": half, "epoch": epoch, "train_loss": loss, "val_accuracy": value, "lr": rate})
            if value > best["val_accuracy"]:
                state = {name: tensor.clone() for name, tensor in stitched.state_dict().items()}
                best = {"val_accuracy": value, "state": state, "half": half, "epoch": epoch}
            if before is not None:
                restore_statistics(stitched, before)
    stitched.load_state_dict(best.pop("state"))
    return {"best": best, "epochs": rows}


def train_epoch(
    args: argparse.Namespace,
    cell: Cell,
    stitched: StitchedModel,
    data: Splits,
    optimizers: list[torch.optim.Optimizer],
    epoch: int,
    interruption: Interruption,
) -> float:
    """One epoch of the joint; the mean loss. Raises Interrupted if a signal comes."""
    stitched.train()
    key = (*cell.pair, cell.place.index, cell.run, epoch)
    choice = generator_of(args.seed, *key, 2)
    amp = torch.bfloat16 if args.precision == "bf16" else None
    losses = []
    for x, labels in data.batches(args.batch_size, generator_of(args.seed, *key, 0)):
        interruption.check()
        which = int(torch.randint(len(optimizers), (), generator=choice))  # matrix or scales, with --alternating
        eps = 1e-3 if args.pgd_hook else None
        losses.append(training_step(stitched, x, labels, optimizers[which], hook_eps=eps, amp=amp))
    return torch.stack(losses).mean().item()


def run_cell(
    args: argparse.Namespace,
    cell: Cell,
    networks: tuple[nn.Module, nn.Module],
    parents: tuple[float, float],
    data: Splits,
    folder: Path,
    interruption: Interruption,
) -> None:
    """Train a cell's joint and write what came out: figures as .json, its state as .pt."""
    began = time.monotonic()
    torch.manual_seed(seed_of(args.seed, *cell.pair, cell.place.index, cell.run))
    joint = make_joint(args, cell.place.channels, cell.run)
    stitched = stitch(*networks, cell.place.index, joint.to(data.test.images.device))
    found = train_cell(args, cell, stitched, data, interruption)
    test = accuracy(stitched, data.test, data.preprocessing)
    figures = {
        "pair": list(cell.pair),
        "layer": cell.place.index,
        "module": cell.place.name,
        "inside_block": cell.place.inside_block,
        "channels": cell.place.channels,
        "run": cell.run,
        "joint_parameters": sum(p.numel() for p in joint.parameters()),
        "parents": list(parents),
        "val_accuracy": found["best"]["val_accuracy"],
        "accuracy": test,
        "penalty": sum(parents) / 2 - test,
        **found,
        **what_it_is(joint),
        "seconds": time.monotonic() - began,
    }
    state = {name: value.cpu() for name, value in joint.state_dict().items()}
    both = {"matrix": joint.matrix().detach().cpu(), "rounded": joint.rounded().cpu()}
    write_in_one_step(folder / f"{cell.stem}.pt", lambda file: torch.save(state | both, file))
    write_json(folder / f"{cell.stem}.json", figures)


def what_it_is(joint: Joint) -> dict[str, Any]:
    """What is learned of a joint that can be told in numbers: permutation and scales, or sparsity."""
    if isinstance(joint, Lasso):
        return {"sparsity": joint.sparsity()}
    if isinstance(joint, Birkhoff):
        permutation, scales = joint.permutation(), joint.weight_scalars
        return {"permutation": permutation.argmax(1).tolist(), "scales": scales.tolist(), "alpha": joint.alpha}
    if isinstance(joint, Wreath):
        return {"permutation": joint.permutation().argmax(1).tolist(), "scales": joint.weight_scalars.exp().tolist()}
    return {}


# ---- the sweep -----------------------------------------------------------------------------------------------------------


def cells_of(args: argparse.Namespace, pairs: list[tuple[int, int]], places: list[Place]) -> list[Cell]:
    """All cells in the published order: pair by pair, the last layer first."""
    runs = range(args.sr_offset, args.sr_offset + args.stitch_repeats)
    return [Cell(pair, place, run) for pair in pairs for place in reversed(places) for run in runs]


def places_of(args: argparse.Namespace, network: nn.Module) -> list[Place]:
    """The joints that were asked for. Raises ValueError if a network has none there, or the rank is too large."""
    places = joints_of(network)
    unknown = [layer for layer in args.layers or [] if layer not in [place.index for place in places]]
    if unknown:
        raise ValueError(f"--layers {unknown[0]}: {args.arch} has joints at {' '.join(str(place.index) for place in places)}")
    chosen = [place for place in places if not args.layers or place.index in args.layers]
    for place in chosen:
        if args.lowrank and args.rank > place.channels:
            raise ValueError(f"--rank {args.rank} is above the {place.channels} channels of layer {place.index}")
    return chosen


def sweep(
    args: argparse.Namespace,
    cells: list[Cell],
    networks: dict[int, nn.Module],
    data: Splits,
    run: RunDirectory,
    interruption: Interruption,
) -> bool:
    """Train all cells that are not there yet; False if a signal came first."""
    folder = run.path / "cells"
    folder.mkdir(exist_ok=True)
    checkpoint.save({"name": run.name}, run.last)  # there is something to go on with
    parents = {number: accuracy(network, data.test, data.preprocessing) for number, network in networks.items()}
    for number, value in parents.items():
        tell(run, f"network {number}: {value:.2f} % of {len(data.test)} test images")
    with tqdm(cells, disable=None if args.progress else True) as bar:
        for i, cell in enumerate(bar):
            if (folder / f"{cell.stem}.json").exists():
                continue
            first, second = cell.pair
            try:
                both = (networks[first], networks[second])
                run_cell(args, cell, both, (parents[first], parents[second]), data, folder, interruption)
            except Interrupted:
                return False
            found = read_cell(folder, cell)
            star = "*" if cell.place.inside_block else ""
            tell(
                run,
                f"[{i + 1}/{len(cells)}] pair {first}-{second} layer {cell.place.index}{star} run {cell.run}: "
                f"{found['accuracy']:.2f} % of test images (parents {parents[first]:.2f}, {parents[second]:.2f}; "
                f"chance {100 / len(data.test.classes):.3g}), penalty {found['penalty']:.2f}",
            )
            if interruption.signal:
                return False
    return True


def read_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    return json.loads((folder / f"{cell.stem}.json").read_text())


def report(args: argparse.Namespace, cells: list[Cell], data: Splits, run: RunDirectory) -> dict[str, Any]:
    """All figures of a sweep; also metrics.csv, a row per epoch, and a picture of each layer's first joint."""
    folder = run.path / "cells"
    found = [read_cell(folder, cell) for cell in cells]
    rows = []
    for cell, figures in zip(cells, found, strict=True):
        of_cell = {"pair": f"{cell.pair[0]}-{cell.pair[1]}", "layer": cell.place.index, "run": cell.run}
        rows += [of_cell | row for row in figures["epochs"]]
    write_table(run.path / "metrics.csv", rows)
    draw_matrices(cells, folder, run)
    selected = choose_runs(args.select, found)
    seconds = sum(figures.pop("seconds", 0.0) for figures in found)
    for figures in found:
        del figures["epochs"]
    protocol = "best epoch, and best of a layer's runs, by " + (
        f"{len(data.selection)} training images that were left out" if args.select == "validation" else "the test images"
    )
    return {
        "script": "cifar10_stitching",
        "name": run.name,
        "arch": args.arch,
        "dataset": args.dataset,
        "kind": kind_of(args),
        "seed": args.seed,
        "zoo": args.zoo,
        "select": args.select,
        "protocol": f"{protocol}; accuracies are of the test images",
        "device": str(data.test.images.device),
        "training_images": len(data.training),
        "seconds": seconds,
        "layers": by_layer(selected),
        "cells": found,
    }


def report_table(result: dict[str, Any]) -> str:
    """The penalties as text."""
    lines = [f"{result['kind']}: penalty in % of accuracy, mean and deviation over pairs (* inside a residual block)"]
    for of in result["layers"]:
        deviation = "" if of["deviation"] is None else f" +- {of['deviation']:.2f}"
        star = "*" if of["inside_block"] else " "
        lines.append(f"  layer {of['layer']:>3}{star} {of['penalty']:7.2f}{deviation}  (n = {of['n']})")
    return "\n".join(lines)


def draw_matrices(cells: list[Cell], folder: Path, run: RunDirectory) -> None:
    """matrices.png: the joints of the first pair, as trained and as rounded for evaluation."""
    shown = []
    for cell in cells:
        if cell.pair == cells[0].pair and cell.run == cells[0].run:
            state = torch.load(folder / f"{cell.stem}.pt", weights_only=True)
            shown.append((f"layer {cell.place.index}", state["matrix"].numpy(), state["rounded"].numpy()))
    plotting.plot_matrices(run.path / "matrices.png", run.name, list(reversed(shown)))


# ---- figures of several runs ---------------------------------------------------------------------------------------------


def compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """--compare: penalties.csv and .png of several finished runs, accuracy by rank, accuracy by sparsity."""
    with refusing(parser, RecordError):
        results = with_chunks_together(read_results(args.compare, "cifar10_stitching"))
    order = ["full", "permutation", "permutation (cross-validated)", "softsort"]
    results.sort(key=lambda result: (order.index(result["kind"]) if result["kind"] in order else 9, result["kind"]))
    folder = Path(args.results_dir) / "cifar10_stitching" / f"figures-{results[0]['arch']}-{results[0]['dataset']}"
    with refusing(parser):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"kind": result["kind"], **of} for result in results for of in result["layers"]]
        write_table(folder / "penalties.csv", rows)
        title = f"{results[0]['arch']} on {results[0]['dataset']}"
        paper_figures.plot_penalties(folder / "penalties.png", f"{title}: mean and deviation over pairs", rows)
        for kind, axis in (("rank", "rank"), ("lasso", "sparsity")):
            some = [row for row in rows if row["kind"].startswith(f"{kind} ")]
            if some:
                points = [row | {"rank": int(row["kind"].split()[1])} if kind == "rank" else row for row in some]
                references = [row for row in rows if row["kind"] in ("full", "permutation")]
                paper_figures.plot_accuracies(folder / f"{axis}.png", title, axis, points, references)
    for result in results:
        say(report_table(result))
    say(f"figures: {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    return 0


# ---- one sweep from start to end -----------------------------------------------------------------------------------------


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
    run_directory = RunDirectory(args.results_dir, "cifar10_stitching", name, another="--name NAME")
    with Interruption() as interruption, run_directory as run:
        with refusing(parser, DataError, ZooError, ValueError):
            if has_finished(run, args, FREE):
                return 0
            pairs = pairs_of(args)
            n_classes = images.N_CLASSES[images.BY_OPTION[args.dataset]]
            networks = zoo.load_members(args.zoo, args.arch, {number for pair in pairs for number in pair}, n_classes)
            places = places_of(args, next(iter(networks.values())))
            data = load_data(args, device)
            open_run(run, args, {"drawn_pairs": pairs, "networks": zoo.fingerprint(networks), "data": data.fingerprint}, FREE)
        with surviving_full_disks(run):
            cells = cells_of(args, pairs, places)
            tell(
                run,
                f"{len(pairs)} pairs, {len(places)} layers, {len(cells)} joints to train: {kind_of(args)}, seed {args.seed}",
            )
            layout = torch.channels_last
            on_device = {number: network.to(device, memory_format=layout) for number, network in networks.items()}
            if not sweep(args, cells, on_device, data, run, interruption):
                tell(run, f"stopped by {interruption.signal}: --resume goes on from here")
                return EXIT_RESUMABLE
            result = report(args, cells, data, run)
            tell(run, report_table(result))
            run.finish(result)
    say(f"figures: {run.final / 'result.json'}, {run.final / 'matrices.png'}; --compare draws several runs beside each other")
    return 0


if __name__ == "__main__":
    sys.exit(main())
