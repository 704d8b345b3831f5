"""Amortised clustering with set-equivariant networks (Vollgraf 2019, arXiv 1906.09400, section 4.1).

A network sees a set of points in the plane, drawn from a mixture of 3 to 10 Gaussians, once, and labels every point with its
cluster. The loss is the cross entropy under the best matching of labels to clusters. The published command:

    python -u amortised_clustering.py -type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50 -wc 60

leaves its run in results/amortised_clustering/: log, metrics.csv, learning curves, weight traces, samples, result.json.
With several GPUs: torchrun --nproc-per-node=N amortised_clustering.py ... (-bs is the batch of all of them).
docs/clustering.md says what each option and each logged quantity means.
A trained model labels points of your own:

    python amortised_clustering.py -apply points.csv -resume results/amortised_clustering/NAME
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from common import matching, parallel, plotting
from common.datasets import clustering
from common.datasets.clustering import N_LABELS, ClusteringTasks
from common.errors import InputError
from common.graphs import GraphedModel
from common.models.sets import MODEL_TYPES, NON_LINEARITIES, make_set_model
from common.points import Points, canonical_order, feature_ranges, oddities, scaling_to, write_with_columns
from common.precision import autocast, set_backend_flags
from common.run import apply, dotted, options
from common.run.budget import BudgetedTraining, add_budget_options, add_own_options, make_adam
from common.run.command import echo
from common.run.memory import tune_malloc
from common.run.options import at_least, real
from common.run.progress import bar
from common.run.run import Run
from common.seeds import epoch_order, seed_everything

NOT_IN_NAME = (*options.RUN_OPTIONS, *apply.POINTS_OPTIONS)  # options that do not make another run
OWN_OPTIONS = {  # what only some types of model have a use for
    "Swarm": {"n_iter", "pooling", "non_lin"},
    "SetLinear": {"non_lin"},
    "SetLinearMax": {"non_lin"},
    "SetTransformer": {"n_heads", "n_ind_points"},
    "LSTM": set(),
    "LSTMS": set(),
}
MEASURES = {"cross_entropy": "cross entropy", "accuracy": "accuracy", "rand_index": "adj. Rand index"}
K_MEANS_TASKS = 1000  # at most, that k-means clusters for a report: 2 ms each
COLUMNS = ("epoch", "step", "seconds", "train_loss", "val_loss", "val_accuracy", "val_rand_index", "lr")


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="amortised_clustering.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper", "example: -type Swarm -n_hidden 32 -tasks 6000 -bs 20 -wc 3")
    paper.add_argument("-type", choices=MODEL_TYPES, help="type of set-equivariant model")
    paper.add_argument("-n_hidden", type=at_least(1), default=128, help="hidden units inside the model [%(default)s]")
    paper.add_argument("-n_layers", type=at_least(1, 1000), default=1, help="layers [%(default)s]")
    paper.add_argument("-n_iter", type=at_least(1), default=5, help="iterations in Swarm layers [%(default)s]")
    paper.add_argument("-non_lin", choices=NON_LINEARITIES, default="relu", help="non-linearity between layers [%(default)s]")
    paper.add_argument("-n_heads", type=at_least(1), default=4, help="attention heads in SetTransformer [%(default)s]")
    paper.add_argument("-n_ind_points", type=at_least(1), default=10, help="inducing points in SetTransformer [%(default)s]")
    paper.add_argument("-dropout", type=real(0, 1, below=True), default=0.0, help="dropout rate [%(default)s]")
    paper.add_argument(
        "-tasks", type=at_least(10), default=10000, help="number of tasks; the last tenth is for validation [%(default)s]"
    )
    paper.add_argument("-bs", type=at_least(1), default=100, help="tasks per batch [%(default)s]")
    add_budget_options(paper, wc=60.0, update_interval=10.0, max_epochs=1000, bt_horizon=0.2, bt_alpha=0.9)
    own = parser.add_argument_group("options of this suite", "example: -seed 1 -pooling POMA -precision bf16")
    add_own_options(own, "data, weights and order of batches", "the model (Swarm: its pointwise part)")
    own.add_argument("-pooling", choices=("MEAN", "POMA"), default="MEAN", help="pooling in Swarm layers [%(default)s]")
    own.add_argument(
        "-loss", choices=matching.LOSSES, default="hungarian", help="matching of clusters to labels in the loss [%(default)s]"
    )
    apply.add_points_options(parser, "labels", "labels and their probabilities, in columns after those of POINTS")
    return parser


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what no model can do."""
    if args.type is None:
        parser.error("which model? -type says it, or for -apply, -resume FILE")
    if args.type == "SetTransformer" and args.n_hidden % args.n_heads:
        parser.error(f"-n_hidden {args.n_hidden} does not split into -n_heads {args.n_heads}: choose a multiple")
    if args.type == "Swarm" and args.pooling == "POMA" and args.n_hidden <= 8:
        parser.error(f"-pooling POMA takes 8 hidden units for itself: -n_hidden {args.n_hidden} is too small")
    if args.type.startswith("LSTM") and args.precision == "bf16" and options.device_of(args).type == "cuda":
        parser.error(
            f"-type {args.type} -precision bf16: autocast makes cuDNN's recurrent networks float16, whose gradients vanish "
            "without loss scaling: take -precision tf32, or -device cpu"
        )
    if args.dropout and args.type.startswith("SetLinear"):
        parser.error(f"-type {args.type} has no dropout: leave -dropout {args.dropout:g} out")
    if args.dropout and args.type.startswith("LSTM") and args.n_layers == 1:
        parser.error(f"-type {args.type} drops out between layers: -dropout {args.dropout:g} needs -n_layers 2 or more")


