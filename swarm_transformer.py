"""The SWARM image transformer (Vollgraf 2019, arXiv 1906.09400, section 4.2): images, learned and drawn value by value.

The probability of an image is the product of the probabilities of its values, each given those before it in reading order. A
SWARM layer with causal pooling computes all of them in one pass. The published command for Fashion-MNIST (a GPU, eight hours):

    python -u swarm_transformer.py -data FashionMNIST -n_layers 1 -n_hidden 256 -n_iter 10 -wc 480 -lr 0.001 -bs 50

leaves its run in results/swarm_transformer/: log, metrics.csv, learning curves, weight traces, samples and completions,
result.json. With several GPUs: torchrun --nproc-per-node=N swarm_transformer.py ... (-bs is the batch of all of them).
docs/image_transformer.md says what each option and each logged quantity means.
A trained model draws images, and completes yours:

    python swarm_transformer.py -draw 40 -resume results/swarm_transformer/NAME
    python swarm_transformer.py -complete images.npy -resume results/swarm_transformer/NAME
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import parallel, plotting
from common.datasets import images
from common.datasets.image_files import read_images, to_array
from common.datasets.images import ImageSet
from common.errors import InputError, warn
from common.graphs import GraphedModel
from common.models.image_transformer import N_VALUES, ImageTransformer, cross_entropy
from common.models.sets import NON_LINEARITIES
from common.precision import autocast, set_backend_flags
from common.run import apply, dotted, options
from common.run.budget import BudgetedTraining, add_own_options, make_adam
from common.run.command import echo
from common.run.memory import MicroBatches, tune_malloc
from common.run.options import at_least, boolean, real, shortest
from common.run.progress import bar
from common.run.run import Run
from common.seeds import epoch_order, seed_everything

DATA = tuple(images.SHAPES)
# options that do not make another run
NOT_IN_NAME = (*options.RUN_OPTIONS, "name", "data_dir", "to_stdout", *apply.IMAGES_OPTIONS)
# the published name has these fields alone; other options that are not at their defaults follow, as -option.value
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
NAME = re.compile(
    rf"(?P<data>{'|'.join(DATA)})-(?P<n_layers>\d+)-(?P<non_lin>{'|'.join(NON_LINEARITIES)})-(?P<n_hidden>\d+)"
    rf"-(?P<n_iter>\d+)-wc(?P<wc>{NUMBER})-lr(?P<lr>{NUMBER})-bs(?P<bs>\d+)(?P<more>(?:-.*)?)"
)
COLUMNS = ("epoch", "step", "seconds", "train_loss", "val_loss", "val_bits", "lr")
DRAWN_AT_ONCE = 100  # images: what is drawn from a seed depends on it


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="swarm_transformer.py", description=__doc__)
    paper = parser.add_argument_group(
        "options of the paper", "example: -data FashionMNIST -n_hidden 64 -n_iter 10 -bs 10 -wc 20 -cond"
    )
    paper.add_argument("-data", choices=DATA, help="data set; BWCIFAR is CIFAR10 in grey, SMALL its central 16x16 pixels")
    paper.add_argument("-n_hidden", type=at_least(4, 2**16), default=128, help="hidden units, a multiple of 4 [%(default)s]")
    paper.add_argument("-n_layers", type=at_least(1, 1000), default=1, help="layers [%(default)s]")
    paper.add_argument("-n_iter", type=at_least(1, 1000), default=5, help="iterations in each layer [%(default)s]")
    paper.add_argument("-non_lin", choices=NON_LINEARITIES, default="relu", help="non-linearity between layers [%(default)s]")
    paper.add_argument("-bs", type=at_least(1), default=50, help="images per batch [%(default)s]")
    paper.add_argument(
        "-wc", type=real(0, 1e6, above=True), default=60.0, help="wall clock time for training, in minutes [%(default)s]"
    )
    paper.add_argument(
        "-update_interval", type=real(0, 1e6), default=10.0, help="minutes between two updates of the plots [%(default)s]"
    )
    paper.add_argument("-lr", type=real(0, 1, above=True), default=0.01, help="learning rate of Adam [%(default)s]")
    paper.add_argument("-no_cuda", action="store_true", help="the same as -device cpu")
    paper.add_argument("-name", help="a run's name, in place of -data and the options in it")
    paper.add_argument("-dry_run", action="store_true", help="check the options, print the run's name, exit")
    paper.add_argument("-to_stdout", action="store_true", help="log to stdout instead of the file log of the run")
    paper.add_argument(
        "-bt_horizon", type=real(0, 1), default=0.1, help="backtracking horizon, a fraction of the epochs [%(default)s]"
    )
    paper.add_argument(
        "-bt_alpha", type=real(0, 1, above=True), default=0.9, help="learning rate factor of backtracking [%(default)s]"
    )
    paper.add_argument("-cond", action="store_true", help="condition on the class")
    paper.add_argument(
        "-resume", metavar="FILE|auto", help="start from a best.pkl; auto: continue this run where it was interrupted"
    )
    paper.add_argument(
        "-learn_loc", type=boolean, default=False, metavar="true|false", help="learn the location features [%(default)s]"
    )
    own = parser.add_argument_group("options of this suite", "example: -seed 1 -epoch_images 11000 -data_dir data")
    add_own_options(own, "split, weights and order of images", "the pointwise part of the layers")
    own.add_argument("-data_dir", metavar="DIR", help="directory of image data sets [data; missing files are downloaded to it]")
    own.add_argument("-max_epochs", type=at_least(1), metavar="N", help="largest number of epochs [no limit]")
    own.add_argument("-epoch_images", type=at_least(1), metavar="N", help="training images of an epoch [all]")
    own.add_argument(
        "-n_samples",
        type=at_least(1, 1000),
        metavar="N",
        help="images drawn for samples.png [12; two of each class with -cond]",
    )
    apply.add_images_options(parser)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options of a command line, those of -name among them. Ends with the parser's error if they contradict each other."""
    tokens = dotted.split_command_line(parser, argv, NOT_IN_NAME)
    names = [value for option, value, _ in tokens if option == "-name"]
    named = named_options(parser, names[-1]) if names else []
    args = dotted.parse_tokens(parser, [*named, *tokens])
    of_name = dotted.parse_tokens(parser, named)
    for option in {option.lstrip("-") for option, *_ in named}:
        if getattr(args, option) != getattr(of_name, option):
            parser.error(
                f"-name says -{option} {getattr(of_name, option)}, the command line {getattr(args, option)}: leave one out"
            )
    if apply.check_options(
        parser, args, {token[0].lstrip("-") for token in tokens}, ("draw", "complete"), apply.IMAGES_OPTIONS, ("seed",)
    ):
        return args
    if args.data is None:
        parser.error("which images? -data says it, or -name")
    if args.n_hidden % 4:
        parser.error(
            f"-n_hidden {args.n_hidden} is not a multiple of 4: locations are made of sines and cosines in two directions"
        )
    return args


