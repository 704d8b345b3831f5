"""DUET, SimCLR and ESSL: representations learned from two views of each image (Suau et al., ICML 2023, arXiv 2306.16058).

DUET's representations are matrices: one axis for what is seen, one for how it was transformed. The published line (about 73 %):

    python train_ssl.py --model duet --encoder cifar10_resnet32 --dataset cifar10 --batch-size 1024 --test-every 10 \\
        --warmup-epochs 10 --epochs 800 --center-crop --tx sca rot --equi-tx rot --duet-target vm --duet-lambda 1000 \\
        --save-dir some_dir

leaves the encoder in some_dir and its run in results/train_ssl/: log, metrics.csv, pictures, result.json. With several GPUs:
torchrun --nproc-per-node=N train_ssl.py ... README.md says what each logged quantity means.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, parallel, plotting
from common.datasets import images
from common.datasets.images import DataError, ImageSet
from common.errors import InputError
from common.models.resnet import BLOCKS, CifarResNet
from common.run import options, trackers
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.memory import tune_malloc
from common.run.metrics import Meter, Metrics, Traces, read_metrics
from common.run.options import at_least, real
from common.run.records import write_json
from common.run.run import Run, RunError
from common.run.schedule import warmup_cosine
from common.run.state import State, refuse_infinity
from common.seeds import generator_of, seed_everything
from common.ssl import evaluation, losses
from common.ssl.evaluation import as_floats
from common.ssl.method import Batch, Method
from common.ssl.models import CLASSES, ESSL_CODES, Outputs, SelfSupervised, encoder_of, read_saved
from common.ssl.targets import TARGETS
from common.ssl.views import CIRCULAR, CODES, COLOURS, NEEDS_RGB, PARAMETRISED, Stack, clean_view

ENCODERS = ("Cifar10_ResNet", *(f"{lifted}cifar10_{name}" for lifted in ("", "lifted_") for name in BLOCKS))
NOT_IN_NAME = (  # options that do not make another run
    "device", "dataset_root", "save_dir", "wandb_project", "tensorboard", "resume", "results_dir", "overwrite", "dry_run",
    "linear_probe", "knn",
)  # fmt: skip
FILES = ("*.pt", "marginals.png", "tensorboard/*", "wandb/*", "wandb-id")
DRAW_SECONDS = 600.0  # between two drawings of metrics.png
Means = dict[str, dict[str, float]]  # mean metrics, by split and name
N_SHOWN, N_SWEPT = 12, 500  # images in samples.png, and in the heat map


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="train_ssl.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper")
    paper.add_argument("--device", choices=("cpu", "cuda"), help="[cuda when available]")
    paper.add_argument("--dataset", choices=tuple(images.BY_OPTION), help="[cifar10]")
    paper.add_argument("--dataset-root", metavar="PATH", default="data", help="where images lie, or are saved [%(default)s]")
    paper.add_argument("--batch-size", type=at_least(2), default=1024, metavar="INT", help="of all processes [%(default)s]")
    paper.add_argument("--image-size", type=at_least(8, 512), default=32, metavar="INT", help="side of a view [%(default)s]")
    paper.add_argument("--center-crop", action="store_true", help="use images 8/7 as large, of which tests see the centre")
    paper.add_argument("--save-dir", metavar="PATH", help="where to save the model [the run's directory]")
    paper.add_argument("--wandb-project", metavar="STR", help="log to Weights & Biases (credentials: see README.md)")
    paper.add_argument("--model", choices=("duet", "simclr", "essl"), default="duet", help="[%(default)s]")
    paper.add_argument("--encoder", choices=ENCODERS, default="cifar10_resnet32", help="[%(default)s]")
    paper.add_argument("--num-classes", type=at_least(1, 10**6), metavar="INT", help="[those of the data set]")
    paper.add_argument("--epochs", type=at_least(0), default=800, metavar="INT", help="[%(default)s]")
    paper.add_argument("--warmup-epochs", type=at_least(0), default=10, metavar="INT", help="linear warm-up [%(default)s]")
    paper.add_argument("--test-every", type=at_least(1), default=10, metavar="INT", help="epochs between tests [%(default)s]")
    paper.add_argument("--lr", type=real(0, 10, above=True), default=0.0004, metavar="FLOAT", help="rate [%(default)s]")
    paper.add_argument("--tx", nargs="*", choices=CODES, help="transformations, in the order in which they are applied")
    structured = "what to learn the structure of: one of --tx for duet, one that is taken out of it for essl"
    paper.add_argument("--equi-tx", choices=CODES, help=structured)
    paper.add_argument("--duet-lambda", type=real(0, 1e9), default=10.0, metavar="FLOAT", help="of structure [%(default)s]")
    paper.add_argument("--duet-bins", type=at_least(0, 4096), default=8, metavar="INT", help="G; 0 is SimCLR [%(default)s]")
    paper.add_argument("--duet-target", choices=tuple(TARGETS), default="ga", help="Gaussian or von Mises [%(default)s]")
    paper.add_argument("--essl-lambda", type=real(0, 1e9), default=0.4, metavar="FLOAT", help="of equivariance [%(default)s]")
    paper.add_argument("--debug-steps", type=at_least(1), metavar="INT", help="steps per epoch, and per test [all]")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--seed", type=at_least(0), default=0, help="of weights, order and views [%(default)s]")
    own.add_argument("--encoder-width", type=at_least(1, 1024), default=64, help="channels of the stem [%(default)s]")
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of products and convolutions [%(default)s]")
    own.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    own.add_argument("--joint-pass", action="store_true", help="encode both views in one pass, with common batch statistics")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="train on N images, chosen by the seed [all]")
    own.add_argument("--keep-all", action="store_true", help="keep the models of all tests, not of the last alone")
    own.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, in the run's directory")
    options.add_run_options(own)
    instead = "instead of training: test accuracy of"
    own.add_argument("--linear-probe", metavar="PATH", help=f"{instead} a linear classifier on a saved encoder")
    own.add_argument("--knn", metavar="PATH", help=f"{instead} the nearest neighbours of a saved encoder")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """Options that can work together, and the run's name ("probe" if saved encoders are measured); or the parser's error."""
    args = parser.parse_args(argv)
    if args.linear_probe is not None or args.knn is not None:
        options.check(parser, args, "probe")
        return args, "probe"
    args.dataset = args.dataset or "cifar10"
    if args.tx is None:
        parser.error(f"--tx is missing: choose from {' '.join(CODES)}")
    check_encoder(parser, args)
    check_transformations(parser, args)
    n_classes = images.N_CLASSES[images.BY_OPTION[args.dataset]]
    args.num_classes = args.num_classes or n_classes
    if args.num_classes < n_classes:
        parser.error(f"--num-classes {args.num_classes} is too small: {args.dataset} has {n_classes}")
    if args.model == "essl" and args.equi_tx in args.tx:
        args.tx = [code for code in args.tx if code != args.equi_tx]  # in their order
        if parallel.is_main() and not args.dry_run:
            echo(f"[ESSL] Transformation {args.equi_tx} removed from tx, only using {args.tx}")
    name = name_of(parser, args)
    options.check(parser, args, name)
    return args, name


def check_encoder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.encoder.startswith("lifted_"):
        parser.error(f"--encoder {args.encoder} wants 54 input channels, from a lift of images that was never published")
    if args.encoder == "Cifar10_ResNet":
        parser.error("--encoder Cifar10_ResNet is the class of the others, without a depth: choose cifar10_resnet20, ...")
    features = 8 * args.encoder_width
    if args.model == "duet" and args.duet_bins and features % args.duet_bins:
        parser.error(f"--duet-bins {args.duet_bins} does not divide the encoder's {features} features")


def check_transformations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    structured = args.model == "duet" and args.duet_bins > 0
    if args.equi_tx is None and (structured or args.model == "essl"):
        parser.error(f"--equi-tx is missing: {args.model} needs to know the structure of which transformation to learn")
    if structured:
        if args.equi_tx not in PARAMETRISED:
            parser.error(f"--equi-tx {args.equi_tx} has no parameter to structure by: choose from {' '.join(PARAMETRISED)}")
        made_by = {"sca": "ccr"} | dict.fromkeys(COLOURS, "jit")  # what else has the parameter
        if args.equi_tx not in args.tx and made_by.get(args.equi_tx) not in args.tx:
            parser.error(
                f"--equi-tx {args.equi_tx} is not one of --tx {' '.join(args.tx)}: duet can only learn what is applied"
            )
    if args.model == "essl" and args.equi_tx not in ESSL_CODES:
        parser.error(f"--equi-tx {args.equi_tx} is nothing that essl can predict: choose from {' '.join(ESSL_CODES)}")
    if args.dataset in ("mnist", "fashionmnist"):
        used = args.tx if args.model == "simclr" else (*args.tx, args.equi_tx)
        coloured = [code for code in used if code in NEEDS_RGB]
        if coloured:
            parser.error(f"{coloured[0]} changes colours: the images of {args.dataset} have one channel")


def name_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The run's name: data, method and transformations, and every other option that is not at its default."""
    parts = [args.dataset, args.model, ".".join(["tx", *args.tx])]
    if args.equi_tx:
        parts.append(f"equi-tx.{args.equi_tx}")
    derived = ("num_classes",) if args.num_classes == images.N_CLASSES[images.BY_OPTION[args.dataset]] else ()
    parts += options.not_defaults(parser, args, (*NOT_IN_NAME, *derived, "dataset", "model", "tx", "equi_tx"))
    return "-".join(parts)


