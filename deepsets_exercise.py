"""The DeepSets exercise: a network that is invariant to the order of its inputs, and an MLP that is not.

    python deepsets_exercise.py                            # a minute on two CPU cores
    python deepsets_exercise.py --steps 500 --no-sweep     # a few seconds

An instance is a bag of 10 objects with one number each. In class 0, three of them (any three) are 1/3 and the rest 0; in
class 1, five are 1/5. Sum and size are the same in both classes, so a network has to look at single objects, and then to ignore
which one was which. That is what a DeepSet does (Zaheer et al. 2017, arXiv 1703.06114):

    y = set_network( sum over objects x of element_network(x) )

The sum does not depend on the order of its terms, so y does not either, whatever the weights are. The script goes through
the exercise sheet step by step, prints what it finds, and leaves its pictures in results/deepsets_exercise/.
docs/deepsets.md discusses them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

from common.plotting import PALETTE, save_figure
from common.precision import autocast, set_backend_flags
from common.run import dotted, options
from common.run.command import echo
from common.run.options import at_least, real
from common.run.run import Run

N_OBJECTS = 10
SUBSET = (3, 5)  # class 0 has 3 objects at 1/3, class 1 has 5 at 1/5
MLP_HIDDEN = 20
NOT_IN_NAME = (*options.RUN_OPTIONS, "show")  # options that do not make another run
SWEEP_WIDTHS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)


def get_parser() -> argparse.ArgumentParser:
    parser = options.OneLineParser(prog="deepsets_exercise.py", description=__doc__)
    parser.add_argument(
        "--steps", type=at_least(1), default=4000, metavar="N", help="training steps of each model [%(default)s]"
    )
    parser.add_argument(
        "--batch-size", type=at_least(2), default=128, metavar="N", help="instances per step, an even number [%(default)s]"
    )
    parser.add_argument(
        "--hidden", type=at_least(1, 4096), default=5, metavar="N", help="hidden units per layer of the DeepSet [%(default)s]"
    )
    parser.add_argument(
        "--lr", type=real(0, 1, above=True), default=0.005, metavar="LR", help="learning rate of Adam [%(default)s]"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of data, weights and permutations [%(default)s]"
    )
    parser.add_argument(
        "--seeds", type=at_least(1, 100), default=5, metavar="N", help="models of each width in the sweep [%(default)s]"
    )
    parser.add_argument("--results-dir", default="results", metavar="DIR", help="directory of all runs [%(default)s]")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the MLPs of growing width")
    parser.add_argument("--show", action="store_true", help="also show the pictures in windows")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of the same options")
    parser.add_argument("--dry-run", action="store_true", help="check the options, print the run's name and exit")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="small networks are faster on a CPU [%(default)s]"
    )
    options.add_arithmetic_options(parser)
    options.add_tracker_options(parser)
    return parser


# ---- the data ------------------------------------------------------------------------------------------------------------


def make_data(N: int) -> tuple[Tensor, Tensor]:
    """N random instances, half of each class: features (N, 10, 1) and labels (N, 1). Raises ValueError if N is odd."""
    if N % 2:
        raise ValueError(f"{N} instances do not fall into two equal classes")
    y = torch.arange(N) % 2
    k = torch.where(y == 1, SUBSET[1], SUBSET[0]).unsqueeze(1)  # how many objects are not 0: (N, 1)
    # The places of 10 random numbers in their order are a random permutation, so the k first places are a random subset.
    place = torch.rand(N, N_OBJECTS).argsort(1)  # (N, 10)
    X = torch.where(place < k, 1 / k, 0.0)
    return X.unsqueeze(2), y.unsqueeze(1).float()


def all_instances() -> tuple[Tensor, Tensor]:
    """Every instance that there is, 120 of class 0 and 252 of class 1: features (372, 10, 1) and labels (372, 1)."""
    rows, labels = [], []
    for label, k in enumerate(SUBSET):
        for subset in itertools.combinations(range(N_OBJECTS), k):
            rows.append([1 / k if i in subset else 0.0 for i in range(N_OBJECTS)])
            labels.append([float(label)])
    return torch.tensor(rows).unsqueeze(2), torch.tensor(labels)


# ---- the models ----------------------------------------------------------------------------------------------------------


class DeepSet(nn.Module):
    """Probability of class 1, whatever the order of the objects: (N, 10, 1) -> (N, 1)."""

    def __init__(self, hidden: int = 5, *, linear_elements: bool = False):
        super().__init__()
        non_linearity = nn.Identity if linear_elements else nn.Tanh
        self.element_network = nn.Sequential(  # R -> R, the same for all objects
            nn.Linear(1, hidden),
            non_linearity(),
            nn.Linear(hidden, hidden),
            non_linearity(),
            nn.Linear(hidden, 1),
        )
        self.set_network = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, X: Tensor) -> Tensor:
        elements = self.element_network(X)  # (N, 10, 1): linear layers act on the last axis, so on each object alone
        pooled = elements.sum(1)  # (N, 1): here the order is forgotten
        return self.set_network(pooled)


def make_mlp(hidden: int = MLP_HIDDEN) -> nn.Sequential:
    """The standard network: it sees ten numbers in a row, and has to learn that their order means nothing."""
    return nn.Sequential(
        nn.Flatten(),  # (N, 10, 1) -> (N, 10)
        nn.Linear(N_OBJECTS, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
        nn.Sigmoid(),
    )


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- training ------------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module, steps: int = 4000, batch_size: int = 128, lr: float = 0.005, precision: str = "fp32"
) -> tuple[nn.Module, list[float]]:
    """Train on fresh data in every step, so on an endless data set; the trained model and the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history = []
    for _ in tqdm(range(steps), type(model).__name__, disable=None, leave=False):
        X, y = make_data(batch_size)
        with autocast(X, precision):
            p = model(X)
        loss = F.binary_cross_entropy(p.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())  # a GPU goes on
    return model, [loss.item() for loss in history]


