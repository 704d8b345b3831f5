"""A mixture of Gaussians in one forward pass (the third experiment of the SWARM program, Vollgraf 2019, arXiv 1906.09400).

A network sees a set of points once, and returns the parameters of a mixture of Gaussians: means, deviations and weights. The
loss is the negative log-likelihood of the points, without any label. The line

    python -u amortised_mog.py -p MEAN -wc 60

leaves its run in results/amortised_mog/: log, metrics.csv, learning curves, weight traces, samples, result.json.
With several GPUs: torchrun --nproc-per-node=N amortised_mog.py ... (-bs is the batch of all of them).
docs/mixture_of_gaussians.md says what each option and each logged quantity means.
A trained model fits mixtures to points of your own:

    python amortised_mog.py -apply points.csv -resume results/amortised_mog/NAME
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from common import parallel, plotting
from common.datasets import mixtures
from common.datasets.mixtures import DEVIATION, MixtureSets, draw_sets
from common.errors import InputError
from common.models.mixture import N_HEADS, Mixture, MixtureNetwork, log_likelihood, single_gaussian_log_likelihood
from common.models.sets import NON_LINEARITIES
from common.points import Points, canonical_order, feature_ranges, oddities, scaling_to
from common.precision import autocast, set_backend_flags
from common.run import apply, dotted, options
from common.run.budget import BudgetedTraining, add_budget_options, add_own_options, make_adam
from common.run.command import echo
from common.run.memory import tune_malloc
from common.run.options import at_least, real
from common.run.progress import bar
from common.run.run import Run
from common.seeds import generator_of, seed_everything

NOT_IN_NAME = (*options.RUN_OPTIONS, *apply.POINTS_OPTIONS)  # options that do not make another run
STEPS_PER_EPOCH, VALIDATION_BATCHES, TEST_BATCHES = 500, 100, 1000
TRAINING, VALIDATION, TEST = 0, 1, 2  # in the keys of random numbers
N_TRAINING = (mixtures.N_POINTS[0], mixtures.N_POINTS[1] - 1)  # points of a training set
PUBLISHED_DECAY = (70, 0.1)  # without -gamma: after 70 epochs, the learning rate falls to a tenth
COLUMNS = ("epoch", "step", "seconds", "train_loss", "val_loss", "lr")


def get_parser() -> argparse.ArgumentParser:
    """The original's options, then the suite's own."""
    parser = options.OneLineParser(prog="amortised_mog.py", description=__doc__)
    paper = parser.add_argument_group("options of the original", "example: -n_clust 6 -p POMA -gamma 0.7 -max_epochs 8")
    paper.add_argument("-n_hidden", type=at_least(1), default=128, help="hidden units inside the model [%(default)s]")
    paper.add_argument("-n_layers", type=at_least(1, 1000), default=1, help="SWARM layers [%(default)s]")
    paper.add_argument("-n_iter", type=at_least(1), default=5, help="iterations in SWARM layers [%(default)s]")
    paper.add_argument("-non_lin", choices=NON_LINEARITIES, default="relu", help="non-linearity between layers [%(default)s]")
    paper.add_argument("-n_dim", type=at_least(1, 50), default=2, help="dimensions of the points [%(default)s]")
    paper.add_argument("-n_clust", type=at_least(1, 1000), default=4, help="Gaussians of a mixture [%(default)s]")
    paper.add_argument("-pma", action="store_true", help="pool the set by attention, with one learned seed per Gaussian")
    paper.add_argument("-dropout", type=real(0, 1, below=True), default=0.0, help="dropout rate of SWARM layers [%(default)s]")
    paper.add_argument("-bs", type=at_least(1), default=10, help="sets per batch [%(default)s]")
    add_budget_options(paper, wc=300.0, update_interval=5.0, max_epochs=100, bt_horizon=1.0, bt_alpha=0.8)
    paper.add_argument(
        "-gamma", type=real(0, 1, above=True), help="factor of the learning rate an epoch [a tenth, once, after 70 epochs]"
    )
    paper.add_argument("-p", choices=("MEAN", "POMA"), default="MEAN", help="pooling in SWARM layers [%(default)s]")
    own = parser.add_argument_group("options of this suite", "example: -seed 1 -precision bf16")
    add_own_options(own, "data and weights", "the pointwise part of the model")
    apply.add_points_options(parser, "mixture", "weight, means and deviations of each Gaussian of each set, in a line")
    return parser


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what no model can do."""
    if args.p == "POMA" and args.n_hidden <= 8:
        parser.error(f"-p POMA takes 8 hidden units for itself: -n_hidden {args.n_hidden} is too small")
    if args.pma and args.n_hidden % N_HEADS:
        parser.error(f"-pma has {N_HEADS} attention heads: -n_hidden {args.n_hidden} is no multiple of {N_HEADS}")


