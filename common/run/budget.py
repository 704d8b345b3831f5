"""Training with a wall-clock budget and backtracking, as the SWARM experiments do it (Vollgraf 2019)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, parallel, plotting
from common.checkpoint import CheckpointError
from common.graphs import GraphedModel
from common.run.backtracking import Backtracking
from common.run.clock import Clock
from common.run.metrics import Meter, Metrics, Traces, read_metrics
from common.run.options import add_device_options, add_tracker_options, at_least, real, run_id
from common.run.run import Run
from common.run.state import Part, State


def make_adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam, on a GPU in one kernel for all parameters. It takes states from any device, and stays as it is then."""
    fused = next(model.parameters()).is_cuda or None
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=fused)

    def keep_fused(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_fused)
    return optimizer


def add_budget_options(
    group: argparse._ArgumentGroup, *, wc: float, update_interval: float, max_epochs: int, bt_horizon: float, bt_alpha: float
) -> None:
    """The options of such a training, as the SWARM scripts publish them, with a script's own defaults."""
    add = group.add_argument
    add("-wc", type=real(0, 1e6, above=True), default=wc, help="wall clock time for training, in minutes [%(default)s]")
    add(
        "-update_interval",
        type=real(0, 1e6),
        default=update_interval,
        help="minutes between two updates of the plots [%(default)s]",
    )
    add("-max_epochs", type=at_least(1), default=max_epochs, help="largest number of epochs [%(default)s]")
    add(
        "-bt_horizon",
        type=real(0, 1),
        default=bt_horizon,
        help="backtracking horizon, a fraction of the epochs; 1: never [%(default)s]",
    )
    add(
        "-bt_alpha",
        type=real(0, 1, above=True),
        default=bt_alpha,
        help="learning rate factor of backtracking [%(default)s]",
    )
    add("-lr", type=real(0, 1, above=True), default=0.01, help="learning rate of Adam [%(default)s]")
    add("-no_cuda", action="store_true", help="the same as -device cpu")
    add("-dry_run", action="store_true", help="check the options, print the run's name, exit")
    add("-to_stdout", action="store_true", help="log to stdout instead of the file log of the run")
    add("-run", type=run_id, help="an id that tells repeated runs apart, at the end of the run's name")
    add("-resume", metavar="FILE|auto", help="start from a best.pkl; auto: continue this run where it was interrupted")


def add_own_options(group: argparse._ArgumentGroup, seeded: str, compiled: str) -> None:
    """The suite's options that all such trainings have: what is drawn from the seed, and what can be compiled, in words."""
    add = group.add_argument
    add("-seed", type=at_least(0), default=0, metavar="N", help=f"seed of {seeded} [%(default)s]")
    add("-results_dir", default="results", metavar="DIR", help="directory of all runs [%(default)s]")
    add_device_options(group, "-")
    add("-compile", action="store_true", help=f"torch.compile {compiled}")
    add("-overwrite", action="store_true", help="replace a run of the same name")
    add_tracker_options(group, "-")


class BestModel:
    """best.pkl: the model with the lowest validation loss so far, and the return to it.

    It holds model, optimizer, name, best_val_loss, which is infinite before the first validation, and a description of the
    model (common/trained.py).
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        horizon: float,
        alpha: float,
        description: Mapping[str, Any] | None = None,
    ):
        self.path, self.name, self.model, self.optimizer, self.alpha = run.best, run.name, model, optimizer, alpha
        self.description = dict(description or {})
        self.backtracking = Backtracking(horizon)

    @property
    def loss(self) -> float:
        return self.backtracking.best

    def save(self) -> None:
        if not parallel.is_main():
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        about = {"name": self.name, "best_val_loss": self.loss, "description": self.description}
        checkpoint.save(state | about, self.path)

    def load(self) -> None:
        state = parallel.run_on_main(lambda: checkpoint.read(self.path), CheckpointError)
        checkpoint.load_model(self.model, state["model"], self.path)
        self.optimizer.load_state_dict(state["optimizer"])

    def judge(self, val_loss: float, *, last_epoch: bool) -> str:
        """Save the model, keep it, or return to the best at alpha times the learning rate; in words, for the log."""
        rate = self.optimizer.param_groups[0]["lr"]
        verdict = self.backtracking.judge(val_loss, last_epoch=last_epoch)
        if verdict == "best":
            self.save()
            return " | best so far, saved"
        if verdict == "back":
            self.load()
            for group in self.optimizer.param_groups:
                group["lr"] = rate * self.alpha
            return f" | back to the best, lr {rate * self.alpha:.4g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return self.backtracking.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if best.pkl, which training may return to, is not whole."""
        self.backtracking.load_state_dict(state)
        if self.path.exists() or math.isfinite(self.loss):
            checkpoint.check_fits(self.model, checkpoint.read(self.path)["model"], self.path)


