"""Amortised clustering with set-equivariant networks (Vollgraf 2019, arXiv 1906.09400, section 4.1).

A population of points in the plane, drawn from a mixture of 3 to 10 Gaussians, goes through a network once; out comes a
cluster label for every point. The loss is the cross entropy under the best matching of labels to clusters. The published line:

    python -u amortised_clustering.py -type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50 -wc 60

leaves its run in results/amortised_clustering/: log, metrics.csv, learning curves, weight traces, samples, result.json.
README.md says what each logged quantity means.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import matching, plotting
from common.datasets import clustering
from common.datasets.clustering import N_LABELS, ClusteringTasks
from common.models.sets import MODEL_TYPES, NON_LINEARITIES, make_set_model
from common.run import checkpoint, options
from common.run.backtracking import Backtracking
from common.run.checkpoint import CheckpointError
from common.run.clock import Clock
from common.run.directory import RunDirectory, RunError
from common.run.interruption import EXIT_RESUMABLE, Interruption
from common.run.memory import keep_freed_memory
from common.run.traces import Metrics, Traces, read_metrics

UNNAMED = ("-resume", "-results_dir", "-overwrite", "-dry_run")  # options that do not make another run
OWN_OPTIONS = {  # what only some types of model have a use for
    "Swarm": {"n_iter", "pooling", "non_lin"},
    "SetLinear": {"non_lin"},
    "SetLinearMax": {"non_lin"},
    "SetTransformer": {"n_heads", "n_ind_points"},
    "LSTM": set(),
    "LSTMS": set(),
}
MEASURES = {"cross_entropy": "cross entropy", "accuracy": "accuracy", "rand_index": "adj. Rand index"}
COLUMNS = ("epoch", "step", "seconds", "train_loss", "val_loss", "val_accuracy", "val_rand_index", "lr")
SAVE_SECONDS = 60.0  # between two saves of last.pkl within an epoch


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    from common.run.options import at_least, real, run_id

    parser = options.OneLineParser(prog="amortised_clustering.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper")
    paper.add_argument("-type", required=True, choices=MODEL_TYPES, help="type of set-equivariant model")
    paper.add_argument("-n_hidden", type=at_least(1), default=128, help="hidden units inside the model [%(default)s]")
    paper.add_argument("-n_layers", type=at_least(1), default=1, help="layers [%(default)s]")
    paper.add_argument("-n_iter", type=at_least(1), default=5, help="iterations in Swarm layers [%(default)s]")
    paper.add_argument("-non_lin", choices=NON_LINEARITIES, default="relu", help="non-linearity between layers [%(default)s]")
    paper.add_argument("-n_heads", type=at_least(1), default=4, help="attention heads in SetTransformer [%(default)s]")
    paper.add_argument("-n_ind_points", type=at_least(1), default=10, help="inducing points in SetTransformer [%(default)s]")
    paper.add_argument("-dropout", type=real(0, 1, below=True), default=0.0, help="dropout rate [%(default)s]")
    paper.add_argument("-tasks", type=at_least(10), default=10000, help="tasks, training and validation together [%(default)s]")
    paper.add_argument("-bs", type=at_least(1), default=100, help="batch size, in tasks [%(default)s]")
    paper.add_argument("-wc", type=real(0, above=True), default=60.0, help="wall clock time for training, in minutes [%(default)s]")
    paper.add_argument("-update_interval", type=real(0), default=10.0, help="minutes between two updates of the plots [%(default)s]")
    paper.add_argument("-max_epochs", type=at_least(1), default=1000, help="largest number of epochs [%(default)s]")
    paper.add_argument("-bt_horizon", type=real(0, 1), default=0.2, help="backtracking horizon, a fraction of the epochs [%(default)s]")
    paper.add_argument("-bt_alpha", type=real(0, 1, above=True), default=0.9, help="learning rate factor of backtracking [%(default)s]")
    paper.add_argument("-lr", type=real(0, 1, above=True), default=0.01, help="learning rate of Adam [%(default)s]")
    paper.add_argument("-no_cuda", action="store_true", help="don't use CUDA even if it is available")
    paper.add_argument("-dry_run", action="store_true", help="just print the model name and exit")
    paper.add_argument("-to_stdout", action="store_true", help="log to stdout instead of the file log of the run")
    paper.add_argument("-run", type=run_id, help="run id to append to the model name; has no function otherwise")
    paper.add_argument("-resume", metavar="FILE|auto", help="start from a best.pkl; auto: go on with this run where it was interrupted")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("-seed", type=at_least(0), default=0, help="seed of data, weights and order of batches [%(default)s]")
    own.add_argument("-results_dir", default="results", help="where run directories are made [%(default)s]")
    own.add_argument("-pooling", choices=("MEAN", "POMA"), default="MEAN", help="pooling in Swarm layers [%(default)s]")
    own.add_argument("-loss", choices=matching.LOSSES, default="hungarian", help="matching that is trained for [%(default)s]")
    own.add_argument("-precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products [%(default)s]")
    own.add_argument("-compile", action="store_true", help="torch.compile the model (Swarm: its pointwise part)")
    own.add_argument("-overwrite", action="store_true", help="replace a run of the same name")
    return parser


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what no model can do."""
    if args.type == "SetTransformer" and args.n_hidden % args.n_heads:
        parser.error(f"-n_hidden {args.n_hidden} does not split into -n_heads {args.n_heads}: choose a multiple")
    if args.type == "Swarm" and args.pooling == "POMA" and args.n_hidden <= 8:
        parser.error(f"-pooling POMA takes 8 hidden units for itself: -n_hidden {args.n_hidden} is too small")
    if args.dropout and args.type.startswith("SetLinear"):
        parser.error(f"-type {args.type} has no dropout: leave -dropout {args.dropout:g} out")
    if args.dropout and args.type.startswith("LSTM") and args.n_layers == 1:
        parser.error(f"-type {args.type} drops out between layers: -dropout {args.dropout:g} needs -n_layers 2 or more")
    if args.resume == "auto" and args.overwrite:
        parser.error("-resume auto goes on with a run, -overwrite replaces it: choose one")