# ---- data ----------------------------------------------------------------------------------------------------------------


def batch_of(args: argparse.Namespace, *key: int) -> MixtureSets:
    """The batch of a key, on the CPU, always the same one: (TRAINING, epoch, step), (VALIDATION, index) or (TEST, index)."""
    return draw_sets(args.bs, args.n_dim, args.n_clust, generator_of(args.seed, *key))


def true_mixture(sets: MixtureSets) -> Mixture:
    return Mixture(sets.means, torch.full_like(sets.means, DEVIATION), sets.weights.log())


def measure_baselines(batch: MixtureSets) -> dict[str, Tensor]:
    """Log-likelihood of each set (N) under the mixture it was drawn from, and under the best single Gaussian."""
    return {
        "oracle": log_likelihood(batch.points, true_mixture(batch), batch.mask),
        "single Gaussian": single_gaussian_log_likelihood(batch.points, batch.mask),
    }


def mean_baselines(args: argparse.Namespace, device: torch.device, part: int, n_batches: int) -> dict[str, float]:
    """Their means over the batches of a part, in nats per point."""
    measured = [measure_baselines(batch_of(args, part, index).to(device)) for index in range(n_batches)]
    return {name: torch.cat([values[name] for values in measured]).mean().item() for name in measured[0]}


# ---- training ------------------------------------------------------------------------------------------------------------


def likelihood(args: argparse.Namespace, model: Callable[..., Mixture], batch: MixtureSets) -> Tensor:
    """Log-likelihood of each set under the mixture that the model makes of it, in nats per point (N)."""
    with autocast(batch.points, args.precision):
        mixture = model(batch.points, batch.mask)
    return log_likelihood(batch.points, mixture, batch.mask)


@torch.no_grad()
def evaluate(args: argparse.Namespace, training: BudgetedTraining, part: int, n_batches: int) -> Tensor:
    """Log-likelihood of each set of a part."""
    training.model.eval()
    device = next(training.model.parameters()).device
    batches = (batch_of(args, part, index).graphed(device) for index in parallel.own(range(n_batches)))
    values = [likelihood(args, training.forward, batch) for batch in batches]
    training.model.train()
    return torch.cat(parallel.collect([value.cpu() for value in values]))


def decay_learning_rate(args: argparse.Namespace, training: BudgetedTraining) -> None:
    """At the start of an epoch: by -gamma after each epoch, or as published."""
    if args.gamma is not None:
        decays, factor = training.epoch > 0, args.gamma
    else:
        epochs, factor = PUBLISHED_DECAY
        decays = training.epoch == epochs
    if decays:
        for group in training.optimizer.param_groups:
            group["lr"] *= factor


