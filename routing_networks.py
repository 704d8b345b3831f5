"""Routing networks: learning which modules each task goes through (Rosenbaum, Klinger & Riemer, ICLR 2018, arXiv 1711.01239).

A convolutional trunk is shared by all tasks; each fully connected layer behind it has several modules, and a router decides
which one a sample goes through, paid by the loss that the sample ends with: common/routing has the method,
common/models/routed.py the networks. The experiment as published, on CIFAR-100 in 20 tasks, and a short one on MNIST in ten:

    python routing_networks.py
    python routing_networks.py --data MNIST-MTL --optimizer adam --loss cross-entropy --batch-size 64 --lr 1e-3 --epochs 5

    python routing_networks.py --compare results/routing_networks/*      # accuracy of finished runs over seeds

README.md says what each logged quantity means.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import Tensor, nn

import common.routing as routing
from common import paper_figures, plotting
from common.datasets import images, multitask
from common.datasets.images import DataError
from common.datasets.multitask import MultitaskSet
from common.models import routed
from common.models.routed import RoutedNet, SoftMixture
from common.routing import Decision, Loss, Trajectories
from common.run import checkpoint, options
from common.run.directory import RunDirectory, environment
from common.run.ending import EXIT_RESUMABLE, refusing, say, surviving_full_disks, tell
from common.run.epochs import EpochTraining, Sums, load_last
from common.run.interruption import Interruption
from common.run.memory import keep_freed_memory
from common.run.options import at_least, real
from common.run.records import RecordError, read_results, write_text
from common.run.traces import read_metrics
from common.seeds import generator_of, seed_of

DECISIONS = (
    "WPL", "REINFORCE", "REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "ActorCritic", "AAC", "BootstrapAAC", "EGreedyAAC",
    "QLearning", "SARSA", "AdvantageLearning", "BootstrapAdvantageLearning", "GumbelSoftmax", "RELAX",
)  # fmt: skip
LEARNED = ("routed-all-fc", "dispatched", "single-agent")  # models that decide
SPLITS = ("train", "test")
MAX_NORM = 40.0  # of the gradient, of modules and of routers apart
# options that do not make another run
UNNAMED = ("data_dir", "results_dir", "device", "resume", "overwrite", "dry_run", "compare")
COLUMNS = (
    "epoch", "step", "seconds", "lr", "exploration", "train_loss", "train_accuracy", "train_routing_loss", "test_loss",
    "test_accuracy", "test_routing_loss", "policy_entropy", "modules_used", "task_overlap",
)  # fmt: skip
EVALUATED_AT_ONCE = 500
N_SHOWN = 12  # parameters in weights.png: there may be hundreds


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="routing_networks.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper")
    paper.add_argument("--data", choices=tuple(multitask.N_TASKS), default="CIFAR100-MTL", help="tasks [%(default)s]")
    paper.add_argument("--model", choices=routed.MODELS, default="routed-all-fc", help="[%(default)s]")
    paper.add_argument("--decision", choices=DECISIONS, default="WPL", help="how routers learn [%(default)s]")
    paper.add_argument("--modules", type=at_least(1, 10**4), metavar="N", help="in each layer [as many as tasks]")
    paper.add_argument("--agents", type=at_least(1, 10**4), metavar="N", help="of dispatched [as many as tasks]")
    paper.add_argument("--depth", type=at_least(1, 100), default=3, metavar="N", help="fully connected layers [%(default)s]")
    paper.add_argument("--exploration", type=real(0, 1), default=0.1, metavar="E", help="of routers, 0 to 1 [%(default)s]")
    paper.add_argument(
        "--collaboration", type=real(0, 1), default=0.3, metavar="R", help="share of reward for popular modules [%(default)s]"
    )
    paper.add_argument("--lr", type=real(0, 10, above=True), default=0.003, help="of trunk and modules [%(default)s]")
    paper.add_argument("--routing-lr", type=real(0, 10, above=True), metavar="LR", help="of routers [0.3 --lr]")
    paper.add_argument("--epochs", type=at_least(1, 10**6), default=50, metavar="N", help="[%(default)s]")
    paper.add_argument("--batch-size", type=at_least(2, 10**6), default=10, metavar="N", help="[%(default)s]")
    own = parser.add_argument_group("options of this suite")
    own.add_argument("--seed", type=at_least(0), default=0, help="of data, weights, order, draws [%(default)s]")
    own.add_argument("--width", type=at_least(1, 10**4), default=48, metavar="N", help="of the hidden layers [%(default)s]")
    drops = "epochs until the rates fall to a third; after twice as many, to a tenth [%(default)s]"
    own.add_argument("--drop-after", type=at_least(1), default=5, metavar="N", help=drops)
    own.add_argument("--exploration-end", type=real(0, 1), metavar="E", help="approached in a line over the epochs [constant]")
    own.add_argument("--loss", choices=("mse", "cross-entropy"), default="mse", help="mse: of one-hot labels [%(default)s]")
    own.add_argument("--reward", choices=("loss", "correct"), default="loss", help="-loss, or +1 and -1 [%(default)s]")
    own.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd", help="[%(default)s]")
    own.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of products and convolutions [%(default)s]")
    own.add_argument("--device", choices=("cpu", "cuda"), help="[cuda when available]")
    own.add_argument("--data-dir", metavar="PATH", default="data", help="where the data set lies, or is saved [%(default)s]")
    own.add_argument("--results-dir", metavar="PATH", default="results", help="[%(default)s]")
    own.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help="go on with a run that was interrupted")
    own.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    own.add_argument("--dry-run", action="store_true", help="check the options, print the run's name, exit")
    own.add_argument("--compare", nargs="+", metavar="RUN", help="instead of training: a table of finished runs")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """Options that can work together, what was left open filled in, and the run's name; or the parser's error."""
    args = parser.parse_args(argv)
    n_tasks = multitask.N_TASKS[args.data]
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite replaces it: choose one")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if args.model.startswith("per-task") and args.modules not in (None, n_tasks):
        parser.error(f"--modules {args.modules}: {args.model} has one for each of the {n_tasks} tasks")
    if args.agents is not None and args.model != "dispatched":
        parser.error(f"--agents {args.agents}: {args.model} has no choice of agents, dispatched has")
    for name in ("decision", "exploration", "exploration_end", "collaboration", "reward"):
        if args.model not in LEARNED and getattr(args, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} {getattr(args, name)}: {args.model} decides nothing, {', '.join(LEARNED)} do")
    name = ".".join([args.data, args.model])
    named = options.not_defaults(parser, args, (*UNNAMED, "data", "model"))
    name = "-".join([name, *named])
    options.check_length(parser, name)
    args.modules = args.modules or n_tasks
    args.agents = args.agents or n_tasks
    args.routing_lr = args.routing_lr or 0.3 * args.lr
    return args, name


# ---- data ----------------------------------------------------------------------------------------------------------------


class Data:
    """Both splits on the device, and what pixels are scaled with."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """Read, or download, what the options name. Raises DataError."""
        name = args.data.removesuffix("-MTL")
        train, test = (images.load(name, split, args.data_dir, download=True) for split in images.SPLITS)
        self.fingerprint = train.fingerprint()
        if args.data == "CIFAR100-MTL":
            self.train, self.test = (multitask.superclasses(split).to(device) for split in (train, test))
        else:
            self.train, self.test = (
                multitask.one_against_rest(split, multitask.PER_TASK[which], args.seed).to(device)
                for which, split in zip(SPLITS, (train, test), strict=True)
            )
        pixels = self.train.images.float() / 255
        self.mean, self.deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
        self.n_tasks, self.n_labels = multitask.N_TASKS[args.data], multitask.N_LABELS[args.data]

    def batch(self, split: MultitaskSet, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, C, H, W), tasks (B) and labels (B)."""
        x = (split.images[chosen].float() / 255 - self.mean) / self.deviation
        return x.contiguous(memory_format=torch.channels_last), split.tasks[chosen], split.labels[chosen]


