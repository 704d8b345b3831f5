"""A zoo: networks of one architecture that differ in random numbers alone (Godfrey et al., NeurIPS 2022, arXiv 2205.14258).

Stitching and alignment (cifar10_*.py) compare its members. The published line, a quarter of 100 networks of 91.4 % on CIFAR-10:

    python train_zoo.py --num_models=100 --arch=mCNN --num_chunks=4 --chunk=0

leaves 0.pt to 24.pt in results/zoo/cifar10-mCNN/, each a plain state dict under the original's keys, beside a record (.json)
and a row an epoch (.csv). The same line again trains what is missing. README.md says what each logged quantity means.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from common.datasets import images
from common.datasets.classification import Splits, load_splits
from common.datasets.images import DataError, ImageSet
from common.models import cnn, zoo
from common.run import checkpoint, epochs, options
from common.run.checkpoint import CheckpointError
from common.run.classifier import RECIPES, evaluate, learning_rate, make_optimizer, training_step
from common.run.clock import Clock
from common.run.directory import RunError, environment
from common.run.ending import EXIT_RESUMABLE, refusing, say
from common.run.epochs import Sums
from common.run.interruption import Interruption
from common.run.lock import release_lock, take_lock
from common.run.memory import keep_freed_memory
from common.run.options import at_least, real
from common.run.records import write_json
from common.run.traces import Metrics
from common.seeds import generator_of, seed_of

# options that do not make another model
UNNAMED = (
    "num_models", "progress", "num_chunks", "chunk", "data_dir", "device", "compile", "out", "resume", "overwrite", "dry_run"
)  # fmt: skip
LAST_ENTRIES = ("model", "optimizer", "options", "data", "progress", "sums", "best", "rng", "seconds", "metrics_size")


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="train_zoo.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper")
    paper.add_argument("--num_models", type=at_least(1, 10**6), default=1, metavar="INT", help="in the zoo [%(default)s]")
    paper.add_argument("--arch", choices=zoo.ARCHITECTURES, help="architecture")
    paper.add_argument("--progress", action="store_true", help="show progress bars")
    paper.add_argument("--num_chunks", type=at_least(1, 10**6), metavar="INT", help="jobs that share the zoo [1]")
    paper.add_argument("--chunk", type=at_least(0), metavar="INT", help="which of them this one is, from 0 [0]")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--dataset", choices=tuple(images.BY_OPTION), default="cifar10", help="[%(default)s]")
    own.add_argument("--data-dir", metavar="PATH", default="data", help="where the data set lies, or is saved [%(default)s]")
    own.add_argument("--recipe", choices=tuple(RECIPES), default="published", help="[%(default)s]")
    for name, kind, what in (
        ("--epochs", at_least(1, 10**6), "passes over the training images"),
        ("--batch-size", at_least(2, 10**6), "images a step"),
        ("--lr", real(0, 10, above=True), "highest learning rate"),
    ):
        of_recipes = ", ".join(str(recipe[name[2:].replace("-", "_")]) for recipe in RECIPES.values())
        own.add_argument(name, type=kind, metavar="N", help=f"{what} [by recipe: {of_recipes}]")
    own.add_argument("--select", choices=("validation", "test"), default="validation", help="which images choose the epoch")
    own.add_argument("--seed", type=at_least(0), default=0, help="of the zoo; each model has its own from it [%(default)s]")
    own.add_argument("--width", type=at_least(1, 4096), metavar="N", help="channels of the first convolution [64, cw: 512]")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="use N training images, chosen by the seed [all]")
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of products and convolutions [%(default)s]")
    own.add_argument("--compile", action="store_true", help="torch.compile the network")
    own.add_argument("--device", choices=("cpu", "cuda"), help="[cuda when available]")
    own.add_argument("--out", metavar="PATH", help="directory of the zoo [results/zoo/NAME]")
    own.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help="go on with models that were interrupted")
    own.add_argument("--overwrite", action="store_true", help="train models again that are there")
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
    if args.resume and args.overwrite:
        parser.error("--resume goes on with models, --overwrite replaces them: choose one")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    defaults = RECIPES[args.recipe] | {"width": cnn.WIDTHS.get(args.arch)}
    for name, value in defaults.items():
        if getattr(args, name) in (None, value):
            setattr(args, name, None)  # not in the name
    if args.out is None:
        named = options.not_defaults(parser, args, (*UNNAMED, "dataset", "arch"))
        name = "-".join([args.dataset, args.arch, *named])
        options.check_length(parser, name)
        args.out = str(Path("results") / "zoo" / name)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def models_of_chunk(args: argparse.Namespace) -> range:
    """The numbers of the models that this job trains: consecutive ones, chunks as equal as can be."""
    n, chunks, chunk = args.num_models, args.num_chunks or 1, args.chunk or 0
    return range(n * chunk // chunks, n * (chunk + 1) // chunks)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make a model what it is."""
    return {name: value for name, value in vars(args).items() if name not in UNNAMED}