def train_epoch(args: argparse.Namespace, baselines: dict[str, float], training: BudgetedTraining, progress: tqdm) -> bool:
    """Train on the steps of an epoch that are left, until the time is up; False if the loss diverged."""
    device = next(training.model.parameters()).device
    if training.batch == 0:
        decay_learning_rate(args, training)
    while training.batch < STEPS_PER_EPOCH and not training.time_is_up():
        batch = batch_of(args, TRAINING, training.epoch, training.batch)
        parallel.seed_step(args.seed, training.step)  # for dropout
        own = batch[parallel.deal(batch.mask.sum(1))].graphed(device)
        loss = -likelihood(args, training.forward, own).sum() / len(batch)
        training.optimizer.zero_grad()
        loss.backward()
        loss = training.sum_over_processes(loss)
        if not training.is_finite(loss):
            return False
        training.optimizer.step()

        baseline = f"oracle {-baselines['oracle']:.3f}"
        progress.set_description_str(training.progress_text(STEPS_PER_EPOCH, baseline), refresh=False)
        progress.update()
        training.record_step(len(batch), loss)
    return training.fetch_losses()


def validate_epoch(args: argparse.Namespace, baselines: dict[str, float], training: BudgetedTraining, finite: bool) -> None:
    """Validate, log the metrics, and keep the model, save it as the best, or return to the best."""
    val_loss = -evaluate(args, training, VALIDATION, VALIDATION_BATCHES).mean().item() if finite else math.nan
    baseline = f"oracle {-baselines['oracle']:.4f}, single Gaussian {-baselines['single Gaussian']:.4f}"
    training.conclude_epoch({"val_loss": val_loss}, f"validation {val_loss:.4f} ({baseline})")


# ---- report --------------------------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, baselines: dict[str, float], training: BudgetedTraining) -> None:
    """metrics.png, weights.png, samples.png."""
    if not parallel.is_main():
        return
    losses = {name: -value for name, value in baselines.items()}
    training.draw(STEPS_PER_EPOCH, {"val_loss": losses}, "negative log-likelihood (nats per point)")
    plot_mixtures(training.run.part / "samples.png", training.run.name, *samples(args, training.model))


@torch.no_grad()
def samples(args: argparse.Namespace, model: nn.Module) -> tuple[MixtureSets, Mixture]:
    """Nine validation sets, always the same, and the model's mixtures of them."""
    gen = generator_of(args.seed, VALIDATION, VALIDATION_BATCHES)
    sets = draw_sets(9, args.n_dim, args.n_clust, gen).to(options.device_of(args))
    model.eval()
    with autocast(sets.points, args.precision):
        mixture = model(sets.points, sets.mask)
    model.train()
    return sets, mixture


def plot_mixtures(path: Path, title: str, sets: MixtureSets, predicted: Mixture) -> None:
    """Pairs of panels, a pair for each of nine sets: its points with the predicted Gaussians, and with the true ones."""
    figure = Figure(figsize=(17, 9.2), layout="constrained")
    plotting.headline(figure, title)
    panels = figure.subplots(3, 6, sharex=True, sharey=True).reshape(9, 2)
    for column, (name, mixture) in enumerate((("predicted", predicted), ("true", true_mixture(sets)))):
        values = log_likelihood(sets.points, mixture, sets.mask).tolist()
        for index, panel in enumerate(panels[:, column]):
            draw_mixture(panel, sets.points[index][sets.mask[index]].cpu(), Mixture(*(part[index].cpu() for part in mixture)))
            panel.set(xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), aspect="equal")
            panel.set_title(f"{name}: {values[index]:.2f} nats per point", fontsize=9)
    plotting.save_figure(figure, path)


def draw_mixture(panel: Axes, points: Tensor, mixture: Mixture) -> None:
    """Points (E, D), and ellipses of one and two deviations, the heavier a Gaussian the more opaque; two dimensions of them."""
    means, deviations, opacities = mixture.means, mixture.deviations, mixture.log_weights.exp().sqrt()
    if points.shape[1] == 1:  # a line becomes a strip
        points, means, deviations = F.pad(points, (0, 1)), F.pad(means, (0, 1)), F.pad(deviations, (0, 1), value=DEVIATION)
    panel.scatter(points[:, 0], points[:, 1], c="0.55", s=4, linewidths=0)
    for k, (mean, deviation, opacity) in enumerate(zip(means.tolist(), deviations.tolist(), opacities.tolist(), strict=True)):
        look = {"fill": False, "edgecolor": plotting.PALETTE[k % len(plotting.PALETTE)], "linewidth": 1.5, "alpha": opacity}
        for n in (1, 2):
            panel.add_patch(Ellipse(mean[:2], 2 * n * deviation[0], 2 * n * deviation[1], **look))