# ---- model and loss ------------------------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace, data: Data) -> RoutedNet | SoftMixture:
    """The network of the options, in its initial state."""
    _, channels, side, _ = data.train.images.shape

    def make_decision(n: int, in_features: int, n_agents: int, storage: str) -> Decision:
        # on the output, where the factor's gradient is what more of the module would change
        more = {"scale": "output"} if args.decision == "GumbelSoftmax" else {}
        reward = routing.CollaborationReward(args.collaboration, num_actions=n)
        return getattr(routing, args.decision)(
            n, in_features, n_agents, args.exploration, storage, additional_reward_func=reward, **more
        )

    sizes = routed.layer_sizes(side, args.depth, args.width, data.n_labels)
    return routed.make(args.model, channels, sizes, data.n_tasks, args.modules, args.agents, make_decision)


def make_optimizer(args: argparse.Namespace, model: RoutedNet | SoftMixture) -> torch.optim.Optimizer:
    """Two groups: modules with the trunk, and routers. The weights of soft-mixture learn as modules do."""
    routers = model.routing_parameters() if isinstance(model, RoutedNet) else []
    of_routers = {id(parameter) for parameter in routers}
    modules = [parameter for parameter in model.parameters() if id(parameter) not in of_routers]
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
    return kind([{"params": modules, "lr": args.lr}, {"params": routers, "lr": args.routing_lr}], fused=True)