# ---- one model -----------------------------------------------------------------------------------------------------------


class ModelFiles:
    """The files of one model of a zoo. Nothing is created before `take`."""

    def __init__(self, out: str, index: int):
        folder = Path(out)
        self.folder = folder
        self.weights, self.record, self.metrics = (folder / f"{index}.{kind}" for kind in ("pt", "json", "csv"))
        self.last, self.lock = folder / f"{index}.last.pkl", folder / f"{index}.lock"
        self._lock: TextIO | None = None

    def found(self, args: argparse.Namespace) -> str:
        """What a start finds: "finished", "unfinished" or "new". Raises RunError if it cannot go on as asked."""
        hints = "--overwrite replaces it, another --out keeps it"
        if args.overwrite:
            return "new"
        if self.weights.exists() and self.record.exists():
            self._compare(json.loads(self.record.read_text())["options"], args, self.weights, hints)
            return "finished"
        if self.last.exists():
            state = checkpoint.load(self.last, LAST_ENTRIES)
            self._compare(state["options"], args, self.last, hints)
            if not args.resume:
                raise RunError(f"{self.last} is there, of a model in training: --resume goes on with it, {hints}")
            return "unfinished"
        if self.weights.exists():  # without a record: trained elsewhere, by the original, say
            there = zoo.load(self.weights, args.arch).state_dict()
            with torch.device("meta"):
                own = zoo.make(args.arch, images.N_CLASSES[images.BY_OPTION[args.dataset]], args.width).state_dict()
            if zoo.difference(there, own):
                raise RunError(f"{self.weights} is of another model: {zoo.difference(there, own)}; {hints}")
            return "finished"
        return "new"

    @staticmethod
    def _compare(noted: dict[str, Any], args: argparse.Namespace, path: Path, hints: str) -> None:
        for name, value in options_of(args).items():
            if noted.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                raise RunError(f"{path} was made with {option} {noted.get(name)}, not {value}: {hints}")

    def take(self) -> bool:
        """Whether the model is this process's own until `release`: of several, the first has it. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.lock)
        return self._lock is not None

    def release(self) -> None:
        if self._lock is not None:
            release_lock(self._lock, self.lock)
            self._lock = None

    def remove(self) -> None:
        for path in (self.weights, self.record, self.metrics, self.last):
            path.unlink(missing_ok=True)


class Training:
    """Where the training of a model stands: `batch` batches of epoch `epoch` are done, with their figures in `sums`."""

    def __init__(self, args: argparse.Namespace, data: Splits, files: ModelFiles, index: int):
        """Start anew, or where the model's last.pkl stands. Raises CheckpointError."""
        self.args, self.data, self.files, self.index = args, data, files, index
        self.seed = seed_of(args.seed, index)
        self.n_batches = len(data.training) // args.batch_size  # the rest of the images waits for another epoch
        checkpoint.seed_everything(self.seed)
        self.model = zoo.make(args.arch, images.N_CLASSES[images.BY_OPTION[args.dataset]], args.width)
        self.model.to(data.test.labels.device, memory_format=torch.channels_last)
        if args.compile:
            self.model.compile()
        self.optimizer = make_optimizer(self.model, args.recipe, args.lr)
        self.epoch = self.batch = self.step = 0
        self.sums, self.best = Sums(), {"epoch": 0, "accuracy": -math.inf}
        last = self.load() if files.last.exists() else None
        columns = ("epoch", "step", "seconds", "lr", "train_loss", "train_accuracy", f"{args.select}_loss")
        self.metrics = Metrics(files.metrics, (*columns, f"{args.select}_accuracy"), last["metrics_size"] if last else 0)
        self.clock = Clock(math.inf, last["seconds"] if last else 0.0)
        self.saved_at = time.monotonic()
        if last is None:
            self.save()

    def load(self) -> dict[str, Any]:
        last = checkpoint.load(self.files.last, LAST_ENTRIES)
        if last["data"] != self.data.fingerprint:
            raise CheckpointError(f"{self.files.last} was made with other data: name the place where those are")
        if not self.files.metrics.exists() or self.files.metrics.stat().st_size < last["metrics_size"]:
            raise CheckpointError(f"{self.files.metrics} is missing or cut off: --overwrite starts the model again")
        checkpoint.load_model(self.model, last, self.files.last)
        self.optimizer.load_state_dict(last["optimizer"])
        self.epoch, self.batch, self.step = last["progress"]
        self.sums, self.best = Sums(last["sums"]), last["best"]
        checkpoint.set_rng_state(last["rng"])
        return last

    def save(self) -> None:
        """Write last.pkl: everything that is needed to go on exactly here. Weights that are not finite are never written."""
        self.saved_at = time.monotonic()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "options": options_of(self.args),
            "data": self.data.fingerprint,
            "progress": (self.epoch, self.batch, self.step),
            "sums": self.sums.plain(),
            "best": self.best,
            "rng": checkpoint.rng_state(),  # of attention dropout
            "seconds": self.clock.used(),
            "metrics_size": self.metrics.size,
        }
        checkpoint.save(state, self.files.last)

    def train_epoch(self, interruption: Interruption) -> bool:
        """Train on the batches of the epoch that are left; False if a signal comes first."""
        args, data, model = self.args, self.data, self.model
        model.train()
        left = data.batches(args.batch_size, generator_of(self.seed, self.epoch), first=self.batch)
        what = f"model {self.index} epoch {self.epoch + 1}"
        for x, labels in tqdm(left, what, self.n_batches - self.batch, disable=not args.progress, leave=False):
            if interruption.signal is not None:
                return False
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(args.recipe, args.lr, self.step, self.n_batches, args.epochs)
            figures = training_step(model, self.optimizer, x, labels, args.precision)
            self.sums.add(len(x), figures)
            self.batch, self.step = self.batch + 1, self.step + 1
            if time.monotonic() - self.saved_at > epochs.SAVE_SECONDS:
                self.save()
        return True

    def epoch_done(self, selected: dict[str, float]) -> None:
        """Note the figures of the epoch, keep its weights if they are the best; the next epoch begins."""
        means, rate = self.sums.means(), self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(means["loss"]):
            raise SystemExit(f"the loss of model {self.index} in epoch {self.epoch + 1} is not finite: a smaller --lr may help")
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()
        better = selected["accuracy"] > self.best["accuracy"]
        if better:
            state = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "accuracy": selected["accuracy"], "loss": selected["loss"], "train": means}
            self.best["model"] = state
        row: dict[str, float | int] = {"epoch": self.epoch, "step": self.step, "seconds": self.clock.used(), "lr": rate}
        row |= {f"train_{name}": value for name, value in means.items()}
        self.metrics.append(row | {f"{self.args.select}_{name}": value for name, value in selected.items()})
        chance = 1 / images.N_CLASSES[images.BY_OPTION[self.args.dataset]]
        say(
            f"model {self.index:>3}  epoch {self.epoch:>3}  step {self.step:>6}  {self.clock.used() / 60:8.2f} min | "
            f"training {means['loss']:.4f}, accuracy {means['accuracy']:.4f} | {self.args.select} {selected['loss']:.4f}, "
            f"accuracy {selected['accuracy']:.4f} (chance {chance:g}) | lr {rate:.3g}" + (" | best so far" if better else "")
        )


