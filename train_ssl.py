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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import plotting
from common.datasets import images
from common.datasets.images import DataError, ImageSet
from common.models.resnet import BLOCKS, CifarResNet
from common.run import checkpoint, options, trackers
from common.run.directory import RunDirectory, RunError
from common.run.ending import EXIT_RESUMABLE, refusing, say, surviving_full_disks, tell
from common.run.epochs import EpochTraining, Sums, load_last
from common.run.interruption import Interruption
from common.run.memory import keep_freed_memory
from common.run.options import at_least, real
from common.run.records import write_json
from common.run.schedule import warmup_cosine
from common.run.traces import read_metrics
from common.seeds import generator_of
from common.ssl import evaluation, losses, parallel
from common.ssl.evaluation import as_floats
from common.ssl.method import Batch, Method
from common.ssl.models import CLASSES, ESSL_CODES, Outputs, SelfSupervised, encoder_of, read_saved
from common.ssl.targets import TARGETS
from common.ssl.views import CIRCULAR, CODES, COLOURS, NEEDS_RGB, PARAMETRISED, Stack, clean_view

ENCODERS = ("Cifar10_ResNet", *(f"{lifted}cifar10_{name}" for lifted in ("", "lifted_") for name in BLOCKS))
# options that do not make another run
UNNAMED = (
    "device", "dataset_root", "save_dir", "wandb_project", "tensorboard", "resume", "results_dir", "overwrite", "dry_run",
    "linear_probe", "knn",
)  # fmt: skip
SPLITS = ("train", "test")
PICTURES = {
    "log": "log",
    "curves": "metrics.png",
    "weight traces": "weights.png",
    "views": "samples.png",
    "group marginals": "marginals.png",
}
DRAW_SECONDS = 600.0  # between two drawings of metrics.png
N_SHOWN, N_SWEPT = 12, 500  # images in samples.png, and in the heat map


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="train_ssl.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper")
    paper.add_argument("--device", choices=("cpu", "cuda"), help="[cuda when available]")
    paper.add_argument("--dataset", choices=tuple(images.BY_OPTION), help="[cifar10]")
    paper.add_argument(
        "--dataset-root", metavar="PATH", default="data", help="where the data set lies, or is saved [%(default)s]"
    )
    paper.add_argument("--batch-size", type=at_least(2), default=1024, metavar="INT", help="of all processes [%(default)s]")
    paper.add_argument("--image-size", type=at_least(8, 512), default=32, metavar="INT", help="side of a view [%(default)s]")
    paper.add_argument("--center-crop", action="store_true", help="use images 8/7 as large, of which tests see the centre")
    paper.add_argument("--save-dir", metavar="PATH", help="where to save the model [the run's directory]")
    paper.add_argument(
        "--wandb-project", metavar="STR", help="log to Weights & Biases (credentials: .wandb.yaml, see README.md)"
    )
    paper.add_argument("--model", choices=("duet", "simclr", "essl"), default="duet", help="[%(default)s]")
    paper.add_argument("--encoder", choices=ENCODERS, default="cifar10_resnet32", help="[%(default)s]")
    paper.add_argument("--num-classes", type=at_least(1, 10**6), metavar="INT", help="[those of the data set]")
    paper.add_argument("--epochs", type=at_least(0), default=800, metavar="INT", help="[%(default)s]")
    paper.add_argument("--warmup-epochs", type=at_least(0), default=10, metavar="INT", help="linear warm-up [%(default)s]")
    paper.add_argument(
        "--test-every", type=at_least(1), default=10, metavar="INT", help="epochs between two tests [%(default)s]"
    )
    paper.add_argument(
        "--lr", type=real(0, 10, above=True), default=0.0004, metavar="FLOAT", help="learning rate [%(default)s]"
    )
    paper.add_argument("--tx", nargs="*", choices=CODES, help="transformations, in the order in which they are applied")
    paper.add_argument(
        "--equi-tx",
        choices=CODES,
        help="what to learn the structure of: one of --tx for duet, one that is taken out of it for essl",
    )
    paper.add_argument(
        "--duet-lambda", type=real(0, 1e9), default=10.0, metavar="FLOAT", help="weight of structure [%(default)s]"
    )
    paper.add_argument("--duet-bins", type=at_least(0, 4096), default=8, metavar="INT", help="G; 0 is SimCLR [%(default)s]")
    paper.add_argument("--duet-target", choices=tuple(TARGETS), default="ga", help="Gaussian or von Mises [%(default)s]")
    paper.add_argument(
        "--essl-lambda", type=real(0, 1e9), default=0.4, metavar="FLOAT", help="weight of equivariance [%(default)s]"
    )
    paper.add_argument("--debug-steps", type=at_least(1), metavar="INT", help="steps per epoch, and per test [all]")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--seed", type=at_least(0), default=0, help="of weights, order and views [%(default)s]")
    own.add_argument("--encoder-width", type=at_least(1, 1024), default=64, help="channels of the stem [%(default)s]")
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of products and convolutions [%(default)s]")
    own.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    own.add_argument("--joint-pass", action="store_true", help="encode both views in one pass, with common batch statistics")
    own.add_argument("--subset", type=at_least(20), metavar="N", help="train on N images, chosen by the seed [all]")
    own.add_argument("--results-dir", default="results", metavar="PATH", help="where run directories are made [%(default)s]")
    own.add_argument(
        "--resume", nargs="?", const="auto", choices=("auto",), help="go on with this run where it was interrupted"
    )
    own.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    own.add_argument("--keep-all", action="store_true", help="keep the models of all tests, not of the last alone")
    own.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, in the run's directory")
    own.add_argument("--dry-run", action="store_true", help="check the options, print the run's name and exit")
    own.add_argument(
        "--linear-probe", metavar="PATH", help="instead of training: test accuracy of a linear classifier on an encoder"
    )
    own.add_argument("--knn", metavar="PATH", help="instead of training: the same of its nearest neighbours")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options that can work together, or the parser's error."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if args.linear_probe is not None or args.knn is not None:
        return args
    args.dataset = args.dataset or "cifar10"
    if args.tx is None:
        parser.error(f"--tx is missing: choose from {' '.join(CODES)}")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it: choose one")
    check_encoder(parser, args)
    check_transformations(parser, args)
    classes = images.N_CLASSES[images.BY_OPTION[args.dataset]]
    if args.num_classes is None:
        args.num_classes = classes
    if args.num_classes < classes:
        parser.error(f"--num-classes {args.num_classes} is too small: {args.dataset} has {classes}")
    if args.model == "essl" and args.equi_tx in args.tx:
        args.tx = [code for code in args.tx if code != args.equi_tx]  # in their order
        if parallel.is_main() and not args.dry_run:
            say(f"[ESSL] Transformation {args.equi_tx} removed from tx, only using {args.tx}")
    return args