@torch.no_grad()
def evaluate(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy over every instance that there is, both classes counting the same."""
    X, y = all_instances()
    return tuple(metric.item() for metric in balanced(model(X), y))


def balanced(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and accuracy of probabilities (..., N, 1) for labels (N, 1), both classes counting the same: (...)."""
    weight = torch.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    loss = F.binary_cross_entropy(p, y.expand_as(p), reduction="none")
    return (weight * loss).sum((-2, -1)), (weight * ((p > 0.5) == (y > 0.5))).sum((-2, -1))


# ---- question 1: how many parameters does an MLP need? -------------------------------------------------------------------


def widened(mlp: nn.Sequential, hidden: int) -> nn.Sequential:
    """The same function as a wider MLP, which also stays the same when it is trained.

    A new hidden unit has weights 0 on both sides. relu(0) = 0, so the weights behind it get no gradient; and the weights before
    it get none, because nothing behind it listens.
    """
    wide = make_mlp(hidden)
    for parameter, own in zip(wide.parameters(), mlp.parameters(), strict=True):
        nn.init.zeros_(parameter)
        with torch.no_grad():
            parameter[tuple(slice(length) for length in own.shape)] = own
    return wide


def train_together(
    models: list[nn.Module], steps: int, batch_size: int, lr: float, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Train models of one architecture in one batched pass, all on the same data: final loss and accuracy, (number of models).

    torch.func turns a module into a function of its parameters; vmap runs it over a stack of them. Adam treats each weight for
    itself, and the gradient of a sum of losses with respect to one model's weights is that of its own loss. So each model is
    trained as if it were alone.
    """
    params, _ = stack_module_state(models)  # {name: (number of models, ...)}

    def probabilities(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(models[0], params, (X,))

    batched = vmap(probabilities, in_dims=(0, None))
    optimizer = torch.optim.Adam(params.values(), lr=lr)
    for _ in tqdm(range(steps), f"{len(models)} models", disable=None, leave=False):
        X, y = make_data(batch_size)
        with autocast(X, precision):
            p = batched(params, X)  # (number of models, N, 1)
        loss = F.binary_cross_entropy(p.float(), y.expand_as(p), reduction="none").mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        X, y = all_instances()
        return balanced(batched(params, X), y)


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """DeepSets of several seeds, and MLPs of growing width: metrics of each, as {"DeepSet": row, "MLP": [rows]}."""
    settings = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "precision": args.precision}
    losses, accuracies = train_together([DeepSet(args.hidden) for _ in range(args.seeds)], **settings)
    deep_set = {
        "parameters": count_params(DeepSet(args.hidden)), "losses": losses.tolist(), "accuracies": accuracies.tolist(),
    }  # fmt: skip
    mlps = [make_mlp(width) for width in SWEEP_WIDTHS for _ in range(args.seeds)]
    losses, accuracies = train_together([widened(mlp, SWEEP_WIDTHS[-1]) for mlp in mlps], **settings)
    rows = []
    for i, width in enumerate(SWEEP_WIDTHS):
        own = slice(i * args.seeds, (i + 1) * args.seeds)
        rows.append(
            {
                "hidden": width,
                "parameters": count_params(mlps[own][0]),
                "losses": losses[own].tolist(),
                "accuracies": accuracies[own].tolist(),
            }
        )
    return {"DeepSet": deep_set, "MLP": rows}


def first_match(swept: dict[str, Any]) -> dict[str, Any] | None:
    """The smallest MLP whose median loss and median accuracy are as good as the DeepSet's; None if none is."""
    loss, accuracy = (np.median(swept["DeepSet"][metric]) for metric in ("losses", "accuracies"))
    for row in swept["MLP"]:
        if np.median(row["losses"]) <= loss and np.median(row["accuracies"]) >= accuracy:
            return row
    return None


# ---- pictures ------------------------------------------------------------------------------------------------------------


def draw_batch(X: Tensor, y: Tensor, path: Path) -> None:
    """A batch, an instance a row, the classes one above the other."""
    order = y.flatten().argsort(stable=True)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    image = axes.imshow(X[order, :, 0].cpu().numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
    axes.axhline(len(X) / 2 - 0.5, color="white", linewidth=2)
    axes.set(title="a batch: class 0 above the line, class 1 below", xlabel="object", ylabel="instance")
    figure.colorbar(image, label="value")
    save_figure(figure, path)


def draw_losses(histories: dict[str, list[float]], path: Path) -> None:
    """Loss by step of some models, smoothed over 50 steps; faint: each step."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, history), colour in zip(histories.items(), PALETTE, strict=False):
        window = min(50, len(history))
        axes.plot(history, color=colour, alpha=0.25, linewidth=0.8)
        smooth = np.convolve(history, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(window - 1, len(history)), smooth, color=colour, label=name)
    axes.axhline(math.log(2), color="#666666", linestyle="--", linewidth=1, label="knowing nothing: ln 2")
    axes.set(xlabel="step", ylabel="binary cross entropy (nats)", yscale="log", title="training on fresh data in every step")
    axes.grid(alpha=0.25)
    axes.legend()
    save_figure(figure, path)


def draw_sweep(swept: dict[str, Any], path: Path) -> None:
    """Loss against number of parameters: each model a dot, the median over the seeds a line."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    deep_set, rows = swept["DeepSet"], swept["MLP"]
    parameters = [row["parameters"] for row in rows]
    for row in rows:
        axes.plot([row["parameters"]] * len(row["losses"]), row["losses"], ".", color=PALETTE[1], alpha=0.5)
    axes.plot(parameters, [np.median(row["losses"]) for row in rows], color=PALETTE[1], label="MLPs, median")
    axes.plot([deep_set["parameters"]] * len(deep_set["losses"]), deep_set["losses"], ".", color=PALETTE[0], alpha=0.5)
    axes.plot(
        deep_set["parameters"], np.median(deep_set["losses"]), "*", markersize=14, color=PALETTE[0], label="DeepSet, median"
    )
    axes.axhline(np.median(deep_set["losses"]), color=PALETTE[0], linestyle=":", linewidth=1)
    axes.axhline(math.log(2), color="#666666", linestyle="--", linewidth=1, label="knowing nothing: ln 2")
    axes.set(xlabel="parameters", ylabel="loss over all instances (nats)", xscale="log", yscale="log")
    axes.set_title(f"how many parameters match the DeepSet's? ({len(deep_set['losses'])} seeds each)")
    axes.grid(alpha=0.25)
    axes.legend()
    save_figure(figure, path)


# ---- the exercise, from top to bottom ------------------------------------------------------------------------------------


@torch.no_grad()
def compare_permutations(models: dict[str, nn.Module]) -> tuple[str, dict[str, float]]:
    """Three random permutations of one instance through all models: a table, and each model's largest difference."""
    X, _ = make_data(2)
    instance = X[0]  # (10, 1)
    orders = [np.arange(N_OBJECTS)] + [np.random.permutation(N_OBJECTS) for _ in range(3)]
    outputs = {name: [model(instance[order].unsqueeze(0)).item() for order in orders] for name, model in models.items()}
    lines = [f"{'order of the objects':>22}" + "".join(f"{name:>14}" for name in models)]
    for i, order in enumerate(orders):
        lines.append(f"{' '.join(map(str, order)):>22}" + "".join(f"{outputs[name][i]:14.8f}" for name in models))
    largest = {name: max(values) - min(values) for name, values in outputs.items()}
    lines.append(f"{'largest difference':>22}" + "".join(f"{largest[name]:14.2g}" for name in models))
    return "\n".join(lines), largest


@torch.no_grad()
def pooled_by_class(model: DeepSet) -> list[float]:
    """Mean pooled value of each class: the input of the set network."""
    X, y = all_instances()
    pooled = model.element_network(X).sum(1)
    return [pooled[y == label].mean().item() for label in (0, 1)]


def sweep_table(swept: dict[str, Any]) -> str:
    lines = [
        f"{'':>12} {'parameters':>10}   {'loss: median (lowest to highest)':>36}   {'accuracy: median (lowest to highest)':>36}"
    ]
    rows = [("DeepSet", swept["DeepSet"]), *((f"MLP of {row['hidden']}", row) for row in swept["MLP"])]
    for name, row in rows:
        losses, accuracies = row["losses"], row["accuracies"]
        lines.append(
            f"{name:>12} {row['parameters']:>10}"
            f"   {np.median(losses):>16.2e} ({min(losses):.2e} to {max(losses):.2e})"
            f"   {np.median(accuracies):>16.4f} ({min(accuracies):.4f} to {max(accuracies):.4f})"
        )
    return "\n".join(lines)


def track(run: Run, histories: dict[str, list[float]]) -> None:
    """The losses of every 100th step for TensorBoard and Weights & Biases, where they are asked for."""
    for name, history in histories.items():
        for step in range(0, len(history), 100):
            run.trackers.log({"loss": history[step]}, step, group=name.replace(" ", "_"))


def exercise(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Every step of the sheet in its order; what goes into result.json."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "precision": args.precision}

    run.log("1. Data: 10 objects; class 0 has three of 1/3, class 1 five of 1/5")
    X, y = make_data(args.batch_size)
    draw_batch(X, y, run.path / "batch.png")
    run.log(f"   X {tuple(X.shape)}, y {tuple(y.shape)}; sums of objects from {X.sum(1).min():.6f} to {X.sum(1).max():.6f}")

    run.log("2. Two models")
    deep_set, mlp = DeepSet(args.hidden), make_mlp()
    run.log(f"{deep_set}\n{mlp}")

    run.log(f"3. Training both for {args.steps} steps of {args.batch_size} fresh instances")
    deep_set, deep_set_history = train(deep_set, **settings)
    mlp, mlp_history = train(mlp, **settings)
    result: dict[str, Any] = {}
    for name, model in (("DeepSet", deep_set), ("MLP", mlp)):
        loss, accuracy = evaluate(model)
        result[name] = {"parameters": count_params(model), "loss": loss, "accuracy": accuracy}
        run.log(
            f"   {name:>8}: {count_params(model):5} parameters, loss {loss:.2e}, accuracy {accuracy:.4f} over all 372 instances"
        )

    histories = {"DeepSet": deep_set_history, "MLP": mlp_history}
    track(run, histories)
    draw_losses(histories, run.path / "losses.png")

    run.log("4. The symmetry holds exactly: one instance, its objects in other orders")
    table, result["largest_difference"] = compare_permutations({"DeepSet": deep_set, "MLP": mlp})
    run.log(table)

    if not args.no_sweep:
        run.log(f"5. How many parameters does an MLP need to match the DeepSet? {args.seeds} seeds each, all trained together")
        swept = sweep(args)
        run.log(sweep_table(swept))
        match = first_match(swept)
        if match is None:
            run.log("   None of these MLPs matches the DeepSet's median loss and accuracy.")
        else:
            times = match["parameters"] / swept["DeepSet"]["parameters"]
            run.log(
                f"   The MLP with {match['hidden']} hidden units a layer does, with {times:.1f} times the DeepSet's parameters."
            )
        draw_sweep(swept, run.path / "sweep.png")
        result["sweep"] = swept | {"match": match}

    run.log("6. The DeepSet without the non-linearity in its element network")
    linear, linear_history = train(DeepSet(args.hidden, linear_elements=True), **settings)
    assert isinstance(linear, DeepSet)
    loss, accuracy = evaluate(linear)
    class_0, class_1 = pooled_by_class(linear)
    result["linear"] = {"loss": loss, "accuracy": accuracy, "ln 2": math.log(2), "pooled": [class_0, class_1]}
    run.log(
        f"   loss {loss:.4f}, accuracy {accuracy:.4f}: ln 2 = {math.log(2):.4f} is the loss of knowing nothing.\n"
        "   Why: the element network is a linear map now, x -> a x + b, and its sum over the objects is a (sum of x) + 10 b.\n"
        "   That sees only the sum and the number of the objects, and they are 3/3 = 5/5 = 1 and 10 in both classes. The set\n"
        f"   network is given {class_0:.5f} for class 0 and {class_1:.5f} for class 1, and cannot tell what is the same."
    )
    track(run, {"DeepSet with linear elements": linear_history})
    histories = {"DeepSet": deep_set_history, "DeepSet with linear elements": linear_history}
    draw_losses(histories, run.path / "linear.png")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = dotted.parse_tokens(parser, dotted.split_command_line(parser, argv, NOT_IN_NAME))
    if args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} is odd: half of a batch is of each class")
    name = "-".join(options.not_defaults(parser, args, NOT_IN_NAME)) or "default"
    options.check(parser, args, name)
    if args.dry_run:
        echo(name)
        return 0
    set_backend_flags(args.precision, deterministic=args.deterministic)
    files = ("*.png",)
    with Run("deepsets_exercise", name, args, another="--seed N", may_change=NOT_IN_NAME, files=files) as run:
        run.open()
        # the context makes every call a little slower
        with torch.device("cuda") if args.device == "cuda" else contextlib.nullcontext():
            result = exercise(args, run)
        status = run.finish({"script": "deepsets_exercise", "name": run.name, "seed": args.seed, **result})
    echo(f"pictures: {', '.join(str(path) for path in sorted(run.final.glob('*.png')))}")
    if args.show:
        plt.show()
    plt.close("all")
    return status


if __name__ == "__main__":
    sys.exit(main())
