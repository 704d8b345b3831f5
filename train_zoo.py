"""A zoo: networks of one architecture that differ only in random numbers (Godfrey et al., NeurIPS 2022, arXiv 2205.14258).

Stitching and alignment (cifar10_*.py) compare its members. The published command, for a quarter of 100 networks
(91.4 % on CIFAR-10):

    python train_zoo.py --num_models=100 --arch=mCNN --num_chunks=4 --chunk=0

writes 0.pt to 24.pt to results/zoo/cifar10-mCNN/, each a plain state dict under the original's keys, with a record (.json) and
a row per epoch (.csv). The same line again trains what is missing. docs/zoo_and_stitching.md explains all options and metrics.

Exit status 0: all requested models are finished, or other processes train them, as the last line says.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, parallel
from common.datasets.classification import Splits
from common.models import cnn, zoo
from common.precision import set_backend_flags
from common.run import options
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.jobs import failures, pending
from common.run.lock import is_locked
from common.run.memory import tune_malloc
from common.run.metrics import Meter, Metrics
from common.run.options import at_least, check_same_options
from common.run.records import RecordError
from common.run.run import RunError, environment
from common.run.state import State
from common.run.trackers import Trackers
from common.run.workers import Worker, share
from common.seeds import seed_everything, seed_of
from common.zoo import training
from common.zoo.sweeps import CheckedJob, fits
from common.zoo.training import RECIPES, BestEpoch, describe_epoch, evaluate, make_optimizer, n_classes, splits_of, train_epoch

# options that do not make another model
NOT_IN_NAME = (*options.RUN_OPTIONS, "num_models", "num_chunks", "chunk", "data_dir", "compile", "out")
PROTOCOLS = {
    "validation": "the epoch with the highest accuracy on the validation images, measured once on the test images",
    "test": "as published: the epoch with the highest accuracy on the test images, and that accuracy",
}
HINTS = "--overwrite replaces it, another --out keeps it"


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="train_zoo.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper", "example: --num_models 100 --arch mCNN --num_chunks 4 --chunk 0")
    paper.add_argument("--num_models", type=at_least(1, 10**6), default=1, metavar="INT", help="size of the zoo [%(default)s]")
    paper.add_argument("--arch", choices=zoo.ARCHITECTURES, help="architecture of all models (required)")
    paper.add_argument("--progress", action="store_true", help="show progress bars also where there is no terminal")
    paper.add_argument("--num_chunks", type=at_least(1, 10**6), metavar="INT", help="jobs that share the models of the zoo [1]")
    paper.add_argument("--chunk", type=at_least(0), metavar="INT", help="number of this job, from 0 [0]")
    own = parser.add_argument_group("options of this suite", "example: --dataset fashionmnist --recipe fast --width 8 --resume")
    training.add_data_options(own)
    training.add_recipe_options(own)
    own.add_argument(
        "--select", choices=("validation", "test"), default="validation", help="images that choose the epoch [%(default)s]"
    )
    own.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed; each model has its own from it [%(default)s]"
    )
    own.add_argument("--width", type=at_least(1, 4096), metavar="N", help="channels of the first convolution [64, cw: 512]")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="use N training images, chosen by the seed [all]")
    options.add_device_options(own)
    options.add_jobs_option(own, "models")
    own.add_argument("--compile", action="store_true", help="torch.compile the network")
    options.add_tracker_options(own)
    own.add_argument("--out", metavar="PATH", help="directory of the zoo [results/zoo/NAME]")
    own.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help="resume interrupted models")
    own.add_argument("--retry-failed", action="store_true", help="train again the models that have failed")
    own.add_argument("--overwrite", action="store_true", help="replace existing models")
    own.add_argument("--dry-run", action="store_true", help="check the options, print the zoo's directory and models, exit")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options that can work together, with what the recipe sets, or the parser's error."""
    args = parser.parse_args(argv)
    if args.arch is None:
        parser.error(f"--arch is missing: choose from {', '.join(zoo.ARCHITECTURES)}")
    if args.width is not None and args.arch not in zoo.CNNS:
        parser.error(f"--width: {args.arch} has no width to choose, {', '.join(zoo.CNNS)} have")
    if (args.num_chunks is None) != (args.chunk is None):
        parser.error("--num_chunks and --chunk go together")
    if args.num_chunks is not None and args.chunk >= args.num_chunks:
        parser.error(f"--chunk {args.chunk} is beyond --num_chunks {args.num_chunks}: chunks count from 0")
    defaults = RECIPES[args.recipe] | {"width": cnn.WIDTHS.get(args.arch)}
    for name, value in defaults.items():
        if getattr(args, name) in (None, value):
            setattr(args, name, None)  # not in the name
    name = "-".join([args.dataset, args.arch, *options.not_defaults(parser, args, (*NOT_IN_NAME, "dataset", "arch"))])
    options.check(parser, args, name)
    args.out = args.out or str(Path("results") / "zoo" / name)
    reason = options.name_error(Path(args.out).name)
    if reason or not args.out.isprintable():
        parser.error(f"--out {args.out!r} cannot be a zoo's directory: {reason or 'it has characters that cannot be printed'}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    training.check_subset(parser, args)
    return args


def models_of_chunk(args: argparse.Namespace) -> range:
    """The numbers of the models that this job trains."""
    return range(args.num_models)[parallel.chunk(args.num_models, args.chunk or 0, args.num_chunks or 1)]


# ---- one model -----------------------------------------------------------------------------------------------------------


class ZooJob(CheckedJob):
    """A model of the zoo. It is also done if only its weights are there, trained elsewhere; not if it is to be replaced."""

    def __init__(self, args: argparse.Namespace, index: int):
        super().__init__(Path(args.out), str(index))
        self.weights, self.metrics = (self.folder / f"{index}.{kind}" for kind in ("pt", "csv"))
        self.trackers = Trackers(args, self.folder / f"{index}.trackers", f"{self.folder.name}-{index}")
        self.options = {name: value for name, value in vars(args).items() if name not in NOT_IN_NAME}
        self.index, self.seed, self.replaced = index, seed_of(args.seed, index), args.overwrite
        self.pattern = {"options": dict, "data": str, "epochs": int}

    @property
    def done(self) -> bool:
        return not self.replaced and self.weights.exists() and (self.record.exists() or not self.last.exists())

    def check(self, args: argparse.Namespace) -> None:
        """Raises InputError if files that are there are damaged, or do not fit the options."""
        if self.replaced:
            return
        if not any(path.exists() for path in (self.weights, self.last, self.failed)):
            for path in (self.record, self.metrics, self.trackers.folder):
                if path.exists():
                    raise RunError(f"{path} is there without its model; {HINTS}")
        if self.weights.exists() and self.record.exists():
            record = self.read()
            self._compare(record, self.weights)
            self._check_metrics(record["epochs"])
        elif self.last.exists() and not is_locked(self.lock):
            state = checkpoint.read(self.last)
            self._compare(state, self.last)
            progress = state.get("progress")  # State.resume refuses what is no tuple of three numbers
            whole = isinstance(progress, tuple) and fits(list(progress), [int, int, int])
            self._check_metrics(progress[0] if whole else 0)
            if not (args.resume or args.retry_failed):
                raise RunError(f"{self.last} is there, of a model in training: --resume continues it, {HINTS}")
        elif self.weights.exists() and not self.last.exists():
            there = zoo.load(self.weights, args.arch).state_dict()
            with torch.device("meta"):
                own = make_model(args).state_dict()
            if why_not := zoo.difference(there, own):
                raise RunError(f"{self.weights} is of another model: {why_not}; {HINTS}")

    def _compare(self, content: Any, path: Path) -> None:
        noted = content.get("options") if isinstance(content, dict) else None
        if not isinstance(noted, dict):
            raise RecordError(f"{path} is of another version, or damaged: no options are noted; {HINTS}")
        check_same_options(noted, self.options, f"{path} was made", HINTS)

    def _check_metrics(self, epochs: int) -> None:
        """Raises RecordError if the table, where it is, lacks an epoch that is done. (A resume cuts off what follows.)"""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(errors="replace").splitlines() if self.metrics.is_file() else []
        rows = [line.split(",") for line in lines[: epochs + 1]]
        whole = [row[0] for row in rows] == ["epoch", *map(str, range(1, epochs + 1))]
        if not self.metrics.is_file() or (epochs and not (whole and len(set(map(len, rows))) == 1)):
            raise RecordError(f"{self.metrics} is damaged; {HINTS}")

    def remove(self) -> None:
        """Remove the files. The record comes after the weights, which without it would look like trained elsewhere."""
        for path in (self.weights, self.last, self.record, self.metrics):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.trackers.folder, ignore_errors=True)
        self.replaced = False


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    return zoo.make(args.arch, n_classes(args), args.width)