def train_model(training: Training, interruption: Interruption) -> bool:
    """Train until the epochs are over and write what is kept; False if a signal came first, with all to go on from saved."""
    args, data, model = training.args, training.data, training.model

    def measure(split: ImageSet) -> dict[str, float] | None:
        return evaluate(model, split, data.preprocessing, args.precision, interruption)

    while training.epoch < args.epochs:
        selected = measure(data.selection) if training.train_epoch(interruption) else None
        if selected is None:
            training.save()
            return False
        training.epoch_done(selected)
    training.save()
    model.load_state_dict(training.best["model"])
    test = {name: training.best[name] for name in ("loss", "accuracy")} if args.select == "test" else measure(data.test)
    if test is None:
        return False
    finish(training, test)
    return True


def finish(training: Training, test: dict[str, float]) -> None:
    """Write the weights, then the record, whose presence means finished; what was needed to go on goes."""
    args, files, best = training.args, training.files, training.best
    checkpoint.save({name: value.contiguous() for name, value in best["model"].items()}, files.weights)
    chosen = {name: best[name] for name in ("loss", "accuracy")}
    protocol = {
        "validation": "the epoch with the highest accuracy on the validation images, measured once on the test images",
        "test": "as published: the epoch with the highest accuracy on the test images, and that accuracy",
    }
    record = {
        "script": "train_zoo",
        "model": training.index,
        "seed": training.seed,
        "options": options_of(args),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "protocol": protocol[args.select],
        "epochs": training.epoch,
        "best_epoch": best["epoch"],
        "steps": training.step,
        "seconds": training.clock.used(),
        "images": {split: len(getattr(training.data, split)) for split in ("training", "selection", "test")},
        "training": best["train"],  # while it was trained on: augmented, and with the weights of each step
        "validation": chosen if args.select == "validation" else None,
        "test": test,
        "chance_accuracy": 1 / images.N_CLASSES[images.BY_OPTION[args.dataset]],
        "data": training.data.fingerprint,
        **environment(),
    }
    write_json(files.record, record)
    files.last.unlink(missing_ok=True)
    say(
        f"model {training.index:>3}  finished after {record['seconds'] / 60:.2f} min: test accuracy {test['accuracy']:.4f} "
        f"(epoch {best['epoch']}, chance {record['chance_accuracy']:g}): {files.weights}"
    )


