"""The state of a run that trains: model, optimiser, clock, backtracking, traces, and how far it is; saved and gone on from.

The loop itself stays in the script. It calls `step_done` after each step, `save_now_and_then` where it can be stopped, and
`conclude_epoch` with the validation loss.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.run import checkpoint
from common.run.backtracking import Backtracking
from common.run.checkpoint import CheckpointError
from common.run.clock import Clock
from common.run.directory import RunDirectory
from common.run.traces import Metrics, Traces

SAVE_SECONDS = 60.0  # between two saves of last.pkl within an epoch


class Training:
    """Where a run stands: `batch` batches of epoch `epoch` are done, with a mean loss of loss_sum / n_seen.

    `args` are the options that make the run what it is: it goes on with the same ones alone; and with the same data, where
    their `fingerprint` is given, see `check_data`. `budget` is in seconds.
    """

    def __init__(
        self,
        run: RunDirectory,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        args: dict[str, Any],
        *,
        budget: float,
        horizon: float,
        alpha: float,
        columns: tuple[str, ...],
        fingerprint: str | None = None,
    ):
        self.run, self.model, self.optimizer, self.args, self.fingerprint = run, model, optimizer, args, fingerprint
        self.budget, self.alpha, self.columns = budget, alpha, columns
        self.backtracking = Backtracking(horizon)
        self.traces = Traces(model)
        self.epoch = self.batch = self.step = self.n_seen = 0
        self.loss_sum = 0.0

    def start(self, last: dict[str, Any] | None) -> None:
        """Start the clock and the files: anew, or where last.pkl, which `load_checkpoint` has read, stands."""
        path = self.run.path / "metrics.csv"
        if last is None:
            self.metrics = Metrics(path, self.columns)
            self.clock = Clock(self.budget)
            self.save_last()
        else:
            self.backtracking.load_state_dict(last["backtracking"])
            self.traces.load_state_dict(last["traces"])
            self.epoch, self.batch, self.step, self.n_seen, self.loss_sum = last["progress"]
            self.metrics = Metrics(path, self.columns, last["metrics_size"])
            self.clock = Clock(self.budget, last["seconds"])
            self.saved_at = time.monotonic()
            checkpoint.set_rng_state(last["rng"])
            self.run.log(f"resumed in epoch {self.epoch + 1} after step {self.step}, {self.clock.used() / 60:.2f} minutes used")
        if self.step == 0:
            self.save_best(math.inf)  # somewhere to go back to, should the first epoch fail

    def goes_on(self, max_epochs: float) -> bool:
        """Whether epochs and time are left for another epoch. However short the time, one step is taken."""
        return self.epoch < max_epochs and (self.step == 0 or not self.clock.is_up())

    def save_last(self) -> None:
        """Write last.pkl: everything that is needed to go on exactly here.

        Weights that are not finite (after a gradient that was not) are not written: the run goes on from the last that were.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "name": self.run.name,
            "best_val_loss": self.backtracking.best,
            "args": self.args,
            "data": self.fingerprint,
            "progress": (self.epoch, self.batch, self.step, self.n_seen, self.loss_sum),
            "seconds": self.clock.used(),
            "backtracking": self.backtracking.state_dict(),
            "traces": self.traces.state_dict(),
            "metrics_size": self.metrics.size,
            "rng": checkpoint.rng_state(),
        }
        checkpoint.save(state, self.run.last)
        self.saved_at = time.monotonic()

    def save_now_and_then(self) -> None:
        """Write last.pkl within an epoch, if the last time is a minute ago."""
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save_last()

    def save_best(self, val_loss: float) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(state | {"name": self.run.name, "best_val_loss": val_loss}, self.run.best)

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

    @property
    def mean_loss(self) -> float:
        """Training loss of this epoch so far."""
        return self.loss_sum / self.n_seen if self.n_seen else math.nan

    def step_done(self, n: int, loss: float, **numbers: float) -> None:
        """Count an optimiser's step on n samples with that mean loss; it and other numbers of the step are traced."""
        self.batch, self.step = self.batch + 1, self.step + 1
        self.loss_sum, self.n_seen = self.loss_sum + n * loss, self.n_seen + n
        self.traces.record(self.step, {"loss": loss, **numbers})

    def conclude_epoch(self, val_loss: float, row: dict[str, float | int]) -> str:
        """Enter the row into metrics.csv and judge the epoch: "best" (saved), "back" (to the best, at a lower rate), "keep".

        The next epoch begins. A loss that is not finite reaches no checkpoint.
        """
        rate = self.learning_rate
        verdict = self.backtracking.judge(val_loss, last_epoch=self.clock.is_up())
        if verdict == "best":
            self.save_best(val_loss)
        elif verdict == "back":
            self.load_best()
            self.learning_rate = rate * self.alpha
        self.metrics.append(row)
        self.epoch, self.batch, self.n_seen, self.loss_sum = self.epoch + 1, 0, 0, 0.0
        if math.isfinite(val_loss) or verdict == "back":
            self.save_last()
        return verdict

    def in_words(self, verdict: str) -> str:
        """What `conclude_epoch` has done, for the end of the epoch's line in the log."""
        return {
            "best": " | best so far, saved",
            "keep": "",
            "back": f" | back to the best, lr {self.learning_rate:.4g}",
        }[verdict]


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n batches, or samples: a function of seed and epoch alone, so that a resume in mid-epoch is exact."""
    gen = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=gen)


def load_checkpoint(
    run: RunDirectory, found: str, resume: str | None, model: nn.Module, optimizer: torch.optim.Optimizer, args: dict[str, Any]
) -> dict[str, Any] | None:
    """Put the weights in that a run starts from; the content of last.pkl if it goes on, or None.

    An "unfinished" run goes on from its last.pkl. A path in `resume` gives weights and optimiser, at this run's learning rate.
    Raises CheckpointError if the file is missing, damaged, or of another model. Creates nothing.
    """
    if found == "unfinished":
        last = checkpoint.load(run.last, needed=("model", "optimizer", "args", "progress", "rng"))
        for name, value in last["args"].items():
            if args.get(name) != value:
                raise CheckpointError(
                    f"{run.last} was made with -{name} {value}, not {args.get(name)}: {run.another} starts another run"
                )
        metrics = run.path / "metrics.csv"
        if not metrics.exists() or metrics.stat().st_size < last["metrics_size"]:
            raise CheckpointError(f"{metrics} is missing or cut off: {run.dash}overwrite starts the run again")
        if last["progress"][2] > 0:  # there will be a best model to go back to: see that it is whole
            checkpoint.load_model(model, checkpoint.load(run.best), run.best)
        checkpoint.load_model(model, last, run.last)
        optimizer.load_state_dict(last["optimizer"])
        return last
    if resume not in (None, "auto"):
        path, settings = Path(str(resume)), [dict(group) for group in optimizer.param_groups]
        state = checkpoint.load(path)
        checkpoint.load_model(model, state, path)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise CheckpointError(f"{path} has weights that are not finite: choose an earlier checkpoint")
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} has an optimizer of another model") from None
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        for parameter, moments in optimizer.state.items():
            if any(moment.shape != parameter.shape for moment in moments.values() if moment.ndim):
                raise CheckpointError(f"{path} has an optimizer of another model")
    return None


def check_data(run: RunDirectory, last: dict[str, Any] | None, fingerprint: str) -> None:
    """Raises CheckpointError if a run that goes on from `last` was begun with other data. Old ones do not tell."""
    noted = None if last is None else last.get("data")
    if noted not in (None, fingerprint):
        raise CheckpointError(
            f"{run.last} was made with other data (fingerprint {noted}, now {fingerprint}): name the place where those are, "
            f"or {run.dash}overwrite starts the run again, {run.another} another one"
        )