def log_probs(model: Callable[..., Tensor], points: Tensor, mask: Tensor, precision: str) -> Tensor:
    """Log-probability of each label for each point: (N, E, 2), (N, E) -> (N, E, 10)."""
    with autocast(points, precision):
        logits = model(points, mask)
    return logits.float().log_softmax(2)


# ---- measures ------------------------------------------------------------------------------------------------------------


def measure(log_p: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Cross entropy, accuracy and adjusted Rand index of each task (N), each under its best matching."""
    counts = matching.contingency(log_p.argmax(2), labels, mask, N_LABELS)
    return {
        "cross_entropy": matching.matched_cross_entropy(log_p, labels, mask).double().cpu(),
        "accuracy": matching.matched_accuracy(counts).cpu(),
        "rand_index": matching.adjusted_rand_index(counts).cpu(),
    }


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in MEASURES}


@torch.no_grad()
def validate(
    model: nn.Module, tasks: ClusteringTasks, batches: list[Tensor], precision: str, forward: GraphedModel | None = None
) -> dict[str, Tensor]:
    """The model's measures of every validation task, in the order of the batches. `forward` takes the place of its calls."""
    model.eval()
    parts = []
    for indices in parallel.own(batches):
        points, labels, mask = clustering.padded_batch(tasks, indices, graphed=forward is not None)
        parts.append(measure(log_probs(forward or model, points, mask, precision), labels, mask))
    model.train()
    return joined(parallel.collect(parts))


def measure_baselines(tasks: ClusteringTasks, batches: list[Tensor], seed: int) -> dict[str, dict[str, Tensor]]:
    """The same measures for chance (equal probabilities, random ties) and the oracle (posterior of the true mixture)."""
    gen = torch.Generator().manual_seed(seed)
    parts: dict[str, list[dict[str, Tensor]]] = {"chance": [], "oracle": []}
    for indices in batches:
        points, labels, mask = clustering.padded_batch(tasks, indices)
        noise = 1e-6 * torch.rand(*mask.shape, N_LABELS, generator=gen).to(points.device)
        parts["chance"].append(measure(noise.log_softmax(2), labels, mask))
        parts["oracle"].append(measure(clustering.log_posterior(tasks, indices, points), labels, mask))
    return {name: joined(measures) for name, measures in parts.items()}


def measure_k_means(tasks: ClusteringTasks, seed: int) -> dict[str, float]:
    """Mean adjusted Rand index of k-means, which is told the number of clusters, on (the first 1,000) validation tasks."""
    tasks, values = tasks.to(torch.device("cpu")), []
    validation = clustering.split(len(tasks))[1][:K_MEANS_TASKS]
    for task in validation.split(1):
        _, labels, mask = clustering.padded_batch(tasks, task)
        predicted = clustering.k_means(tasks, int(task), seed)
        values.append(matching.adjusted_rand_index(matching.contingency(predicted[None], labels, mask, N_LABELS)))
    index = torch.cat(values).mean().item()
    return {"adjusted_rand_index": index, "tasks": len(validation), "starts": clustering.K_MEANS_STARTS}


def means(measured: dict[str, Tensor]) -> dict[str, float]:
    """Mean over tasks, each counting the same."""
    return {name: values.mean().item() for name, values in measured.items()}


# ---- training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Tasks, cut into batches of training and validation, and baselines."""

    tasks: ClusteringTasks
    training: list[Tensor]
    validation: list[Tensor]
    by_task: dict[str, dict[str, Tensor]]  # measures of "chance" and "oracle" for each validation task
    baselines: dict[str, dict[str, float]]  # their means


def make_data(n_tasks: int, batch_size: int, seed: int, device: torch.device) -> Data:
    tasks = clustering.make_tasks(n_tasks, seed).to(device)
    parallel.check_same(tasks=tasks.points)
    training, validation = (clustering.batches_by_size(tasks, part, batch_size) for part in clustering.split(n_tasks))
    parallel.check_batches(map(len, training), "tasks")
    by_task = measure_baselines(tasks, validation, seed)
    return Data(tasks, training, validation, by_task, {name: means(measures) for name, measures in by_task.items()})


def forward_of(args: argparse.Namespace, training: BudgetedTraining) -> GraphedModel | None:
    """The model's calls as CUDA graphs; None for cuDNN's recurrent networks, which are launched as they are."""
    return None if args.type.startswith("LSTM") else training.forward


def train_epoch(args: argparse.Namespace, data: Data, training: BudgetedTraining, progress: tqdm) -> bool:
    """Train on the batches of an epoch that are left, until the time is up; False if the loss diverged."""
    forward = forward_of(args, training)
    for index in epoch_order(len(data.training), args.seed, training.epoch)[training.batch :].tolist():
        if training.time_is_up():
            break
        batch = data.training[index]
        parallel.seed_step(args.seed, training.step)  # for dropout
        own = batch[parallel.deal(data.tasks.sizes[batch])]
        points, labels, mask = clustering.padded_batch(data.tasks, own, graphed=forward is not None)
        log_p = log_probs(forward or training.model, points, mask, args.precision)
        loss = matching.matched_cross_entropy(log_p, labels, mask, args.loss).sum() / len(batch)
        training.optimizer.zero_grad()
        loss.backward()
        loss = training.sum_over_processes(loss)
        if not training.is_finite(loss):
            return False
        training.optimizer.step()

        baseline = f"oracle {data.baselines['oracle']['cross_entropy']:.3f}"
        progress.set_description_str(training.progress_text(len(data.training), baseline), refresh=False)
        progress.update()
        training.record_step(len(batch), loss)
    return training.fetch_losses()


def validate_epoch(args: argparse.Namespace, data: Data, training: BudgetedTraining, finite: bool) -> None:
    """Validate, log the metrics, and keep the model, save it as the best, or return to the best."""
    values = dict.fromkeys(MEASURES, math.nan)
    if finite:
        values = means(validate(training.model, data.tasks, data.validation, args.precision, forward_of(args, training)))
    measured = {"val_loss": values["cross_entropy"], "val_accuracy": values["accuracy"], "val_rand_index": values["rand_index"]}
    chance, oracle = data.baselines["chance"], data.baselines["oracle"]
    training.conclude_epoch(
        measured,
        f"validation {measured['val_loss']:.4f} (oracle {oracle['cross_entropy']:.4f}, chance {chance['cross_entropy']:.4f}) | "
        f"accuracy {measured['val_accuracy']:.3f} (oracle {oracle['accuracy']:.3f}, chance {chance['accuracy']:.3f})",
    )


# ---- report --------------------------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, data: Data, training: BudgetedTraining) -> None:
    """metrics.png, weights.png, samples.png."""
    if not parallel.is_main():
        return
    baselines = {
        column: {name: data.baselines[name][measure] for name in ("chance", "oracle")}
        for column, measure in (("val_loss", "cross_entropy"), ("val_accuracy", "accuracy"))
    }
    training.draw(len(data.training), baselines, "cross entropy (nats per point)")
    plot_clusterings(training.run.part / "samples.png", training.run.name, samples(args, data, training.model))


def plot_clusterings(
    path: Path,
    title: str,
    tasks: Sequence[tuple[NDArray[np.floating], NDArray[np.integer], NDArray[np.integer], str]],
) -> None:
    """Scatter plots of some tasks: predicted labels above, true ones below, in matching colours.

    Each task is (points (E, 2), predicted (E), true (E), caption); predicted labels are already renamed to the true clusters
    that they are matched with. Far outliers are left outside the frame.
    """
    figure = Figure(figsize=(4.2 * len(tasks), 8.6), layout="constrained")
    plotting.headline(figure, title)
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, (points, predicted, true, caption) in enumerate(tasks):
        for panel, labels in zip(panels[:, column], (predicted, true), strict=True):
            draw_clustering(panel, points, labels)
            panel.set_xlabel("first coordinate")
        panels[0, column].set_title(f"predicted: {caption}", fontsize=9)
        panels[1, column].set_title("true clusters", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("second coordinate")
    plotting.save_figure(figure, path)


def draw_clustering(panel: Axes, points: NDArray[np.floating], labels: NDArray[np.integer], opacity: Any = None) -> None:
    """Points (E, 2) in the colours of their labels (E); far outliers are left outside the frame."""
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    margin = np.where(high > low, 0.08 * (high - low), 1)
    panel.scatter(points[:, 0], points[:, 1], c=np.array(plotting.PALETTE)[labels], s=9, linewidths=0, alpha=opacity)
    panel.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))