# ---- the zoo -------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    keep_freed_memory()
    chosen = models_of_chunk(args)
    if args.dry_run:
        print(f"{args.out}: models {', '.join(map(str, chosen)) or 'none'}")
        return 0
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with Interruption() as interruption:
        with refusing(parser, DataError, zoo.ZooError):
            found = [ModelFiles(args.out, index).found(args) for index in chosen]
            if all(state == "finished" for state in found):
                for index in chosen:
                    ModelFiles(args.out, index).last.unlink(missing_ok=True)  # of a process killed at its very end
                say(f"all models of {args.out} that were asked for are there: nothing to do")
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
        say(
            f"{args.out}: {len(chosen)} models, {found.count('finished')} of them finished; {len(data.training)} training, "
            f"{len(data.selection)} {args.select} images on {device}"
        )
        for index in chosen:
            try:
                ended = train_one(parser, args, data, index, interruption)
            except OSError as error:
                say(f"stopped: cannot write {error.filename or args.out}: {error.strerror}; --resume goes on")
                return EXIT_RESUMABLE
            if not ended:
                say(f"stopped by {interruption.signal} in model {index}: --resume goes on from here")
                return EXIT_RESUMABLE
    return 0


def train_one(
    parser: argparse.ArgumentParser, args: argparse.Namespace, data: Splits, index: int, interruption: Interruption
) -> bool:
    """Train a model unless it is finished or another process is at it; False if a signal came."""
    files = ModelFiles(args.out, index)
    try:
        with refusing(parser, zoo.ZooError):
            if not files.take():
                say(f"model {index:>3}  is in training by another process: left to it")
                return True
            found = files.found(args)
            if found == "finished":
                files.last.unlink(missing_ok=True)
                return True
            if found == "new":
                files.remove()
            training = Training(args, data, files, index)
        return train_model(training, interruption)
    finally:
        files.release()


if __name__ == "__main__":
    sys.exit(main())
