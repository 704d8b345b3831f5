"""The state of a run of whole epochs: model, optimiser, clock, sums of figures, how far it is; saved and gone on from.

The loop itself stays in the script. It calls `step_done` after each step, `save_now_and_then` where it can be stopped, and
`epoch_done` with the figures of the epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.run import checkpoint
from common.run.checkpoint import CheckpointError
from common.run.clock import Clock
from common.run.directory import RunDirectory
from common.run.traces import Metrics, Traces
from common.run.training import check_data

NEEDED = ("model", "optimizer", "args", "data", "progress", "sums", "tested", "seconds", "traces", "metrics_size")
SAVE_SECONDS = 120.0  # between two saves of last.pkl


class Sums:
    """Sums of figures over batches, weighted by their sizes; on the figures' device, so that adding waits for nothing."""

    def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None):
        self._sums: dict[str, tuple[Tensor | float, float]] = dict(sums or {})

    def add(self, n: int, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + n * value.detach().double(), weight + n)

    def plain(self) -> dict[str, tuple[float, float]]:
        """(sum, weight) of each figure, as plain numbers."""
        return {name: (float(total), weight) for name, (total, weight) in self._sums.items()}

    def means(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.plain().items()}


class EpochTraining:
    """Where a run stands: `batch` batches of epoch `epoch` are done, with their figures in `sums`.

    `args` are the options that make the run what it is: it goes on with the same ones alone, and with data of the same
    `fingerprint`.
    """

    def __init__(
        self,
        run: RunDirectory,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        args: dict[str, Any],
        *,
        fingerprint: str,
        columns: tuple[str, ...],
        last: dict[str, Any] | None,
        writes: bool = True,
    ):
        """Start the clock and the files: anew, or where last.pkl, which `load_last` has read, stands.

        Of several processes that train together, one alone `writes`.
        """
        self.run, self.model, self.optimizer, self.args, self.fingerprint = run, model, optimizer, args, fingerprint
        self.writes = writes
        self.traces, self.sums = Traces(model), Sums()
        self.epoch = self.batch = self.step = 0
        self.tested: dict[str, Any] = {}  # figures of the last test, plain values
        self.clock = Clock(math.inf, last["seconds"] if last else 0.0)
        self.saved_at = time.monotonic()
        if last is not None:
            self.epoch, self.batch, self.step = last["progress"]
            self.sums, self.tested = Sums(last["sums"]), last["tested"]
            self.traces.load_state_dict(last["traces"])
        self.epoch_began = self.clock.used()
        if writes:
            self.metrics = Metrics(run.path / "metrics.csv", columns, last["metrics_size"] if last else 0)
            if last is None:
                self.save_last()

    def step_done(self, n: int, figures: Mapping[str, Tensor]) -> None:
        """Count an optimiser's step on n samples with those mean figures."""
        self.batch, self.step = self.batch + 1, self.step + 1
        self.sums.add(n, figures)

    def epoch_done(self, row: dict[str, float | int]) -> None:
        """Enter the row into metrics.csv, trace some weights; the next epoch begins."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()
        self.epoch_began = self.clock.used()
        if self.writes:
            self.metrics.append(row)
            self.traces.record(self.epoch, {})
        self.save_now_and_then()

    def save_last(self) -> None:
        """Write last.pkl: everything that is needed to go on exactly here. Weights that are not finite are never written."""
        self.saved_at = time.monotonic()
        if not self.writes or not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "name": self.run.name,
            "args": self.args,
            "data": self.fingerprint,
            "progress": (self.epoch, self.batch, self.step),
            "sums": self.sums.plain(),
            "tested": self.tested,
            "seconds": self.clock.used(),
            "traces": self.traces.state_dict(),
            "metrics_size": self.metrics.size,
        }
        checkpoint.save(state, self.run.last)

    def save_now_and_then(self) -> None:
        """Write last.pkl if the last time is two minutes ago."""
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save_last()


def load_last(
    run: RunDirectory, model: nn.Module, optimizer: torch.optim.Optimizer, args: dict[str, Any], fingerprint: str
) -> dict[str, Any]:
    """Put the weights in that an unfinished run goes on from; the content of its last.pkl.

    Raises CheckpointError if that is damaged, or was made with other options, another model or other data. Creates nothing.
    """
    last = checkpoint.load(run.last, needed=NEEDED)
    for name, value in last["args"].items():
        if args.get(name) != value:
            option = f"{run.dash}{name.replace('_', '-')}"
            raise CheckpointError(f"{run.last} was made with {option} {value}, not {args.get(name)}")
    check_data(run, last, fingerprint)
    metrics = run.path / "metrics.csv"
    if not metrics.exists() or metrics.stat().st_size < last["metrics_size"]:
        raise CheckpointError(f"{metrics} is missing or cut off: {run.dash}overwrite starts the run again")
    checkpoint.load_model(model, last, run.last)
    optimizer.load_state_dict(last["optimizer"])
    return last
