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
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import parallel, plotting
from common.datasets import images
from common.datasets.images import DataError, ImageSet
from common.errors import InputError
from common.models.resnet import BLOCKS, CifarResNet
from common.precision import PRECISIONS, autocast
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
from common.run.state import State, refuse_infinity
from common.seeds import generator_of, seed_everything
from common.ssl import evaluation, models, pictures
from common.ssl.duet import DUET, TARGETS, jensen_shannon
from common.ssl.essl import ESSL, ESSL_CODES
from common.ssl.simclr import SimCLR
from common.ssl.steps import Batch, as_floats
from common.ssl.views import CIRCULAR, CODES, NEEDS_RGB, PARAMETRISED, Stack

ENCODERS = ("Cifar10_ResNet", *(f"{lifted}cifar10_{name}" for lifted in ("", "lifted_") for name in BLOCKS))
NOT_IN_NAME = (*options.RUN_OPTIONS, "dataset_root", "save_dir", "linear_probe", "knn")  # options that do not make another run
FILES = ("*.pt", "marginals.png")
DRAW_SECONDS = 600.0  # between two drawings of metrics.png
N_SHOWN, N_SWEPT = 12, 500  # images in samples.png, and in the heat map
PROBES = ("linear_probe", "knn")
Model = DUET | SimCLR | ESSL
Means = dict[str, dict[str, float]]  # of metrics, by split and name


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
    own.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of products and convolutions [%(default)s]")
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
    """Options that can work together, and the run's name ("probe" if saved encoders are measured). Ends with parser errors."""
    args = parser.parse_args(argv)
    if any(getattr(args, probe) is not None for probe in PROBES):
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
        if not Stack(args.tx, args.image_size).applies(args.equi_tx):
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


def make_model(args: argparse.Namespace, device: torch.device) -> Model:
    """The model of the options, with weights from the seed. With a weight or number of bins of 0, DUET and ESSL are SimCLR."""
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
        parts = {name: getattr(self, name) for name in ("optimizer", "clock", "meter", "metrics", "traces")}
        super().__init__(run.last, run.options, run, data=data.fingerprint, model=model, **parts)


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
        refuse_infinity(means["train"]["total_loss"], f"epoch {training.epoch}", "--lr or --duet-lambda")
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
    for split, values in means.items():
        chance = {name: f" (chance {level:.3g})" for name, level in training.baselines.items() if level is not None}
        metrics = ", ".join(f"{name}: {value:.3f}{chance.get(name, '')}" for name, value in values.items())
        rate = f", lr: {lr:g}" if split == "train" else ""
        training.run.log(f"[{split.capitalize():<5} epoch {training.epoch} in {seconds[split]:.2f}s]  {metrics}{rate}")
        row |= {f"{split}_{name}": value for name, value in values.items()}
    training.metrics.append(dict.fromkeys(training.metrics.columns, math.nan) | row)
    training.traces.record(training.epoch + 1, {})


# ---- what is left of a run -----------------------------------------------------------------------------------------------


def model_files(args: argparse.Namespace, run: Run) -> tuple[Path, str]:
    """The folder of saved models, and the published beginning of their names."""
    equi = f"_{args.equi_tx}" if args.equi_tx else ""
    more = {"duet": f"_eq-{args.equi_tx}_target-{args.duet_target}", "essl": f"_eq-{args.equi_tx}", "simclr": ""}
    folder = Path(args.save_dir) if args.save_dir else run.part
    return folder, f"encoder_{args.dataset}_{args.model}{equi}{more[args.model]}"


def save_model(args: argparse.Namespace, training: Training, when: str) -> None:
    """Save the model with its options; those of earlier epochs go, unless all are to be kept."""
    run, (folder, stem) = training.run, model_files(args, training.run)
    path = folder / f"{stem}_{when}.pt"
    models.save(training.model, path, vars(args), training.step)
    for old in models.saved_models(folder, stem):
        if old != path and not args.keep_all:
            old.unlink()
    run.log(f"Model saved as {path if args.save_dir or when != 'final' else run.final / path.name}")


