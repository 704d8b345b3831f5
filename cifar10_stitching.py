"""Stitching (Godfrey et al., NeurIPS 2022, section 4): the front of one network, a learned layer, the back of another.

The lost accuracy shows how much the two networks differ beyond what the stitching layer can undo. The published runs on a zoo
of networks (train_zoo.py), with permutations times scales and with any linear map as stitching layers:

    python cifar10_stitching.py --recipe Grelu --arch mCNN
    python cifar10_stitching.py --recipe standard --arch mCNN

leave their results in results/cifar10_stitching/, and

    python cifar10_stitching.py --compare results/cifar10_stitching/*

draws them next to each other. docs/zoo_and_stitching.md says what each option and each metric means.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, parallel
from common.datasets.classification import Splits
from common.errors import InputError
from common.models import zoo
from common.precision import set_backend_flags, strict_fp32
from common.run import options
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.jobs import pending
from common.run.memory import tune_malloc
from common.run.options import at_least, real
from common.run.progress import bar
from common.run.records import read_results, write_table
from common.run.run import Run
from common.run.schedule import halving
from common.run.state import State, check_finite, rng_state, set_rng_state
from common.run.workers import Worker, share
from common.seeds import generator_of, seed_of
from common.symmetry import pictures
from common.symmetry.penalties import best_runs, by_layer, merge_chunks, penalty_table
from common.symmetry.stitching import StitchedModel, StitchPoint, reestimate_statistics, stitch
from common.symmetry.stitching_layers import Birkhoff, Full, Lasso, LowRank, StitchingLayer, Wreath
from common.symmetry.train import make_optimizers, published_lr, training_step
from common.zoo import pairs as zoo_pairs
from common.zoo.pairs import MAY_CHANGE_ON_RESUME, Pair
from common.zoo.sweeps import CheckedJob, make_result, open_run, read_arrays, read_records, selection_of
from common.zoo.training import BestEpoch, accuracy, check_subset, evaluate, splits_of

# what the original's batch files pass. All of them pass a rate of 0.001, too, which it ignores: see --stitch_lr
STANDARD: dict[str, Any] = {"stitch_repeats": 1, "stitch_epochs": 20, "nopermwarmup": True, "noschedule": True}
GRELU: dict[str, Any] = {"birkhoff": True, "noschedule": True, "bn_epoch": True}
RECIPES = {
    "Grelu": GRELU | {"alpha": 0.1, "stitch_repeats": 1, "stitch_epochs": 20},
    "standard": STANDARD,
    "lowrank": STANDARD | {"lowrank": True},
    "lasso": STANDARD | {"lasso": True},
    "crossval": GRELU | {"alpha": "crossval", "stitch_repeats": 5, "stitch_epochs": 5},
}
PUBLISHED_PAIRS = {"mCNN": 32}  # of others, 16
KINDS = ("wreath", "birkhoff", "lowrank", "lasso")
CROSSVAL_SHARE = 0.2  # of the training images, which validate
FILES = ("cells/*", "matrices.png")  # besides those of every run


def alpha(text: str) -> float | str:
    """--alpha: a number, or the word for all of them."""
    return text if text == "crossval" else real(0)(text)


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="cifar10_stitching.py", description=__doc__)
    paper = parser.add_argument_group("options of the original", "example: --arch mCNN --birkhoff --alpha 0.1 --bn_epoch")
    paper.add_argument("--arch", choices=zoo.ARCHITECTURES, metavar="ARCH", help=f"one of {', '.join(zoo.ARCHITECTURES)}")
    paper.add_argument("--name", type=options.run_id, help="name of the run [architecture and kind of stitching layer]")
    paper.add_argument("--retrain_repeats", type=at_least(1), metavar="N", help="pairs of networks [mCNN: 32, others: 16]")
    paper.add_argument(
        "--stitch_repeats",
        type=at_least(1),
        default=1,
        metavar="N",
        help="runs of a layer; crossval: values of alpha [%(default)s]",
    )
    paper.add_argument("--stitch_epochs", type=at_least(1), default=20, metavar="N", help="epochs of a run [%(default)s]")
    paper.add_argument("--progress", action="store_true", help="show progress bars also where there is no terminal")
    paper.add_argument("--wreath", action="store_true", help="stitching layer: softly sorted permutation times scales")
    paper.add_argument("--birkhoff", action="store_true", help="stitching layer: doubly stochastic matrix times scales")
    paper.add_argument("--lowrank", action="store_true", help="stitching layer: matrix of --rank [without a kind: any matrix]")
    paper.add_argument("--lasso", action="store_true", help="stitching layer: matrix with penalty --multiplier times sum |w|")
    paper.add_argument("--rank", type=at_least(1), metavar="R", help="rank of --lowrank")
    paper.add_argument("--multiplier", type=real(0), default=0.1, metavar="M", help="weight of the lasso penalty [%(default)s]")
    paper.add_argument(
        "--alpha", type=alpha, default=1e-3, metavar="A", help="weight of the Birkhoff penalty, or crossval [%(default)s]"
    )
    paper.add_argument("--nopermwarmup", action="store_true", help="no warm-up (half of the epochs without scales)")
    paper.add_argument("--noschedule", action="store_true", help="constant learning rate")
    paper.add_argument("--alternating", action="store_true", help="Birkhoff: each step updates the matrix or the scales")
    paper.add_argument("--pgd_hook", action="store_true", help="Birkhoff: project gradients, too")
    paper.add_argument("--bn_epoch", action="store_true", help="re-estimate batch statistics before validation")
    paper.add_argument(
        "--stitch_lr", type=real(0, 100, above=True), metavar="LR", help="learning rate [permutations: 0.01, others: 0.001]"
    )
    paper.add_argument("--sr_offset", type=at_least(0), default=0, metavar="N", help="first run of a layer [%(default)s]")
    paper.add_argument("--num_chunks", type=at_least(1), default=1, metavar="N", help="jobs that share the pairs [%(default)s]")
    paper.add_argument("--chunk", type=at_least(0), default=0, metavar="N", help="number of this job, from 0 [%(default)s]")
    own = parser.add_argument_group("options of this suite", "example: --recipe Grelu --zoo results/zoo/mCNN --resume")
    text = "options of a published batch file of stitching (not train_zoo.py's recipes); typed options override them"
    own.add_argument("--recipe", choices=tuple(RECIPES), help=text)
    zoo_pairs.add_options(own, "sweep", layers="stitch points [all, the last first]")
    own.add_argument("--batch-size", type=at_least(2), default=32, metavar="N", help="images per step [%(default)s]")
    own.add_argument(
        "--bn_batches",
        "--bn-batches",
        type=at_least(0),
        default=100,
        metavar="N",
        help="batches of --bn_epoch; 0: all [%(default)s]",
    )
    own.add_argument(
        "--threshold", type=real(0), default=1e-3, metavar="W", help="lasso: smaller weights are rounded to 0 [%(default)s]"
    )
    own.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of all random draws [%(default)s]")
    own.add_argument("--subset", type=at_least(50), metavar="N", help="use N training images, as the zoo of this seed [all]")
    own.add_argument(
        "--select", choices=("validation", "test"), default="validation", help="images that choose the epoch [%(default)s]"
    )
    options.add_device_options(own)
    options.add_jobs_option(own, "stitching layers")
    options.add_tracker_options(own)
    return parser


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
    zoo_pairs.complete(parser, args)
    kinds = [f"--{kind}" for kind in KINDS if getattr(args, kind)]
    if len(kinds) > 1:
        parser.error(f"{' and '.join(kinds)} are two kinds of stitching layer: choose one")
    if args.lowrank != (args.rank is not None):
        parser.error("--lowrank and --rank R belong together")
    if args.chunk >= args.num_chunks:
        parser.error(f"--chunk {args.chunk} is beyond the last of --num_chunks {args.num_chunks}: the first is 0")
    needed = {"alternating": "birkhoff", "pgd_hook": "birkhoff", "alpha": "birkhoff"}
    for option, kind in (needed | {"multiplier": "lasso", "threshold": "lasso", "bn_batches": "bn_epoch"}).items():
        value = getattr(args, option)
        if value != parser.get_default(option) and not getattr(args, kind):
            parser.error(f"--{option.replace('bn_', 'bn-')}{'' if value is True else f' {value}'} is for --{kind}")
    if args.stitch_epochs < 2 and has_warmup(args):
        parser.error("--stitch_epochs 1 cannot be halved: take at least 2, or --nopermwarmup")
    args.retrain_repeats = args.retrain_repeats or PUBLISHED_PAIRS.get(args.arch, 16)
    pairs = args.pairs or range(args.retrain_repeats)
    if not pairs[chunk_of(args, len(pairs))]:
        parser.error(f"chunk {args.chunk} of {args.num_chunks} has none of the {len(pairs)} pairs: take fewer chunks")
    check_subset(parser, args, validation_share(args))
    if args.dry_run and args.arch not in zoo.CNNS:  # whose channels depend on the zoo's width
        zoo_pairs.check(parser, refuse_rank, args, zoo_pairs.points_of(args))
    return args


def chunk_of(args: argparse.Namespace, n_pairs: int) -> slice:
    """The pairs of this job among all pairs."""
    return parallel.chunk(n_pairs, args.chunk, args.num_chunks)


def validation_share(args: argparse.Namespace) -> float | None:
    """The share of the training images that validates, if it is not the usual one."""
    return CROSSVAL_SHARE if args.alpha == "crossval" else None


def has_warmup(args: argparse.Namespace) -> bool:
    """True if a run has two halves, the first of them without scales."""
    return not args.nopermwarmup and args.alpha != "crossval"


def kind_of(args: argparse.Namespace) -> str:
    """The kind of stitching layer, as results and pictures name it."""
    if args.lowrank:
        return f"rank {args.rank}"
    if args.lasso:
        return f"lasso {args.multiplier:g}"
    if args.birkhoff:
        return "permutation (cross-validated)" if args.alpha == "crossval" else "permutation"
    return "softsort" if args.wreath else "full"


def name_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The run's name: architecture and kind (or --name), recipe, and other options that are not at their defaults."""
    kind = kind_of(args).replace(" ", "").replace("(", "-").replace(")", "")
    first = [args.name or f"{args.arch}-{kind}", *([f"recipe.{args.recipe}"] if args.recipe else [])]
    return zoo_pairs.name_of(parser, args, first, (*KINDS, "recipe", "rank", "multiplier"), "retrain_repeats")


