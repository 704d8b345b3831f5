"""The rotation test (Godfrey et al., NeurIPS 2022): channels are mixed behind a frozen front, and the rest is trained anew.

A permutation with positive scales before a ReLU can be undone by what follows; a rotation cannot. So the accuracy that a
rotation costs, and a permutation with scales does not, shows that the channels of a ReLU network are a basis of its own. The
published run, an mCNN without batch norm and its twin with sigmoids, ten elements of either group at three layers:

    python cifar10_projections.py --repeats=10

leaves its figures in results/cifar10_projections/. README.md says what each of them means.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import paper_figures
from common.datasets import images
from common.datasets.classification import Splits, load_splits
from common.datasets.images import DataError
from common.models import zoo
from common.run import checkpoint, options
from common.run.checkpoint import CheckpointError
from common.run.classifier import RECIPES, accuracy, evaluate, learning_rate, make_optimizer, training_step
from common.run.directory import RunDirectory
from common.run.ending import EXIT_RESUMABLE, has_finished, open_run, refusing, say, surviving_full_disks, tell
from common.run.epochs import Sums
from common.run.interruption import Interrupted, Interruption
from common.run.memory import keep_freed_memory
from common.run.options import at_least, real
from common.run.records import RecordError, read_results, write_json, write_table
from common.seeds import generator_of, seed_of
from common.symmetry.rotations import GROUPS, random_element, transform_layer

ARCHITECTURES = {"relu": "mCNN_k", "sigmoid": "mCNN_k_sigmoid"}
LAYERS = (0, 2, 5, 8)  # convolutions, by their places in the network; the last one is published nowhere
UNNAMED = ("results_dir", "data_dir", "resume", "overwrite", "dry_run", "progress", "name", "draw")
FREE = ("results_dir", "data_dir", "resume", "overwrite", "progress", "dry_run", "draw")  # a test that goes on may have others


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="cifar10_projections.py", description=__doc__)
    paper = parser.add_argument_group("options of the original")
    paper.add_argument("--repeats", type=at_least(1), default=10, help="random elements of each group and layer [%(default)s]")
    paper.add_argument("--progress", action="store_true", help="show a bar")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--activations", nargs="+", choices=tuple(ARCHITECTURES), default=["relu", "sigmoid"], help="[both]")
    own.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="of matrices [all]")
    own.add_argument("--layers", nargs="+", type=int, choices=LAYERS, default=[0, 2, 5], help="convolutions [0 2 5]")
    own.add_argument("--dataset", choices=tuple(images.BY_OPTION), default="cifar10", help="[%(default)s]")
    own.add_argument("--data-dir", metavar="DIR", default="data", help="where the data set lies [%(default)s]")
    own.add_argument("--results-dir", metavar="DIR", default="results", help="where run directories are made [%(default)s]")
    own.add_argument("--name", type=options.run_id, help="of the run [projections]")
    own.add_argument("--recipe", choices=tuple(RECIPES), default="published", help="as of train_zoo.py [%(default)s]")
    own.add_argument("--epochs", type=at_least(1), help="of the network, and again of each rest [by recipe: 50, 12]")
    own.add_argument("--batch-size", type=at_least(2), help="[by recipe: 32, 128]")
    own.add_argument("--lr", type=real(0, 10, above=True), help="highest learning rate [by recipe: 0.001, 0.003]")
    own.add_argument("--width", type=at_least(1, 4096), default=64, help="channels of the first layer [%(default)s]")
    own.add_argument("--seed", type=at_least(0), default=0, help="of weights, split, order and matrices [%(default)s]")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="use N training images, chosen by the seed [all]")
    own.add_argument("--select", choices=("validation", "test"), default="validation", help="which images choose the epoch")
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="[%(default)s]")
    own.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help="go on with a test that was interrupted")
    own.add_argument("--overwrite", action="store_true", help="replace a test of the same name")
    own.add_argument("--dry-run", action="store_true", help="check the options, print the run's name and exit")
    own.add_argument("--draw", metavar="RUN", help="instead: figure and table of a finished test, from its result.json")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """Options that can work together, with what the recipe sets, and the run's name; or the parser's error."""
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a test, --overwrite replaces it: choose one")
    for option in ("activations", "groups", "layers"):
        values = getattr(args, option)
        if len(set(values)) < len(values):
            parser.error(f"--{option} {' '.join(map(str, values))} names one twice")
    parts = [args.name or "projections"]
    for option in ("activations", "groups", "layers"):
        if getattr(args, option) != parser.get_default(option):
            parts.append(".".join([option, *map(str, getattr(args, option))]))
    parts += options.not_defaults(parser, args, (*UNNAMED, "activations", "groups", "layers"))
    name = "-".join(parts)
    options.check_length(parser, name)
    for option, value in RECIPES[args.recipe].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    return args, name


# ---- one cell: a network, or its rest behind a matrix ----------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What is trained at once, and kept in a file of its own: without a group the network that others start from."""

    activation: str
    group: str | None = None
    layer: int = 0
    run: int = 0

    @property
    def stem(self) -> str:
        return self.activation + (f"_{self.group}_layer_{self.layer}_run_{self.run}" if self.group else "")


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All cells, each network before what is made of it. Runs of the identity differ in the order of images alone."""
    cells = []
    for activation in args.activations:
        cells.append(Cell(activation))
        for layer in args.layers:
            for group in args.groups:
                cells += [Cell(activation, group, layer, run) for run in range(args.repeats)]
    return cells


def make_network(args: argparse.Namespace, cell: Cell, folder: Path, device: torch.device) -> nn.Module:
    """What a cell trains: a new network, or a trained one with a matrix in it and all before that frozen."""
    torch.manual_seed(seed_of(args.seed, list(ARCHITECTURES).index(cell.activation)))
    classes = images.N_CLASSES[images.BY_OPTION[args.dataset]]
    network = zoo.make(ARCHITECTURES[cell.activation], classes, args.width)
    if cell.group is not None:
        assert isinstance(network, nn.Sequential)
        network.load_state_dict(torch.load(folder / f"{cell.activation}.pt", weights_only=True))
        n = network[cell.layer].weight.shape[0]
        chance = generator_of(args.seed, GROUPS.index(cell.group), cell.layer, cell.run)
        network = transform_layer(network, cell.layer, random_element(cell.group, n, chance))
    return network.to(device, memory_format=torch.channels_last)


def train(
    args: argparse.Namespace,
    network: nn.Module,
    data: Splits,
    key: tuple[int, ...],
    last: Path,
    interruption: Interruption,
) -> dict[str, Any]:
    """Train what is not frozen; leaves the weights of the best epoch. `key` and the seed decide the order of the images.

    After each epoch all that is needed to go on is in the file `last`, from which a training that was interrupted does go on.
    Raises Interrupted if a signal comes, CheckpointError.
    """
    optimizer = make_optimizer(network, args.recipe, args.lr)
    best: dict[str, Any] = {"accuracy": -math.inf}
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    if last.exists():
        state = checkpoint.load(last, ("model", "optimizer", "best", "epochs"))
        checkpoint.load_model(network, state, last)
        optimizer.load_state_dict(state["optimizer"])
        best, rows = state["best"], state["epochs"]
        began -= state.get("seconds", 0.0)
    for epoch in range(len(rows), args.epochs):
        batches = data.batches(args.batch_size, generator_of(args.seed, *key, epoch))
        means = train_epoch(args, network, optimizer, batches, epoch, len(data.training) // args.batch_size, interruption)
        selected = evaluate(network, data.selection, data.preprocessing, args.precision, interruption)
        if selected is None:
            raise Interrupted
        if not math.isfinite(means["loss"]):
            raise SystemExit(f"the loss in epoch {epoch + 1} is not finite: a smaller --lr may help")
        figures = {"train_loss": means["loss"], "train_accuracy": 100 * means["accuracy"], "lr": means["lr"]}
        rows.append({"epoch": epoch + 1, **figures, "val_loss": selected["loss"], "val_accuracy": 100 * selected["accuracy"]})
        if selected["accuracy"] > best["accuracy"]:
            weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            best = {"accuracy": selected["accuracy"], "epoch": epoch + 1, "weights": weights}
        state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "best": best, "epochs": rows}
        checkpoint.save(state | {"seconds": time.monotonic() - began}, last)
    network.load_state_dict(best["weights"])
    seconds = time.monotonic() - began
    return {"best_epoch": best["epoch"], "val_accuracy": 100 * best["accuracy"], "epochs": rows, "seconds": seconds}


def train_epoch(
    args: argparse.Namespace,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    epoch: int,
    n_batches: int,
    interruption: Interruption,
) -> dict[str, float]:
    """Mean loss and accuracy while it was trained on, and the rate of the last step. Raises Interrupted."""
    network.train()
    sums, rate = Sums(), 0.0
    for batch, (x, labels) in enumerate(batches):
        interruption.check()
        rate = learning_rate(args.recipe, args.lr, epoch * n_batches + batch, n_batches, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums.add(len(x), training_step(network, optimizer, x, labels, args.precision))
    return sums.means() | {"lr": rate}


def run_cell(args: argparse.Namespace, cell: Cell, data: Splits, folder: Path, interruption: Interruption) -> dict[str, Any]:
    """Train a cell and write what came out: figures as .json, of a network that others start from also the weights."""
    network = make_network(args, cell, folder, data.device)
    # the same images for all groups, so that they differ in the matrix alone
    last = folder / f"{cell.stem}.last.pkl"
    found = train(args, network, data, (cell.layer, cell.run, int(cell.group is not None)), last, interruption)
    test = accuracy(network, data.test, data.preprocessing)
    figures = {
        "activation": cell.activation,
        "group": cell.group,
        "layer": cell.layer,
        "run": cell.run,
        "accuracy": test,
        **found,
    }
    if cell.group is None:
        checkpoint.save(
            {name: value.cpu().contiguous() for name, value in network.state_dict().items()}, folder / f"{cell.stem}.pt"
        )
    write_json(folder / f"{cell.stem}.json", figures)
    last.unlink()
    return figures


# ---- the test --------------------------------------------------------------------------------------------------------------


def sweep(args: argparse.Namespace, cells: list[Cell], data: Splits, run: RunDirectory, interruption: Interruption) -> bool:
    """Train all cells that are not there yet; False if a signal came first."""
    folder = run.path / "cells"
    folder.mkdir(exist_ok=True)
    checkpoint.save({"name": run.name}, run.last)  # there is something to go on with
    chance = 100 / len(data.test.classes)
    for i, cell in enumerate(tqdm(cells, disable=None if args.progress else True)):
        if (folder / f"{cell.stem}.json").exists():
            continue
        try:
            found = run_cell(args, cell, data, folder, interruption)
        except Interrupted:
            return False
        except CheckpointError as error:
            raise SystemExit(f"{error}; without the file, that training begins again") from None
        baseline = read_cell(folder, Cell(cell.activation))["accuracy"]
        what = f"{cell.group} behind layer {cell.layer}, run {cell.run}" if cell.group else "untouched"
        tell(
            run,
            f"[{i + 1}/{len(cells)}] {cell.activation}, {what}: {found['accuracy']:.2f} % of test images "
            f"(untouched {baseline:.2f}, chance {chance:.3g}), penalty {baseline - found['accuracy']:.2f}",
        )
        if interruption.signal:
            return False
    return True


def read_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    return json.loads((folder / f"{cell.stem}.json").read_text())


def report(args: argparse.Namespace, cells: list[Cell], data: Splits, run: RunDirectory) -> dict[str, Any]:
    """All figures; also metrics.csv, a row per epoch."""
    found = [read_cell(run.path / "cells", cell) for cell in cells]
    seconds = sum(figures.pop("seconds", 0.0) for figures in found)
    rows = []
    for figures in found:
        of_cell = {name: figures[name] for name in ("activation", "group", "layer", "run")}
        rows += [of_cell | row for row in figures.pop("epochs")]
    write_table(run.path / "metrics.csv", rows)
    penalties = penalties_of(args, found)
    chosen_by = (
        f"{len(data.selection)} training images that were left out" if args.select == "validation" else "the test images"
    )
    return {
        "script": "cifar10_projections",
        "name": run.name,
        "dataset": args.dataset,
        "seed": args.seed,
        "protocol": f"best epoch by {chosen_by}; accuracies are of the test images",
        "device": str(data.device),
        "training_images": len(data.training),
        "seconds": seconds,
        "baselines": {figures["activation"]: figures["accuracy"] for figures in found if figures["group"] is None},
        "penalties": penalties,
        "cells": found,
    }


def draw(result: dict[str, Any], folder: Path) -> None:
    """penalties.csv and penalties.png, from a test's result alone."""
    rows = result["penalties"]
    write_table(folder / "penalties.csv", rows)
    title = f"rotation test on {result['dataset']}: mean and deviation of {rows[0]['n']}"
    bars = [row | {"kind": f"{row['activation']}, {row['group']}", "inside_block": False} for row in rows]
    paper_figures.plot_penalties(folder / "penalties.png", title, bars)