def draw_curves(training: Training) -> None:
    """metrics.png, and weights.png (of convolutions and linear maps: a panel a tensor)."""
    run, metrics, accuracy = training.run, read_metrics(training.metrics.path), "track_head_top_1_mean"
    measures = [name for name in training.baselines if "top_5" not in name]
    plotting.plot_epochs(
        run.part / "metrics.png", run.name, metrics, measures, {accuracy: {"chance": training.baselines[accuracy]}}
    )
    traced = training.traces.by_parameter()
    weights = {name: values for name, values in traced.items() if training.model.get_parameter(name).ndim > 1}
    plotting.plot_weights(run.part / "weights.png", run.name, training.traces.steps, weights, 1)


def draw_marginals(args: argparse.Namespace, data: Data, model: Model, run: Run) -> dict[str, Any] | None:
    """marginals.png: the group marginal of test images as the transformation goes through its range; and its metrics."""
    code, bins = args.equi_tx or next((code for code in args.tx if code in PARAMETRISED), None), args.duet_bins
    if code not in PARAMETRISED or not bins or model.base_network.n_features % bins:
        return None
    shown = data.test.images[:N_SWEPT]
    parameters, learned = evaluation.marginals_by_parameter(model.base_network, shown, args.image_size, code, bins)
    learned, target = learned.cpu(), TARGETS[args.duet_target](torch.tensor(parameters), bins)
    pictures.plot_marginals(run.part / "marginals.png", run.name, code, parameters, learned.numpy(), target.numpy())
    divergence = jensen_shannon(learned.log(), target).item()
    uniform = jensen_shannon(torch.zeros_like(target), target).item()
    return {"code": code, "divergence_from_target": divergence, "divergence_of_uniform": uniform, "images": len(shown)}


def report(args: argparse.Namespace, data: Data, training: Training) -> dict[str, Any]:
    """The final metrics of the last model, and pictures of what it learned."""
    run, model = training.run, training.model.eval()
    if training.epoch:
        draw_curves(training)
    marginals = draw_marginals(args, data, model, run)
    indices = training_batches(args, data.training, 0)[0][:N_SHOWN]
    pixels, generator = as_floats(data.training.images[indices]), generator_of(args.seed, 3)
    pictures.plot_views(run.part / "samples.png", run.name, pixels, model.stack, args.equi_tx, generator)
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

    def walk(parts: Sequence[Any]) -> Iterable[Any]:
        return bar(args, parts, "measuring the encoder")

    splits = evaluation.represent_splits(model.base_network, train_set, test_set, args.image_size, walk)
    result["linear_probe"] = evaluation.linear_probe(*splits, args.num_classes, args.seed, walk)
    result["knn"] = evaluation.nearest_neighbours(*splits, args.num_classes)
    if "rot" in (*args.tx, args.equi_tx):
        bins = args.duet_bins if marginals is not None and marginals["code"] == "rot" else 0
        rotated = train_set.images[:10_000], test_set.images, args.image_size
        result["rotation_error_degrees"] = evaluation.rotation_errors(model.base_network, *rotated, bins, args.seed, walk)
    return result


def report_table(result: dict[str, Any]) -> str:
    """The final metrics as text."""
    chance = f"(chance {result['chance_top_1']:.3g})"
    rows = {
        "test images": result["test_images"],
        "online linear head, top-1": f"{result['test']['track_head_top_1_mean']:.2f} % {chance}",
        "linear probe, top-1": f"{result['linear_probe']['top_1']:.2f} % {chance}",
        "nearest neighbours, top-1": f"{result['knn']['top_1']:.2f} % {chance}",
    }
    for how, error in result.get("rotation_error_degrees", {}).items():
        means = f"{error['mean']:.1f} degrees in the mean, {error['median']:.1f} in the median (chance 90)"
        rows[f"rotation, by the {how}"] = means
    if result["marginals"]:
        learned, uniform = (result["marginals"][name] for name in ("divergence_from_target", "divergence_of_uniform"))
        rows["divergence of marginals from target"] = f"{learned:.4f} nats (of a uniform one {uniform:.4f})"
    return "\n".join(f"{name:>34}: {value}" for name, value in rows.items())


# ---- saved encoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A saved encoder that is to be measured, and the file of its metrics."""

    kind: str  # linear_probe or knn
    path: Path
    encoder: CifarResNet
    args: argparse.Namespace  # with data set and sizes of images of its training
    out: Path