@torch.no_grad()
def samples(args: argparse.Namespace, data: Data, model: nn.Module) -> list[tuple[Any, Any, Any, str]]:
    """Three validation tasks, always the same: with few, some and many clusters."""
    _, validation = clustering.split(len(data.tasks))
    by_clusters = validation[data.tasks.n_clusters[validation.to(data.tasks.points.device)].argsort(stable=True).cpu()]
    shown = by_clusters[torch.linspace(0, len(by_clusters) - 1, min(3, len(by_clusters))).long()]
    model.eval()
    drawn = []
    for task in shown.split(1):
        points, labels, mask = clustering.padded_batch(data.tasks, task)
        predicted = log_probs(model, points, mask, args.precision).argmax(2)
        counts = matching.contingency(predicted, labels, mask, N_LABELS)
        cluster_of_label = matching.best_matching(counts)[0].argsort()
        oracle = clustering.log_posterior(data.tasks, task, points).argmax(2)
        oracle_accuracy = matching.matched_accuracy(matching.contingency(oracle, labels, mask, N_LABELS)).item()
        caption = (
            f"{int(data.tasks.n_clusters[task])} clusters, {points.shape[1]} points,\n"
            f"accuracy {matching.matched_accuracy(counts).item():.2f} (oracle {oracle_accuracy:.2f})"
        )
        arrays = (tensor.cpu().numpy() for tensor in (points[0], cluster_of_label[predicted[0]], labels[0]))
        drawn.append((*arrays, caption))
    model.train()
    return drawn


