"""The rotation test (Godfrey et al., NeurIPS 2022): channels are mixed behind a frozen front, and the rest is trained again.

The layers behind a ReLU can undo a permutation with positive scales before it, but not a rotation. If a
rotation costs accuracy and a permutation with scales does not, the channels of the network are a privileged basis. The
published run: an mCNN without batch norm, and the same network with sigmoids; ten matrices of each group at three layers:

    python cifar10_projections.py --repeats=10

leaves its results in results/cifar10_projections/. docs/alignment_and_rotations.md says what each option and metric means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import checkpoint
from common.datasets.classification import Splits
from common.models import zoo
from common.precision import set_backend_flags
from common.run import options
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.jobs import pending
from common.run.memory import tune_malloc
from common.run.metrics import Meter
from common.run.options import at_least
from common.run.records import RecordError, read_json, read_results, write_table
from common.run.run import Run
from common.run.state import State
from common.run.workers import Worker, share
from common.seeds import generator_of, seed_of
from common.symmetry import pictures
from common.symmetry.rotations import GROUPS, random_element, transform_layer
from common.zoo import training
from common.zoo.sweeps import CheckedJob, make_result, open_run, read_records, selection_of, spread
from common.zoo.training import RECIPES, BestEpoch, describe_epoch, evaluate, make_optimizer, n_classes, splits_of, train_epoch

ARCHITECTURES = {"relu": "mCNN_k", "sigmoid": "mCNN_k_sigmoid"}
LAYERS = (0, 2, 5, 8)  # indices of convolutions; the last one has no published results
LISTS = ("activations", "groups", "layers")  # options with several values
MAY_CHANGE_ON_RESUME = (*options.RUN_OPTIONS, "data_dir", "draw")
NOT_IN_NAME = (*MAY_CHANGE_ON_RESUME, *LISTS, "name")
FILES = ("cells/*", "penalties.csv", "penalties.png")


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="cifar10_projections.py", description=__doc__)
    paper = parser.add_argument_group("options of the original", "example: --repeats 10")
    paper.add_argument(
        "--repeats", type=at_least(1), default=10, metavar="N", help="random matrices of each group and layer [%(default)s]"
    )
    paper.add_argument("--progress", action="store_true", help="show progress bars also where there is no terminal")
    own = parser.add_argument_group("options of this suite", "example: --activations relu --layers 5 --recipe fast")
    own.add_argument(
        "--activations",
        nargs="+",
        choices=tuple(ARCHITECTURES),
        default=["relu", "sigmoid"],
        help="activation functions [both]",
    )
    own.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of matrices [all]")
    own.add_argument("--layers", nargs="+", type=int, choices=LAYERS, default=[0, 2, 5], help="convolutions [0 2 5]")
    training.add_data_options(own)
    own.add_argument("--name", type=options.run_id, help="name of the run [projections]")
    training.add_recipe_options(own)
    own.add_argument(
        "--width", type=at_least(1, 4096), default=64, metavar="N", help="channels of the first convolution [%(default)s]"
    )
    own.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of all random draws [%(default)s]")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="use N training images, chosen by the seed [all]")
    own.add_argument(
        "--select", choices=("validation", "test"), default="validation", help="images that choose the epoch [%(default)s]"
    )
    options.add_device_options(own)
    options.add_jobs_option(own, "trainings")
    options.add_tracker_options(own)
    own.add_argument("--retry-failed", action="store_true", help="train again what has failed")
    options.add_run_options(own, "test")
    own.add_argument("--draw", metavar="RUN", help="train nothing: figure and table of a finished test")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """Options that can work together, with what the recipe sets, and the run's name; or the parser's error."""
    args = parser.parse_args(argv)
    parts = [args.name or "projections"]
    for option in LISTS:
        values = getattr(args, option)
        if len(set(values)) < len(values):
            parser.error(f"--{option} {' '.join(map(str, values))} names one twice")
        if values != parser.get_default(option):
            parts.append(".".join([option, *map(str, values)]))
    name = "-".join([*parts, *options.not_defaults(parser, args, NOT_IN_NAME)])
    options.check(parser, args, name)
    for option, value in RECIPES[args.recipe].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    training.check_subset(parser, args)
    return args, name


# ---- one job: a network, or its rest behind a matrix -----------------------------------------------------------------------


class RotationJob(CheckedJob):
    """The training of a network (without a group) or, from its weights, of the rest of it behind a random matrix."""

    def __init__(self, folder: Path, activation: str, group: str | None = None, layer: int = 0, run: int = 0):
        name = activation + (f"_{group}_layer_{layer}_run_{run}" if group else "")
        super().__init__(folder, name, needs=(activation,) if group else (), keeps=() if group else ("pt",))
        self.activation, self.group, self.layer, self.run = activation, group, layer, run
        self.network, self.weights = folder / f"{activation}.json", folder / f"{activation}.pt"
        self.fields = {"activation": activation, "group": group, "layer": layer, "run": run}
        self.pattern = {**self.fields, "accuracy": float, "epochs": [dict, ...]}


def make_jobs(args: argparse.Namespace, folder: Path) -> list[RotationJob]:
    """All trainings, each network before its rests. Runs of the identity differ only in the order of images."""
    jobs = []
    for activation in args.activations:
        jobs.append(RotationJob(folder, activation))
        for layer, group, run in product(args.layers, args.groups, range(args.repeats)):
            jobs.append(RotationJob(folder, activation, group, layer, run))
    return jobs


def make_network(args: argparse.Namespace, job: RotationJob, device: torch.device) -> nn.Module:
    """A new network, or a trained one with a random matrix in it and all before that frozen."""
    torch.manual_seed(seed_of(args.seed, list(ARCHITECTURES).index(job.activation)))
    network = zoo.make(ARCHITECTURES[job.activation], n_classes(args), args.width)
    if job.group is not None:
        assert isinstance(network, nn.Sequential)
        checkpoint.load_model(network, checkpoint.read(job.weights), job.weights)
        n = network[job.layer].weight.shape[0]
        generator = generator_of(args.seed, GROUPS.index(job.group), job.layer, job.run)
        network = transform_layer(network, job.layer, random_element(job.group, n, generator))
    return network.to(device, memory_format=torch.channels_last)


def train(args: argparse.Namespace, data: Splits, run: Run | Worker, job: RotationJob) -> None:
    """Train the parameters that are not frozen; write the record of the best epoch and, of a network, the weights.

    Raises Interrupted, Failed, CheckpointError.
    """
    network = make_network(args, job, data.device)
    optimizer = make_optimizer(network, args.recipe, args.lr)
    best, meter, clock = BestEpoch(), Meter(), Clock()
    parts = {"optimizer": optimizer, "best": best, "meter": meter, "clock": clock}
    state = State(job.last, run.options, run, data=data.fingerprint, model=network, **parts)
    state.extra["epochs"] = []
    if job.last.exists():
        state.resume()
    # the same images for all groups, so that they differ in the matrix alone
    key = (args.seed, job.layer, job.run, int(job.group is not None))
    while state.epoch < args.epochs:
        means, selected = train_epoch(args, data, state, optimizer, meter, key, job.name)
        row = {"epoch": state.epoch + 1, "train_loss": means["loss"], "train_accuracy": 100 * means["accuracy"]}
        row |= {"lr": optimizer.param_groups[0]["lr"], "val_loss": selected["loss"], "val_accuracy": 100 * selected["accuracy"]}
        state.extra["epochs"].append(row)
        better = best.offer(network, selected["accuracy"], epoch=row["epoch"])
        run.trackers.log(row, row["epoch"], group=job.name)
        chance = 1 / n_classes(args)
        run.log(describe_epoch(job.name, state, clock.used(), row["lr"], args.select, means, selected, chance, better))
        meter.reset()
        state.end_epoch()
    network.load_state_dict(best.weights)
    test = evaluate(network, data.test, data.preprocessing, check_signal=state.check_signal)
    if job.group is None:
        checkpoint.save(best.plain_weights(), job.weights)
    record = job.fields | {"accuracy": 100 * test["accuracy"], "best_epoch": best.metrics["epoch"]}
    record |= {"val_accuracy": 100 * best.accuracy, "epochs": state.extra["epochs"], "seconds": clock.used()}
    job.finish(record)


def describe(job: RotationJob, chance: float) -> str:
    """A job that is done, for the log."""
    accuracy, baseline = job.read()["accuracy"], read_json(job.network)["accuracy"]
    change = f"{job.group} behind layer {job.layer}, run {job.run}" if job.group else "untouched"
    return (
        f"{job.activation}, {change}: {accuracy:.2f} % of test images (untouched {baseline:.2f}, chance {chance:.3g}), "
        f"penalty {baseline - accuracy:.2f}"
    )


def train_all(
    args: argparse.Namespace, data: Splits, run: Run | Worker, jobs: Iterable[tuple[int, RotationJob]], n: int
) -> None:  # fmt: skip
    """Train the networks of jobs that are locked, some of n."""
    for i, job in jobs:
        with job:
            train(args, data, run, job)
            run.log(f"[{i}/{n}] {describe(job, 100 / len(data.test.classes))}")


def work(worker: Worker, args: argparse.Namespace, n: int) -> None:
    """Train networks in one of several processes."""
    set_backend_flags(args.precision, deterministic=args.deterministic)
    train_all(args, splits_of(args, options.device_of(args)), worker, worker.jobs(), n)


# ---- the test --------------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, jobs: Sequence[RotationJob], data: Splits, run: Run) -> dict[str, Any]:
    """The result, of all jobs that are done; also writes metrics.csv, a row an epoch."""
    records, seconds = read_records(jobs, run.part / "metrics.csv", "activation", "group", "layer", "run")
    selection = selection_of(args.select, len(data.selection))
    return make_result(
        run, ("dataset", "seed"), jobs, device=str(data.device), training_images=len(data.training), seconds=seconds,
        protocol=f"best epoch by {selection}; accuracies are of the test images",
        baselines={record["activation"]: record["accuracy"] for record in records if record["group"] is None},
        penalties=penalties_of(args, records), cells=records,
    )  # fmt: skip


def penalties_of(args: argparse.Namespace, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy lost by activation, layer and group, against the untouched network and against the identity.

    Like all rests, the identity was trained twice as long as the untouched network. Means and deviations (n - 1) over runs;
    against the identity runs are paired, since they saw the same images in the same order. Missing runs are left out.
    """
    accuracies = {(r["activation"], r["group"], r["layer"], r["run"]): r["accuracy"] for r in records}
    rows = []
    for activation, layer, group in product(args.activations, args.layers, args.groups):
        runs = [run for run in range(args.repeats) if (activation, group, layer, run) in accuracies]
        if not runs:
            continue
        own = np.array([accuracies[activation, group, layer, run] for run in runs])
        penalties = accuracies[activation, None, 0, 0] - own
        row = {"activation": activation, "layer": layer, "group": group, "n": len(runs), "accuracy": float(own.mean())}
        row |= {"penalty": float(penalties.mean()), "deviation": deviation(own)}
        control = np.array([accuracies.get((activation, "identity", layer, run), np.nan) for run in runs])
        penalties = (control - own)[~np.isnan(control)]
        if len(penalties):
            row |= {"penalty_to_identity": float(penalties.mean()), "deviation_to_identity": deviation(penalties)}
        rows.append(row)
    return rows