def report(args: argparse.Namespace, training: BudgetedTraining) -> dict[str, Any]:
    """The best model's log-likelihood on sets that it has not seen, with the baselines on the same sets."""
    training.best.load()
    device = next(training.model.parameters()).device
    values = evaluate(args, training, TEST, TEST_BATCHES)
    baselines = mean_baselines(args, device, TEST, TEST_BATCHES)
    protocol = "the model with the lowest validation loss of all epochs, measured once on 1,000 fresh batches"
    return {
        **training.about(args.seed, protocol),
        "test_sets": len(values),
        "log_likelihood": {"model": values.mean().item(), **baselines},
    }


def summary(result: dict[str, Any]) -> str:
    """The log-likelihood with its baselines."""
    values = result["log_likelihood"]
    return (
        f"{result['test_sets']:,} fresh sets, after {result['seconds'] / 60:.1f} minutes of training: log-likelihood "
        f"{values['model']:.4f} nats per point\n(true mixture {values['oracle']:.4f}, {values['oracle'] - values['model']:.4f} "
        f"above; best single Gaussian {values['single Gaussian']:.4f})"
    )


# ---- points of a user ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def mixture_of(
    model: MixtureNetwork, points: NDArray[np.float64], deviation: float | None, precision: str
) -> tuple[Mixture, NDArray[np.float64]]:
    """The mixture of a set of points (E, D), in float64 and in their own coordinates, and the scaled points.

    It is the same in whatever order the points come. Raises InputError if there is none.
    """
    ordered = points[canonical_order(points)[0]]
    scaling = scaling_to(ordered, deviation)
    scaled = scaling(ordered)
    x = torch.from_numpy(scaled).float()[None].to(next(model.parameters()).device)
    with autocast(x, precision):
        means, deviations, log_weights = (part.double().cpu() for part in model(x))
    if not all(part.isfinite().all() for part in (x, means, deviations, log_weights)):
        raise InputError(f"coordinates up to {np.abs(scaled).max():.3g} are too large for the model: leave -raw out")
    shift, scale = torch.from_numpy(scaling.shift), torch.from_numpy(scaling.scale)
    return Mixture(means * scale + shift, deviations * scale, log_weights), scaled


def likelihood_in_words(points: NDArray[np.float64], mixture: Mixture) -> str:
    """The log-likelihood of a set, in its own units, and that of the best single Gaussian."""
    x = torch.from_numpy(points)[None]
    single = single_gaussian_log_likelihood(x, torch.ones(x.shape[:2], dtype=torch.bool)).item()
    bound = f"{single:.4f}" if math.isfinite(single) else "has no bound"
    return f"log-likelihood {log_likelihood(x, mixture).item():.4f} nats per point (best single Gaussian {bound})"


def write_mixtures(file: IO[bytes], read: Points, found: list[Mixture]) -> None:
    """A line for each set and Gaussian, those of large weights first."""
    rows = io.StringIO()
    table, several = csv.writer(rows, lineterminator="\n"), len(read.set_names) > 1
    columns = ["gaussian", "weight", *(f"{what}_{name}" for what in ("mean", "deviation") for name in read.names)]
    table.writerow([*(["set"] if several else []), *columns])
    for name, mixture in zip(read.set_names, found, strict=True):
        numbers = torch.cat([mixture.log_weights[0].exp()[:, None], mixture.means[0], mixture.deviations[0]], 1)
        for k, row in enumerate(sorted(numbers.tolist(), reverse=True), 1):
            table.writerow([*([name] if several else []), k, *(f"{number:.9g}" for number in row)])
    file.write(rows.getvalue().encode())


