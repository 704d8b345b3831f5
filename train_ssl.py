"""DUET, SimCLR and ESSL: representations learned from two views of each image (Suau et al., ICML 2023, arXiv 2306.16058).

DUET's representations are matrices: one axis for an image's content, one for its transformation. The published command (73 %):

    python train_ssl.py --model duet --encoder cifar10_resnet32 --dataset cifar10 --batch-size 1024 --test-every 10 \\
        --warmup-epochs 10 --epochs 800 --center-crop --tx sca rot --equi-tx rot --duet-target vm --duet-lambda 1000 \\
        --save-dir some_dir

writes the encoder to some_dir and its run to results/train_ssl/: log, metrics.csv, pictures, result.json. With several GPUs:
torchrun --nproc-per-node=N train_ssl.py ... docs/ssl.md explains all options and metrics.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import parallel, plotting
from common.datasets import images
from common.datasets.images import ImageSet
from common.errors import InputError
from common.models.resnet import BLOCKS, CifarResNet
from common.precision import autocast, set_backend_flags, strict_fp32
from common.run import options
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.memory import tune_malloc
from common.run.metrics import Meter, Metrics, Traces, read_metrics
from common.run.options import at_least, real
from common.run.progress import bar
from common.run.records import write_json
from common.run.run import Run
from common.run.schedule import warmup_cosine
from common.run.state import State, check_finite
from common.seeds import generator_of, seed_everything
from common.ssl import evaluation, pictures
from common.ssl.data import Data, load_splits
from common.ssl.duet import DUET, TARGETS, check_structure
from common.ssl.essl import ESSL, check_code
from common.ssl.models import SavedModels, describe, load_for_images, published_stem
from common.ssl.simclr import SimCLR
from common.ssl.steps import Batch, as_floats
from common.ssl.views import CIRCULAR, CODES, NEEDS_RGB, PARAMETRISED

ENCODERS = ("Cifar10_ResNet", *(f"{lifted}cifar10_{name}" for lifted in ("", "lifted_") for name in BLOCKS))
NOT_IN_NAME = (*options.RUN_OPTIONS, "dataset_root", "save_dir", "linear_probe", "knn")  # options that do not make another run
FILES = ("*.pt", "marginals.png")
DRAW_SECONDS = 600.0  # between two drawings of metrics.png
N_SHOWN, N_SWEPT = 12, 500  # images in samples.png, and in the heat map
PROBES = ("linear_probe", "knn")
PROTOCOL = (
    "the model of the last epoch, measured on the test images; a tenth of the training images chose the linear probe's penalty"
)
Model = DUET | SimCLR | ESSL
Means = dict[str, dict[str, float]]  # of metrics, by split and name


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="train_ssl.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper", "example: --tx sca rot --equi-tx rot --duet-target vm")
    paper.add_argument("--device", choices=("cpu", "cuda"), help="processor [cuda when available]")
    paper.add_argument("--dataset", choices=tuple(images.BY_OPTION), help="image data set [cifar10]")
    paper.add_argument("--dataset-root", metavar="PATH", default="data", help="directory of image data sets [%(default)s]")
    paper.add_argument(
        "--batch-size",
        type=at_least(2),
        default=1024,
        metavar="INT",
        help="images per step, of all processes together [%(default)s]",
    )
    paper.add_argument(
        "--image-size", type=at_least(8, 512), default=32, metavar="INT", help="side of a view, in pixels [%(default)s]"
    )
    paper.add_argument("--center-crop", action="store_true", help="resize images to 8/7 of a view; tests see the centre crop")
    paper.add_argument("--save-dir", metavar="PATH", help="directory of the saved models [the run's directory]")
    paper.add_argument("--wandb-project", metavar="NAME", help="log metrics to this project of Weights & Biases")
    paper.add_argument("--model", choices=("duet", "simclr", "essl"), default="duet", help="method [%(default)s]")
    paper.add_argument("--encoder", choices=ENCODERS, default="cifar10_resnet32", help="architecture [%(default)s]")
    paper.add_argument(
        "--num-classes", type=at_least(1, 10**6), metavar="INT", help="classes of the online head [those of the data]"
    )
    paper.add_argument("--epochs", type=at_least(0), default=800, metavar="INT", help="passes over the images [%(default)s]")
    paper.add_argument(
        "--warmup-epochs", type=at_least(0), default=10, metavar="INT", help="epochs with a rising learning rate [%(default)s]"
    )
    paper.add_argument("--test-every", type=at_least(1), default=10, metavar="INT", help="epochs between tests [%(default)s]")
    paper.add_argument(
        "--lr", type=real(0, 10, above=True), default=0.0004, metavar="FLOAT", help="highest learning rate [%(default)s]"
    )
    paper.add_argument("--tx", nargs="*", choices=CODES, help="transformations of a view, in the order of application")
    structured = "transformation that duet structures by (one of --tx) or that essl predicts (removed from --tx)"
    paper.add_argument("--equi-tx", choices=CODES, help=structured)
    paper.add_argument(
        "--duet-lambda", type=real(0, 1e9), default=10.0, metavar="FLOAT", help="weight of group loss [%(default)s]"
    )
    paper.add_argument(
        "--duet-bins",
        type=at_least(0, 4096),
        default=8,
        metavar="INT",
        help="bins G of the group marginal; 0 is SimCLR [%(default)s]",
    )
    paper.add_argument("--duet-target", choices=tuple(TARGETS), default="ga", help="Gaussian or von Mises target [%(default)s]")
    paper.add_argument(
        "--essl-lambda", type=real(0, 1e9), default=0.4, metavar="FLOAT", help="weight of prediction [%(default)s]"
    )
    paper.add_argument("--debug-steps", type=at_least(1), metavar="INT", help="limit of steps per epoch and per test [all]")
    own = parser.add_argument_group("options of this suite", "example: --seed 1 --subset 12000 --encoder-width 16 --resume")
    own.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of all random draws [%(default)s]")
    own.add_argument(
        "--encoder-width",
        type=at_least(1, 1024),
        default=64,
        metavar="N",
        help="channels of the first convolution [%(default)s]",
    )
    options.add_arithmetic_options(own)
    own.add_argument("--compile", action="store_true", help="compile the encoder with torch.compile")
    own.add_argument("--joint-pass", action="store_true", help="encode both views in one pass, with shared batch statistics")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="train on N images, chosen by the seed [all]")
    own.add_argument("--keep-all", action="store_true", help="keep the saved models of all tests, not only of the last")
    own.add_argument("--tensorboard", action="store_true", help="log metrics to TensorBoard, in the run's directory")
    options.add_run_options(own)
    instead = "train nothing: test accuracy of"
    own.add_argument("--linear-probe", metavar="PATH", help=f"{instead} a linear probe of this saved encoder")
    own.add_argument("--knn", metavar="PATH", help=f"{instead} nearest neighbours, by this saved encoder")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """Options that can work together, and the run's name ("probe" if saved encoders are measured). Ends with parser errors."""
    args = parser.parse_args(argv)
    if any(getattr(args, probe) is not None for probe in PROBES):
        options.check(parser, args, "probe")
        return args, "probe"
    args.dataset = args.dataset or "cifar10"
    if args.tx is None:
        parser.error(f"--tx is missing: choose from {' '.join(CODES)}")
    check_model(parser, args)
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