# ---- data and model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Both splits, on the device, as large as the transformations are to see them."""

    training: ImageSet
    test: ImageSet
    fingerprint: str


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set, at a side of --image-size, or 8/7 of it with --center-crop (as published: 36 for 32). Raises DataError."""

    def fetch() -> list[ImageSet]:
        return [images.load(images.BY_OPTION[args.dataset], split, args.dataset_root, download=True) for split in images.SPLITS]

    parallel.main_first(fetch, InputError, OSError)
    training, test = fetch()
    fingerprint = training.fingerprint() + test.fingerprint()
    if args.subset:
        if args.subset > len(training):
            raise DataError(f"--subset {args.subset} is more than the {len(training)} training images of {args.dataset}")
        training = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(args.seed))[: args.subset]]
    if min(len(training), len(test), args.batch_size) < max(2, parallel.world_size()):
        raise DataError(
            f"{args.dataset} has {len(training)} training and {len(test)} test images, --batch-size {args.batch_size}: "
            f"too few for {parallel.world_size()} processes"
        )
    side = args.image_size * 256 // 224 if args.center_crop else args.image_size
    return Data(images.resize(training, side).to(device), images.resize(test, side).to(device), fingerprint)


def method_of(args: argparse.Namespace) -> Method:
    """What --model, and a weight or number of bins of 0, stand for."""
    views = tuple(args.tx), args.image_size
    if args.model == "duet" and args.duet_bins:
        return Method(*views, bins=args.duet_bins, structure=args.equi_tx, target=args.duet_target, weight=args.duet_lambda)
    if args.model == "essl" and args.essl_lambda:
        return Method(*views, predicts=args.equi_tx, weight=args.essl_lambda)
    return Method(*views)


def make_model(args: argparse.Namespace, method: Method, device: torch.device) -> SelfSupervised:
    """The model of the options, with weights from the seed."""
    seed_everything(args.seed)
    blocks = BLOCKS[args.encoder.removeprefix("cifar10_")]
    channels = images.SHAPES[images.BY_OPTION[args.dataset]][0]
    encoder = CifarResNet((blocks,) * 3, in_channels=channels, width=args.encoder_width)
    model = method.make_model(encoder, args.num_classes)
    model = parallel.synchronise_batch_norm(model.to(device, memory_format=torch.channels_last))
    if args.compile:
        model.base_network.compile()
    return model


def make_optimizer(model: SelfSupervised, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)


# ---- training ------------------------------------------------------------------------------------------------------------


class Training(State):
    """The state of a training, with its method and its parts. `extra["tested"]`: metrics of the last test."""

    model: SelfSupervised

    def __init__(self, args: argparse.Namespace, run: Run, method: Method, model: SelfSupervised, data: str):
        self.run, self.method, self.optimizer = run, method, make_optimizer(model, args.lr)
        self.clock, self.meter, self.traces = Clock(), Meter(), Traces(model)
        names = method.figure_names(args.batch_size)
        columns = ("epoch", "step", "seconds", "lr", *(f"{split}_{name}" for split in images.SPLITS for name in names))
        self.metrics = Metrics(run.part / "metrics.csv", columns)
        parts = {name: getattr(self, name) for name in ("optimizer", "clock", "meter", "metrics", "traces")}
        super().__init__(run.last, run.options, run, data=data, model=model, **parts)


def forward(args: argparse.Namespace, model: SelfSupervised, batch: Batch) -> Outputs:
    """What the model says of this process's rows, in fp32."""
    view1, view2 = (view.contiguous(memory_format=torch.channels_last) for view in (batch.view1, batch.view2))
    with torch.autocast(view1.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        out = model.forward_jointly(view1, view2, batch.task) if args.joint_pass else model(view1, view2, batch.task)
    return out.float()


def batches_of(args: argparse.Namespace, order: Tensor, smallest: int) -> list[Tensor]:
    """Batches of an order of images; the last may be smaller, but needs `smallest` images, and one for each process."""
    batches = [batch for batch in order.split(args.batch_size) if len(batch) >= max(smallest, parallel.world_size())]
    return batches[: args.debug_steps]


def training_batches(args: argparse.Namespace, data: ImageSet, epoch: int) -> list[Tensor]:
    """The batches of an epoch: a function of seed and epoch alone."""
    order = torch.randperm(len(data), generator=generator_of(args.seed, 0, epoch))
    return batches_of(args, order.to(data.images.device), smallest=2)  # for batch norm


def train_epoch(args: argparse.Namespace, data: ImageSet, training: Training, progress: tqdm) -> None:
    """Train on the batches of an epoch that are left."""
    method, model, optimizer = training.method, training.model, training.optimizer
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = args.lr * warmup_cosine(training.epoch, args.warmup_epochs, args.epochs)
    batches = training_batches(args, data, training.epoch)
    for indices in batches[training.batch :]:
        generator = generator_of(args.seed, 1, training.epoch, training.batch)
        batch = method.make_batch(data.images, data.labels, indices, generator, training=True)
        loss, metrics = method.loss(forward(args, model, batch), batch, training=True)
        optimizer.zero_grad()
        loss.backward()
        parallel.sum_gradients(model.parameters())
        optimizer.step()

        at = f"epoch {training.epoch}/{args.epochs} batch {training.batch + 1}/{len(batches)}"
        progress.set_description_str(at, refresh=False)
        progress.update()
        training.meter.add(len(indices), metrics)
        training.after_step()


@torch.no_grad()
def test_epoch(args: argparse.Namespace, data: ImageSet, training: Training) -> dict[str, float]:
    """Mean metrics of the test images, always with the same views."""
    method, model, meter = training.method, training.model, Meter()
    model.eval()
    for i, indices in enumerate(batches_of(args, torch.arange(len(data), device=data.images.device), smallest=1)):
        training.check_signal()
        batch = method.make_batch(data.images, data.labels, indices, generator_of(args.seed, 2, i), training=False)
        meter.add(len(indices), method.loss(forward(args, model, batch), batch, training=False)[1])
    return meter.means()


def train(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Train until the epochs are over: each is a row of metrics.csv, some end with a test and a saved model."""
    clock, drawn_at = training.clock, -math.inf
    baselines = chance_levels(args, training.method, min(args.batch_size, len(data.training)))
    progress = tqdm(disable=None, bar_format="{desc} {rate_fmt}", unit="step")
    with progress, trackers.Trackers(training.run, training.epoch) as sinks:
        while training.epoch < args.epochs:
            began = clock.used()
            train_epoch(args, data.training, training, progress)
            means, seconds = {"train": training.meter.means()}, {"train": clock.used() - began}
            refuse_infinity(means["train"]["total_loss"], f"epoch {training.epoch}", "--lr or --duet-lambda")
            if training.epoch % args.test_every == 0 or training.epoch == args.epochs - 1:
                training.extra["tested"] = means["test"] = test_epoch(args, data.test, training)
                seconds["test"] = clock.used() - began - seconds["train"]
            if parallel.is_main():
                log_epoch(training, means, seconds, baselines)
                note_epoch(training, means, sinks)
                if "test" in means:
                    save_model(args, training, f"{training.epoch:04d}")
                if "test" in means and clock.used() - drawn_at >= DRAW_SECONDS:
                    with clock.paused():
                        draw_curves(args, training)
                    drawn_at = clock.used()
            training.meter.reset()
            training.end_epoch()
    if "tested" not in training.extra:  # --epochs 0
        training.extra["tested"] = test_epoch(args, data.test, training)
    training.save()


def log_epoch(training: Training, means: Means, seconds: dict[str, float], baselines: dict[str, float]) -> None:
    """Log the metrics of an epoch, each with its baseline, a line a split."""
    for split, values in means.items():
        chance = {name: f" (chance {baselines[name]:.3g})" for name in values if name in baselines}
        metrics = ", ".join(f"{name}: {value:.3f}{chance.get(name, '')}" for name, value in values.items())
        rate = f", lr: {training.optimizer.param_groups[0]['lr']:g}" if split == "train" else ""
        training.run.log(f"[{split.capitalize():<5} epoch {training.epoch} in {seconds[split]:.2f}s]  {metrics}{rate}")


def note_epoch(training: Training, means: Means, sinks: trackers.Trackers) -> None:
    """Enter an epoch into metrics.csv, the traces and the trackers."""
    lr = training.optimizer.param_groups[0]["lr"]
    row: dict[str, float | int] = {"epoch": training.epoch, "step": training.step, "seconds": training.clock.used()}
    row |= {f"{split}_{name}": value for split, values in means.items() for name, value in values.items()}
    sinks.log(row | {"train_lr": lr}, training.epoch)
    training.metrics.append(dict.fromkeys(training.metrics.columns, math.nan) | row | {"lr": lr})
    training.traces.record(training.epoch + 1, {})


def chance_levels(args: argparse.Namespace, method: Method, n: int) -> dict[str, float]:
    """Metrics of chance in batches of n images."""
    nce = "model_loss_mean" if method.structure is None and method.predicts is None else "model_nce_loss_mean"
    levels = {nce: 2 * math.log(2 * n - 1)}
    for k in (1, 5):
        levels[f"track_head_top_{k}_mean"] = 100 * min(1, k / args.num_classes)
        levels |= {f"model_ntxent_{rows}_top{k}_mean": 100 * min(1, k / (2 * n - 1)) for rows in ("ABAA", "BABB", "total")}
        levels[f"model_essl_top_{k}_mean"] = 100 * min(1, k / CLASSES.get(method.predicts or "", 1))
    return levels


# ---- what is left of a run -----------------------------------------------------------------------------------------------


def file_stem(args: argparse.Namespace) -> str:
    """The published name of saved models."""
    equi = f"_{args.equi_tx}" if args.equi_tx else ""
    more = {"duet": f"_eq-{args.equi_tx}_target-{args.duet_target}", "essl": f"_eq-{args.equi_tx}", "simclr": ""}
    return f"encoder_{args.dataset}_{args.model}{equi}{more[args.model]}"


def save_model(args: argparse.Namespace, training: Training, when: str) -> None:
    """Save the model with its options; those of earlier epochs go, unless all are to be kept."""
    run, model, stem = training.run, training.model, file_stem(args)
    folder = Path(args.save_dir) if args.save_dir else run.part
    path = folder / f"{stem}_{when}.pt"
    state = {
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
        "encoder": model.base_network.options,
        "options": vars(args),
        "steps": training.step,
    }
    checkpoint.save(state, path)
    for old in saved_models(folder, stem):
        if old != path and not args.keep_all:
            old.unlink()
    run.log(f"Model saved as {path if args.save_dir or when != 'final' else run.final / path.name}")


def saved_models(folder: Path, stem: str) -> list[Path]:
    """The models of a run in a folder."""
    return sorted(path for path in folder.glob(f"{stem}_*.pt") if re.fullmatch(r"\d{4,}|final", path.stem[len(stem) + 1 :]))


def check_save_dir(args: argparse.Namespace, run: Run) -> None:
    """See that --save-dir can be used, and that its models, whose published names say little, are of this run alone.

    A file <stem>.run there says whose they are. Raises RunError if another run's, or OSError.
    """
    if args.save_dir is None:
        return
    folder, stem = Path(args.save_dir), file_stem(args)
    folder.mkdir(parents=True, exist_ok=True)
    owner, models = folder / f"{stem}.run", saved_models(folder, stem)
    if args.overwrite:
        return
    if models and (run.status != "unfinished" or not owner.exists()):
        raise RunError(f"{models[0]} is there, of another run: --overwrite replaces it, another --save-dir keeps it")
    name = owner.read_text(errors="replace") if owner.exists() else ""
    if name not in ("", run.name):
        raise RunError(f"{owner} says that the run {name!r} saves there: choose another --save-dir")


def claim_save_dir(args: argparse.Namespace, run: Run) -> None:
    """Replace the models in --save-dir, if that was asked for, and note whose they are. Raises RunError, OSError."""
    if args.save_dir is None:
        return
    folder, stem = Path(args.save_dir), file_stem(args)
    owner = folder / f"{stem}.run"
    for old in (owner, *saved_models(folder, stem)) if args.overwrite else ():
        old.unlink(missing_ok=True)
    try:
        with open(owner, "x") as file:  # of two that start at once, one alone can
            file.write(run.name)
    except FileExistsError:
        check_save_dir(args, run)
        owner.write_text(run.name)  # it is empty if a kill came between the two


def draw_curves(args: argparse.Namespace, training: Training) -> None:
    """metrics.png, and weights.png (of convolutions and linear maps: a panel a tensor)."""
    run, metrics = training.run, read_metrics(training.metrics.path)
    measures = [name.removeprefix("train_") for name in metrics if name.startswith("train_") and "top_5" not in name]
    chance = {"track_head_top_1_mean": {"chance": 100 / args.num_classes}}
    plotting.plot_epochs(run.part / "metrics.png", run.name, metrics, measures, chance)
    traced = training.traces.by_parameter()
    weights = {name: values for name, values in traced.items() if training.model.get_parameter(name).ndim > 1}
    plotting.plot_weights(run.part / "weights.png", run.name, training.traces.steps, weights, 1)


def draw_views(args: argparse.Namespace, data: Data, run: Run) -> None:
    """samples.png: some training images, and two views of each."""
    indices = training_batches(args, data.training, 0)[0][:N_SHOWN]
    generator, stack = generator_of(args.seed, 3), Stack(args.tx, args.image_size)
    pixels = as_floats(data.training.images[indices])
    drawn = [stack.draw(len(indices), pixels.shape[3], generator) for _ in range(2)]
    shown = [clean_view(pixels, args.image_size), *(stack(pixels, draw.to(pixels.device)) for draw in drawn)]
    mosaic = ((torch.cat(shown) + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    title, names = "training images (above), and two views of each", None
    if args.equi_tx in stack.codes and args.equi_tx in PARAMETRISED:
        parameters = (stack.parameter(args.equi_tx, draw)[:, 0].tolist() for draw in drawn)
        names = [f"{first:.2f}, {second:.2f}" for first, second in zip(*parameters, strict=True)]
        title += f", with their parameters of {args.equi_tx}"
    plotting.plot_images(run.part / "samples.png", run.name, [plotting.ImageGrid(title, mosaic, len(indices), names)])


def draw_marginals(args: argparse.Namespace, data: Data, model: SelfSupervised, run: Run) -> dict[str, Any] | None:
    """marginals.png: the group marginal of test images as the transformation goes through its range; and its metrics."""
    code = args.equi_tx or next((code for code in args.tx if code in PARAMETRISED), None)
    features = 8 * args.encoder_width
    if code not in PARAMETRISED or not args.duet_bins or features % args.duet_bins:
        return None
    shown = data.test.images[:N_SWEPT]
    parameters, learned = evaluation.marginals_by_parameter(model.base_network, shown, args.image_size, code, args.duet_bins)
    target = TARGETS[args.duet_target](torch.tensor(parameters), args.duet_bins)
    plotting.plot_marginals(run.part / "marginals.png", run.name, code, parameters, learned.cpu().numpy(), target.numpy())
    divergence = losses.jensen_shannon(learned.cpu().log(), target).item()
    uniform = losses.jensen_shannon(torch.zeros_like(target), target).item()
    return {"code": code, "divergence_from_target": divergence, "divergence_of_uniform": uniform, "images": len(shown)}


def report(args: argparse.Namespace, data: Data, training: Training) -> dict[str, Any]:
    """The final metrics of the last model, and pictures of what it learned."""
    run, model, size = training.run, training.model, args.image_size
    encoder = model.base_network.eval()
    if training.epoch:
        draw_curves(args, training)
    marginals = draw_marginals(args, data, model, run)
    draw_views(args, data, run)
    # a run for debugging looks at few images here, too
    limit = args.debug_steps * args.batch_size if args.debug_steps else None
    train_set, test_set = data.training[:limit], data.test[:limit]
    result = {
        "script": "train_ssl",
        "name": run.name,
        "seed": args.seed,
        "protocol": "the model of the last epoch, measured on the test images; a tenth of the training images chose the linear "
        "probe's penalty",
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(data.test.images.device),
        "processes": parallel.world_size(),
        "epochs": training.epoch,
        "steps": training.step,
        "seconds": training.clock.used(),
        "training_images": len(train_set),
        "test_images": len(test_set),
        "test": training.extra["tested"],
        "chance_top_1": 100 / args.num_classes,
        "marginals": marginals,
    }
    known = represent_splits(encoder, train_set, test_set, size)
    result["linear_probe"] = evaluation.linear_probe(*known, args.num_classes, args.seed)
    result["knn"] = evaluation.nearest_neighbours(*known, args.num_classes)
    if "rot" in (*args.tx, args.equi_tx):
        bins = args.duet_bins if marginals is not None and marginals["code"] == "rot" else 0
        rotated = train_set.images[:10_000], test_set.images
        result["rotation_error_degrees"] = evaluation.rotation_errors(encoder, *rotated, size, bins, args.seed)
    return result


def represent_splits(
    encoder: CifarResNet, training: ImageSet, test: ImageSet, size: int, check_signal: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Representations and labels of the training images, then of the test images."""
    z, z_test = (evaluation.represent(encoder, split.images, size, check_signal) for split in (training, test))
    return z, training.labels, z_test, test.labels


def report_table(result: dict[str, Any]) -> str:
    """The final figures as text."""
    chance = f"(chance {result['chance_top_1']:.3g})"
    lines = [
        f"{'test images':>34}: {result['test_images']}",
        f"{'online linear head, top-1':>34}: {result['test']['track_head_top_1_mean']:.2f} % {chance}",
        f"{'linear probe, top-1':>34}: {result['linear_probe']['top_1']:.2f} % {chance}",
        f"{'nearest neighbours, top-1':>34}: {result['knn']['top_1']:.2f} % {chance}",
    ]
    for how, error in result.get("rotation_error_degrees", {}).items():
        means = f"{error['mean']:.1f} degrees in the mean, {error['median']:.1f} in the median (chance 90)"
        lines.append(f"{f'rotation, by the {how}':>34}: {means}")
    if result["marginals"]:
        learned, uniform = (result["marginals"][name] for name in ("divergence_from_target", "divergence_of_uniform"))
        lines.append(f"{'divergence of marginals from target':>34}: {learned:.4f} nats (of a uniform one {uniform:.4f})")
    return "\n".join(lines)


# ---- saved encoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A saved encoder that is to be measured, and the file of its metrics."""

    kind: str  # linear_probe or knn
    path: Path
    encoder: CifarResNet
    options: argparse.Namespace  # that it was trained with, but for data, subset and seed
    out: Path


def read_probe(args: argparse.Namespace, kind: str) -> Probe:
    """Read an encoder. Raises InputError if it is none, does not fit the data, or was measured before."""
    path = Path(getattr(args, kind))
    saved = read_saved(path)
    encoder, noted = encoder_of(saved, path), saved["options"]
    if noted.get("dataset") not in images.BY_OPTION or not {"image_size", "center_crop", "batch_size"} <= noted.keys():
        raise InputError(f"{path} has no options of a training")
    dataset = args.dataset or noted["dataset"]
    own = {"dataset_root": args.dataset_root, "dataset": dataset, "subset": args.subset, "seed": args.seed}
    channels = images.SHAPES[images.BY_OPTION[dataset]][0]
    if channels != encoder.conv1.in_channels:
        raise InputError(f"{path} takes {encoder.conv1.in_channels} channels, images of {dataset} have {channels}")
    out = path.with_name(f"{path.stem}_{kind}_{dataset}.json")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out} is there: --overwrite replaces it")
    return Probe(kind, path, encoder, argparse.Namespace(**{**noted, **own}), out)


def measure(probe: Probe, device: torch.device, command: Command) -> None:
    """Print the accuracy of a saved encoder, and write it beside the file."""

    check_signal = partial(command.check_signal, f"before {probe.path} was measured")
    seed, dataset, size = (getattr(probe.options, name) for name in ("seed", "dataset", "image_size"))
    data, n_classes = load_data(probe.options, device), images.N_CLASSES[images.BY_OPTION[dataset]]
    known = represent_splits(probe.encoder.to(device), data.training, data.test, size, check_signal)
    if probe.kind == "linear_probe":
        metrics = evaluation.linear_probe(*known, n_classes, seed)
    else:
        metrics = evaluation.nearest_neighbours(*known, n_classes)
    echo(f"{probe.path}: {probe.kind.replace('_', ' ')} top-1 {metrics['top_1']:.2f} % (chance {100 / n_classes:.3g})")
    result = {"file": str(probe.path), "dataset": dataset, "seed": seed, "chance_top_1": 100 / n_classes}
    write_json(probe.out, result | {"training_images": len(data.training), "test_images": len(data.test), **metrics})
    echo(f"written to {probe.out}")


def evaluate_saved(args: argparse.Namespace, device: torch.device) -> int:
    """--linear-probe and --knn. All files are read before anything is computed."""
    with Command("train_ssl") as command:
        command.next = "the same line begins again"
        if parallel.launched():
            raise InputError("--linear-probe and --knn are for one process: leave torchrun out")
        for probe in [read_probe(args, kind) for kind in ("linear_probe", "knn") if getattr(args, kind) is not None]:
            if args.dry_run:
                echo(str(probe.out))
            else:
                measure(probe, device, command)
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Begin or resume the run, once nothing can be refused any more, and log what was derived from the options."""
    run, side = training.run, data.training.images.shape[3]
    if run.status == "unfinished":
        training.resume()
    parallel.main_says(lambda: check_save_dir(args, run), InputError, OSError)
    run.open()
    parallel.main_says(lambda: claim_save_dir(args, run), InputError, OSError)
    training.save()
    run.log(
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters on {data.test.images.device}, "
        f"{parallel.world_size()} processes, seed {args.seed}; {len(data.training)} training and {len(data.test)} test images "
        f"of {side}x{side} pixels, {len(training_batches(args, data.training, 0))} steps an epoch"
    )
    if training.method.structure and args.duet_target == "vm" and args.equi_tx not in CIRCULAR:
        run.log(f"note: on the circle of --duet-target vm, both ends of the range of {args.equi_tx} are one point")
    run.log(f"resumed in epoch {training.epoch} after step {training.step}" if training.step else "Training starts!")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name = parse(parser, argv)
    tune_malloc()
    device_type = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.linear_probe is not None or args.knn is not None:
        return evaluate_saved(args, torch.device(device_type))
    if args.dry_run:
        print(name)
        return 0
    run = Run("train_ssl", name, args, another="--seed N", may_change=NOT_IN_NAME, files=FILES)
    with parallel.process_group(device_type) as device, run:
        parallel.main_says(lambda: trackers.check(args), InputError)
        data, method = load_data(args, device), method_of(args)
        training = Training(args, run, method, make_model(args, method, device), data.fingerprint)
        start(args, data, training)
        train(args, data, training)
        if not parallel.is_main():
            return 0
        save_model(args, training, "final")
        with training.clock.paused():
            result = report(args, data, training)
        run.log(report_table(result))
        status = run.finish(result)
    looks = run.where_to_look(views="samples.png", marginals="marginals.png")
    echo(f"after {result['seconds'] / 60:.1f} minutes of training:\n{looks}")
    return status


if __name__ == "__main__":
    sys.exit(main())