def named_options(parser: argparse.ArgumentParser, name: str) -> list[dotted.Token]:
    """The options that make up a run's name, also in the original's form, which has one more word at its end."""
    match = NAME.fullmatch(name)
    if match is None:
        parser.error(f"-name {name!r} does not parse: names look like MNIST-1-relu-256-10-wc480-lr0.001-bs50-cond-seed.1")
    *fields, (_, more) = match.groupdict().items()
    known, word = [*vars(parser.parse_args([])), "help"], more[1:]
    if re.fullmatch(r"\w+", word) and word != "h" and not word.lower().startswith(tuple(known)):
        for meant in difflib.get_close_matches(word.lower(), known, n=1):
            parser.error(f"-name {name!r} does not parse: there is no option -{word}; did you mean -{meant}?")
        warn(f"note: the last field of -name, {word}, is left out: no option is called so")
        more = ""  # the original's last field, of an option that its scripts do not have
    further = dotted.split_command_line(parser, [more] if more else [], NOT_IN_NAME)
    for option, _, _ in further:
        if option.lstrip("-") in (*match.groupdict(), *NOT_IN_NAME, "h", "help"):
            parser.error(f"-name {name!r} does not parse: {option} is no part of the end of a name")
    return [(f"-{field}", value, "") for field, value in fields] + further


def name_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The published name of a run, and what it leaves out, if it is not at its default."""
    name = (
        f"{args.data}-{args.n_layers}-{args.non_lin}-{args.n_hidden}-{args.n_iter}"
        f"-wc{shortest(args.wc)}-lr{shortest(args.lr)}-bs{args.bs}"
    )
    name += "".join(f"-{part}" for part in options.not_defaults(parser, args, (*NOT_IN_NAME, *NAME.groupindex)))
    options.check(parser, args, name)
    return name


# ---- data ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The three splits, on the device, and baselines in nats per value."""

    training: ImageSet
    validation: ImageSet
    test: ImageSet
    baselines: dict[str, dict[str, float]]  # {"validation": {"chance": ..., "by position": ...}, "test": ...}
    fingerprint: str  # of the training images before validation took its part