def make_loss(args: argparse.Namespace) -> Loss:
    module_loss = nn.MSELoss() if args.loss == "mse" else nn.CrossEntropyLoss()
    return Loss(module_loss, routing.NegLossReward() if args.reward == "loss" else routing.CorrectClassifiedReward())


def losses_of(
    args: argparse.Namespace, model: nn.Module, loss_func: Loss, x: Tensor, tasks: Tensor, labels: Tensor, n_labels: int
) -> tuple[Tensor, Tensor, Tensor, Trajectories]:
    """One batch through the network: logits (B, labels), module loss, routing loss, and its trajectories."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        logits, records = model(x, tasks)
    logits = logits.float()
    targets = F.one_hot(labels, n_labels).float() if args.loss == "mse" else labels
    module_loss, routing_loss = loss_func(logits, records, targets)
    return logits, module_loss, routing_loss, records


def rate_share(args: argparse.Namespace, epoch: int) -> float:
    """The share of the full rates in an epoch (from 0): all, a third, a tenth, as published."""
    return 1.0 if epoch < args.drop_after else 1 / 3 if epoch < 2 * args.drop_after else 0.1


def exploration_in(args: argparse.Namespace, epoch: int) -> float:
    """Exploration of an epoch (from 0)."""
    if args.exploration_end is None:
        return args.exploration
    return routing.annealed(args.exploration, args.exploration_end, epoch / max(1, args.epochs - 1))


# ---- the loop ------------------------------------------------------------------------------------------------------------


def batches_of(args: argparse.Namespace, data: Data, epoch: int) -> list[Tensor]:
    """The batches of an epoch: a function of seed and epoch alone. A last one of a single image is left out, for batch norm."""
    order = torch.randperm(len(data.train), generator=generator_of(args.seed, 0, epoch)).to(data.train.labels.device)
    return [batch for batch in order.split(args.batch_size) if len(batch) > 1]


def train_epoch(args: argparse.Namespace, data: Data, training: EpochTraining, interruption: Interruption) -> bool:
    """Train on the batches of the epoch that are left; False if a signal comes first."""
    model, optimizer, loss_func = training.model, training.optimizer, make_loss(args)
    model.train()
    if args.exploration_end is not None:
        routing.set_exploration(model, exploration_in(args, training.epoch))
    for group, rate in zip(optimizer.param_groups, (args.lr, args.routing_lr), strict=True):
        group["lr"] = rate * rate_share(args, training.epoch)
    for chosen in batches_of(args, data, training.epoch)[training.batch :]:
        if interruption.signal is not None:
            return False
        # what routers draw is a function of the step, so that a run that is gone on with draws the same
        torch.manual_seed(seed_of(args.seed, 1, training.epoch, training.batch))
        x, tasks, labels = data.batch(data.train, chosen)
        logits, module_loss, routing_loss, _ = losses_of(args, model, loss_func, x, tasks, labels, data.n_labels)
        optimizer.zero_grad()
        (module_loss + routing_loss).backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], MAX_NORM)
        optimizer.step()
        accuracy = (logits.argmax(1) == labels).float().mean()
        training.step_done(len(chosen), {"loss": module_loss, "accuracy": accuracy, "routing_loss": routing_loss})
        training.save_now_and_then()
    return True


@torch.no_grad()
def evaluate(
    args: argparse.Namespace, data: Data, model: RoutedNet | SoftMixture, interruption: Interruption
) -> dict[str, Any] | None:
    """Figures of the test images, greedy decisions: means, accuracy by task, and routing maps; None if a signal comes.

    A routing map (tasks, modules) is, for a layer, the share of a task's images that go through a module.
    """
    model.eval()
    sums, loss_func = Sums(), make_loss(args)
    right = torch.zeros(data.n_tasks, device=data.test.labels.device)
    maps: list[Tensor] = []
    for chosen in torch.arange(len(data.test), device=right.device).split(EVALUATED_AT_ONCE):
        if interruption.signal is not None:
            return None
        x, tasks, labels = data.batch(data.test, chosen)
        logits, module_loss, routing_loss, records = losses_of(args, model, loss_func, x, tasks, labels, data.n_labels)
        hits = (logits.argmax(1) == labels).float()
        right.index_add_(0, tasks, hits)
        figures = {"loss": module_loss, "accuracy": hits.mean(), "routing_loss": routing_loss}
        sums.add(len(chosen), figures | {"policy_entropy": policy_entropy(records, module_loss)})
        used = [choice.float() for choice in model.routing(records, tasks)]
        new = [torch.zeros(data.n_tasks, use.shape[1], device=use.device).index_add(0, tasks, use) for use in used]
        maps = [old + more for old, more in zip(maps, new, strict=True)] if maps else new
    per_task = torch.bincount(data.test.tasks, minlength=data.n_tasks)
    maps = [counts / per_task[:, None] for counts in maps]
    return sums.means() | {
        "accuracy_by_task": (right / per_task).tolist(),
        "maps": [counts.tolist() for counts in maps],
        "modules_used": statistics.fmean(modules_used(m) for m in maps),
        "task_overlap": statistics.fmean(task_overlap(m) for m in maps),
    }


def policy_entropy(records: Trajectories, like: Tensor) -> Tensor:
    """Mean entropy, in nats, of the softmax of what the decisions are made by: policies' logits, or values."""
    if not records.steps:
        return torch.zeros_like(like)
    policies = [step.states[:, :, 0].log_softmax(1) for step in records.steps]
    return torch.stack([-(log_p.exp() * log_p).sum(1).mean() for log_p in policies]).mean()