def log_probs(model: nn.Module, points: Tensor, mask: Tensor, precision: str) -> Tensor:
    """Log-probability of each label for each point: (N, E, 2), (N, E) -> (N, E, 10)."""
    with torch.autocast(points.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
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
def validate(model: nn.Module, tasks: ClusteringTasks, batches: list[Tensor], precision: str) -> dict[str, Tensor]:
    """The model's measures of every validation task, in the order of the batches."""
    model.eval()
    parts = []
    for chosen in batches:
        points, labels, mask = clustering.padded_batch(tasks, chosen)
        parts.append(measure(log_probs(model, points, mask, precision), labels, mask))
    model.train()
    return joined(parts)


def references(tasks: ClusteringTasks, batches: list[Tensor], seed: int) -> dict[str, dict[str, Tensor]]:
    """The same measures for chance (all labels equally likely, ties broken at random) and for the true mixture's posterior."""
    gen = torch.Generator().manual_seed(seed)
    parts: dict[str, list[dict[str, Tensor]]] = {"chance": [], "oracle": []}
    for chosen in batches:
        points, labels, mask = clustering.padded_batch(tasks, chosen)
        noise = 1e-6 * torch.rand(*mask.shape, N_LABELS, generator=gen).to(points.device)
        parts["chance"].append(measure(noise.log_softmax(2), labels, mask))
        parts["oracle"].append(measure(clustering.log_posterior(tasks, chosen, points), labels, mask))
    return {name: joined(of) for name, of in parts.items()}


def means(measured: dict[str, Tensor]) -> dict[str, float]:
    """Mean over tasks, each counting the same."""
    return {name: values.mean().item() for name, values in measured.items()}


# ---- training ------------------------------------------------------------------------------------------------------------


class Experiment:
    """One run: what is trained, on what, and how far it is. `state_dict` is the content of last.pkl."""

    def __init__(self, args: argparse.Namespace, run: RunDirectory, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.args, self.run, self.model, self.optimizer = args, run, model, optimizer
        self.device = next(model.parameters()).device
        self.tasks = clustering.make_tasks(args.tasks, args.seed).to(self.device)
        training, validation = clustering.split(args.tasks)
        self.batches = clustering.batches_by_size(self.tasks, training, args.bs)
        self.validation = clustering.batches_by_size(self.tasks, validation, args.bs)
        self.references = references(self.tasks, self.validation, args.seed)
        self.levels = {name: means(measured) for name, measured in self.references.items()}
        self.backtracking = Backtracking(args.bt_horizon)
        self.traces = Traces(model)
        # where it stands: `batch` batches of `epoch` are done; loss_sum is their training loss, summed over n_tasks tasks
        self.epoch = self.batch = self.step = self.n_tasks = 0
        self.loss_sum = 0.0

    def start(self, last: dict[str, Any] | None) -> None:
        """Start the clock and the files: anew, or where last.pkl stands."""
        path = self.run.path / "metrics.csv"
        if last is None:
            self.metrics = Metrics(path, COLUMNS)
            self.clock = Clock(60 * self.args.wc)
            self.save_last()
            self.save_best(math.inf)
            return
        self.optimizer.load_state_dict(last["optimizer"])
        self.backtracking.load_state_dict(last["backtracking"])
        self.traces.load_state_dict(last["traces"])
        self.epoch, self.batch, self.step, self.n_tasks, self.loss_sum = last["progress"]
        self.metrics = Metrics(path, COLUMNS, last["metrics_size"])
        self.clock = Clock(60 * self.args.wc, last["seconds"])
        checkpoint.set_rng_state(last["rng"])
        self.saved_at = time.monotonic()
        if self.step == 0:  # stopped between the two saves above
            self.save_best(math.inf)

    def save_last(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "name": self.run.name,
            "best_val_loss": self.backtracking.best,
            "args": {name: value for name, value in vars(self.args).items() if f"-{name}" not in UNNAMED},
            "progress": (self.epoch, self.batch, self.step, self.n_tasks, self.loss_sum),
            "seconds": self.clock.used(),
            "backtracking": self.backtracking.state_dict(),
            "traces": self.traces.state_dict(),
            "metrics_size": self.metrics.size,
            "rng": checkpoint.rng_state(),
        }
        checkpoint.save(state, self.run.last)
        self.saved_at = time.monotonic()

    def save_best(self, val_loss: float) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(state | {"name": self.run.name, "best_val_loss": val_loss, "epoch": self.epoch}, self.run.best)

    def load_best(self) -> None:
        state = checkpoint.load(self.run.best)
        checkpoint.load_model(self.model, state, self.run.best)
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def batch_order(n_batches: int, seed: int, epoch: int) -> list[int]:
    """The order of the batches: a function of seed and epoch alone, so that a resume in mid-epoch is exact."""
    gen = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n_batches, generator=gen).tolist()


def train_epoch(ex: Experiment, interruption: Interruption, progress: tqdm) -> bool:
    """Train on the batches of an epoch that are left, until the time is up or a signal comes; False if the loss diverged."""
    args = ex.args
    for index in batch_order(len(ex.batches), args.seed, ex.epoch)[ex.batch :]:
        points, labels, mask = clustering.padded_batch(ex.tasks, ex.batches[index])
        log_p = log_probs(ex.model, points, mask, args.precision)
        loss = matching.matched_cross_entropy(log_p, labels, mask, args.loss).mean()
        value = loss.item()
        if not math.isfinite(value):
            return False
        ex.optimizer.zero_grad()
        loss.backward()
        ex.optimizer.step()

        ex.loss_sum += value * len(points)
        ex.n_tasks += len(points)
        ex.batch, ex.step = ex.batch + 1, ex.step + 1
        ex.traces.record(ex.step, loss)
        progress.set_description_str(
            f"epoch {ex.epoch + 1} batch {ex.batch}/{len(ex.batches)}  loss {value:.3f}  best validation "
            f"{ex.backtracking.best:.3f} (oracle {ex.levels['oracle']['cross_entropy']:.3f})  lr {ex.learning_rate:.2g}  "
            f"time left {tqdm.format_interval(int(ex.clock.left()))}",
            refresh=False,
        )
        progress.update()
        if ex.clock.is_up() or interruption.signal:
            break
        if time.monotonic() - ex.saved_at > SAVE_SECONDS:
            ex.save_last()
    return True


def end_epoch(ex: Experiment, finite: bool) -> None:
    """Validate, note the figures, and keep the model, save it as the best, or go back to the best."""
    nothing = dict.fromkeys(MEASURES, math.nan)
    figures = means(validate(ex.model, ex.tasks, ex.validation, ex.args.precision)) if finite else nothing
    train_loss = ex.loss_sum / ex.n_tasks if finite else math.nan
    val_loss, rate = figures["cross_entropy"], ex.learning_rate
    last_epoch = ex.clock.is_up() or ex.epoch + 1 == ex.args.max_epochs
    verdict = ex.backtracking.judge(val_loss, last_epoch=ex.clock.is_up())
    if verdict == "best":
        ex.save_best(val_loss)
    elif verdict == "back":
        ex.load_best()
        ex.learning_rate = rate * ex.args.bt_alpha

    done = {"best": " | best so far, saved", "keep": "", "back": f" | back to the best, lr {ex.learning_rate:.4g}"}[verdict]
    chance, oracle = ex.levels["chance"], ex.levels["oracle"]
    ex.run.log(
        f"epoch {ex.epoch + 1:4d}  step {ex.step:6d}  {ex.clock.used() / 60:7.2f} min | training {train_loss:.4f} | "
        f"validation {val_loss:.4f} (oracle {oracle['cross_entropy']:.4f}, chance {chance['cross_entropy']:.4f}) | "
        f"accuracy {figures['accuracy']:.3f} (oracle {oracle['accuracy']:.3f}, chance {chance['accuracy']:.3f}) | "
        f"lr {rate:.4g}{done}"
    )
    row = [ex.epoch + 1, ex.step, ex.clock.used(), train_loss, val_loss, figures["accuracy"], figures["rand_index"], rate]
    ex.metrics.append(dict(zip(COLUMNS, row, strict=True)))
    ex.epoch, ex.batch, ex.n_tasks, ex.loss_sum = ex.epoch + 1, 0, 0, 0.0
    if finite or not last_epoch:  # what diverged in the last epoch is not worth a checkpoint
        ex.save_last()


def train(ex: Experiment, interruption: Interruption) -> bool:
    """Train until the epochs or the time are used up; False if a signal came first, with all that is needed to go on saved."""
    plotted_at: float | None = None
    with tqdm(disable=None, bar_format="{desc}") as progress:
        while ex.epoch < ex.args.max_epochs and not ex.clock.is_up():
            finite = train_epoch(ex, interruption, progress)
            if interruption.signal and not ex.clock.is_up():
                if finite:
                    ex.save_last()
                return False
            end_epoch(ex, finite)
            if plotted_at is None or ex.clock.used() - plotted_at >= 60 * ex.args.update_interval:
                with ex.clock.paused():
                    draw(ex)
                plotted_at = ex.clock.used()
    return True


# ---- report --------------------------------------------------------------------------------------------------------------


def draw(ex: Experiment) -> None:
    """metrics.png, weights.png, samples.png."""
    title, steps_per_epoch = ex.run.name, len(ex.batches)
    levels = {
        column: {name: ex.levels[name][measure] for name in ("chance", "oracle")}
        for column, measure in (("val_loss", "cross_entropy"), ("val_accuracy", "accuracy"))
    }
    losses = (ex.traces.steps, [loss.item() for loss in ex.traces.losses])
    metrics = read_metrics(ex.metrics.path)
    plotting.plot_metrics(
        ex.run.path / "metrics.png", title, metrics, losses, steps_per_epoch, levels, "cross entropy (nats per point)"
    )
    weights = {name: values.numpy() for name, values in ex.traces.by_parameter().items()}
    if weights:
        plotting.plot_weights(ex.run.path / "weights.png", title, ex.traces.steps, weights, steps_per_epoch)
    plotting.plot_clusterings(ex.run.path / "samples.png", title, samples(ex))


@torch.no_grad()
def samples(ex: Experiment) -> list[tuple[Any, Any, Any, str]]:
    """Three validation tasks, always the same: with few, some and many clusters."""
    _, validation = clustering.split(len(ex.tasks))
    by_clusters = validation[ex.tasks.n_clusters[validation.to(ex.device)].argsort(stable=True).cpu()]
    chosen = by_clusters[torch.linspace(0, len(by_clusters) - 1, min(3, len(by_clusters))).long()]
    ex.model.eval()
    drawn = []
    for task in chosen.split(1):
        points, labels, mask = clustering.padded_batch(ex.tasks, task)
        predicted = log_probs(ex.model, points, mask, ex.args.precision).argmax(2)
        counts = matching.contingency(predicted, labels, mask, N_LABELS)
        cluster_of_label = matching.best_matching(counts)[0].argsort()
        oracle = clustering.log_posterior(ex.tasks, task, points).argmax(2)
        oracle_accuracy = matching.matched_accuracy(matching.contingency(oracle, labels, mask, N_LABELS)).item()
        caption = (
            f"{int(ex.tasks.n_clusters[task])} clusters, {points.shape[1]} points,\n"
            f"accuracy {matching.matched_accuracy(counts).item():.2f} (oracle {oracle_accuracy:.2f})"
        )
        shown = (points[0], cluster_of_label[predicted[0]], labels[0])
        drawn.append((*(tensor.cpu().numpy() for tensor in shown), caption))
    ex.model.train()
    return drawn


def report(ex: Experiment) -> dict[str, Any]:
    """The final figures: the best model's measures on the validation tasks, by number of clusters, beside the references."""
    ex.load_best()
    measured = {"model": validate(ex.model, ex.tasks, ex.validation, ex.args.precision), **ex.references}
    n_clusters = ex.tasks.n_clusters.cpu()[torch.cat(ex.validation)]
    by_clusters = {}
    for number in sorted(set(n_clusters.tolist())):
        of_number = n_clusters == number
        figures = {name: means({m: v[of_number] for m, v in values.items()}) for name, values in measured.items()}
        by_clusters[str(number)] = {"tasks": int(of_number.sum()), **figures}
    return {
        "script": "amortised_clustering",
        "name": ex.run.name,
        "seed": ex.args.seed,
        "protocol": "the model with the lowest validation loss of all epochs, measured on the same validation tasks",
        "parameters": sum(p.numel() for p in ex.model.parameters()),
        "device": str(ex.device),
        "epochs": ex.epoch,
        "steps": ex.step,
        "seconds": ex.clock.used(),
        "validation_tasks": len(n_clusters),
        **{name: means(values) for name, values in measured.items()},
        "by_clusters": by_clusters,
    }


def report_table(result: dict[str, Any]) -> str:
    """The final figures as text: a row for each number of clusters."""
    names = ("model", "chance", "oracle")
    lines = [
        " " * 16 + "".join(f"| {title:^23}" for title in MEASURES.values()),
        f"{'clusters':>8} {'tasks':>6} " + ("| " + "".join(f"{name:>7}" for name in names) + "  ") * len(MEASURES),
    ]
    rows = {**result["by_clusters"], "all": {"tasks": result["validation_tasks"], **{name: result[name] for name in names}}}
    for number, row in rows.items():
        cells = ("| " + "".join(f"{row[name][measure]:7.3f}" for name in names) + "  " for measure in MEASURES)
        lines.append(f"{number:>8} {row['tasks']:>6} " + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


# ---- one run from start to end -------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, run: RunDirectory, found: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any] | None]:
    """Model and optimiser, and the content of last.pkl if the run goes on. Raises CheckpointError; creates nothing."""
    checkpoint.seed_everything(args.seed)
    names = ("n_hidden", "n_layers", "n_iter", "non_lin", "n_heads", "n_ind_points", "dropout", "pooling")
    model = make_set_model(args.type, 2, N_LABELS, fuse=args.compile, **{name: getattr(args, name) for name in names})
    model.to("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    last = None
    if found == "unfinished":
        last = checkpoint.load(run.last, needed=("model", "optimizer", "args", "progress", "rng"))
        for name, value in last["args"].items():
            if getattr(args, name, None) != value:
                raise CheckpointError(f"{run.last} was made with -{name} {value}, not {getattr(args, name, None)}: -run ID starts another run")
        checkpoint.load_model(model, last, run.last)
        if last["progress"][2] > 0:
            checkpoint.load_model(model, checkpoint.load(run.best), run.best)  # so that it can be gone back to
            checkpoint.load_model(model, last, run.last)
    elif args.resume not in (None, "auto"):
        state = checkpoint.load(Path(args.resume))
        checkpoint.load_model(model, state, Path(args.resume))
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{args.resume} has an optimizer of another model ({error})") from None
        for group in optimizer.param_groups:
            group["lr"] = args.lr
    if args.compile and args.type != "Swarm":
        model.compile(dynamic=True)
    return model, optimizer, last


def introduce(ex: Experiment, given: set[str]) -> None:
    """Log what was derived from the options."""
    args, n_training = ex.args, sum(len(batch) for batch in ex.batches)
    ex.run.log(f"{ex.model}\n{sum(p.numel() for p in ex.model.parameters()):,} parameters on {ex.device}, seed {args.seed}")
    ex.run.log(f"{n_training} training tasks, {len(ex.batches)} steps an epoch; {len(ex.tasks) - n_training} validation tasks")
    everyones = set().union(*OWN_OPTIONS.values())
    for name in sorted(given & (everyones - OWN_OPTIONS[args.type])):
        ex.run.log(f"note: -type {args.type} has no use for -{name}")
    if ex.step:
        ex.run.log(f"resumed in epoch {ex.epoch + 1} after step {ex.step}, {ex.clock.used() / 60:.2f} minutes used")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name, given = options.parse(parser, argv, UNNAMED)
    check_combinations(parser, args)
    if args.dry_run:
        print(name)
        return 0
    keep_freed_memory()
    run = RunDirectory(args.results_dir, "amortised_clustering", name)
    with Interruption() as interruption:
        try:
            found = run.check(resume=args.resume == "auto", overwrite=args.overwrite)
            if found == "finished":
                run.finish_interrupted_rename()
                print(f"the run {run.final} has finished: nothing to do")
                return 0
            model, optimizer, last = prepare(args, run, found)
            run.open(vars(args), overwrite=args.overwrite, to_stdout=args.to_stdout)
        except (RunError, CheckpointError) as error:
            parser.error(str(error))
        print(f"running in {run.path}", flush=True)
        try:
            ex = Experiment(args, run, model, optimizer)
            ex.start(last)
            introduce(ex, given)
            if not train(ex, interruption):
                run.log(f"stopped by {interruption.signal} after step {ex.step}: -resume auto goes on from here")
                return EXIT_RESUMABLE
            with ex.clock.paused():
                draw(ex)
                result = report(ex)
            run.log(report_table(result))
            run.finish(result)
        except OSError as error:
            what = f"cannot write {error.filename or run.path}: {error.strerror}"
            print(f"stopped: {what}; what was saved before is intact, and -resume auto goes on from it", file=sys.stderr)
            return EXIT_RESUMABLE
    if not args.to_stdout:
        print(report_table(result))
    print(f"trained for {result['seconds'] / 60:.1f} minutes; log, traces and samples are in {run.final}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