def report(args: argparse.Namespace, data: Data, training: BudgetedTraining) -> dict[str, Any]:
    """The best model's measures on the validation tasks, by number of clusters, with the baselines."""
    training.best.load()
    measured = {"model": validate(training.model, data.tasks, data.validation, args.precision), **data.by_task}
    n_clusters = data.tasks.n_clusters.cpu()[torch.cat(data.validation)]
    by_clusters = {}
    for number in sorted(set(n_clusters.tolist())):
        mask = n_clusters == number
        metrics = {name: means({m: v[mask] for m, v in values.items()}) for name, values in measured.items()}
        by_clusters[str(number)] = {"tasks": int(mask.sum()), **metrics}
    protocol = "the model with the lowest validation loss of all epochs, measured on the same validation tasks"
    return {
        **training.about(args.seed, protocol),
        "validation_tasks": len(n_clusters),
        **{name: means(values) for name, values in measured.items()},
        "by_clusters": by_clusters,
        "k_means": measure_k_means(data.tasks, args.seed),
    }


def report_table(result: dict[str, Any]) -> str:
    """The final metrics as text: a row for each number of clusters, and k-means."""
    names = ("model", "chance", "oracle")
    lines = [
        " " * 16 + "".join(f"| {title:^23}" for title in MEASURES.values()),
        f"{'clusters':>8} {'tasks':>6} " + ("| " + "".join(f"{name:>7}" for name in names) + "  ") * len(MEASURES),
    ]
    rows = {**result["by_clusters"], "all": {"tasks": result["validation_tasks"], **{name: result[name] for name in names}}}
    for number, row in rows.items():
        cells = ("| " + "".join(f"{row[name][measure]:z7.3f}" for name in names) + "  " for measure in MEASURES)
        lines.append(f"{number:>8} {row['tasks']:>6} " + "".join(cells))
    k_means = result["k_means"]
    lines.append(
        f"adj. Rand index of k-means, which is told the number of clusters: {k_means['adjusted_rand_index']:.3f} "
        f"({k_means['tasks']} of these tasks, the best of {k_means['starts']} starts)"
    )
    return "\n".join(line.rstrip() for line in lines)


