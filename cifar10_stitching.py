"""Stitching (Godfrey et al., NeurIPS 2022, section 4): the front of one network, a learned joint, the back of another.

How much accuracy is lost tells how much the two differ by more than the joint can undo. The published runs on a zoo of
networks (train_zoo.py), with joints of permutations and scales, and with any linear map:

    python cifar10_stitching.py --recipe Grelu --arch mCNN
    python cifar10_stitching.py --recipe standard --arch mCNN

leave their results in results/cifar10_stitching/, and

    python cifar10_stitching.py --compare results/cifar10_stitching/*

draws them beside each other. README.md says what each metric means.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import checkpoint, paper_figures, plotting
from common.datasets import images
from common.datasets.classification import Splits, load_splits
from common.errors import InputError
from common.models import zoo
from common.run import options, zoo_pairs
from common.run.classifier import BestEpoch, accuracy, evaluate
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.jobs import Job, check_files, failures, pending
from common.run.memory import tune_malloc
from common.run.options import at_least, real
from common.run.penalties import by_layer, choose_runs, with_chunks_together
from common.run.records import read_results, write_table
from common.run.run import Run
from common.run.schedule import halving
from common.run.state import State, refuse_infinity, rng_state, set_rng_state
from common.seeds import generator_of, seed_of
from common.symmetry.joints import Birkhoff, Full, Joint, Lasso, LowRank, Wreath
from common.symmetry.stitching import Place, StitchedModel, reestimate_statistics, stitch
from common.symmetry.train import make_optimizers, published_lr, training_step

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
KINDS = ("wreath", "birkhoff", "lowrank", "lasso")
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
    zoo_pairs.add_options(own, "sweep", layers="joints [all, the last first]")
    own.add_argument("--batch-size", type=at_least(2), default=32, help="[%(default)s]")
    own.add_argument("--bn_batches", "--bn-batches", type=at_least(0), default=100, help="of --bn_epoch; 0: all [%(default)s]")
    own.add_argument(
        "--threshold", type=real(0), default=1e-3, help="of --lasso: below it weights are rounded to 0 [%(default)s]"
    )
    own.add_argument("--seed", type=at_least(0), default=0, help="of pairs, split, joints and order [%(default)s]")
    own.add_argument(
        "--subset", type=at_least(50), metavar="N", help="training images, as of a zoo of this seed and subset [all]"
    )
    own.add_argument("--select", choices=("validation", "test"), default="validation", help="chooses the epoch [%(default)s]")
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="[%(default)s]")
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
        parser.error(f"{' and '.join(kinds)} are two kinds of joint: choose one")
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
    return args


def has_warmup(args: argparse.Namespace) -> bool:
    """Whether a run has two halves: the first, of permutations, without scales."""
    return not args.nopermwarmup and args.alpha != "crossval"


def kind_of(args: argparse.Namespace) -> str:
    """The joint, as results and pictures name it."""
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
    first = [args.name or f"{args.arch}-{kind}", *([f"recipe.{args.recipe}"] if args.recipe else [])]
    return zoo_pairs.name_of(parser, args, first, (*KINDS, "recipe", "rank", "multiplier"), "retrain_repeats")


# ---- images, pairs and jobs ----------------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, device: torch.device) -> Splits:
    """Images that train, choose and are reported. Raises DataError."""
    share = CROSSVAL_SHARE if args.alpha == "crossval" else None
    shared = {name: getattr(args, name) for name in ("seed", "batch_size", "subset", "select")}
    return load_splits(images.BY_OPTION[args.dataset], args.data_dir, device, validation_share=share, **shared)


def pairs_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Pairs of numbers of networks, those of this chunk. Raises InputError if the zoo has too few."""
    pairs = zoo.pairs_of(args.zoo, args.pairs, args.retrain_repeats, args.seed)
    chunk = pairs[len(pairs) * args.chunk // args.num_chunks : len(pairs) * (args.chunk + 1) // args.num_chunks]
    if not chunk:
        raise InputError(f"chunk {args.chunk} of {args.num_chunks} has none of the {len(pairs)} pairs: take fewer chunks")
    return chunk


class StitchJob(Job):
    """The training of one joint: of a pair of networks, after a layer, in one of the layer's runs."""

    def __init__(self, folder: Path, pair: tuple[int, int], place: Place, run: int):
        super().__init__(folder, f"{pair[0]}-{pair[1]}_layer_{place.index}_run_{run}", keeps=("pt",))
        self.pair, self.place, self.run = pair, place, run
        self.key = (*pair, place.index, run)  # of its random numbers
        self.joint = folder / f"{self.name}.pt"


def jobs_of(args: argparse.Namespace, folder: Path, pairs: list[tuple[int, int]], places: list[Place]) -> list[StitchJob]:
    """All jobs in the published order: pair by pair, the last layer first. Raises InputError if the rank is too large."""
    for place in places:
        if args.lowrank and args.rank > place.channels:
            raise InputError(f"--rank {args.rank} is above the {place.channels} channels of layer {place.index}")
    runs = range(args.sr_offset, args.sr_offset + args.stitch_repeats)
    return [StitchJob(folder, pair, place, run) for pair in pairs for place in reversed(places) for run in runs]


# ---- training ------------------------------------------------------------------------------------------------------------


def make_joint(args: argparse.Namespace, channels: int, run: int) -> Joint:
    """The joint of the options, with random weights."""
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


def train(args: argparse.Namespace, job: StitchJob, stitched: StitchedModel, data: Splits, run: Run) -> dict[str, Any]:
    """Train a joint, or resume; leaves the best epoch's weights, with the statistics of its validation. Returns the metrics."""
    joint, halves = stitched.joint, 2 if has_warmup(args) else 1
    epochs, full_rate = args.stitch_epochs // halves, args.stitch_lr or published_lr(joint)
    optimizers = make_optimizers(joint, full_rate, alternating=args.alternating)
    best, clock = BestEpoch(), Clock()
    parts = {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)} | {"best": best, "clock": clock}
    state = State(job.last, run.options, run, data=data.fingerprint, model=stitched, **parts)
    state.extra = {"epochs": [], "losses": torch.zeros(len(data.training) // args.batch_size)}
    if job.last.exists():
        state.resume()
    state.extra["losses"] = state.extra["losses"].to(data.device)
    while state.epoch < halves * epochs:
        half, epoch = divmod(state.epoch, epochs)
        if isinstance(joint, Birkhoff | Wreath):
            joint.scalars = half == halves - 1
        if half and epoch == state.batch == 0:  # begin the second half with the best weights of the first
            stitched.load_state_dict(best.weights)
            for optimizer in optimizers:
                optimizer.state.clear()
            if isinstance(joint, Birkhoff | Wreath):
                best.accuracy = -math.inf  # with scales it is another joint
        rate = full_rate * (1.0 if args.noschedule else halving(epoch, epochs) / 16**half)
        train_epoch(args, job, data, state, optimizers, rate)
        loss = state.extra["losses"].mean().item()
        refuse_infinity(loss, f"epoch {state.epoch + 1}", "--stitch_lr")
        validated, value = validate(args, job, data, state)
        best.offer(validated, value, half=half, epoch=epoch)
        state.extra["epochs"].append({"half": half, "epoch": epoch, "train_loss": loss, "val_accuracy": value, "lr": rate})
        state.end_epoch()
    stitched.load_state_dict(best.weights)
    test = evaluate(stitched, data.test, data.preprocessing, check_signal=state.check_signal)
    metrics = {"accuracy": 100 * test["accuracy"], "best": {"val_accuracy": best.accuracy, **best.metrics}}
    return metrics | {"epochs": state.extra["epochs"], "seconds": clock.used()}


def train_epoch(
    args: argparse.Namespace, job: StitchJob, data: Splits, state: State, optimizers: list[torch.optim.Optimizer], rate: float
) -> None:
    """Train on the batches of an epoch that are left; notes their losses. Raises Interrupted, saved, if a signal comes."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
    state.model.train()
    key, losses = (args.seed, *job.key, state.epoch), state.extra["losses"]
    choices = torch.randint(len(optimizers), losses.shape, generator=generator_of(*key, 2)).tolist()  # with --alternating
    step = {"hook_eps": 1e-3 if args.pgd_hook else None, "amp": torch.bfloat16 if args.precision == "bf16" else None}
    for x, labels in data.batches(args.batch_size, generator_of(*key, 0), first=state.batch):
        losses[state.batch] = training_step(state.model, x, labels, optimizers[choices[state.batch]], **step)
        state.after_step()


def validate(args: argparse.Namespace, job: StitchJob, data: Splits, state: State) -> tuple[nn.Module, float]:
    """A copy of the model, with re-estimated statistics for --bn_epoch, and its accuracy on the selection images (%).

    Raises Interrupted if a signal comes; what is saved then is the state before the validation.
    """
    model, rng = copy.deepcopy(state.model), rng_state()

    def check_signal() -> None:
        if state.command.signal is not None:
            set_rng_state(rng)  # re-estimation is in train mode, with dropout
            state.check_signal()

    def batches() -> Iterator[Tensor]:
        epoch = data.batches(args.batch_size, generator_of(args.seed, *job.key, state.epoch, 1))
        for x, _ in islice(epoch, args.bn_batches or None):
            check_signal()
            yield x

    if args.bn_epoch:
        reestimate_statistics(model, batches())
    return model, 100 * evaluate(model, data.selection, data.preprocessing, check_signal=check_signal)["accuracy"]


def run_job(
    args: argparse.Namespace, job: StitchJob, networks: dict[int, nn.Module], parents: dict[int, float], data: Splits, run: Run
) -> dict[str, Any]:
    """Train a job's joint and write its state; the job's record."""
    torch.manual_seed(seed_of(args.seed, *job.key))
    joint = make_joint(args, job.place.channels, job.run)
    stitched = stitch(*(networks[number] for number in job.pair), job.place.index, joint.to(data.device))
    metrics = train(args, job, stitched, data, run)
    state = {name: value.cpu() for name, value in joint.state_dict().items()}
    matrices = {"matrix": joint.matrix().detach().cpu(), "rounded": joint.rounded().cpu()}
    checkpoint.save(state | matrices, job.joint)
    accuracies = [parents[number] for number in job.pair]
    return {
        "pair": list(job.pair),
        "layer": job.place.index,
        "module": job.place.name,
        "inside_block": job.place.inside_block,
        "channels": job.place.channels,
        "run": job.run,
        "joint_parameters": sum(p.numel() for p in joint.parameters()),
        "parents": accuracies,
        "val_accuracy": metrics["best"]["val_accuracy"],
        "penalty": sum(accuracies) / 2 - metrics["accuracy"],
        **metrics,
        **learned(joint),
    }


def learned(joint: Joint) -> dict[str, Any]:
    """Permutation and scales, or sparsity, of a joint that has them."""
    if isinstance(joint, Lasso):
        return {"sparsity": joint.sparsity()}
    if isinstance(joint, Birkhoff):
        permutation, scales = joint.permutation(), joint.weight_scalars
        return {"permutation": permutation.argmax(1).tolist(), "scales": scales.tolist(), "alpha": joint.alpha}
    if isinstance(joint, Wreath):
        return {"permutation": joint.permutation().argmax(1).tolist(), "scales": joint.weight_scalars.exp().tolist()}
    return {}


# ---- the sweep -----------------------------------------------------------------------------------------------------------


def measure_parents(networks: dict[int, nn.Module], data: Splits, run: Run) -> dict[int, float]:
    """Move the networks to the device; their accuracies (% of test images). Raises Interrupted if a signal comes."""
    accuracies = {}
    for number, network in networks.items():
        run.check_signal("before the first joint")
        network.to(data.device, memory_format=torch.channels_last)
        accuracies[number] = accuracy(network, data.test, data.preprocessing)
        run.log(f"network {number}: {accuracies[number]:.2f} % of {len(data.test)} test images")
    return accuracies


def line_of(record: dict[str, Any], n_classes: int) -> str:
    """The metrics of a joint for the log."""
    (first, second), (accuracy1, accuracy2) = record["pair"], record["parents"]
    return (
        f"pair {first}-{second} layer {record['layer']}{'*' * record['inside_block']} run {record['run']}: "
        f"{record['accuracy']:.2f} % of test images (parents {accuracy1:.2f}, {accuracy2:.2f}; "
        f"chance {100 / n_classes:.3g}), penalty {record['penalty']:.2f}"
    )


def report(args: argparse.Namespace, jobs: list[StitchJob], data: Splits, run: Run) -> dict[str, Any]:
    """The result of a sweep; also metrics.csv, a row per epoch, and a picture of each layer's first joint."""
    done, failed = [job for job in jobs if job.done], failures(jobs)
    records = [job.read() for job in done]
    rows = [
        {"pair": f"{job.pair[0]}-{job.pair[1]}", "layer": job.place.index, "run": job.run} | epoch
        for job, record in zip(done, records, strict=True)
        for epoch in record.pop("epochs")
    ]
    if done:
        write_table(run.part / "metrics.csv", rows)
        draw_matrices(done, run)
    seconds = sum(record.pop("seconds", 0.0) for record in records)
    by = "the test images" if args.select == "test" else f"{len(data.selection)} training images that were left out"
    return {
        "script": "cifar10_stitching",
        "name": run.name,
        "arch": args.arch,
        "dataset": args.dataset,
        "kind": kind_of(args),
        "seed": args.seed,
        "zoo": args.zoo,
        "select": args.select,
        "protocol": f"best epoch, and best of a layer's runs, by {by}; accuracies are of the test images",
        "device": str(data.device),
        "training_images": len(data.training),
        "seconds": seconds,
        "layers": by_layer(choose_runs(args.select, records)),
        "cells": records,
        **({"failed": failed} if failed else {}),
    }


def report_table(result: dict[str, Any]) -> str:
    """The penalties as text."""
    lines = [f"{result['kind']}: penalty in % of accuracy, mean and deviation over pairs (* inside a residual block)"]
    for metrics in result["layers"]:
        layer, deviation = f"{metrics['layer']:>3}{'*' if metrics['inside_block'] else ' '}", metrics["deviation"]
        spread = "" if deviation is None else f" +- {deviation:.2f}"
        lines.append(f"  layer {layer} {metrics['penalty']:7.2f}{spread}  (n = {metrics['n']})")
    return "\n".join(lines)


def draw_matrices(jobs: list[StitchJob], run: Run) -> None:
    """matrices.png: the joints of the first pair, as trained and as rounded for evaluation."""
    first = [job for job in reversed(jobs) if (job.pair, job.run) == (jobs[0].pair, jobs[0].run)]
    states = [checkpoint.read(job.joint) for job in first]
    shown = [(f"layer {j.place.index}", s["matrix"].numpy(), s["rounded"].numpy()) for j, s in zip(first, states, strict=True)]
    plotting.plot_matrices(run.part / "matrices.png", run.name, shown)


# ---- figures of several runs ---------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> int:
    """--compare: penalties.csv and .png of several finished runs, accuracy by rank, accuracy by sparsity."""
    results = with_chunks_together(read_results(args.compare, "cifar10_stitching"))
    order = ["full", "permutation", "permutation (cross-validated)", "softsort"]
    results.sort(key=lambda result: (order.index(result["kind"]) if result["kind"] in order else 9, result["kind"]))
    rows = [{"kind": result["kind"], **layer} for result in results for layer in result["layers"]]
    if not rows:
        raise InputError("all joints of these runs failed")
    folder = Path(args.results_dir) / "cifar10_stitching" / f"figures-{results[0]['arch']}-{results[0]['dataset']}"
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "penalties.csv", rows)
    title = f"{results[0]['arch']} on {results[0]['dataset']}"
    paper_figures.plot_penalties(folder / "penalties.png", f"{title}: mean and deviation over pairs", rows)
    for kind, axis in (("rank", "rank"), ("lasso", "sparsity")):
        points = [row for row in rows if row["kind"].split()[0] == kind]
        if kind == "rank":
            points = [row | {"rank": int(row["kind"].split()[1])} for row in points]
        if points:
            baselines = [row for row in rows if row["kind"] in ("full", "permutation")]
            paper_figures.plot_accuracies(folder / f"{axis}.png", title, axis, points, baselines)
    for result in results:
        echo(report_table(result))
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
        print(name)
        return 0
    tune_malloc()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = {"another": "--name NAME", "may_change": zoo_pairs.MAY_CHANGE, "files": ("cells/*", "matrices.png")}
    with Run("cifar10_stitching", name, args, **own) as run:
        pairs = pairs_of(args)
        networks, places = zoo_pairs.load(args, pairs)
        jobs = jobs_of(args, run.part / "cells", pairs, places)
        data = load_data(args, device)
        if run.status == "unfinished":
            check_files(jobs_of(args, run.path / "cells", pairs, places))
        run.open(drawn_pairs=pairs, networks=zoo.fingerprint(networks), data=data.fingerprint)
        (run.part / "cells").mkdir(exist_ok=True)
        checkpoint.save({"name": run.name}, run.last)  # there is something to resume
        run.log(f"{len(pairs)} pairs, {len(places)} layers, {len(jobs)} joints to train: {kind_of(args)}, seed {args.seed}")
        parents = measure_parents(networks, data, run)
        for i, job in pending(run, jobs, retry_failed=args.retry_failed, bar=args.progress):
            with job:
                record = run_job(args, job, networks, parents, data, run)
                job.finish(record)
                run.log(f"[{i}/{len(jobs)}] {line_of(record, len(data.test.classes))}")
        result = report(args, jobs, data, run)
        run.log(report_table(result))
        status = run.finish(result)
    echo(zoo_pairs.where_to_look(run, result))
    return status


if __name__ == "__main__":
    sys.exit(main())