def modules_used(m: Tensor) -> float:
    """The effective number of modules of a layer: exp of the entropy of how often each is used."""
    share = m.mean(0)
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def task_overlap(m: Tensor) -> float:
    """How likely images of two different tasks go through the same module."""
    same = m @ m.T
    n = len(m)
    return ((same.sum() - same.trace()) / (n * (n - 1))).item()


def train(args: argparse.Namespace, data: Data, training: EpochTraining, interruption: Interruption) -> bool:
    """Train until the epochs are over; False if a signal came first, with all that is needed to go on saved."""
    model = training.model
    assert isinstance(model, RoutedNet | SoftMixture)
    while training.epoch < args.epochs:
        try:
            tested = evaluate(args, data, model, interruption) if train_epoch(args, data, training, interruption) else None
        except ValueError as error:  # of rewards
            if "no finite value" not in str(error):
                raise
            raise SystemExit(f"the loss of epoch {training.epoch + 1} is not finite: a smaller --lr may help") from None
        if tested is None:
            training.save_last()
            return False
        means = training.sums.means()
        if not math.isfinite(means["loss"] + means["routing_loss"]):
            raise SystemExit(f"the loss of epoch {training.epoch + 1} is not finite: a smaller --lr may help")
        tested["maps"] = [*training.tested.get("maps", []), tested["maps"]]  # of all epochs
        training.tested = tested
        row: dict[str, float | int] = {"epoch": training.epoch + 1, "step": training.step, "seconds": training.clock.used()}
        row |= {"lr": training.optimizer.param_groups[0]["lr"], "exploration": exploration_in(args, training.epoch)}
        row |= {f"train_{name}": value for name, value in means.items()}
        row |= {name if name in COLUMNS else f"test_{name}": tested[name] for name in tested if isinstance(tested[name], float)}
        tell(training.run, epoch_line(row, 1 / data.n_labels))
        training.epoch_done(row)
    training.save_last()
    return True