def load_data(name: str, data_dir: str | None, seed: int, device: torch.device) -> Data:
    """All splits; validation takes 5,000 of the training images (a tenth of fewer), drawn by the seed. Raises DataError."""

    def fetch() -> list[ImageSet]:
        return [images.load(name, split, data_dir or "data", download=data_dir is None) for split in images.SPLITS]

    parallel.main_first(fetch, InputError, OSError)
    everything, test = (split.to(device) for split in fetch())
    training, validation = images.split_validation(everything, seed)
    table = log_histograms(training)
    baselines = {
        split: {"chance": math.log(N_VALUES), "by position": position_cross_entropy(table, of)}
        for split, of in (("validation", validation), ("test", test))
    }
    return Data(training, validation, test, baselines, everything.fingerprint())


def log_histograms(data: ImageSet) -> Tensor:
    """Log-probability of each value at each position, from its counts plus one: (256, C H W)."""
    values = data.images.flatten(1)
    first = N_VALUES * torch.arange(values.shape[1], device=values.device)  # bin of each position
    n_bins = N_VALUES * values.shape[1]
    counts = sum(torch.bincount((first + part).flatten(), minlength=n_bins) for part in values.split(1000))
    counts = counts.view(-1, N_VALUES).T.contiguous()
    return ((counts + 1) / (len(values) + N_VALUES)).double().log()


def position_cross_entropy(table: Tensor, data: ImageSet) -> float:
    """Nats per value of independent values, each with the histogram of its position."""
    total = sum(table.gather(0, part.flatten(1).long()).sum() for part in data.images.split(1000))
    return -float(total) / data.images.numel()


# ---- training ------------------------------------------------------------------------------------------------------------


def nats(model: ImageTransformer, batch: ImageSet, precision: str, forward: GraphedModel | None = None) -> Tensor:
    """Nats per value of each image (N); `forward` takes the place of the model's."""
    with autocast(batch.images, precision):
        logits = (forward or model)(batch.images, *([batch.labels] if model.n_classes else []))
    return cross_entropy(logits, batch.images)


def accumulate_gradients(
    model: ImageTransformer, batch: ImageSet, precision: str, size: int, forward: GraphedModel | None = None
) -> Tensor:
    """The batch's mean loss, with its gradient left in the parameters; `size` images at a time, which changes nothing else.

    `forward` takes the place of the model's, if all images go through it at a time. Of several processes, each goes through
    its own images: the sum of their results is the batch's.
    """
    own = batch[parallel.shard(len(batch))]
    forward = forward if size >= len(own) else None
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64, device=batch.images.device)
    for start in range(0, len(own), size):
        loss = nats(model, own[start : start + size], precision, forward).sum() / len(batch)
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: ImageTransformer,
    data: ImageSet,
    precision: str,
    size: int,
    check_signal: Callable[[], None] = lambda: None,
    forward: GraphedModel | None = None,
) -> Tensor:
    """Nats per value of each image, in float64 (N), `size` images at a time; `check_signal` is called between them.

    `forward` takes the place of the model's.
    """
    starts, parts = range(0, len(data), size), []
    n = parallel.world_size()
    for first in range(0, len(starts), n):
        check_signal()  # in all processes
        for start in parallel.own(starts[first : first + n]):
            parts.append(nats(model, data[start : start + size], precision, forward).double().cpu())
    return torch.cat(parallel.collect(parts))


def gradient_norm(model: ImageTransformer) -> Tensor:
    """The sum of the absolute gradients, as the original logs it: a scalar."""
    return torch.as_tensor(sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None))


def epoch_size(args: argparse.Namespace, data: Data) -> int:
    """Training images in an epoch."""
    return min(args.epoch_images or len(data.training), len(data.training))