def read_probe(args: argparse.Namespace, kind: str) -> Probe:
    """Read an encoder. Raises InputError if it is none, does not fit the data, or was measured before."""
    path = Path(getattr(args, kind))
    saved = models.read_saved(path)
    encoder, noted = models.encoder_of(saved, path), saved["options"]
    for name, values in (("dataset", images.BY_OPTION), ("image_size", range(8, 513)), ("center_crop", (False, True))):
        if name not in noted or noted[name] not in values:
            raise InputError(f"{path} is of another version: its option {name} is {noted.get(name, 'missing')!r}")
    dataset = args.dataset or noted["dataset"]
    channels = images.SHAPES[images.BY_OPTION[dataset]][0]
    if channels != encoder.conv1.in_channels:
        raise InputError(f"{path} takes {encoder.conv1.in_channels} channels, images of {dataset} have {channels}")
    out = path.with_name(f"{path.stem}_{kind}_{dataset}.json")
    if out.exists() and not args.overwrite:
        raise InputError(f"{out} is there: --overwrite replaces it")
    sizes = {name: noted[name] for name in ("image_size", "center_crop")}
    return Probe(kind, path, encoder, argparse.Namespace(**{**vars(args), "dataset": dataset, **sizes}), out)


def measure(probe: Probe, command: Command) -> None:
    """Print the accuracy of a saved encoder, and write it beside the file."""
    args, kind = probe.args, probe.kind.replace("_", " ")

    def walk(parts: Sequence[Any]) -> Iterator[Any]:
        for part in bar(args, parts, kind):
            command.check_signal(f"before {probe.path} was measured")
            yield part

    device, n_classes = options.device_of(args), images.N_CLASSES[images.BY_OPTION[args.dataset]]
    data = load_data(args, device)
    splits = evaluation.represent_splits(probe.encoder.to(device), data.training, data.test, args.image_size, walk)
    if probe.kind == "linear_probe":
        metrics = evaluation.linear_probe(*splits, n_classes, args.seed, walk)
    else:
        metrics = evaluation.nearest_neighbours(*splits, n_classes)
    echo(f"{probe.path}: {kind} top-1 {metrics['top_1']:.2f} % (chance {100 / n_classes:.3g})")
    result = {"file": str(probe.path), "dataset": args.dataset, "seed": args.seed, "chance_top_1": 100 / n_classes}
    write_json(probe.out, result | {"training_images": len(data.training), "test_images": len(data.test), **metrics})
    echo(f"written to {probe.out}")


def evaluate_saved(args: argparse.Namespace) -> int:
    """--linear-probe and --knn. All files are read before anything is computed."""
    with Command("train_ssl") as command:
        command.next = "the same line begins again"
        if parallel.launched():
            raise InputError("--linear-probe and --knn are for one process: leave torchrun out")
        for probe in [read_probe(args, kind) for kind in PROBES if getattr(args, kind) is not None]:
            if args.dry_run:
                echo(str(probe.out))
            else:
                measure(probe, command)
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Begin or resume the run, once nothing can be refused any more, and log what was derived from the options."""
    run, begun = training.run, training.run.status == "unfinished"
    place = *model_files(args, run), run.name

    def check_save_dir() -> None:
        place[0].mkdir(parents=True, exist_ok=True)
        if not args.overwrite:
            models.check_owner(*place, begun=begun)

    if begun:
        training.resume()
    if args.save_dir:
        parallel.main_says(check_save_dir, InputError, OSError)
    run.open()
    if args.save_dir:
        parallel.main_says(lambda: models.claim(*place, begun=begun, overwrite=args.overwrite), InputError, OSError)
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
    if name == "probe":
        return evaluate_saved(args)
    if args.dry_run:
        print(name)
        return 0
    run = Run("train_ssl", name, args, another="--seed N", may_change=NOT_IN_NAME, files=FILES)
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
        run.log(report_table(result))
        status = run.finish(result)
    looks = run.where_to_look(views="samples.png", marginals="marginals.png")
    echo(f"after {result['seconds'] / 60:.1f} minutes of training:\n{looks}")
    return status


if __name__ == "__main__":
    sys.exit(main())