def summary(result: dict[str, Any]) -> str:
    """The metrics of all validation tasks with their baselines."""
    lines = [f"{result['validation_tasks']} validation tasks, after {result['seconds'] / 60:.1f} minutes of training:"]
    for measure, title in MEASURES.items():
        model, chance, oracle = (result[name][measure] for name in ("model", "chance", "oracle"))
        lines.append(f"{title:>16}: {model:z.3f} (chance {chance:z.3f}, oracle {oracle:z.3f})")
    k_means = result["k_means"]["adjusted_rand_index"]
    lines.append(f"{'... of k-means':>16}: {k_means:z.3f} (it is told the number of clusters, the network is not)")
    return "\n".join(lines)


# ---- points of a user -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def label(
    model: nn.Module, points: NDArray[np.float64], deviation: float | None, precision: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Label of each point (E, 2) of a set and its probability (E), and the scaled points. Raises InputError if there is none.

    In whatever order the points come, each gets the same ones: the model sees them sorted, and equal points get the same label.
    """
    order, first = canonical_order(points)
    scaled = scaling_to(points[order], deviation)(points[order])
    x = torch.from_numpy(scaled).float()[None].to(next(model.parameters()).device)
    log_p = log_probs(model, x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), precision)[0].double().cpu()
    if not (x.isfinite().all() and log_p.isfinite().all()):
        raise InputError(f"coordinates up to {np.abs(scaled).max():.3g} are too large for the model: leave -raw out")
    best = log_p.max(1)
    labels, confidences = np.empty(len(points), np.int64), np.empty(len(points))
    labels[order], confidences[order] = best.indices.numpy()[first], best.values.exp().numpy()[first]
    return labels, confidences, scaled


def plot_labels(path: Path, read: Points, labels: NDArray[np.int64], confidences: NDArray[np.float64]) -> None:
    """The first sets, up to six, in colours of their labels; the less probable, the fainter."""
    figure, panels = apply.panels_of(read, f"{read.path.name}: labels; the less probable, the fainter")
    for panel, members in panels:
        draw_clustering(panel, read.coordinates[members], labels[members], np.clip(confidences[members], 0.15, 1))
    plotting.save_figure(figure, path)


def clusters_in_words(labels: NDArray[np.int64], confidences: NDArray[np.float64]) -> str:
    sizes = sorted(np.unique(labels, return_counts=True)[1].tolist(), reverse=True)
    found = f"{len(sizes)} cluster{'s' * (len(sizes) > 1)} of {', '.join(map(str, sizes))}"
    return f"{found}; mean confidence {confidences.mean():.3f}"


def apply_model(args: argparse.Namespace) -> int:
    """-apply: labels of a user's points, and a picture of them."""
    with apply.command("amortised_clustering"):
        outputs = apply.outputs_of(args, Path(args.apply), "labels.csv")
        model, described = apply.load_model(args, "make_set_model")
        read = apply.read_points(args, described["arguments"]["n_in"], clustering.N_ENTITIES)
        deviation = None if args.raw else clustering.typical_deviation()
        ranges = feature_ranges(clustering.training_sets(1000), deviation)
        labels, confidences = np.empty(len(read), np.int64), np.empty(len(read))
        strange, words = [], []
        for members in bar(args, read.sets(), "sets"):
            labels[members], confidences[members], scaled = label(model, read.coordinates[members], deviation, args.precision)
            strange.append(oddities(scaled, clustering.N_ENTITIES, ranges))
            words.append(clusters_in_words(labels[members], confidences[members]))
        columns = {"label": map(str, labels), "confidence": (f"{value:.4f}" for value in confidences)}
        outputs.write(lambda file: write_with_columns(file, read, columns))
        plot_labels(outputs.picture, read, labels, confidences)
        apply.conclude(read, words, strange, deviation, outputs)
    return 0