def epoch_line(row: dict[str, float | int], chance: float) -> str:
    return (
        f"epoch {row['epoch']:>4}  step {row['step']:>7}  {row['seconds'] / 60:7.2f} min | training {row['train_loss']:.4f}, "
        f"accuracy {row['train_accuracy']:.4f} | test {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.4f} (chance "
        f"{chance:g}) | routing loss {row['train_routing_loss']:.4f}, entropy {row['policy_entropy']:.3f}, modules used "
        f"{row['modules_used']:.2f}, overlap of tasks {row['task_overlap']:.2f} | lr {row['lr']:.3g}"
    )


# ---- what is left of a run -----------------------------------------------------------------------------------------------


def n_parameters(model: RoutedNet | SoftMixture) -> dict[str, int]:
    """How many parameters there are, and how many of them route."""
    routers = sum(parameter.numel() for parameter in model.routing_parameters())
    return {"total": sum(parameter.numel() for parameter in model.parameters()), "routers": routers}


def draw(data: Data, training: EpochTraining) -> None:
    """metrics.png, weights.png, and routing.png: which task goes through which module, over time."""
    run = training.run
    chance = {"accuracy": {"chance": 1 / data.n_labels}}
    metrics = read_metrics(training.metrics.path)
    plotting.plot_epochs(run.path / "metrics.png", run.name, metrics, ("loss", "accuracy", "routing_loss"), chance)
    traced = training.traces.by_parameter()
    shown = {name: traced[name].numpy() for name in list(traced)[:: max(1, len(traced) // N_SHOWN)]}
    plotting.plot_weights(run.path / "weights.png", run.name, training.traces.steps, shown, 1)
    plotting.plot_routing_maps(run.path / "routing.png", run.name, training.tested["maps"], data.train.task_names)


def report(data: Data, training: EpochTraining) -> dict[str, Any]:
    """The final figures of the last epoch."""
    run, model, tested = training.run, training.model, training.tested
    assert isinstance(model, RoutedNet | SoftMixture)
    by_task = dict(zip(data.train.task_names, tested["accuracy_by_task"], strict=True))
    return {
        "script": "routing_networks",
        "name": run.name,
        "options": training.args,
        "protocol": "the model of the last epoch, measured on the test images, decisions greedy; nothing was chosen by them",
        "parameters": n_parameters(model),
        "epochs": training.epoch,
        "steps": training.step,
        "seconds": training.clock.used(),
        "images": {split: len(getattr(data, split)) for split in SPLITS},
        "test": {name: value for name, value in tested.items() if isinstance(value, float)} | {"accuracy_by_task": by_task},
        "chance_accuracy": 1 / data.n_labels,
        "maps": tested["maps"][-1],
        "data": data.fingerprint,
        **environment(),
    }


def report_table(result: dict[str, Any]) -> str:
    """The final figures as text."""
    test, chance = result["test"], result["chance_accuracy"]
    lines = [
        f"{'all tasks':>22}: accuracy {test['accuracy']:.4f} (chance {chance:g}) on {result['images']['test']} test images"
    ]
    lines += [f"{task:>22}: accuracy {accuracy:.4f}" for task, accuracy in test["accuracy_by_task"].items()]
    lines.append(f"{'modules used':>22}: {test['modules_used']:.2f} a layer; overlap of tasks {test['task_overlap']:.2f}")
    return "\n".join(lines)


# ---- several runs --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the two-sided 95 % confidence interval by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return values[0], None
    return statistics.fmean(values), float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


def compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """--compare: runs that differ by their seed alone are one row; the table, table.md and comparison.png."""
    with refusing(parser, RecordError):
        results = read_results(args.compare, "routing_networks")
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        label = "-".join(part for part in result["name"].split("-") if not part.startswith("seed."))
        groups.setdefault(label, []).append(result)
    rows = [row_of(label, of) for label, of in sorted(groups.items())]
    folder = Path(args.results_dir) / "routing_networks" / f"figures-{results[0]['options']['data']}"
    with refusing(parser):
        folder.mkdir(parents=True, exist_ok=True)
        text = comparison_table(rows)
        write_text(folder / "table.md", text + "\n")
        paper_figures.plot_intervals(folder / "comparison.png", "test accuracy, mean and 95 % interval over seeds", rows)
    say(text)
    say(f"{folder / 'table.md'}, {folder / 'comparison.png'}")
    return 0


def row_of(label: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and interval of several runs of one kind."""
    mean, half = interval([100 * result["test"]["accuracy"] for result in results])
    tasks = results[0]["test"]["accuracy_by_task"]
    return {
        "label": label,
        "n": len(results),
        "accuracy": mean,
        "half": half,
        "by_task": {task: interval([100 * r["test"]["accuracy_by_task"][task] for r in results]) for task in tasks},
        "parameters": results[0]["parameters"]["total"],
        "minutes": statistics.fmean(result["seconds"] for result in results) / 60,
        "modules_used": statistics.fmean(result["test"]["modules_used"] for result in results),
        "task_overlap": statistics.fmean(result["test"]["task_overlap"] for result in results),
        "chance": 100 * results[0]["chance_accuracy"],
    }


def with_interval(mean: float, half: float | None) -> str:
    return f"{mean:.2f}" + ("" if half is None else f" ± {half:.2f}")


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table of all tasks together, one of each task."""
    lines = ["| run | n | accuracy % (95 %) | parameters | modules used | overlap | minutes |", "| --- " * 7 + "|"]
    for row in rows:
        figures = f"{row['parameters']:,} | {row['modules_used']:.2f} | {row['task_overlap']:.2f} | {row['minutes']:.1f}"
        lines.append(f"| {row['label']} | {row['n']} | {with_interval(row['accuracy'], row['half'])} | {figures} |")
    for row in rows:
        lines += ["", f"{row['label']}, accuracy % by task (chance {row['chance']:g}):", ""]
        lines.append("; ".join(f"{task} {with_interval(*figures)}" for task, figures in row["by_task"].items()))
    return "\n".join(lines)


# ---- one run from start to end -------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name = parse(parser, argv)
    keep_freed_memory()
    if args.compare:
        return compare(parser, args)
    if args.dry_run:
        print(name)
        return 0
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with Interruption() as interruption, RunDirectory(args.results_dir, "routing_networks", name, another="--seed N") as run:
        with refusing(parser, DataError):
            found = run.check(resume=args.resume, overwrite=args.overwrite)
            if found == "finished":
                run.finish_interrupted_rename()
                say(f"the run {run.final} has finished: nothing to do")
                return 0
            data = Data(args, device)
            checkpoint.seed_everything(seed_of(args.seed))
            model = make_model(args, data).to(device, memory_format=torch.channels_last)
            optimizer = make_optimizer(args, model)
            named = {option: value for option, value in vars(args).items() if option not in UNNAMED}
            last = load_last(run, model, optimizer, named, data.fingerprint) if found == "unfinished" else None
            run.open(vars(args), overwrite=args.overwrite, to_stdout=False)
        with surviving_full_disks(run):
            training = EpochTraining(run, model, optimizer, named, fingerprint=data.fingerprint, columns=COLUMNS, last=last)
            return run_to_the_end(args, data, training, interruption)


def run_to_the_end(args: argparse.Namespace, data: Data, training: EpochTraining, interruption: Interruption) -> int:
    """Train, report, and give the run its name."""
    run, model = training.run, training.model
    assert isinstance(model, RoutedNet | SoftMixture)
    counts = n_parameters(model)
    tell(
        run,
        f"{args.model}: {counts['total']:,} parameters, {counts['routers']:,} of them in routers; {data.n_tasks} tasks of "
        f"{data.n_labels} labels, {len(data.train)} training and {len(data.test)} test images; "
        f"{len(batches_of(args, data, 0))} steps an epoch on {data.test.labels.device}, seed {args.seed}",
    )
    if training.step:
        tell(run, f"resumed in epoch {training.epoch + 1} after step {training.step}")
    if not train(args, data, training, interruption):
        tell(run, f"stopped by {interruption.signal} after step {training.step}: --resume goes on from here")
        return EXIT_RESUMABLE
    with training.clock.paused():
        draw(data, training)
    result = report(data, training)
    tell(run, report_table(result))
    run.finish(result)
    say(f"{'pictures':>22}: {', '.join(str(run.final / file) for file in ('metrics.png', 'weights.png', 'routing.png'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