def draw_again(parser: argparse.ArgumentParser, place: str) -> int:
    """--draw: the figure and the table of a finished test."""
    with refusing(parser, RecordError):
        (result,) = read_results([place], "cifar10_projections")
    with refusing(parser):
        draw(result, Path(place))
    say(report_table(result))
    return 0


def penalties_of(args: argparse.Namespace, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each activation, layer and group: accuracy that was lost, against the untouched network and against the identity.

    The identity, too, has been trained twice as long as the untouched network. Means and deviations (n - 1) over runs; against
    the identity the runs are paired, as they saw the same images in the same order.
    """
    by_cell = {(of["activation"], of["group"], of["layer"], of["run"]): of["accuracy"] for of in found}
    rows = []
    for activation in args.activations:
        baseline = by_cell[activation, None, 0, 0]
        for layer in args.layers:
            for group in args.groups:
                own = np.array([by_cell[activation, group, layer, run] for run in range(args.repeats)])
                row = {"activation": activation, "layer": layer, "group": group, "n": len(own), "accuracy": float(own.mean())}
                row |= {"penalty": float((baseline - own).mean()), "deviation": deviation_of(own)}
                if "identity" in args.groups:
                    control = np.array([by_cell[activation, "identity", layer, run] for run in range(args.repeats)])
                    lost = control - own
                    row |= {"penalty_to_identity": float(lost.mean()), "deviation_to_identity": deviation_of(lost)}
                rows.append(row)
    return rows


def deviation_of(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def report_table(result: dict[str, Any]) -> str:
    """The penalties as text."""
    lines = [
        "penalty in % of accuracy against the untouched network (and against the identity, trained as long): mean, deviation"
    ]
    for row in result["penalties"]:
        deviation = "" if row["deviation"] is None else f" +- {row['deviation']:.2f}"
        to_identity = f"  ({row['penalty_to_identity']:.2f})" if "penalty_to_identity" in row else ""
        lines.append(
            f"  {row['activation']:>8} layer {row['layer']} {row['group']:>10} {row['penalty']:7.2f}{deviation}{to_identity}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name = parse(parser, argv)
    if args.draw is not None:
        return draw_again(parser, args.draw)
    if args.dry_run:
        print(name)
        return 0
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        Interruption() as interruption,
        RunDirectory(args.results_dir, "cifar10_projections", name, another="--name NAME") as run,
    ):
        with refusing(parser, DataError):
            if has_finished(run, args, FREE):
                return 0
            data = load_splits(
                images.BY_OPTION[args.dataset],
                args.data_dir,
                device,
                seed=args.seed,
                batch_size=args.batch_size,
                subset=args.subset,
                select=args.select,
            )
            open_run(run, args, {"data": data.fingerprint}, FREE)
        with surviving_full_disks(run):
            cells = cells_of(args)
            tell(run, f"{len(cells)} trainings on {len(data.training)} images, device {device}, seed {args.seed}")
            if not sweep(args, cells, data, run, interruption):
                tell(run, f"stopped by {interruption.signal}: --resume goes on from here")
                return EXIT_RESUMABLE
            result = report(args, cells, data, run)
            draw(result, run.path)
            tell(run, report_table(result))
            run.finish(result)
    say(f"figures: {run.final / 'result.json'}, {run.final / 'penalties.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