# ---- one run from start to end -------------------------------------------------------------------------------------------


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The description of the model in best.pkl (common/trained.py)."""
    names = ("n_hidden", "n_layers", "n_iter", "non_lin", "n_heads", "n_ind_points", "dropout", "pooling")
    arguments = {"kind": args.type, "n_in": 2, "n_out": N_LABELS, **{name: getattr(args, name) for name in names}}
    return {"constructor": "make_set_model", "arguments": arguments, "data": clustering.describe()}


def make_model(args: argparse.Namespace) -> nn.Module:
    """The model of the options, on its device, with weights from the seed."""
    seed_everything(args.seed)
    model = make_set_model(**describe(args)["arguments"], fuse=args.compile)
    if args.compile and args.type != "Swarm":
        model.compile(dynamic=True)
    return model.to(options.device_of(args))


def introduce(args: argparse.Namespace, data: Data, training: BudgetedTraining, given: set[str]) -> None:
    """Log what was derived from the options."""
    log, n_parameters = training.run.log, sum(p.numel() for p in training.model.parameters())
    log(f"{training.model}\n{n_parameters:,} parameters on {data.tasks.points.device}, seed {args.seed}")
    n_training, n_validation = (sum(len(batch) for batch in batches) for batches in (data.training, data.validation))
    log(f"{n_training} training tasks, {len(data.training)} steps an epoch; {n_validation} validation tasks")
    everyones = set().union(*OWN_OPTIONS.values())
    for name in sorted(given & (everyones - OWN_OPTIONS[args.type])):
        log(f"note: -type {args.type} has no use for -{name}")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name, given = dotted.parse(parser, argv, NOT_IN_NAME)
    if apply.check_options(parser, args, given, ("apply",), apply.POINTS_OPTIONS):
        return apply_model(args)
    check_combinations(parser, args)
    options.check(parser, args, name)
    if args.dry_run:
        echo(name)
        return 0
    tune_malloc()
    set_backend_flags(args.precision, deterministic=args.deterministic)
    run = Run("amortised_clustering", name, args, another="-run ID", may_change=NOT_IN_NAME, quiet=True)
    with parallel.process_group(options.device_of(args).type), run:
        model = make_model(args)
        optimizer = make_adam(model, args.lr)
        data = make_data(args.tasks, args.bs, args.seed, next(model.parameters()).device)
        limits = {"budget": 60 * args.wc, "horizon": args.bt_horizon, "alpha": args.bt_alpha}
        training = BudgetedTraining(run, model, optimizer, columns=COLUMNS, description=describe(args), **limits)
        training.start(args.resume)
        introduce(args, data, training, given)
        with bar(args, bar_format="{desc}") as progress:
            while training.has_next_epoch(args.max_epochs):
                finite = train_epoch(args, data, training, progress)
                validate_epoch(args, data, training, finite)
                training.draw_if_due(args.update_interval, lambda: draw(args, data, training))
        with training.clock.paused():
            draw(args, data, training)
            result = report(args, data, training)
        run.log(report_table(result))
        status = run.finish(result)
    if not args.to_stdout:
        echo(report_table(result))
    echo(f"{summary(result)}\n{run.where_to_look(samples='samples.png')}")
    return status


if __name__ == "__main__":
    sys.exit(main())