class BudgetedTraining(State):
    """The state of such a training, with its parts: clock, best, meter, metrics, traces. `budget` is in seconds."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        budget: float,
        horizon: float,
        alpha: float,
        columns: tuple[str, ...],
        description: Mapping[str, Any] | None = None,
        data: str = "",
    ):
        self.clock, self.meter, self.traces = Clock(budget), Meter(), Traces(model)
        self.best = BestModel(run, model, optimizer, horizon, alpha, description)
        self.metrics = Metrics(run.part / "metrics.csv", columns, run.trackers)
        parts: dict[str, Part] = {"optimizer": optimizer, "clock": self.clock, "best": self.best}
        parts |= {"meter": self.meter, "metrics": self.metrics, "traces": self.traces}
        super().__init__(run.last, run.options, run, data=data, description=description, model=model, **parts)
        self.run, self.optimizer, self.drawn_at = run, optimizer, -math.inf
        self.forward = GraphedModel(model)  # for training steps and validation

    def start(self, resume: str | None) -> None:
        """Open the run: continue it, or begin, if `resume` is a file, with the weights and moments in it."""
        if self.run.status == "unfinished":
            self.resume()
            self._time_is_up = self._is_over()
        elif resume not in (None, "auto"):
            checkpoint.start_from(Path(str(resume)), self.model, self.optimizer)
        self.check_same()
        self.run.open()
        if parallel.world_size() > 1:
            self.run.log(f"{parallel.world_size()} processes: each computes a part of every batch")
        if self.step == 0:
            self.save()
            self.best.save()  # somewhere to return to, should the first epoch fail

    def has_next_epoch(self, max_epochs: float) -> bool:
        """True if there is another epoch, or the rest of one. However short the time, one step is taken."""
        return self.epoch < max_epochs and (self.batch > 0 or self.step == 0 or not self._is_over())

    def _is_over(self) -> bool:
        """True if the first process finds the time up, between epochs."""
        return parallel.run_on_main(self.clock.is_up)

    def time_is_up(self) -> bool:
        """True if the epoch ends early. An epoch that has begun takes one step at least."""
        if parallel.world_size() > 1:
            return self.batch > 0 and self.flags_say_time_is_up()
        return self.batch > 0 and self.clock.is_up()

    def sum_over_processes(self, loss: Tensor) -> Tensor:
        """Sum the gradients, and the loss, as `sum_gradients`, with a flag that says whether the time is up."""
        return self.sum_gradients(loss, time_is_up=self.clock.is_up())

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def progress_text(self, n_batches: int, baseline: str) -> str:
        """The step that was just taken, for a progress bar, with the last training loss that has arrived from the device."""
        loss = f"{self.losses[0]:.3f}" if self.losses else "?"
        return (
            f"epoch {self.epoch + 1} batch {self.batch + 1}/{n_batches}  loss {loss}  best validation {self.best.loss:.3f} "
            f"({baseline})  lr {self.learning_rate:.2g}  time left {tqdm.format_interval(int(self.clock.left()))}"
        )

    def record_step(self, n: int, loss: Tensor, **metrics: Tensor) -> None:
        """Count an optimiser's step on n samples; its metrics are traced. Raises Interrupted after a signal."""
        self.meter.add(n, {"loss": loss})
        self.traces.record(self.step + 1, {"loss": loss, **metrics})
        self.after_step()

    def draw_if_due(self, minutes: float, draw: Callable[[], None]) -> None:
        """Draw if that was not done for so many minutes of training. The clock stands still meanwhile."""
        if self.clock.used() - self.drawn_at >= 60 * minutes:
            with self.clock.paused():
                draw()
            self.drawn_at = self.clock.used()

    def draw(self, steps_per_epoch: int, baselines: Mapping[str, Mapping[str, float]], loss_name: str) -> None:
        """metrics.png and weights.png, with the baselines of columns as {"val_loss": {"oracle": 0.1}}."""
        folder, name, traces = self.run.part, self.run.name, self.traces
        weights = traces.by_parameter()  # fetches all
        by_step = traces.steps, traces.numbers, steps_per_epoch
        plotting.plot_metrics(folder / "metrics.png", name, read_metrics(self.metrics.path), *by_step, baselines, loss_name)
        plotting.plot_weights(folder / "weights.png", name, traces.steps, weights, steps_per_epoch)

    def conclude_epoch(self, measured: Mapping[str, float], text: str) -> None:
        """Judge the epoch by its val_loss, one of the values `measured` for metrics.csv, and log it. The next epoch begins.

        `text` is what the log says of these values.
        """
        row = {"epoch": self.epoch + 1, "step": self.step, "seconds": self.clock.used()}
        row |= {"train_loss": self.meter.means()["loss"] if self.losses_finite else math.nan}
        row |= {**measured, "lr": self.learning_rate}
        verdict = self.best.judge(row["val_loss"], last_epoch=self._is_over())
        if not checkpoint.has_finite_weights(self.model):  # there is no way back from the last epoch
            self.best.load()
        self.losses_finite = True
        if parallel.is_main():
            self.metrics.append(row)
        self.meter.reset()
        self.end_epoch()
        self.save()
        when = f"epoch {row['epoch']:4d}  step {row['step']:6d}  {row['seconds'] / 60:7.2f} min"
        self.run.log(f"{when} | training {row['train_loss']:.4f} | {text} | lr {row['lr']:.4g}{verdict}")

    def about(self, seed: int, protocol: str) -> dict[str, Any]:
        """The entries of result.json that all such runs have. `protocol` says in words what was measured."""
        parameters = list(self.model.parameters())
        return {
            "script": self.run.script,
            "name": self.run.name,
            "seed": seed,
            "protocol": protocol,
            "parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "device": str(parameters[0].device),
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": self.clock.used(),
        }