# ---- pairs and jobs ------------------------------------------------------------------------------------------------------


class StitchJob(CheckedJob):
    """The training of one stitching layer: for a pair of networks, a stitch point, and one of its runs."""

    def __init__(self, folder: Path, pair: Pair, point: StitchPoint, run: int):
        super().__init__(folder, f"{pair[0]}-{pair[1]}_layer_{point.index}_run_{run}", keeps=("pt",))
        self.pair, self.point, self.run = pair, point, run
        self.key = (*pair, point.index, run)  # of its random numbers
        self.title = f"pair {pair[0]}-{pair[1]} layer {point.index}{'*' * point.inside_block} run {run}"
        self.weights = folder / f"{self.name}.pt"
        self.fields = {"pair": list(pair), "layer": point.index, "module": point.name, "run": run}
        self.fields |= {"channels": point.channels, "inside_block": point.inside_block}
        numbers = ("accuracy", "val_accuracy", "penalty", "joint_parameters")
        self.pattern = {**self.fields, **dict.fromkeys(numbers, float), "parents": [float, float], "epochs": [dict, ...]}


def make_jobs(args: argparse.Namespace, folder: Path, pairs: list[Pair], points: list[StitchPoint]) -> list[StitchJob]:
    """All jobs in the published order: pair by pair, the last layer first."""
    runs = range(args.sr_offset, args.sr_offset + args.stitch_repeats)
    return [StitchJob(folder, pair, point, run) for pair in pairs for point in reversed(points) for run in runs]