def deviation(values: np.ndarray) -> float | None:
    """Standard deviation (n - 1); None for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write penalties.csv and penalties.png, from a test's result alone."""
    rows = result["penalties"]
    write_table(folder / "penalties.csv", rows)
    n = sorted({row["n"] for row in rows})
    title = f"rotation test on {result['dataset']}: mean and deviation of {n[0]}" + (f" to {n[-1]}" if len(n) > 1 else "")
    bars = [row | {"kind": f"{row['activation']}, {row['group']}", "inside_block": False} for row in rows]
    pictures.plot_penalties(folder / "penalties.png", title, bars)


def draw_again(place: str) -> int:
    """--draw: the figure and the table of a finished test."""
    with Command("cifar10_projections"):
        (result,) = read_results([place], "cifar10_projections")
        if not result["penalties"]:
            raise RecordError(f"{place} has no penalties: its trainings failed")
        draw(result, Path(place))
    echo(report_table(result))
    return 0


def report_table(result: dict[str, Any]) -> str:
    """The penalties as text."""
    lines = [
        "penalty in % of accuracy against the untouched network (and against the identity, trained as long): mean, deviation"
    ]
    for row in result["penalties"]:
        place = f"{row['activation']:>8} layer {row['layer']} {row['group']:>10}"
        to_identity = f"  ({row['penalty_to_identity']:.2f})" if "penalty_to_identity" in row else ""
        lines.append(f"  {place} {row['penalty']:7.2f}{spread(row['deviation'], 2)}{to_identity}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name = parse(parser, argv)
    if args.draw is not None:
        return draw_again(args.draw)
    if args.dry_run:
        echo(name)
        return 0
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    with Run("cifar10_projections", name, args, another="--name NAME", may_change=MAY_CHANGE_ON_RESUME, files=FILES) as run:
        data = splits_of(args, options.device_of(args))
        jobs = open_run(run, lambda folder: make_jobs(args, folder / "cells"), data=data.fingerprint)
        run.log(f"{len(jobs)} trainings on {len(data.training)} images, device {data.device}, seed {args.seed}")
        if args.jobs > 1:
            share(run, jobs, args, work, len(jobs), retry_failed=args.retry_failed)
        else:
            left = pending(run, jobs, retry_failed=args.retry_failed, bar=args.progress)
            train_all(args, data, run, left, len(jobs))
        result = report(args, jobs, data, run)
        if result["penalties"]:
            draw(result, run.part)
            run.log(report_table(result))
        status = run.finish(result)
    echo(f"figures: {run.final / 'result.json'}" + (f", {run.final / 'penalties.png'}" if result["penalties"] else ""))
    return status


if __name__ == "__main__":
    sys.exit(main())