def train_epoch(args: argparse.Namespace, data: Data, training: BudgetedTraining, micro: MicroBatches, progress: tqdm) -> bool:
    """Train on the batches of an epoch that are left, until the time is up; False if the loss diverged."""
    order = epoch_order(len(data.training), args.seed, training.epoch)[: epoch_size(args, data)]
    batches = order.to(data.training.images.device).split(args.bs)
    for indices in batches[training.batch :]:
        if training.time_is_up():
            break
        batch = data.training[indices]
        loss = micro.run_in_parts(
            partial(accumulate_gradients, training.model, batch, args.precision, forward=training.forward)
        )
        loss = training.sum_over_processes(loss)
        norm = gradient_norm(training.model)
        if not training.is_finite(loss, norm):
            return False
        training.optimizer.step()

        baseline = f"by position {data.baselines['validation']['by position']:.3f}"
        progress.set_description_str(training.progress_text(len(batches), baseline), refresh=False)
        progress.update()
        training.record_step(len(indices), loss, gradient_norm=norm)
    return training.fetch_losses()


def validate_epoch(args: argparse.Namespace, data: Data, training: BudgetedTraining, micro: MicroBatches, finite: bool) -> None:
    """Validate, log the metrics, and keep the model, save it as the best, or return to the best."""
    val_loss = math.nan
    if finite:
        how = {"check_signal": training.check_signal, "forward": training.forward}
        validate = partial(evaluate, training.model, data.validation, args.precision, **how)
        val_loss = micro.run_in_parts(validate, together=True).mean().item()
    val_bits, baselines = val_loss / math.log(2), data.baselines["validation"]
    training.conclude_epoch(
        {"val_loss": val_loss, "val_bits": val_bits},
        f"validation {val_loss:.4f} (by position {baselines['by position']:.4f}, chance {baselines['chance']:.4f}) | "
        f"{val_bits:.4f} bits per dimension",
    )