def plot_sets(path: Path, read: Points, found: list[Mixture]) -> None:
    """The first sets, up to six, with the Gaussians of their mixtures."""
    title = f"{read.path.name}: Gaussians at one and two deviations, the heavier, the more opaque"
    figure, panels = apply.panels_of(read, title)
    for index, (panel, members) in enumerate(panels):
        mixture = Mixture(*(part[0] for part in found[index]))
        draw_mixture(panel, torch.from_numpy(read.coordinates[members]), mixture)
    plotting.save_figure(figure, path)


def apply_model(args: argparse.Namespace) -> int:
    """-apply: mixtures of a user's sets of points, and a picture of them."""
    with apply.command("amortised_mog"):
        outputs = apply.outputs_of(args, Path(args.apply), "mixture.csv")
        model, _ = apply.load_model(args, "MixtureNetwork")
        assert isinstance(model, MixtureNetwork)
        read = apply.read_points(args, model.n_dim, N_TRAINING)
        deviation = None if args.raw else mixtures.typical_deviation(model.n_clust)
        ranges = feature_ranges(mixtures.training_sets(1000, model.n_dim, model.n_clust), deviation)
        found, strange, words = [], [], []
        for members in bar(args, read.sets(), "sets"):
            points = read.coordinates[members]
            mixture, scaled = mixture_of(model, points, deviation, args.precision)
            found.append(mixture)
            strange.append(oddities(scaled, N_TRAINING, ranges))
            words.append(likelihood_in_words(points, mixture))
        outputs.write(lambda file: write_mixtures(file, read, found))
        plot_sets(outputs.picture, read, found)
        apply.conclude(read, words, strange, deviation, outputs)
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The description of the model in best.pkl (common/trained.py)."""
    names = ("n_dim", "n_clust", "n_hidden", "n_layers", "n_iter", "non_lin", "dropout")
    arguments = {name: getattr(args, name) for name in names} | {"pooling": args.p, "attention": args.pma}
    return {"constructor": "MixtureNetwork", "arguments": arguments, "data": mixtures.describe(args.n_dim, args.n_clust)}


def make_model(args: argparse.Namespace) -> MixtureNetwork:
    """The model of the options, on its device, with weights from the seed."""
    seed_everything(args.seed)
    model = MixtureNetwork(**describe(args)["arguments"], fuse=args.compile)
    return model.to(options.device_of(args))


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name, given = dotted.parse(parser, argv, NOT_IN_NAME)
    if apply.check_options(parser, args, given, ("apply",), apply.POINTS_OPTIONS):
        return apply_model(args)
    name = name or "default"  # the original's name is then empty
    check_combinations(parser, args)
    options.check(parser, args, name)
    if args.dry_run:
        echo(name)
        return 0
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    run = Run("amortised_mog", name, args, another="-run ID", may_change=NOT_IN_NAME, quiet=True)
    with parallel.process_group(options.device_of(args).type), run:
        parallel.check_batches([args.bs], "sets")
        parallel.check_same(sets=batch_of(args, TRAINING, 0, 0).points)
        model = make_model(args)
        optimizer = make_adam(model, args.lr)
        limits = {"budget": 60 * args.wc, "horizon": args.bt_horizon, "alpha": args.bt_alpha}
        training = BudgetedTraining(run, model, optimizer, columns=COLUMNS, description=describe(args), **limits)
        training.start(args.resume)
        run.log(
            f"{model}\n{sum(p.numel() for p in model.parameters()):,} parameters on {options.device_of(args)}, seed {args.seed}"
        )
        baselines = mean_baselines(args, options.device_of(args), VALIDATION, VALIDATION_BATCHES)
        with bar(args, bar_format="{desc}") as progress:
            while training.has_next_epoch(args.max_epochs):
                finite = train_epoch(args, baselines, training, progress)
                validate_epoch(args, baselines, training, finite)
                training.draw_if_due(args.update_interval, lambda: draw(args, baselines, training))
        with training.clock.paused():
            draw(args, baselines, training)
            result = report(args, training)
        run.log(summary(result))
        status = run.finish(result)
    echo(f"{summary(result)}\n{run.where_to_look(samples='samples.png')}")
    return status


if __name__ == "__main__":
    sys.exit(main())