def check_encoder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.encoder.startswith("lifted_"):
        parser.error(f"--encoder {args.encoder} wants 54 input channels, from a lift of images that was never published")
    if args.encoder == "Cifar10_ResNet":
        parser.error(
            "--encoder Cifar10_ResNet is the class of the others, without a number of blocks: choose cifar10_resnet20, ..."
        )
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
    of_the_data = ("num_classes",) if args.num_classes == images.N_CLASSES[images.BY_OPTION[args.dataset]] else ()
    parts += options.not_defaults(parser, args, (*UNNAMED, *of_the_data, "dataset", "model", "tx", "equi_tx"))
    name = "-".join(parts)
    options.check_length(parser, name)
    return name


# ---- data and model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Both splits, on the device, as large as the transformations are to see them."""

    training: ImageSet
    test: ImageSet
    fingerprint: str

    @property
    def side(self) -> int:
        return self.training.images.shape[3]


def fetch_data(args: argparse.Namespace) -> tuple[ImageSet, ImageSet]:
    """Both splits as published, downloaded if they are not there. Raises DataError."""
    name = images.BY_OPTION[args.dataset]
    return tuple(images.load(name, split, args.dataset_root, download=True) for split in ("train", "test"))  # type: ignore


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set, at a side of --image-size, or 8/7 of it with --center-crop (as published: 36 for 32). Raises DataError."""
    side = args.image_size * 256 // 224 if args.center_crop else args.image_size
    training, test = fetch_data(args)
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
    return Data(images.resize(training, side).to(device), images.resize(test, side).to(device), fingerprint)


def method_of(args: argparse.Namespace) -> Method:
    """What --model, and a weight or number of bins of 0, stand for."""
    views = tuple(args.tx), args.image_size
    if args.model == "duet" and args.duet_bins:
        return Method(*views, bins=args.duet_bins, structure=args.equi_tx, target=args.duet_target, weight=args.duet_lambda)
    if args.model == "essl" and args.essl_lambda:
        return Method(*views, predicts=args.equi_tx, weight=args.essl_lambda)
    return Method(*views)


def make_model(args: argparse.Namespace, device: torch.device) -> SelfSupervised:
    """The model of the options, with weights from the seed."""
    checkpoint.seed_everything(args.seed)
    blocks = BLOCKS[args.encoder.removeprefix("cifar10_")]
    channels = images.SHAPES[images.BY_OPTION[args.dataset]][0]
    encoder = CifarResNet((blocks,) * 3, in_channels=channels, width=args.encoder_width)
    model = method_of(args).make_model(encoder, args.num_classes)
    model = parallel.synchronise_batch_norm(model.to(device, memory_format=torch.channels_last))
    if args.compile:
        model.base_network.compile()
    return model


def make_optimizer(model: SelfSupervised, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)


# ---- epochs --------------------------------------------------------------------------------------------------------------


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


def train_epoch(
    args: argparse.Namespace, data: ImageSet, training: EpochTraining, interruption: Interruption, progress: tqdm
) -> bool:
    """Train on the batches of an epoch that are left; False if a signal comes first."""
    method, model, optimizer = method_of(args), training.model, training.optimizer
    assert isinstance(model, SelfSupervised)
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = args.lr * warmup_cosine(training.epoch, args.warmup_epochs, args.epochs)
    batches = training_batches(args, data, training.epoch)
    for chosen in batches[training.batch :]:
        if parallel.any_process(interruption.signal is not None):
            return False
        generator = generator_of(args.seed, 1, training.epoch, training.batch)
        batch = method.make_batch(data.images, data.labels, chosen, generator, training=True)
        loss, figures = method.loss(forward(args, model, batch), batch, training=True)
        optimizer.zero_grad()
        loss.backward()
        parallel.sum_gradients(model.parameters())
        optimizer.step()

        training.step_done(len(chosen), figures)
        progress.set_description_str(
            f"epoch {training.epoch}/{args.epochs} batch {training.batch}/{len(batches)}", refresh=False
        )
        progress.update()
        training.save_now_and_then()
    return True


@torch.no_grad()
def test_epoch(
    args: argparse.Namespace, data: ImageSet, model: SelfSupervised, interruption: Interruption
) -> dict[str, float] | None:
    """Mean figures of the test images, always with the same views; None if a signal comes."""
    method, sums = method_of(args), Sums()
    model.eval()
    for i, chosen in enumerate(batches_of(args, torch.arange(len(data), device=data.images.device), smallest=1)):
        if parallel.any_process(interruption.signal is not None):
            return None
        batch = method.make_batch(data.images, data.labels, chosen, generator_of(args.seed, 2, i), training=False)
        sums.add(len(chosen), method.loss(forward(args, model, batch), batch, training=False)[1])
    return sums.means()


def train(
    args: argparse.Namespace, data: Data, training: EpochTraining, sinks: trackers.Trackers, interruption: Interruption
) -> bool:
    """Train until the epochs are over; False if a signal came first, with all that is needed to go on saved."""
    assert isinstance(training.model, SelfSupervised)
    drawn_at = -math.inf
    with tqdm(disable=None, bar_format="{desc} {rate_fmt}", unit="step") as progress:
        while training.epoch < args.epochs:
            due = training.epoch % args.test_every == 0 or training.epoch == args.epochs - 1
            finished = train_epoch(args, data.training, training, interruption, progress)
            trained_at, tested = training.clock.used(), None
            if finished and due:
                tested = test_epoch(args, data.test, training.model, interruption)
            if not finished or (due and tested is None):
                training.save_last()
                return False
            means = training.sums.means()
            if not math.isfinite(means["total_loss"]):
                raise SystemExit(f"the loss of epoch {training.epoch} is not finite: a smaller --lr or --duet-lambda may help")
            row = tell_epoch(args, training, len(data.training), means, tested, trained_at)
            figures = {{"lr": "train_lr"}.get(name, name): value for name, value in row.items() if not math.isnan(value)}
            sinks.log(figures, training.epoch)
            if tested is not None:
                training.tested = tested
                if training.writes:
                    save_model(args, training, f"{training.epoch:04d}")
            training.epoch_done(row)
            if tested is not None and training.writes and training.clock.used() - drawn_at >= DRAW_SECONDS:
                with training.clock.paused():
                    draw_curves(args, training)
                drawn_at = training.clock.used()
    training.save_last()
    return True


def tell_epoch(
    args: argparse.Namespace,
    training: EpochTraining,
    n_training: int,
    train_means: dict[str, float],
    test_means: dict[str, float] | None,
    trained_at: float,
) -> dict[str, float | int]:
    """Tell the figures of an epoch; its row of metrics.csv."""
    epoch, lr = training.epoch, training.optimizer.param_groups[0]["lr"]
    seconds = {"train": trained_at - training.epoch_began, "test": training.clock.used() - trained_at}
    row: dict[str, float | int] = {"epoch": epoch, "step": training.step, "seconds": training.clock.used(), "lr": lr}
    for split, means in zip(SPLITS, (train_means, test_means), strict=True):
        row |= {
            f"{split}_{name}": math.nan if means is None else means.get(name, math.nan)
            for name in method_of(args).figure_names(args.batch_size)
        }
        if means is not None and training.writes:
            rate = f", lr: {lr:g}" if split == "train" else ""
            levels = chance_levels(args, min(args.batch_size, n_training))
            told = {name: f" (chance {levels[name]:.3g})" if name in levels else "" for name in means}
            figures = ", ".join(f"{name}: {value:.3f}{told[name]}" for name, value in means.items())
            tell(training.run, f"[{split.capitalize():<5} epoch {epoch} in {seconds[split]:.2f}s]  {figures}{rate}")
    return row


def chance_levels(args: argparse.Namespace, n: int) -> dict[str, float]:
    """What figures would be by chance, in batches of n images: to judge those in the log by."""
    method = method_of(args)
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


def save_model(args: argparse.Namespace, training: EpochTraining, when: str) -> None:
    """Save the model with its options; those of earlier epochs go, unless all are to be kept."""
    model, stem = training.model, file_stem(args)
    assert isinstance(model, SelfSupervised)
    folder = Path(args.save_dir) if args.save_dir else training.run.path
    path = folder / f"{stem}_{when}.pt"
    state = {
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
        "encoder": model.base_network.options,
        "options": vars(args),
        "steps": training.step,
    }
    checkpoint.save(state, path)
    if not args.keep_all:
        for old in saved_models(folder, stem):
            if old != path:
                old.unlink()
    named_at_the_end = path if args.save_dir or when != "final" else training.run.final / path.name
    tell(training.run, f"Model saved as {named_at_the_end}")


def saved_models(folder: Path, stem: str) -> list[Path]:
    """The models of a run in a folder."""
    return sorted(path for path in folder.glob(f"{stem}_*.pt") if re.fullmatch(r"\d{4,}|final", path.stem[len(stem) + 1 :]))


def claim_save_dir(args: argparse.Namespace, name: str, found: str) -> None:
    """See that --save-dir can be written to, and that its models, whose published names say little, are of this run alone.

    A file <stem>.run there says whose they are. Raises RunError if another run's, or OSError.
    """
    if args.save_dir is None:
        return
    folder, stem = Path(args.save_dir), file_stem(args)
    folder.mkdir(parents=True, exist_ok=True)
    owner, models = folder / f"{stem}.run", saved_models(folder, stem)
    if args.overwrite:
        for old in (owner, *models):
            old.unlink(missing_ok=True)
    elif models and (found != "unfinished" or not owner.exists()):
        raise RunError(f"{models[0]} is there, of another run: --overwrite replaces it, another --save-dir keeps it")
    try:
        with open(owner, "x") as file:  # of two that start at once, one alone can
            file.write(name)
    except FileExistsError:
        if owner.read_text() != name:
            raise RunError(f"{owner} says that the run {owner.read_text()!r} saves there: choose another --save-dir") from None


def draw_curves(args: argparse.Namespace, training: EpochTraining) -> None:
    """metrics.png, and weights.png (of convolutions and linear maps: a panel a tensor)."""
    metrics = read_metrics(training.metrics.path)
    measures = [name.removeprefix("train_") for name in metrics if name.startswith("train_") and "top_5" not in name]
    chance = {"track_head_top_1_mean": {"chance": 100 / args.num_classes}}
    plotting.plot_epochs(training.run.path / "metrics.png", training.run.name, metrics, measures, chance)
    traced = training.traces.by_parameter()
    weights = {name: values.numpy() for name, values in traced.items() if training.model.get_parameter(name).ndim > 1}
    if weights:
        plotting.plot_weights(training.run.path / "weights.png", training.run.name, training.traces.steps, weights, 1)


def draw_views(args: argparse.Namespace, data: Data, run: RunDirectory) -> None:
    """samples.png: some training images, and two views of each."""
    chosen = training_batches(args, data.training, 0)[0][:N_SHOWN]
    generator = generator_of(args.seed, 3)
    stack = Stack(args.tx, args.image_size)
    pixels = as_floats(data.training.images[chosen])
    drawn = [stack.draw(len(chosen), data.side, generator) for _ in range(2)]
    shown = [clean_view(pixels, args.image_size), *(stack(pixels, draw.to(pixels.device)) for draw in drawn)]
    mosaic = ((torch.cat(shown) + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    names = None
    if args.equi_tx in stack.codes and args.equi_tx in PARAMETRISED:
        parameters = (stack.parameter(args.equi_tx, draw)[:, 0].tolist() for draw in drawn)
        names = [f"{first:.2f}, {second:.2f}" for first, second in zip(*parameters, strict=True)]
    title = "training images (above), and two views of each" + (f", with their parameters of {args.equi_tx}" if names else "")
    grid = plotting.ImageGrid(title, mosaic, len(chosen), names)
    plotting.plot_images(run.path / "samples.png", run.name, [grid])


def draw_marginals(args: argparse.Namespace, data: Data, model: SelfSupervised, run: RunDirectory) -> dict[str, Any] | None:
    """marginals.png: the group marginal of test images as the transformation goes through its range; and its figures."""
    code = args.equi_tx or next((code for code in args.tx if code in PARAMETRISED), None)
    features = 8 * args.encoder_width
    if code not in PARAMETRISED or not args.duet_bins or features % args.duet_bins:
        return None
    shown = data.test.images[:N_SWEPT]
    parameters, learned = evaluation.marginals_by_parameter(model.base_network, shown, args.image_size, code, args.duet_bins)
    target = TARGETS[args.duet_target](torch.tensor(parameters), args.duet_bins)
    plotting.plot_marginals(run.path / "marginals.png", run.name, code, parameters, learned.cpu().numpy(), target.numpy())
    divergence = losses.jensen_shannon(learned.cpu().log(), target).item()
    uniform = losses.jensen_shannon(torch.zeros_like(target), target).item()
    return {"code": code, "divergence_from_target": divergence, "divergence_of_uniform": uniform, "images": len(shown)}


def report(args: argparse.Namespace, data: Data, training: EpochTraining) -> dict[str, Any]:
    """The final figures of the last model, and pictures of what it learned."""
    run, model = training.run, training.model
    assert isinstance(model, SelfSupervised)
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
        "test": training.tested,
        "chance_top_1": 100 / args.num_classes,
        "marginals": marginals,
    }
    known = split_representations(encoder, train_set, test_set, args.image_size)
    result["linear_probe"] = evaluation.linear_probe(*known, args.num_classes, args.seed)
    result["knn"] = evaluation.nearest_neighbours(*known, args.num_classes)
    if "rot" in (*args.tx, args.equi_tx):
        bins = args.duet_bins if marginals is not None and marginals["code"] == "rot" else 0
        some = train_set.images[:10_000]
        result["rotation_error_degrees"] = evaluation.rotation_errors(
            encoder, some, test_set.images, args.image_size, bins, args.seed
        )
    return result


def split_representations(
    encoder: CifarResNet, training: ImageSet, test: ImageSet, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Representations and labels of the training images, then of the test images."""
    z, z_test = (evaluation.represent(encoder, split.images, size) for split in (training, test))
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
        of = result["marginals"]
        lines.append(
            f"{'divergence of marginals from target':>34}: {of['divergence_from_target']:.4f} nats "
            f"(of a uniform one {of['divergence_of_uniform']:.4f})"
        )
    return "\n".join(lines)


