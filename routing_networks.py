"""Routing networks: learning which modules each task goes through (Rosenbaum, Klinger & Riemer, ICLR 2018, arXiv 1711.01239).

A convolutional trunk is shared by all tasks; each fully connected layer behind it has several modules, and a router decides
which one a sample goes through. The router's reward is the sample's negative loss. common/routing has the method,
common/models/routed.py the networks. The experiment as published, on CIFAR-100 in 20 tasks, and a short one on MNIST in ten:

    python routing_networks.py
    python routing_networks.py --data MNIST-MTL --optimizer adam --loss cross-entropy --batch-size 64 --lr 2e-3 \\
        --decision AAC --routing-lr 0.1 --epochs 4

    python routing_networks.py --compare results/routing_networks/*      # accuracy of finished runs over seeds

docs/routing.md says what each option and each logged quantity means.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common.routing as routing
from common import plotting
from common.datasets import images, multitask
from common.datasets.multitask import MultitaskSet
from common.errors import InputError
from common.models import routed
from common.models.routed import RoutedNet, SoftMixture
from common.precision import autocast, set_backend_flags
from common.routing import Loss, Trajectories, pictures
from common.routing.comparison import comparison_table, interval
from common.routing.loss import NonFiniteLossError
from common.routing.measures import modules_used, policy_entropy, task_overlap
from common.run import options
from common.run.clock import Clock
from common.run.command import Command, echo
from common.run.memory import tune_malloc
from common.run.metrics import Meter, Metrics, Traces, read_metrics
from common.run.options import at_least, real
from common.run.progress import bar
from common.run.records import read_results, write_text
from common.run.run import Run, environment
from common.run.state import State, check_finite
from common.seeds import generator_of, seed_everything, seed_of

DECISIONS = tuple(routed.DECISIONS)
LEARNED = ("routed-all-fc", "dispatched", "single-agent")  # models with decisions
MAX_NORM = 40.0  # gradient clipping, of modules and routers separately
NOT_IN_NAME = (*options.RUN_OPTIONS, "data_dir", "compare")  # options that do not make another run
COLUMNS = (
    "epoch", "step", "seconds", "lr", "exploration", "train_loss", "train_accuracy", "train_routing_loss", "test_loss",
    "test_accuracy", "test_routing_loss", "policy_entropy", "modules_used", "task_overlap",
)  # fmt: skip
EVALUATION_BATCH = 500
N_SHOWN = 12  # parameters in weights.png: there may be hundreds


def get_parser() -> argparse.ArgumentParser:
    """The paper's options, then the suite's own."""
    parser = options.OneLineParser(prog="routing_networks.py", description=__doc__)
    paper = parser.add_argument_group("options of the paper", "example: --data MNIST-MTL --decision AAC --epochs 4")
    paper.add_argument("--data", choices=tuple(multitask.N_TASKS), default="CIFAR100-MTL", help="data and tasks [%(default)s]")
    paper.add_argument(
        "--model", choices=routed.MODELS, default="routed-all-fc", help="which tasks share which modules [%(default)s]"
    )
    learning = "learning rule of routers; GumbelSoftmax has a biased gradient, as published [%(default)s]"
    paper.add_argument("--decision", choices=DECISIONS, default="WPL", help=learning)
    paper.add_argument("--modules", type=at_least(1, 10**4), metavar="N", help="modules per layer [as many as tasks]")
    paper.add_argument("--agents", type=at_least(1, 10**4), metavar="N", help="agents of dispatched [as many as tasks]")
    paper.add_argument("--depth", type=at_least(1, 100), default=3, metavar="N", help="fully connected layers [%(default)s]")
    exploring = "epsilon of epsilon-greedy decisions, temperature of GumbelSoftmax; others ignore it [%(default)s]"
    paper.add_argument("--exploration", type=real(0, 1), default=0.1, metavar="E", help=exploring)
    popular = "weight of the reward for modules that many samples use [%(default)s]"
    paper.add_argument("--collaboration", type=real(0, 1), default=0.3, metavar="R", help=popular)
    paper.add_argument(
        "--lr",
        type=real(0, 10, above=True),
        default=0.003,
        metavar="LR",
        help="learning rate of trunk and modules [%(default)s]",
    )
    paper.add_argument(
        "--routing-lr", type=real(0, 10, above=True), metavar="LR", help="learning rate of routers [0.3 times --lr]"
    )
    paper.add_argument(
        "--epochs", type=at_least(1, 10**6), default=50, metavar="N", help="passes over the images [%(default)s]"
    )
    paper.add_argument("--batch-size", type=at_least(2, 10**6), default=10, metavar="N", help="images per step [%(default)s]")
    own = parser.add_argument_group("options of this suite", "example: --seed 1 --optimizer adam --loss cross-entropy --resume")
    own.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of all random draws [%(default)s]")
    per_task = "training images of a one-against-rest task's class, and as many of others [1000]"
    own.add_argument("--task-images", type=at_least(1, 10**4), metavar="N", help=per_task)
    own.add_argument("--width", type=at_least(1, 10**4), default=48, metavar="N", help="units of a hidden layer [%(default)s]")
    drops = "epochs until both learning rates fall to a third; after 2 N, to a tenth [%(default)s]"
    own.add_argument("--drop-after", type=at_least(1), default=5, metavar="N", help=drops)
    own.add_argument(
        "--exploration-end", type=real(0, 1), metavar="E", help="exploration of the last epoch, reached linearly [constant]"
    )
    own.add_argument("--loss", choices=("mse", "cross-entropy"), default="mse", help="mse is of one-hot labels [%(default)s]")
    own.add_argument("--reward", choices=("loss", "correct"), default="loss", help="minus the loss, or +1 and -1 [%(default)s]")
    own.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd", help="optimiser [%(default)s]")
    options.add_device_options(own)
    options.add_tracker_options(own)
    own.add_argument("--data-dir", metavar="PATH", default="data", help="directory of image data sets [%(default)s]")
    options.add_run_options(own)
    own.add_argument("--compare", nargs="+", metavar="RUN", help="train nothing: a table of finished runs")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, str]:
    """The options, completed, and the run's name. Ends with the parser's error for options that exclude each other."""
    args = parser.parse_args(argv)
    n_tasks = multitask.N_TASKS[args.data]
    if args.model.startswith("per-task") and args.modules not in (None, n_tasks):
        parser.error(f"--modules {args.modules}: {args.model} has one for each of the {n_tasks} tasks")
    if args.agents is not None and args.model != "dispatched":
        parser.error(f"--agents {args.agents}: {args.model} has no choice of agents, dispatched has")
    if args.task_images is not None and args.data == "CIFAR100-MTL":
        parser.error(f"--task-images {args.task_images}: CIFAR100-MTL has all images of its classes, the others draw theirs")
    for name in ("decision", "exploration", "exploration_end", "collaboration", "reward"):
        if args.model not in LEARNED and getattr(args, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} {getattr(args, name)}: {args.model} decides nothing, {', '.join(LEARNED)} do")
    named = options.not_defaults(parser, args, (*NOT_IN_NAME, "data", "model"))
    name = "-".join([f"{args.data}.{args.model}", *named])
    options.check(parser, args, name)
    args.modules = args.modules or n_tasks
    args.agents = args.agents or n_tasks
    args.routing_lr = args.routing_lr or 0.3 * args.lr
    return args, name


# ---- data ----------------------------------------------------------------------------------------------------------------


class Data:
    """Both splits on the device, and mean and deviation of the training pixels."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """Read or download the data set. Raises DataError."""
        train, test, self.fingerprint = multitask.load(args.data, args.data_dir, args.seed, args.task_images)
        self.train, self.test = train.to(device), test.to(device)
        pixels = self.train.images.float() / 255
        self.mean, self.deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
        self.n_tasks, self.n_labels = multitask.N_TASKS[args.data], multitask.N_LABELS[args.data]

    def batch(self, split: MultitaskSet, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, C, H, W), tasks (B) and labels (B)."""
        x = (split.images[indices].float() / 255 - self.mean) / self.deviation
        return x.contiguous(memory_format=torch.channels_last), split.tasks[indices], split.labels[indices]