def check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with the parser's error for an encoder or transformations that cannot be had, or a method cannot use."""
    if args.encoder.startswith("lifted_"):
        parser.error(f"--encoder {args.encoder} wants 54 input channels, from a lift of images that was never published")
    if args.encoder == "Cifar10_ResNet":
        parser.error("--encoder Cifar10_ResNet is the class of the others, without a depth: choose cifar10_resnet20, ...")
    features, structured = 8 * args.encoder_width, args.model == "duet" and args.duet_bins > 0
    if structured and features % args.duet_bins:
        parser.error(f"--duet-bins {args.duet_bins} does not divide the encoder's {features} features")
    if args.equi_tx is None and (structured or args.model == "essl"):
        parser.error(f"--equi-tx is missing: {args.model} needs to know the structure of which transformation to learn")
    try:
        if structured:
            check_structure(args.equi_tx, args.tx)
        elif args.model == "essl":
            check_code(args.equi_tx)
    except ValueError as error:
        parser.error(f"--equi-tx {error}")
    used = args.tx if args.model == "simclr" else (*args.tx, args.equi_tx)
    coloured = [code for code in used if code in NEEDS_RGB]
    if coloured and images.SHAPES[images.BY_OPTION[args.dataset]][0] == 1:
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


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set, at a side of --image-size, or 8/7 of it with --center-crop (as published: 36 for 32). Raises DataError."""
    side = args.image_size * 256 // 224 if args.center_crop else args.image_size
    if args.batch_size < parallel.world_size():
        raise InputError(f"--batch-size {args.batch_size} is too small for {parallel.world_size()} processes")
    name = images.BY_OPTION[args.dataset]
    return load_splits(name, args.dataset_root, side, device, subset=args.subset, seed=args.seed)


def make_model(args: argparse.Namespace, device: torch.device) -> Model:
    """The model of the options, with weights from the seed. DUET without bins and ESSL without weight are SimCLR."""
    seed_everything(args.seed)
    blocks = BLOCKS[args.encoder.removeprefix("cifar10_")]
    channels = images.SHAPES[images.BY_OPTION[args.dataset]][0]
    encoder = CifarResNet((blocks,) * 3, in_channels=channels, width=args.encoder_width)
    shared = {"encoder": encoder, "codes": args.tx, "size": args.image_size, "n_classes": args.num_classes}
    if args.model == "duet" and args.duet_bins:
        duet = {"bins": args.duet_bins, "target": args.duet_target, "weight": args.duet_lambda}
        model: Model = DUET(**shared, structure=args.equi_tx, **duet)
    elif args.model == "essl" and args.essl_lambda:
        model = ESSL(**shared, predicted=args.equi_tx, weight=args.essl_lambda)
    else:
        model = SimCLR(**shared)
    model = parallel.synchronise_batch_norm(model.to(device, memory_format=torch.channels_last))
    if args.compile:
        model.base_network.compile()
    return model


def make_optimizer(model: Model, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)


# ---- training ------------------------------------------------------------------------------------------------------------


class Training(State):
    """The state of a training, with its parts, and `baselines`, the metrics at chance. `extra["tested"]`: of the last test."""

    model: Model

    def __init__(self, args: argparse.Namespace, run: Run, model: Model, data: Data):
        self.run, self.optimizer = run, make_optimizer(model, args.lr)
        self.clock, self.meter, self.traces = Clock(), Meter(), Traces(model)
        self.baselines = model.baselines(min(args.batch_size, len(data.training)))
        columns = (f"{split}_{name}" for split in images.SPLITS for name in self.baselines)
        self.metrics = Metrics(run.part / "metrics.csv", ("epoch", "step", "seconds", "lr", *columns), run.trackers)
        stem = published_stem(args.dataset, args.model, args.equi_tx, args.duet_target)
        self.saved = SavedModels(Path(args.save_dir or run.part), stem, run.name)
        parts = {name: getattr(self, name) for name in ("optimizer", "clock", "meter", "metrics", "traces")}
        about = {"data": data.fingerprint, "description": describe(model.base_network, vars(args))}
        super().__init__(run.last, run.options, run, model=model, **about, **parts)


def loss_of(args: argparse.Namespace, model: Model, batch: Batch, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its metrics, computed in fp32 from the model's outputs."""
    views = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
    with autocast(views[0], args.precision):
        out = model(views, jointly=args.joint_pass)
    return model.loss({name: value.float() for name, value in out.items()}, batch, training=training)