# ---- saved encoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A saved encoder that is to be measured, and where the figures go."""

    which: str  # linear_probe or knn
    path: Path
    encoder: CifarResNet
    options: argparse.Namespace  # that it was trained with, but for data, subset and seed
    out: Path


def make_probe(args: argparse.Namespace, which: str) -> Probe:
    """Read an encoder. Raises ValueError if it is none, does not fit the data, or figures are there already."""
    path = Path(getattr(args, which))
    saved = read_saved(path)
    encoder, of = encoder_of(saved, path), saved["options"]
    if of.get("dataset") not in images.BY_OPTION or not {"image_size", "center_crop", "batch_size"} <= of.keys():
        raise ValueError(f"{path} has no options of a training")
    own = {
        "dataset_root": args.dataset_root,
        "dataset": args.dataset or of["dataset"],
        "subset": args.subset,
        "seed": args.seed,
    }
    trained_with = argparse.Namespace(**{**of, **own})
    channels = images.SHAPES[images.BY_OPTION[trained_with.dataset]][0]
    if channels != encoder.conv1.in_channels:
        raise ValueError(f"{path} takes {encoder.conv1.in_channels} channels, images of {trained_with.dataset} have {channels}")
    out = path.with_name(f"{path.stem}_{which}_{trained_with.dataset}.json")
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} is there: --overwrite replaces it")
    return Probe(which, path, encoder, trained_with, out)