def train(args: argparse.Namespace, data: Splits, command: Command, job: ZooJob) -> None:
    """Train a model to its last epoch and write its files. Raises Interrupted, Failed, CheckpointError."""
    seed_everything(job.seed)
    model = make_model(args).to(data.device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(model, args.recipe, args.lr)
    columns = ("epoch", "step", "seconds", "lr", "train_loss", "train_accuracy")
    metrics = Metrics(job.metrics, (*columns, f"{args.select}_loss", f"{args.select}_accuracy"), job.trackers)
    best, meter, clock = BestEpoch(), Meter(), Clock()
    parts = {"optimizer": optimizer, "best": best, "meter": meter, "metrics": metrics, "clock": clock}
    state = State(job.last, job.options, command, data=data.fingerprint, model=model, **parts)
    if job.last.exists():
        state.resume()
    command.begun = True
    if state.step == 0:
        state.save()
    job.trackers.open()
    title, chance = f"model {job.index:>3}", 1 / n_classes(args)
    while state.epoch < args.epochs:
        means, selected = train_epoch(args, data, state, optimizer, meter, (job.seed,), title)
        row = {"epoch": state.epoch + 1, "step": state.step, "seconds": clock.used(), "lr": optimizer.param_groups[0]["lr"]}
        better = best.offer(model, selected["accuracy"], epoch=row["epoch"], loss=selected["loss"], train=means)
        row |= {f"train_{name}": value for name, value in means.items()}
        metrics.append(row | {f"{args.select}_{name}": value for name, value in selected.items()})
        command.log(describe_epoch(title, state, row["seconds"], row["lr"], args.select, means, selected, chance, better))
        meter.reset()
        state.end_epoch()
    model.load_state_dict(best.weights)
    test = {"loss": best.metrics["loss"], "accuracy": best.accuracy}
    if args.select != "test":
        test = evaluate(model, data.test, data.preprocessing, args.precision, state.check_signal)
    checkpoint.save(best.plain_weights(), job.weights)
    record = make_record(args, data, job, state, best, test, clock.used())
    job.finish(record)
    command.log(
        f"{title}  finished after {record['seconds'] / 60:.2f} min: test accuracy {test['accuracy']:.4f} "
        f"(epoch {record['best_epoch']}, chance {chance:g}): {job.weights}"
    )


def make_record(
    args: argparse.Namespace, data: Splits, job: ZooJob, state: State, best: BestEpoch, test: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The record of a model that is done."""
    number_of = {split: len(getattr(data, split)) for split in ("training", "selection", "test")}
    selected = {"loss": best.metrics["loss"], "accuracy": best.accuracy}
    record = {"script": "train_zoo", "model": job.index, "seed": job.seed, "options": job.options}
    record |= {"parameters": sum(p.numel() for p in state.model.parameters()), "protocol": PROTOCOLS[args.select]}
    record |= {"epochs": state.epoch, "best_epoch": best.metrics["epoch"], "steps": state.step, "seconds": seconds}
    record |= {"images": number_of, "chance_accuracy": 1 / n_classes(args), "data": data.fingerprint}
    # training: while it was trained on, so augmented, and with the weights of each step
    record |= {"training": best.metrics["train"], "validation": selected if args.select == "validation" else None, "test": test}
    return record | environment(options.device_of(args))


# ---- the zoo -------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    jobs = [ZooJob(args, index) for index in models_of_chunk(args)]
    if args.dry_run:
        echo(f"{args.out}: models {', '.join(job.name for job in jobs) or 'none'}")
        return 0
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    device = options.device_of(args)
    with Command("train_zoo") as command:
        for job in jobs:
            job.check(args)
        if all(job.done for job in jobs):
            clear_up(jobs)
            echo(f"all models of {args.out} that were asked for are there: nothing to do")
            return 0
        data = splits_of(args, device)
        command.log(
            f"{args.out}: {len(jobs)} models, {sum(job.done for job in jobs)} of them finished; {len(data.training)} training, "
            f"{len(data.selection)} {args.select} images on {device}"
        )
        for job in jobs:
            if job.done and job.record.exists():
                check_same_options(job.read(), {"data": data.fingerprint}, f"{job.record} was made", HINTS)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for job in jobs:  # all at first: a resume then knows what is left to be trained
            if job.replaced and job.take():
                job.remove()
                job.release()
        retry_failed = args.retry_failed or args.overwrite
        if args.jobs > 1:
            share(command, jobs, args, work, retry_failed=retry_failed)
        else:
            train_all(args, data, command, pending(command, jobs, retry_failed=retry_failed, bar=args.progress))
    if failed := failures(jobs):
        echo(f"{len(failed)} of {len(jobs)} models failed ({', '.join(failed)}): --retry-failed repeats them")
    if left := [job.name for job in jobs if not job.done and job.name not in failed]:
        number = f"{len(left)} of {len(jobs)} models are left to other processes ({', '.join(left)})"
        echo(f"{number}: the same line again tells when they are done")
    return 1 if failed else 0


def train_all(args: argparse.Namespace, data: Splits, command: Command, jobs: Iterable[tuple[int, ZooJob]]) -> None:
    """Train the models of jobs that are locked."""
    for _, job in jobs:
        with job, contextlib.closing(job.trackers):
            train(args, data, command, job)


def work(worker: Worker, args: argparse.Namespace) -> None:
    """Train models in one of several processes."""
    set_backend_flags(args.precision, deterministic=args.deterministic)
    train_all(args, splits_of(args, options.device_of(args)), worker, worker.jobs())


def clear_up(jobs: list[ZooJob]) -> None:
    """Remove the files that a killed process has left of models that are done."""
    for job in jobs:
        if (job.last.exists() or job.lock.exists()) and job.take():
            job.last.unlink(missing_ok=True)
            job.release()


if __name__ == "__main__":
    sys.exit(main())