def split_batches(args: argparse.Namespace, order: Tensor, smallest: int) -> list[Tensor]:
    """Batches of an order of images; the last may be smaller, but needs `smallest` images, and one for each process."""
    batches = [batch for batch in order.split(args.batch_size) if len(batch) >= max(smallest, parallel.world_size())]
    return batches[: args.debug_steps]


def training_batches(args: argparse.Namespace, data: ImageSet, epoch: int) -> list[Tensor]:
    """The batches of an epoch: a function of seed and epoch alone."""
    order = torch.randperm(len(data), generator=generator_of(args.seed, 0, epoch))
    return split_batches(args, order.to(data.images.device), smallest=2)  # for batch norm


def train_epoch(args: argparse.Namespace, data: ImageSet, training: Training) -> dict[str, float]:
    """Train on the batches of an epoch that are left. Returns mean metrics of all its batches."""
    model, optimizer = training.model, training.optimizer
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = args.lr * warmup_cosine(training.epoch, args.warmup_epochs, args.epochs)
    batches, title = training_batches(args, data, training.epoch), f"training, epoch {training.epoch}/{args.epochs}"
    for indices in bar(args, batches[training.batch :], title, initial=training.batch, total=len(batches)):
        generator = generator_of(args.seed, 1, training.epoch, training.batch)
        batch = model.make_batch(data.images, data.labels, indices, generator, training=True)
        loss, metrics = loss_of(args, model, batch, training=True)
        optimizer.zero_grad()
        loss.backward()
        parallel.sum_gradients(model.parameters())
        optimizer.step()
        training.meter.add(len(indices), metrics)
        training.after_step()
    return training.meter.means()