def refuse_rank(args: argparse.Namespace, points: list[StitchPoint]) -> None:
    """Raises InputError if --rank is above the channels of a stitch point."""
    for point in points:
        if args.lowrank and args.rank > point.channels:
            raise InputError(f"--rank {args.rank} is above the {point.channels} channels of layer {point.index}")


# ---- training ------------------------------------------------------------------------------------------------------------


def make_layer(args: argparse.Namespace, channels: int, run: int) -> StitchingLayer:
    """The stitching layer of the options, with random weights."""
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


def train(args: argparse.Namespace, job: StitchJob, stitched: StitchedModel, data: Splits, run: Run | Worker) -> dict[str, Any]:
    """Train a stitching layer, or resume; leaves the best epoch's weights, with the statistics of its validation.

    With a warm-up, the first half of the epochs is without scales. Returns the metrics.
    """
    layer = stitched.stitching_layer
    halves = 2 if has_warmup(args) else 1
    epochs = args.stitch_epochs // halves  # of a half
    full_rate = args.stitch_lr or published_lr(layer)
    optimizers = make_optimizers(layer, full_rate, alternating=args.alternating)
    best, clock, chance = BestEpoch(), Clock(), 100 / len(data.test.classes)
    parts = {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)} | {"best": best, "clock": clock}
    state = State(job.last, run.options, run, data=data.fingerprint, model=stitched, **parts)
    state.extra = {"epochs": [], "losses": torch.zeros(len(data.training) // args.batch_size)}  # of each batch of the epoch
    if job.last.exists():
        state.resume()
    state.extra["losses"] = state.extra["losses"].to(data.device)
    while state.epoch < halves * epochs:
        half, epoch = divmod(state.epoch, epochs)
        if layer.has_scales:
            layer.scalars = half == halves - 1
        if half == 1 and epoch == state.batch == 0:
            begin_second_half(stitched, optimizers, best)
        rate = full_rate * (1.0 if args.noschedule else halving(epoch, epochs) / 16**half)
        train_epoch(args, job, data, state, optimizers, rate)
        loss = state.extra["losses"].mean().item()
        check_finite(loss, f"epoch {state.epoch + 1}", "--stitch_lr")
        validated, val_accuracy = validate(args, job, data, state)
        better = best.offer(validated, val_accuracy, half=half, epoch=epoch)
        row = {"train_loss": loss, "val_accuracy": val_accuracy, "lr": rate}
        state.extra["epochs"].append({"half": half, "epoch": epoch, **row})
        run.trackers.log(row, state.epoch + 1, group=job.name)
        run.log(
            f"{job.name}  epoch {state.epoch + 1:>3}  step {state.step:>6}  {clock.used() / 60:8.2f} min | training {loss:.4f} "
            f"| {args.select} {val_accuracy:.2f} % (chance {chance:.3g}) | lr {rate:.3g}" + " | best so far" * better
        )
        state.end_epoch()
    stitched.load_state_dict(best.weights)
    test = evaluate(stitched, data.test, data.preprocessing, check_signal=state.check_signal)
    metrics = {"accuracy": 100 * test["accuracy"], "best": {"val_accuracy": best.accuracy, **best.metrics}}
    return metrics | {"epochs": state.extra["epochs"], "seconds": clock.used()}


def begin_second_half(stitched: StitchedModel, optimizers: list[torch.optim.Optimizer], best: BestEpoch) -> None:
    """Continue from the best weights of the first half, with new optimisers. Accuracies without scales no longer count."""
    stitched.load_state_dict(best.weights)
    for optimizer in optimizers:
        optimizer.state.clear()
    if stitched.stitching_layer.has_scales:
        best.accuracy = -math.inf


def train_epoch(
    args: argparse.Namespace, job: StitchJob, data: Splits, state: State, optimizers: list[torch.optim.Optimizer], rate: float
) -> None:
    """Train on the remaining batches of an epoch and note their losses. Raises Interrupted, saved, if a signal comes."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    state.model.train()
    key, losses = (args.seed, *job.key, state.epoch), state.extra["losses"]
    draws = torch.randint(len(optimizers), losses.shape, generator=generator_of(*key, 2)).tolist()  # with --alternating
    hook_eps = 1e-3 if args.pgd_hook else None
    batches = data.batches(args.batch_size, generator_of(*key, 0), first=state.batch)
    for x, labels in bar(args, batches, f"epoch {state.epoch + 1}", total=len(losses), initial=state.batch):
        optimizer = optimizers[draws[state.batch]]
        loss = training_step(state.model, x, labels, optimizer, hook_eps=hook_eps, precision=args.precision)
        losses[state.batch] = loss
        state.after_step()


def validate(args: argparse.Namespace, job: StitchJob, data: Splits, state: State) -> tuple[nn.Module, float]:
    """A copy of the model, with re-estimated statistics for --bn_epoch, and its accuracy on the selection images (%).

    Raises Interrupted if a signal comes; the saved state is that before the validation.
    """
    model, rng = copy.deepcopy(state.model), rng_state()

    def check_signal() -> None:
        if state.command.signal is not None:
            set_rng_state(rng)  # re-estimation is in train mode, with dropout
            state.check_signal()

    n_batches = len(data.training) // args.batch_size
    n_batches = min(n_batches, args.bn_batches or n_batches)

    def batches() -> Iterator[Tensor]:
        epoch = data.batches(args.batch_size, generator_of(args.seed, *job.key, state.epoch, 1))
        for x, _ in bar(args, islice(epoch, n_batches), "batch statistics", total=n_batches):
            check_signal()
            yield x

    if args.bn_epoch:
        with strict_fp32():  # as `evaluate`: accuracies, and so penalties, do not depend on --precision
            reestimate_statistics(model, batches())
    return model, 100 * evaluate(model, data.selection, data.preprocessing, check_signal=check_signal)["accuracy"]


def run_job(
    args: argparse.Namespace, job: StitchJob, networks: dict[int, nn.Module], parents: dict[int, float], data: Splits,
    run: Run | Worker,
) -> dict[str, Any]:  # fmt: skip
    """Train a job's stitching layer and write its state; the job's record."""
    torch.manual_seed(seed_of(args.seed, *job.key))
    point = job.point
    layer = make_layer(args, point.channels, job.run)
    stitched = stitch(networks[job.pair[0]], networks[job.pair[1]], point.index, layer.to(data.device))
    metrics = train(args, job, stitched, data, run)
    state = {name: value.cpu() for name, value in layer.state_dict().items()}
    matrices = {"matrix": layer.matrix().detach().cpu(), "rounded": layer.rounded().cpu()}
    checkpoint.save(state | matrices, job.weights)
    accuracies = [parents[number] for number in job.pair]
    record = {**job.fields, **metrics, **layer.learned(), "joint_parameters": sum(p.numel() for p in layer.parameters())}
    record |= {"parents": accuracies, "penalty": sum(accuracies) / 2 - metrics["accuracy"]}
    return record | {"val_accuracy": metrics["best"]["val_accuracy"]}


def run_all(
    args: argparse.Namespace, networks: dict[int, nn.Module], parents: dict[int, float], data: Splits, run: Run | Worker,
    jobs: Iterable[tuple[int, StitchJob]], n: int,
) -> None:  # fmt: skip
    """Train the stitching layers of jobs that are locked, some of n."""
    for i, job in jobs:
        with job:
            record = run_job(args, job, networks, parents, data, run)
            job.finish(record)
            run.log(f"[{i}/{n}] {describe(job, record, len(data.test.classes))}")


def work(worker: Worker, args: argparse.Namespace, pairs: list[Pair], parents: dict[int, float], n: int) -> None:
    """Train stitching layers in one of several processes."""
    set_backend_flags(args.precision, deterministic=args.deterministic)
    networks, _ = zoo_pairs.load(args, pairs)
    data = splits_of(args, options.device_of(args), validation_share(args))
    for network in networks.values():
        network.to(data.device, memory_format=torch.channels_last)
    run_all(args, networks, parents, data, worker, worker.jobs(), n)


# ---- the sweep -----------------------------------------------------------------------------------------------------------


def measure_parents(networks: dict[int, nn.Module], data: Splits, run: Run) -> dict[int, float]:
    """Move the networks to the device and measure them (% of test images). Raises Interrupted if a signal comes."""
    accuracies = {}
    for number, network in bar(run.args, networks.items(), "networks"):
        run.check_signal("before the first stitching layer")
        network.to(data.device, memory_format=torch.channels_last)
        accuracies[number] = accuracy(network, data.test, data.preprocessing)
        run.log(f"network {number}: {accuracies[number]:.2f} % of {len(data.test)} test images")
    return accuracies


def describe(job: StitchJob, record: dict[str, Any], n_classes: int) -> str:
    """The metrics of a stitching layer for the log."""
    references = f"parents {record['parents'][0]:.2f}, {record['parents'][1]:.2f}; chance {100 / n_classes:.3g}"
    return f"{job.title}: {record['accuracy']:.2f} % of test images ({references}), penalty {record['penalty']:.2f}"


def report(args: argparse.Namespace, jobs: Sequence[StitchJob], data: Splits, run: Run) -> dict[str, Any]:
    """The result of a sweep; also writes metrics.csv, a row an epoch, and a picture of the first pair's matrices."""
    records, seconds = read_records(jobs, run.part / "metrics.csv", "pair", "layer", "run")
    if records:
        draw_matrices([job for job in jobs if job.done], run)
    selection = selection_of(args.select, len(data.selection))
    return make_result(
        run, ("arch", "dataset", "seed", "zoo", "select"), jobs,
        kind=kind_of(args), device=str(data.device), training_images=len(data.training), seconds=seconds,
        protocol=f"best epoch, and best of a layer's runs, by {selection}; accuracies are of the test images",
        layers=by_layer(best_runs(args.select, records)), cells=records,
    )  # fmt: skip


def draw_matrices(jobs: Sequence[StitchJob], run: Run) -> None:
    """matrices.png: the matrices of the first pair, as trained and as rounded for evaluation."""
    first_pair = [job for job in reversed(jobs) if (job.pair, job.run) == (jobs[0].pair, jobs[0].run)]
    matrices = [(f"layer {job.point.index}", *read_arrays(job.weights, "matrix", "rounded")) for job in first_pair]
    pictures.plot_matrices(run.part / "matrices.png", run.name, matrices)


def compare(args: argparse.Namespace) -> int:
    """--compare: penalties.csv and .png of several finished runs, accuracy by rank, accuracy by sparsity."""
    results = merge_chunks(read_results(args.compare, "cifar10_stitching"))
    order = ["full", "permutation", "permutation (cross-validated)", "softsort"]
    results.sort(key=lambda result: (order.index(result["kind"]) if result["kind"] in order else 9, result["kind"]))
    rows = [{"kind": result["kind"], **layer} for result in results for layer in result["layers"]]
    if not rows:
        raise InputError("all stitching layers of these runs failed")
    folder, title = zoo_pairs.make_figures_folder(args, results[0])
    write_table(folder / "penalties.csv", rows)
    pictures.plot_penalties(folder / "penalties.png", f"{title}: mean and deviation over pairs", rows)
    pictures.plot_ranks(folder / "rank.png", title, rows)
    pictures.plot_sparsities(folder / "sparsity.png", title, rows)
    for result in results:
        echo(penalty_table(result))
    echo(f"figures: {', '.join(str(path) for path in sorted(folder.iterdir()))}")
    return 0


# ---- one sweep from start to end -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    if args.compare:
        with Command("cifar10_stitching"):
            return compare(args)
    name = name_of(parser, args)
    if args.dry_run:
        echo(name)
        return 0
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    with Run("cifar10_stitching", name, args, another="--name NAME", may_change=MAY_CHANGE_ON_RESUME, files=FILES) as run:
        pairs = zoo_pairs.pairs_of(args, args.retrain_repeats)
        pairs = pairs[chunk_of(args, len(pairs))]
        networks, points = zoo_pairs.load(args, pairs)
        refuse_rank(args, points)
        data = splits_of(args, options.device_of(args), validation_share(args))
        made_from = {"drawn_pairs": pairs, "networks": zoo.fingerprint(networks), "data": data.fingerprint}
        jobs = open_run(run, lambda folder: make_jobs(args, folder / "cells", pairs, points), **made_from)
        run.log(f"{len(pairs)} pairs, {len(points)} layers, {len(jobs)} stitchings to train: {kind_of(args)}, seed {args.seed}")
        parents = measure_parents(networks, data, run)
        if args.jobs > 1:
            share(run, jobs, args, work, pairs, parents, len(jobs), retry_failed=args.retry_failed)
        else:
            left = pending(run, jobs, retry_failed=args.retry_failed, bar=args.progress)
            run_all(args, networks, parents, data, run, left, len(jobs))
        result = report(args, jobs, data, run)
        run.log(penalty_table(result))
        status = run.finish(result)
    echo(zoo_pairs.where_to_look(run, result))
    return status


if __name__ == "__main__":
    sys.exit(main())