# ---- model and loss ------------------------------------------------------------------------------------------------------


def arguments_of(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The arguments of `make_routed`, as plain values."""
    _, channels, side, _ = data.train.images.shape
    sizes = [list(size) for size in routed.layer_sizes(side, args.depth, args.width, data.n_labels)]
    numbers = {"n_tasks": data.n_tasks, "n_modules": args.modules, "n_agents": args.agents}
    # exploration is where it ends: with --exploration-end, each epoch sets its own
    rewards = {"exploration": exploration_in(args, args.epochs - 1), "collaboration": args.collaboration}
    return {"model": args.model, "in_channels": channels, "sizes": sizes, **numbers, "decision": args.decision, **rewards}


def describe(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The description of the model in last.pkl (common/trained.py)."""
    pixels = {"mean": data.mean.flatten().tolist(), "deviation": data.deviation.flatten().tolist()}
    about = {"name": args.data, "n_tasks": data.n_tasks, "n_labels": data.n_labels, **pixels}
    return {"constructor": "make_routed", "arguments": arguments_of(args, data), "data": about}


def make_model(args: argparse.Namespace, data: Data) -> RoutedNet | SoftMixture:
    """The network of the options, with weights from the seed."""
    seed_everything(seed_of(args.seed))
    model = routed.make_routed(**arguments_of(args, data))
    return model.to(data.train.images.device, memory_format=torch.channels_last)


def make_optimizer(args: argparse.Namespace, model: RoutedNet | SoftMixture) -> torch.optim.Optimizer:
    """Two groups: the trunk and modules, and the routers. The weights of soft-mixture are in the first."""
    routers = model.routing_parameters() if isinstance(model, RoutedNet) else []
    router_ids = {id(parameter) for parameter in routers}
    modules = [parameter for parameter in model.parameters() if id(parameter) not in router_ids]
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
    return kind([{"params": modules, "lr": args.lr}, {"params": routers, "lr": args.routing_lr}], fused=True)


def forward(
    args: argparse.Namespace, model: nn.Module, x: Tensor, tasks: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Trajectories]:
    """One batch through the network: logits (B, labels), mean module loss, mean routing loss, and the trajectories."""
    with autocast(x, args.precision):
        logits, records = model(x, tasks)
    logits = logits.float()
    reward = routing.NegLossReward() if args.reward == "loss" else routing.CorrectClassifiedReward()
    if args.loss == "mse":
        loss_func, targets = Loss(nn.MSELoss(), reward), F.one_hot(labels, logits.shape[1]).float()
    else:
        loss_func, targets = Loss(nn.CrossEntropyLoss(), reward), labels
    return logits, *loss_func(logits, targets, records), records


def lr_factor(args: argparse.Namespace, epoch: int) -> float:
    """Factor of both learning rates in an epoch (from 0): 1, a third, a tenth, as published."""
    return 1.0 if epoch < args.drop_after else 1 / 3 if epoch < 2 * args.drop_after else 0.1


def exploration_in(args: argparse.Namespace, epoch: int) -> float:
    """Exploration of an epoch (from 0)."""
    if args.exploration_end is None:
        return args.exploration
    return args.exploration + (args.exploration_end - args.exploration) * (epoch / max(1, args.epochs - 1))


# ---- training ------------------------------------------------------------------------------------------------------------


class Training(State):
    """The state of a training. `extra` has "tested", metrics of the last test, and "maps" of all epochs."""

    model: RoutedNet | SoftMixture

    def __init__(
        self, run: Run, model: RoutedNet | SoftMixture, optimizer: torch.optim.Optimizer, data: str, description: dict[str, Any]
    ):
        self.run, self.optimizer = run, optimizer
        self.clock, self.meter, self.traces = Clock(), Meter(), Traces(model)
        self.metrics = Metrics(run.part / "metrics.csv", COLUMNS, run.trackers)
        parts = {name: getattr(self, name) for name in ("optimizer", "clock", "meter", "metrics", "traces")}
        super().__init__(run.last, run.options, run, data=data, description=description, model=model, **parts)


def epoch_batches(args: argparse.Namespace, data: Data, epoch: int) -> list[Tensor]:
    """Batches of indices, a function of seed and epoch. A last batch of one image is left out, for batch norm."""
    order = torch.randperm(len(data.train), generator=generator_of(args.seed, 0, epoch)).to(data.train.labels.device)
    return [batch for batch in order.split(args.batch_size) if len(batch) > 1]


def train_epoch(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Train on the remaining batches of the epoch. Raises NonFiniteLossError, on a GPU up to 19 steps late."""
    model, optimizer = training.model, training.optimizer
    model.train()
    if args.exploration_end is not None:
        routing.set_exploration(model, exploration_in(args, training.epoch))
    for group, rate in zip(optimizer.param_groups, (args.lr, args.routing_lr), strict=True):
        group["lr"] = rate * lr_factor(args, training.epoch)
    batches = epoch_batches(args, data, training.epoch)
    for indices in bar(args, batches[training.batch :], f"epoch {training.epoch + 1} of {args.epochs}", unit=" steps"):
        torch.manual_seed(seed_of(args.seed, 1, training.epoch, training.batch))  # of the actions that routers draw
        x, tasks, labels = data.batch(data.train, indices)
        logits, module_loss, routing_loss, _ = forward(args, model, x, tasks, labels)
        if not training.is_finite(module_loss, routing_loss):
            raise NonFiniteLossError(f"the loss is not finite at step {training.step + 1}, or shortly before")
        optimizer.zero_grad()
        (module_loss + routing_loss).backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], MAX_NORM)
        optimizer.step()
        accuracy = (logits.argmax(1) == labels).float().mean()
        training.meter.add(len(indices), {"loss": module_loss, "accuracy": accuracy, "routing_loss": routing_loss})
        training.after_step()
    if not training.fetch_losses():
        raise NonFiniteLossError(f"the loss is not finite shortly before step {training.step}")


@torch.no_grad()
def evaluate(args: argparse.Namespace, data: Data, training: Training) -> dict[str, Any]:
    """Metrics of the test images with greedy decisions: means, accuracy by task, a routing map (tasks, modules) by layer."""
    model, meter = training.model.eval(), Meter()
    correct = torch.zeros(data.n_tasks, device=data.test.labels.device)
    maps: list[Tensor] = []
    for indices in bar(args, torch.arange(len(data.test), device=correct.device).split(EVALUATION_BATCH), "test"):
        training.check_signal()
        x, tasks, labels = data.batch(data.test, indices)
        logits, module_loss, routing_loss, records = forward(args, model, x, tasks, labels)
        hits = (logits.argmax(1) == labels).float()
        correct.index_add_(0, tasks, hits)
        metrics = {"loss": module_loss, "accuracy": hits.mean(), "routing_loss": routing_loss}
        meter.add(len(indices), metrics | {"policy_entropy": policy_entropy(records, module_loss)})
        routes = [route.float() for route in model.routing(records, tasks)]  # (B, modules) for each layer
        new = [torch.zeros(data.n_tasks, route.shape[1], device=x.device).index_add(0, tasks, route) for route in routes]
        maps = [old + more for old, more in zip(maps, new, strict=True)] if maps else new
    per_task = torch.bincount(data.test.tasks, minlength=data.n_tasks)
    maps = [counts / per_task[:, None] for counts in maps]
    return meter.means() | {
        "modules_used": statistics.fmean(modules_used(m) for m in maps),
        "task_overlap": statistics.fmean(task_overlap(m) for m in maps),
        "accuracy_by_task": dict(zip(data.test.task_names, (correct / per_task).tolist(), strict=True)),
        "maps": [counts.tolist() for counts in maps],
    }


def train(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Train until the epochs are over; each ends with a test and a row of metrics.csv."""
    while training.epoch < args.epochs:
        epoch = training.epoch + 1
        try:
            train_epoch(args, data, training)
            tested = evaluate(args, data, training)
        except NonFiniteLossError:
            check_finite(math.nan, f"epoch {epoch}")
            raise
        means = training.meter.means()
        check_finite(means["loss"] + means["routing_loss"] + tested["loss"], f"epoch {epoch}")
        training.extra["maps"] = [*training.extra.get("maps", []), tested.pop("maps")]
        training.extra["tested"] = tested
        row: dict[str, float | int] = {"epoch": epoch, "step": training.step, "seconds": training.clock.used()}
        row |= {"lr": training.optimizer.param_groups[0]["lr"], "exploration": exploration_in(args, training.epoch)}
        row |= {f"train_{name}": value for name, value in means.items()}
        row |= {name if name in COLUMNS else f"test_{name}": tested[name] for name in tested if isinstance(tested[name], float)}
        training.run.log(epoch_line(row, 1 / data.n_labels))
        training.metrics.append(row)
        training.traces.record(epoch, {})
        training.meter.reset()
        training.end_epoch()
    training.save()


def epoch_line(row: dict[str, float | int], chance: float) -> str:
    return (
        f"epoch {row['epoch']:>4}  step {row['step']:>7}  {row['seconds'] / 60:7.2f} min | training {row['train_loss']:.4f}, "
        f"accuracy {row['train_accuracy']:.4f} | test {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.4f} (chance "
        f"{chance:g}) | routing loss {row['train_routing_loss']:.4f}, entropy {row['policy_entropy']:.3f}, modules used "
        f"{row['modules_used']:.2f}, overlap of tasks {row['task_overlap']:.2f} | lr {row['lr']:.3g}"
    )


# ---- results of a run ----------------------------------------------------------------------------------------------------


def n_parameters(model: RoutedNet | SoftMixture) -> dict[str, int]:
    """Number of parameters, in total and in routers."""
    routers = sum(parameter.numel() for parameter in model.routing_parameters())
    return {"total": sum(parameter.numel() for parameter in model.parameters()), "routers": routers}


def draw(data: Data, training: Training) -> None:
    """Draw metrics.png, weights.png, and routing.png: modules by task over the epochs."""
    run, metrics, traced = training.run, read_metrics(training.metrics.path), training.traces.by_parameter()
    chance = {"accuracy": {"chance": 1 / data.n_labels}}
    plotting.plot_epochs(run.part / "metrics.png", run.name, metrics, ("loss", "accuracy", "routing_loss"), chance)
    shown = {name: traced[name] for name in list(traced)[:: max(1, len(traced) // N_SHOWN)]}
    plotting.plot_weights(run.part / "weights.png", run.name, training.traces.steps, shown, 1)
    pictures.plot_routing_maps(run.part / "routing.png", run.name, training.extra["maps"], data.train.task_names)


def report(data: Data, training: Training) -> dict[str, Any]:
    """result.json: metrics of the last epoch."""
    return {
        "script": "routing_networks",
        "name": training.run.name,
        "options": training.options,
        "protocol": "the model of the last epoch, measured on the test images, decisions greedy; nothing was chosen by them",
        "parameters": n_parameters(training.model),
        "epochs": training.epoch,
        "steps": training.step,
        "seconds": training.clock.used(),
        "images": {split: len(getattr(data, split)) for split in images.SPLITS},
        "test": training.extra["tested"],
        "chance_accuracy": 1 / data.n_labels,
        "maps": training.extra["maps"][-1],
        "data": data.fingerprint,
        **environment(data.train.images.device),
    }


def report_table(result: dict[str, Any]) -> str:
    """The final metrics as text."""
    test, chance, n = result["test"], result["chance_accuracy"], result["images"]["test"]
    lines = [f"{'all tasks':>22}: accuracy {test['accuracy']:.4f} (chance {chance:g}) on {n} test images"]
    lines += [f"{task:>22}: accuracy {accuracy:.4f}" for task, accuracy in test["accuracy_by_task"].items()]
    lines.append(f"{'modules used':>22}: {test['modules_used']:.2f} a layer; overlap of tasks {test['task_overlap']:.2f}")
    return "\n".join(lines)


# ---- several runs --------------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> int:
    """--compare: write table.md and comparison.png, with a row for runs that differ only by their seed."""
    with Command("routing_networks"):
        results = read_results(args.compare, "routing_networks")
        data = {result["options"]["data"] for result in results}
        if len(data) > 1:
            raise InputError(f"these runs are of several data sets ({', '.join(sorted(data))}): compare those of one")
        groups = {label: [r for r in results if label_of(r) == label] for label in sorted(map(label_of, results))}
        rows = []
        for label, runs in groups.items():
            mean, half = interval([100 * run["test"]["accuracy"] for run in runs])
            chance = 100 * runs[0]["chance_accuracy"]
            rows.append({"label": label, "n": len(runs), "accuracy": mean, "half": half, "chance": chance})
        folder = Path(args.results_dir) / "routing_networks" / f"figures-{results[0]['options']['data']}"
        folder.mkdir(parents=True, exist_ok=True)
        text = comparison_table(groups)
        write_text(folder / "table.md", text + "\n")
        plotting.plot_intervals(folder / "comparison.png", "test accuracy, mean and 95 % interval over seeds", rows)
    echo(f"{text}\n{folder / 'table.md'}, {folder / 'comparison.png'}")
    return 0


def label_of(result: dict[str, Any]) -> str:
    """The name of a run without its seed."""
    return "-".join(part for part in result["name"].split("-") if not part.startswith("seed."))


# ---- one run from start to end -------------------------------------------------------------------------------------------


def introduce(args: argparse.Namespace, data: Data, training: Training) -> None:
    """Log what was derived from the options."""
    log, counts = training.run.log, n_parameters(training.model)
    log(
        f"{args.model}: {counts['total']:,} parameters, {counts['routers']:,} of them in routers; {data.n_tasks} tasks of "
        f"{data.n_labels} labels, {len(data.train)} training and {len(data.test)} test images; "
        f"{len(epoch_batches(args, data, 0))} steps an epoch on {data.test.labels.device}, seed {args.seed}"
    )
    if training.step:
        log(f"resumed in epoch {training.epoch + 1} after step {training.step}")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args, name = parse(parser, argv)
    tune_malloc()
    if args.compare:
        return compare(args)
    if args.dry_run:
        echo(name)
        return 0
    set_backend_flags(args.precision, deterministic=args.deterministic)
    with Run("routing_networks", name, args, another="--seed N", may_change=NOT_IN_NAME, files=("routing.png",)) as run:
        data = Data(args, options.device_of(args))
        model = make_model(args, data)
        training = Training(run, model, make_optimizer(args, model), data.fingerprint, describe(args, data))
        if run.status == "unfinished":
            training.resume()
        run.open()
        training.save()
        introduce(args, data, training)
        train(args, data, training)
        with training.clock.paused():
            draw(data, training)
        result = report(data, training)
        run.log(report_table(result))
        status = run.finish(result)
    echo(f"{'pictures':>22}: {', '.join(str(run.final / file) for file in ('metrics.png', 'weights.png', 'routing.png'))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