def evaluate_saved(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """--linear-probe and --knn: print the accuracy of a saved encoder, and write it beside the file."""
    if parallel.launched():
        parser.error("--linear-probe and --knn are for one process: leave torchrun out")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with refusing(parser, ValueError):
        probes = [make_probe(args, which) for which in ("linear_probe", "knn") if getattr(args, which) is not None]
    for probe in probes:
        if args.dry_run:
            print(probe.out)
            continue
        with refusing(parser, DataError, ValueError):
            data = load_data(probe.options, device)
        n_classes = images.N_CLASSES[images.BY_OPTION[probe.options.dataset]]
        known = split_representations(probe.encoder.to(device), data.training, data.test, probe.options.image_size)
        if probe.which == "linear_probe":
            found = evaluation.linear_probe(*known, n_classes, args.seed)
        else:
            found = evaluation.nearest_neighbours(*known, n_classes)
        say(f"{probe.path}: {probe.which.replace('_', ' ')} top-1 {found['top_1']:.2f} % (chance {100 / n_classes:.3g})")
        result = {"file": str(probe.path), "dataset": probe.options.dataset, "seed": args.seed, "chance_top_1": 100 / n_classes}
        result |= {"training_images": len(data.training), "test_images": len(data.test), **found}
        with refusing(parser):
            write_json(probe.out, result)
        say(f"written to {probe.out}")
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def introduce(args: argparse.Namespace, data: Data, training: EpochTraining) -> None:
    """Tell what was derived from the options."""
    parameters = sum(p.numel() for p in training.model.parameters())
    tell(
        training.run,
        f"{parameters:,} parameters on {data.test.images.device}, {parallel.world_size()} processes, seed {args.seed}; "
        f"{len(data.training)} training and {len(data.test)} test images of {data.side}x{data.side} pixels, "
        f"{len(training_batches(args, data.training, 0))} steps an epoch",
    )
    if method_of(args).structure and args.duet_target == "vm" and args.equi_tx not in CIRCULAR:
        tell(training.run, f"note: on the circle of --duet-target vm, both ends of the range of {args.equi_tx} are one point")
    tell(training.run, f"resumed in epoch {training.epoch} after step {training.step}" if training.step else "Training starts!")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    keep_freed_memory()
    if args.linear_probe is not None or args.knn is not None:
        return evaluate_saved(parser, args)
    name = name_of(parser, args)
    if args.dry_run:
        print(name)
        return 0
    with parallel.process_group(args.device or ("cuda" if torch.cuda.is_available() else "cpu")) as device:
        return run_training(parser, args, name, device)


def start(args: argparse.Namespace, run: RunDirectory) -> str:
    """What a start finds: see RunDirectory.check. Raises RunError or TrackerError if it cannot go on as asked."""
    trackers.check(tensorboard=args.tensorboard, wandb_project=args.wandb_project)
    return run.check(resume=args.resume, overwrite=args.overwrite)


def open_run(args: argparse.Namespace, run: RunDirectory, found: str) -> None:
    """Make, or go on with, the run's directory, and its place for models. Raises RunError, OSError."""
    claim_save_dir(args, run.name, found)
    run.open(vars(args), overwrite=args.overwrite, to_stdout=False)


def run_training(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, device: torch.device) -> int:
    is_main = parallel.is_main()
    with Interruption() as interruption, RunDirectory(args.results_dir, "train_ssl", name, another="--seed N") as run:
        with refusing(parser, DataError, trackers.TrackerError):
            found = parallel.main_says(lambda: start(args, run), RunError, trackers.TrackerError, OSError)
            if found == "finished":
                if is_main:
                    run.finish_interrupted_rename()
                    say(f"the run {run.final} has finished: nothing to do")
                return 0
            parallel.main_first(lambda: fetch_data(args), DataError, OSError)
            data = load_data(args, device)
            model = make_model(args, device)
            optimizer = make_optimizer(model, args.lr)
            named = {option: value for option, value in vars(args).items() if option not in UNNAMED}
            last = load_last(run, model, optimizer, named, data.fingerprint) if found == "unfinished" else None
            parallel.main_says(lambda: open_run(args, run, found), RunError, OSError)
        with surviving_full_disks(run):
            columns = (
                "epoch",
                "step",
                "seconds",
                "lr",
                *(f"{split}_{key}" for split in SPLITS for key in method_of(args).figure_names(args.batch_size)),
            )
            training = EpochTraining(
                run, model, optimizer, named, fingerprint=data.fingerprint, columns=columns, last=last, writes=is_main
            )
            return run_epochs(parser, args, data, training, interruption)


def run_epochs(
    parser: argparse.ArgumentParser, args: argparse.Namespace, data: Data, training: EpochTraining, interruption: Interruption
) -> int:
    """Train, report, and give the run its name."""
    run, model = training.run, training.model
    assert isinstance(model, SelfSupervised)
    tracked = {"tensorboard": args.tensorboard, "wandb_project": args.wandb_project} if training.writes else {}
    with refusing(parser, trackers.TrackerError):
        sinks = trackers.Trackers(run.path, run.name, vars(args), epoch=training.epoch, **tracked)
    try:
        if training.writes:
            introduce(args, data, training)
        if not train(args, data, training, sinks, interruption):
            if training.writes:
                by = interruption.signal or "a signal to another process"
                tell(run, f"stopped by {by} after step {training.step}: --resume goes on from here")
            parallel.wait_for_all()  # torchrun kills the others when the first has gone
            return EXIT_RESUMABLE
        if not training.tested:  # --epochs 0
            training.tested = test_epoch(args, data.test, model, Interruption()) or {}
    finally:
        sinks.close()
    if not training.writes:
        return 0
    save_model(args, training, "final")
    with training.clock.paused():
        result = report(args, data, training)
    tell(run, report_table(result))
    run.finish(result)
    say(f"after {result['seconds'] / 60:.1f} minutes of training:")
    for what, file in PICTURES.items():
        if (run.final / file).exists():
            say(f"{what:>34}: {run.final / file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