# ---- report --------------------------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, data: Data, training: BudgetedTraining) -> None:
    """metrics.png, weights.png, samples.png."""
    if not parallel.is_main():
        return
    run, steps_per_epoch = training.run, -(-epoch_size(args, data) // args.bs)
    baselines = {"by position": data.baselines["validation"]["by position"]}  # next to chance the curve would look flat
    training.draw(steps_per_epoch, {"val_loss": baselines}, "nats per value")
    plotting.plot_images(run.part / "samples.png", run.name, samples(args, data, training.model))


def samples(args: argparse.Namespace, data: Data, model: ImageTransformer) -> list[plotting.ImageGrid]:
    """Images drawn from nothing, and validation images drawn again from their top half; the same noise each time."""
    shown, n_classes = data.validation, model.n_classes
    device, (_, H, _) = shown.images.device, model.shape
    gen = torch.Generator(device).manual_seed(args.seed)
    n = args.n_samples or (2 * n_classes if n_classes else 12)
    columns = min(n_classes or 6, 20, n)
    classes = torch.arange(n, device=device) % n_classes if n_classes else None
    free = model.sample(n, classes, generator=gen)
    names = [shown.classes[i] for i in range(columns)] if n_classes and n_classes <= columns else None

    shown = shown[:columns]
    completed = model.sample(len(shown), shown.labels if n_classes else None, given=shown.images, n_rows=H // 2, generator=gen)
    pairs = torch.cat([shown.images, completed]).cpu().numpy()
    labels = [shown.classes[label] for label in shown.labels.tolist()]
    return [
        plotting.ImageGrid("samples" + (", by class" if n_classes else ""), free.cpu().numpy(), columns, names),
        plotting.ImageGrid(
            "validation images (above), and the model's completions of their top half (below)",
            pairs,
            len(shown),
            labels,
            H // 2,
        ),
    ]


def metrics_of(losses: Tensor, baselines: dict[str, float]) -> dict[str, Any]:
    """The metrics of a split: nats per value, bits per dimension, and the baselines in nats."""
    nats = losses.mean().item()
    return {"images": len(losses), "nats": nats, "bits": nats / math.log(2), "levels": baselines}


def report(args: argparse.Namespace, data: Data, training: BudgetedTraining, micro: MicroBatches) -> dict[str, Any]:
    """The metrics of the best model: on the validation images, which chose it, and, once, on the test images."""
    training.best.load()
    validation, test = (
        micro.run_in_parts(partial(evaluate, training.model, split, args.precision, forward=training.forward), together=True)
        for split in (data.validation, data.test)
    )
    labels = data.test.labels.cpu()
    by_class = {
        data.test.classes[label]: {"images": int((labels == label).sum()), "nats": test[labels == label].mean().item()}
        for label in labels.unique().tolist()
    }
    return {
        **training.about(
            args.seed, "the model with the lowest validation loss of all epochs, measured once on the test images"
        ),
        "fixed_location_features": sum(p.numel() for p in training.model.parameters() if not p.requires_grad),
        "validation": metrics_of(validation, data.baselines["validation"]),
        "test": metrics_of(test, data.baselines["test"]),
        "test_by_class": by_class,
    }


def report_table(result: dict[str, Any]) -> str:
    """The final metrics as text."""
    by_class = {f"test, {name}": metrics for name, metrics in result["test_by_class"].items()}
    width = max(map(len, ("validation", *by_class)))
    lines = [f"{'':>{width}} {'images':>7}  {'nats per value':>14} {'(by position, chance)':>22}  {'bits per dimension':>18}"]
    for name, metrics in {"validation": result["validation"], "test": result["test"], **by_class}.items():
        nats, baselines = metrics["nats"], metrics.get("levels")
        baseline = f"({baselines['by position']:.4f}, {baselines['chance']:.4f})" if baselines else ""
        lines.append(f"{name:>{width}} {metrics['images']:>7}  {nats:>14.4f} {baseline:>22}  {nats / math.log(2):>18.4f}")
    return "\n".join(lines)


# ---- images of a trained model -------------------------------------------------------------------------------------------


def class_names(described: dict[str, Any], n_classes: int | None) -> list[str]:
    """The names of a model's classes, in lower case; their numbers where a checkpoint does not name them."""
    names = described.get("data", {}).get("classes", [])
    return [str(name).lower() for name in names] if len(names) == n_classes else [str(i) for i in range(n_classes or 0)]


def classes_of(args: argparse.Namespace, names: list[str]) -> list[int]:
    """The classes that images have in turn, by their numbers; none for a model without. Raises InputError."""
    if args.classes is None:
        if args.complete is not None and names:
            raise InputError(f"the model was trained with -cond: -classes says what the images show, of {', '.join(names)}")
        return list(range(len(names)))
    if not names:
        raise InputError("the model was trained without -cond, it knows no classes: leave -classes out")
    number_of = {str(number): number for number in range(len(names))} | {name: number for number, name in enumerate(names)}
    words = [word.strip().lower() for word in args.classes.split(",")]
    for word in words:
        if word not in number_of:
            raise InputError(f"-classes: there is no class {word!r}: choose from {', '.join(names)}, or their numbers from 0")
    return [number_of[word] for word in words]


def draw_or_complete(
    args: argparse.Namespace, model: ImageTransformer, n: int, classes: list[int], given: Tensor | None
) -> Tensor:
    """n images (n, C, H, W) from the seed, of the classes in turn; with the top halves of `given` images, if there are some."""
    device = next(model.parameters()).device
    gen = torch.Generator(device).manual_seed(args.seed)
    labels = torch.tensor(classes, device=device)[torch.arange(n, device=device) % len(classes)] if classes else None
    n_rows, parts = model.shape[1] // 2 if given is not None else 0, []
    for start in bar(args, range(0, n, DRAWN_AT_ONCE), "images, by the hundred"):
        part = slice(start, min(start + DRAWN_AT_ONCE, n))
        about = {"given": None if given is None else given[part].to(device), "n_rows": n_rows, "generator": gen}
        parts.append(model.sample(part.stop - start, None if labels is None else labels[part], **about).cpu())
    return torch.cat(parts)


def grids_of(drawn: Tensor, given: Tensor | None, classes: list[int], names: Sequence[str]) -> list[plotting.ImageGrid]:
    """The picture of the first images, a class a column; of completions, below what they complete."""
    if given is not None:
        n = min(len(drawn), 20)
        pairs = torch.cat([given[:n], drawn[:n]]).numpy()
        title = "given images (above), and the model's completions of their top half (below)"
        return [plotting.ImageGrid(title, pairs, n, line=given.shape[2] // 2)]
    columns = 10
    if 1 < len(classes) <= 20:
        columns = len(classes) * max(1, 10 // len(classes))  # each of one class
    columns = min(columns, len(drawn))
    of_columns = [names[classes[i % len(classes)]] for i in range(columns)] if 1 < len(classes) <= 20 else None
    return [plotting.ImageGrid("drawn images", drawn[: 10 * columns].numpy(), columns, of_columns)]


def use_model(args: argparse.Namespace) -> int:
    """-draw, -complete: images of a trained model, as an array and a picture."""
    with apply.command("swarm_transformer"):
        source = None if args.complete is None else Path(args.complete)
        outputs = apply.outputs_of(args, source, "drawn.npy" if source is None else "completed.npy")
        model, described = apply.load_model(args, "ImageTransformer")
        assert isinstance(model, ImageTransformer)
        names = class_names(described, model.n_classes)
        classes = classes_of(args, names)
        given = None if source is None else read_images(source, model.shape)
        n = args.draw if given is None else len(given)
        drawn = draw_or_complete(args, model, n, classes, given)
        outputs.write(lambda file: np.save(file, to_array(drawn)))
        grids = grids_of(drawn, given, classes, names)
        plotting.plot_images(outputs.picture, f"{outputs.result.name}, seed {args.seed}", grids)
        of_classes = f" of the classes, in turn: {', '.join(names[number] for number in classes[:n])}" if classes else ""
        echo(f"{len(drawn):,} image{'s' * (len(drawn) != 1)}{of_classes}\n{outputs}")
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def describe(args: argparse.Namespace, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The description of the model, with the names of the classes, in best.pkl (common/trained.py)."""
    shape, n_classes = list(images.SHAPES[args.data]), images.N_CLASSES[args.data] if args.cond else None
    arguments = {name: getattr(args, name) for name in ("n_hidden", "n_layers", "n_iter", "non_lin", "learn_loc")}
    arguments |= {"shape": shape, "n_classes": n_classes}
    about = {"name": args.data, "shape": shape, "classes": list(classes), "cond": args.cond}
    return {"constructor": "ImageTransformer", "arguments": arguments, "data": about}


def make_model(args: argparse.Namespace) -> ImageTransformer:
    """The model of the options, on its device, with weights from the seed."""
    seed_everything(args.seed)
    model = ImageTransformer(**describe(args)["arguments"], fuse=args.compile)
    return model.to(options.device_of(args))


def introduce(args: argparse.Namespace, data: Data, training: BudgetedTraining) -> None:
    """Log what was derived from the options."""
    log, parameters = training.run.log, list(training.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    log(f"{training.model}\n{learned:,} parameters on {parameters[0].device}, seed {args.seed}")
    log(
        f"{len(data.training)} training images, {-(-epoch_size(args, data) // args.bs)} steps an epoch; "
        f"{len(data.validation)} validation images, chosen by the seed; {len(data.test)} test images"
    )
    for split, baselines in data.baselines.items():
        log(f"{split}: " + ", ".join(f"{name} {nats:.4f} nats per value" for name, nats in baselines.items()))


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parse(parser, argv)
    if args.draw is not None or args.complete is not None:
        return use_model(args)
    name = name_of(parser, args)
    if args.dry_run:
        echo(name)
        return 0
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    run = Run("swarm_transformer", name, args, another="-seed N", may_change=NOT_IN_NAME, quiet=True)
    with parallel.process_group(options.device_of(args).type), run:
        model = make_model(args)
        optimizer = make_adam(model, args.lr)
        data = load_data(args.data, args.data_dir, args.seed, next(model.parameters()).device)
        parallel.check_batches(map(len, torch.arange(epoch_size(args, data)).split(args.bs)), "images")
        limits = {"budget": 60 * args.wc, "horizon": args.bt_horizon, "alpha": args.bt_alpha}
        about = {"data": data.fingerprint, "description": describe(args, data.training.classes)}
        training = BudgetedTraining(run, model, optimizer, columns=COLUMNS, **about, **limits)
        training.start(args.resume)
        introduce(args, data, training)
        micro = MicroBatches(args.bs, run.log)
        with bar(args, bar_format="{desc}") as progress:
            while training.has_next_epoch(args.max_epochs or math.inf):
                finite = train_epoch(args, data, training, micro, progress)
                validate_epoch(args, data, training, micro, finite)
                training.draw_if_due(args.update_interval, lambda: draw(args, data, training))
        with training.clock.paused():
            result = report(args, data, training, micro)
            draw(args, data, training)
        run.log(report_table(result))
        status = run.finish(result)
    if not args.to_stdout:
        echo(report_table(result))
    echo(f"after {result['seconds'] / 60:.1f} minutes of training:\n{run.where_to_look(samples='samples.png')}")
    return status


if __name__ == "__main__":
    sys.exit(main())
