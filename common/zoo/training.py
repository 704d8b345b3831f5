"""Training and measuring the networks of a zoo: options, optimiser and rate of a recipe, an epoch, accuracy, the best epoch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.datasets import images
from common.datasets.augmentation import Preprocessing
from common.datasets.classification import Splits, load_splits
from common.datasets.images import DataError, ImageSet
from common.precision import autocast, strict_fp32
from common.run.metrics import Meter
from common.run.options import at_least, real
from common.run.progress import bar
from common.run.schedule import halving, one_cycle
from common.run.state import State, check_finite
from common.seeds import generator_of

# defaults of --epochs, --batch-size and --lr
RECIPES = {
    "published": {"epochs": 50, "batch_size": 32, "lr": 0.001},
    "fast": {"epochs": 12, "batch_size": 128, "lr": 0.003},
}
WARMUP = 0.2  # share of the steps of `fast` in which the rate rises
EVALUATED_AT_ONCE = 500


# ---- options and images --------------------------------------------------------------------------------------------------


def add_data_options(group: argparse._ArgumentGroup) -> None:
    """Options of the image set."""
    group.add_argument("--dataset", choices=tuple(images.BY_OPTION), default="cifar10", help="image data set [%(default)s]")
    group.add_argument("--data-dir", metavar="DIR", default="data", help="directory of image data sets [%(default)s]")


def add_recipe_options(group: argparse._ArgumentGroup) -> None:
    """Options of a training whose defaults depend on the recipe; `apply_recipe` fills them in."""
    recipes = tuple(RECIPES)
    text = "training recipe: sets --epochs, --batch-size, --lr, the optimiser and its schedule [%(default)s]"
    group.add_argument("--recipe", choices=recipes, default="published", help=text)
    for name, kind, meaning in (
        ("epochs", at_least(1, 10**6), "passes over the training images"),
        ("batch_size", at_least(2, 10**6), "images per step"),
        ("lr", real(0, 10, above=True), "highest learning rate"),
    ):
        defaults = ", ".join(str(RECIPES[recipe][name]) for recipe in recipes)
        metavar = "LR" if name == "lr" else "N"
        text = f"{meaning} [by recipe: {defaults}]"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def n_classes(args: argparse.Namespace) -> int:
    """The number of classes of the image set of the options."""
    return images.N_CLASSES[images.BY_OPTION[args.dataset]]


def check_subset(parser: argparse.ArgumentParser, args: argparse.Namespace, validation_share: float | None = None) -> None:
    """End with the parser's error if --subset leaves fewer training images than --batch-size; shares as in splits_of."""
    if args.subset is None:
        return
    n_validation = 0
    if args.select == "validation":  # see images.split_validation
        share = validation_share
        n_validation = min(images.N_VALIDATION, args.subset // 10) if share is None else int(share * args.subset)
    if args.batch_size > args.subset - n_validation:
        parser.error(f"--batch-size {args.batch_size} is more than the {args.subset - n_validation} training images")


def splits_of(args: argparse.Namespace, device: torch.device, validation_share: float | None = None) -> Splits:
    """The image set of the options: dataset, data_dir, seed, subset, select. Raises DataError, also for too few images."""
    shared = {"seed": args.seed, "subset": args.subset, "select": args.select, "validation_share": validation_share}
    data = load_splits(images.BY_OPTION[args.dataset], args.data_dir, device, **shared)
    if len(data.training) < args.batch_size:
        raise DataError(f"--batch-size {args.batch_size} is more than the {len(data.training)} training images")
    return data


# ---- training ------------------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, recipe: str, lr: float) -> torch.optim.Optimizer:
    """published: Adam with 1e-4 of the weights in the gradient. fast: AdamW. Decay is for names with "weight" in them.

    Frozen parameters are left out.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if "weight" in name]
    others = [parameter for name, parameter in trained if "weight" not in name]
    kind, decay = (torch.optim.Adam, 1e-4) if recipe == "published" else (torch.optim.AdamW, 0.05)
    return kind([{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], lr, fused=True)


def learning_rate(recipe: str, highest: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """published: halved after each quarter of the epochs. fast: one cycle, by steps."""
    if recipe == "published":
        return highest * halving(step // steps_per_epoch, epochs)
    return highest * one_cycle((step + 1) / (epochs * steps_per_epoch + 1), WARMUP)  # never 0


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, precision: str
) -> dict[str, Tensor]:
    """One step on normalised images (B, 3, 32, 32); its loss and accuracy (a share)."""
    with autocast(x, precision):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}


def train_epoch(
    args: argparse.Namespace,
    data: Splits,
    state: State,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    key: tuple[int, ...],
    title: str,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train on the remaining batches of an epoch, then evaluate: mean loss and accuracy of training and selection images.

    `args` has recipe, lr, epochs, batch_size and precision. `key` and the epoch decide order and augmentation of the images.
    `title` is that of the progress bar. Raises Interrupted, and Failed for a loss that is not finite.
    """
    model, n_batches, epoch = state.model, len(data.training) // args.batch_size, state.epoch
    model.train()
    batches = data.batches(args.batch_size, generator_of(*key, epoch), first=state.batch)
    for x, labels in bar(args, batches, f"{title} epoch {epoch + 1}", total=n_batches, initial=state.batch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.recipe, args.lr, state.step, n_batches, args.epochs)
        meter.add(len(x), training_step(model, optimizer, x, labels, args.precision))
        state.after_step()
    means = meter.means()
    check_finite(means["loss"], f"epoch {epoch + 1}")
    selected = evaluate(model, data.selection, data.preprocessing, args.precision, state.check_signal)
    check_finite(selected["loss"], f"the selection images after epoch {epoch + 1}")
    return means, selected


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    preprocessing: Preprocessing,
    precision: str = "fp32",
    check_signal: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss and accuracy (a share) over images, in evaluation mode; `check_signal` is called before each batch.

    fp32 is strict: it stays IEEE float32 when training takes TF32.
    """
    model.eval()
    meter = Meter()
    for part in torch.arange(len(data), device=data.labels.device).split(EVALUATED_AT_ONCE):
        check_signal()
        x = preprocessing.normalise(data.images[part]).contiguous(memory_format=torch.channels_last)
        with autocast(x, precision), strict_fp32() if precision == "fp32" else nullcontext():
            logits = model(x)
        labels = data.labels[part]
        accuracy = (logits.argmax(1) == labels).double().mean()
        meter.add(len(part), {"loss": F.cross_entropy(logits.float(), labels), "accuracy": accuracy})
    return meter.means()


def accuracy(model: nn.Module, data: ImageSet, preprocessing: Preprocessing) -> float:
    """Accuracy in % of the images, in evaluation mode."""
    return 100 * evaluate(model, data, preprocessing)["accuracy"]


def describe_epoch(
    title: str, state: State, seconds: float, lr: float, select: str, means: dict[str, float], selected: dict[str, float],
    chance: float, better: bool,
) -> str:  # fmt: skip
    """An epoch's line of the log. `select` names the images that chose the epoch."""
    return (
        f"{title}  epoch {state.epoch + 1:>3}  step {state.step:>6}  {seconds / 60:8.2f} min | training {means['loss']:.4f}, "
        f"accuracy {means['accuracy']:.4f} | {select} {selected['loss']:.4f}, accuracy {selected['accuracy']:.4f} "
        f"(chance {chance:g}) | lr {lr:.3g}" + (" | best so far" if better else "")
    )


class BestEpoch:
    """The first epoch with the highest accuracy on the selection images: its weights and metrics."""

    def __init__(self) -> None:
        self.accuracy, self.weights, self.metrics = -math.inf, {}, {}  # type: ignore[var-annotated]

    def offer(self, model: nn.Module, accuracy: float, **metrics: Any) -> bool:
        """Keep a copy of the weights, and further metrics of the epoch, if the accuracy is higher than before."""
        if accuracy <= self.accuracy:
            return False
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.accuracy, self.weights, self.metrics = accuracy, weights, metrics
        return True

    def plain_weights(self) -> dict[str, Tensor]:
        """The weights for a file: contiguous, on the CPU."""
        return {name: value.cpu().contiguous() for name, value in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "weights": self.weights, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy, self.weights, self.metrics = state["accuracy"], dict(state["weights"]), dict(state["metrics"])