@torch.no_grad()
def test_epoch(args: argparse.Namespace, data: ImageSet, training: Training) -> dict[str, float]:
    """Mean metrics of the test images, always with the same views."""
    model, meter = training.model, Meter()
    model.eval()
    batches = split_batches(args, torch.arange(len(data), device=data.images.device), smallest=1)
    for i, indices in enumerate(bar(args, batches, f"test, epoch {training.epoch}/{args.epochs}")):
        training.check_signal()
        batch = model.make_batch(data.images, data.labels, indices, generator_of(args.seed, 2, i), training=False)
        meter.add(len(indices), loss_of(args, model, batch, training=False)[1])
    return meter.means()


def train(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Train until the epochs are over: each is a row of metrics.csv, some end with a test and a saved model."""
    clock, drawn_at = training.clock, -math.inf
    while training.epoch < args.epochs:
        began = clock.used()
        means = {"train": train_epoch(args, data.training, training)}
        seconds = {"train": clock.used() - began}
        check_finite(means["train"]["total_loss"], f"epoch {training.epoch}", "--lr or --duet-lambda")
        if training.epoch % args.test_every == 0 or training.epoch == args.epochs - 1:
            training.extra["tested"] = means["test"] = test_epoch(args, data.test, training)
            seconds["test"] = clock.used() - began - seconds["train"]
        if parallel.is_main():
            log_epoch(training, means, seconds)
            if "test" in means:
                save_model(args, training, f"{training.epoch:04d}")
            if "test" in means and clock.used() - drawn_at >= DRAW_SECONDS:
                with clock.paused():
                    draw_curves(training)
                drawn_at = clock.used()
        training.meter.reset()
        training.end_epoch()
    if "tested" not in training.extra:  # --epochs 0
        training.extra["tested"] = test_epoch(args, data.test, training)
    training.save()


def log_epoch(training: Training, means: Means, seconds: dict[str, float]) -> None:
    """Log the metrics of an epoch, each with its baseline, a line a split, and add them to metrics.csv and the traces."""
    lr = training.optimizer.param_groups[0]["lr"]
    row = {"epoch": training.epoch, "step": training.step, "seconds": training.clock.used(), "lr": lr, "train_lr": lr}
    chance = {name: f" (chance {value:.3g})" for name, value in training.baselines.items() if value is not None}
    for split, values in means.items():
        metrics = ", ".join(f"{name}: {value:.3f}{chance.get(name, '')}" for name, value in values.items())
        rate = f", lr: {lr:g}" if split == "train" else ""
        training.run.log(f"[{split.capitalize():<5} epoch {training.epoch} in {seconds[split]:.2f}s]  {metrics}{rate}")
        row |= {f"{split}_{name}": value for name, value in values.items()}
    training.metrics.append(dict.fromkeys(training.metrics.columns, math.nan) | row)
    training.traces.record(training.epoch + 1, {})


# ---- what is left of a run -----------------------------------------------------------------------------------------------


def save_model(args: argparse.Namespace, training: Training, when: str) -> None:
    path = training.saved.save(training.model, when, vars(args), training.step, keep_all=args.keep_all)
    training.run.log(f"Model saved as {path if args.save_dir or when != 'final' else training.run.final / path.name}")


def draw_curves(training: Training) -> None:
    """metrics.png, and weights.png (of convolutions and linear maps: a panel a tensor)."""
    run, metrics, accuracy = training.run, read_metrics(training.metrics.path), "track_head_top_1_mean"
    measures, chance = [name for name in training.baselines if "top_5" not in name], {"chance": training.baselines[accuracy]}
    plotting.plot_epochs(run.part / "metrics.png", run.name, metrics, measures, {accuracy: chance})
    traced = training.traces.by_parameter()
    weights = {name: values for name, values in traced.items() if training.model.get_parameter(name).ndim > 1}
    plotting.plot_weights(run.part / "weights.png", run.name, training.traces.steps, weights, 1)


@strict_fp32()
def report(args: argparse.Namespace, data: Data, training: Training) -> dict[str, Any]:
    """The final metrics of the last model, and pictures of what it learned."""
    run, model = training.run, training.model.eval()
    encoder, size = model.base_network, args.image_size
    if training.epoch:
        draw_curves(training)
    marginals, code = None, args.equi_tx or next((code for code in args.tx if code in PARAMETRISED), None)
    if code in PARAMETRISED and args.duet_bins and encoder.n_features % args.duet_bins == 0:
        path, shown = run.part / "marginals.png", data.test.images[:N_SWEPT]
        marginals = pictures.draw_marginals(path, run.name, encoder, shown, size, code, args.duet_bins, args.duet_target)
    indices = training_batches(args, data.training, 0)[0][:N_SHOWN]
    pixels, generator = as_floats(data.training.images[indices]), generator_of(args.seed, 3)
    pictures.plot_views(run.part / "samples.png", run.name, pixels, model.stack, args.equi_tx, generator)
    # a run for debugging looks at few images here, too
    limit = args.debug_steps * args.batch_size if args.debug_steps else None
    train_set, test_set = data.training[:limit], data.test[:limit]
    result = {"script": "train_ssl", "name": run.name, "seed": args.seed, "protocol": PROTOCOL}
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "device": str(data.test.images.device)}
    result |= {"processes": parallel.world_size(), "epochs": training.epoch, "steps": training.step}
    result |= {"seconds": training.clock.used(), "training_images": len(train_set), "test_images": len(test_set)}
    result |= {"test": training.extra["tested"], "chance_top_1": 100 / args.num_classes, "marginals": marginals}
    walk = partial(bar, args, title="measuring the encoder")
    classes = train_set, test_set, size, args.num_classes, args.seed, walk
    result |= evaluation.measure_classes(encoder, *classes)
    # whoever is not ahead of both has learned nothing about content
    untrained = make_model(argparse.Namespace(**{**vars(args), "compile": False}), data.test.images.device).base_network
    for name, baseline in {"raw_pixels": evaluation.raw_pixels(size), "untrained": untrained}.items():
        result[name] = evaluation.measure_classes(baseline, *classes)
    if "rot" in (*args.tx, args.equi_tx):
        bins = args.duet_bins if marginals is not None and code == "rot" else 0
        rotated = train_set.images[:10_000], test_set.images, size
        result["rotation_error_degrees"] = evaluation.rotation_errors(encoder, *rotated, bins, args.seed, walk)
    return result


# ---- saved encoders ------------------------------------------------------------------------------------------------------


@strict_fp32()
def measure(args: argparse.Namespace, kind: str, path: Path, encoder: CifarResNet, out: Path, command: Command) -> None:
    """Print the accuracy of a saved encoder, of raw pixels and of an encoder with --seed's weights, and write it to `out`."""
    title = kind.replace("_", " ")

    def walk(parts: Sequence[Any]) -> Iterator[Any]:
        for part in bar(args, parts, title):
            command.check_signal(f"before {path} was measured")
            yield part

    device, n_classes = options.device_of(args), images.N_CLASSES[images.BY_OPTION[args.dataset]]
    image_sets = load_data(args, device)
    training, test = image_sets.training, image_sets.test

    def probe(encoder: torch.nn.Module) -> dict[str, Any]:
        splits = evaluation.represent_splits(encoder.to(device), training, test, args.image_size, walk)
        if kind == "linear_probe":
            return evaluation.linear_probe(*splits, n_classes, args.seed, walk)
        return evaluation.nearest_neighbours(*splits, n_classes)

    seed_everything(args.seed)
    untrained, metrics = CifarResNet(**encoder.options), probe(encoder)
    metrics |= {"raw_pixels": probe(evaluation.raw_pixels(args.image_size)), "untrained": probe(untrained)}
    baselines = f"raw pixels {metrics['raw_pixels']['top_1']:.2f}, untrained encoder {metrics['untrained']['top_1']:.2f}"
    echo(f"{path}: {title} top-1 {metrics['top_1']:.2f} % (chance {100 / n_classes:.3g}, {baselines})")
    result = {"file": str(path), "dataset": args.dataset, "seed": args.seed, "chance_top_1": 100 / n_classes}
    write_json(out, result | {"training_images": len(training), "test_images": len(test), **metrics})
    echo(f"written to {out}")


def evaluate_saved(args: argparse.Namespace) -> int:
    """--linear-probe and --knn. All files are read before anything is computed."""
    probes = []
    with Command("train_ssl") as command:
        command.next = "the same line begins again"
        if parallel.launched():
            raise InputError("--linear-probe and --knn are for one process: leave torchrun out")
        for kind, path in ((kind, Path(getattr(args, kind))) for kind in PROBES if getattr(args, kind) is not None):
            encoder, its_images = load_for_images(path, args.dataset)
            out = path.with_name(f"{path.stem}_{kind}_{its_images['dataset']}.json")
            if out.exists() and not args.overwrite:
                raise InputError(f"{out} is there: --overwrite replaces it")
            probes.append((argparse.Namespace(**{**vars(args), **its_images}), kind, path, encoder, out))
        for probe in probes:
            if args.dry_run:
                echo(str(probe[-1]))
            else:
                measure(*probe, command)
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Begin or resume the run, once nothing can be refused any more, and log what was derived from the options."""
    run, begun = training.run, training.run.status == "unfinished"
    if begun:
        training.resume()
    training.check_same()
    if args.save_dir:
        parallel.run_on_main(lambda: training.saved.check(begun=begun, overwrite=args.overwrite), InputError, OSError)
    run.open()
    if args.save_dir:
        parallel.run_on_main(lambda: training.saved.claim(begun=begun, overwrite=args.overwrite), InputError, OSError)
    training.save()
    side = data.training.images.shape[3]
    run.log(
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters on {data.test.images.device}, "
        f"{parallel.world_size()} processes, seed {args.seed}; {len(data.training)} training and {len(data.test)} test images "
        f"of {side}x{side} pixels, {len(training_batches(args, data.training, 0))} steps an epoch"
    )
    if isinstance(training.model, DUET) and args.duet_target == "vm" and args.equi_tx not in CIRCULAR:
        run.log(f"note: on the circle of --duet-target vm, both ends of the range of {args.equi_tx} are one point")
    run.log(f"resumed in epoch {training.epoch} after step {training.step}" if training.step else "Training starts!")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name = parse(parser, argv)
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    if name == "probe":
        return evaluate_saved(args)
    if args.dry_run:
        echo(name)
        return 0
    run = Run("train_ssl", name, args, another="--seed N", may_change=NOT_IN_NAME, files=FILES)
    run.saves_memory = "--precision bf16, a smaller --batch-size, or torchrun with more GPUs"
    with parallel.process_group(options.device_of(args).type) as device, run:
        data = load_data(args, device)
        training = Training(args, run, make_model(args, device), data)
        start(args, data, training)
        train(args, data, training)
        if not parallel.is_main():
            return 0
        save_model(args, training, "final")
        with training.clock.paused():
            result = report(args, data, training)
        run.log(evaluation.as_table(result))
        status = run.finish(result)
    looks = run.where_to_look(views="samples.png", marginals="marginals.png")
    echo(f"after {result['seconds'] / 60:.1f} minutes of training:\n{looks}")
    return status


if __name__ == "__main__":
    sys.exit(main())
