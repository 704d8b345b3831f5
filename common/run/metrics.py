"""The measurements of a run: means over batches, metrics.csv with a row an epoch, traces of losses and weights by step."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.checkpoint import CheckpointError
from common.run.trackers import Trackers

N_TRACED = 13  # entries of each parameter
N_RECORDS = 1000  # kept in memory and drawn


class Meter:
    """Weighted means of metrics over batches, summed in float64 on the device of the values: adding waits for nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, float]] = {}  # sum and weight

    def add(self, n: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the means of n samples."""
        for name, value in metrics.items():
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + n * (value.detach().double() if isinstance(value, Tensor) else value), weight + n)

    def means(self) -> dict[str, float]:
        return {name: float(total) / weight for name, (total, weight) in self._sums.items()}

    def reset(self) -> None:
        self._sums.clear()

    def state_dict(self) -> dict[str, tuple[float, float]]:
        return {name: (float(total), weight) for name, (total, weight) in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, float]]) -> None:
        self._sums = {name: (float(total), float(weight)) for name, (total, weight) in state.items()}


class Metrics:
    """metrics.csv, a row an epoch. On resume, rows after the saved state are overwritten."""

    def __init__(self, path: Path, columns: tuple[str, ...], trackers: Trackers | None = None):
        self.path, self.columns, self.trackers, self.size = path, columns, trackers, 0

    def append(self, row: Mapping[str, float | int]) -> None:
        """Add a row, make sure that it is on the disk, and pass it on to the trackers. Raises OSError if it cannot be written.

        The file takes the values of its columns alone, the trackers take all.
        """
        text = io.StringIO()
        table = csv.writer(text)
        if self.size == 0:
            table.writerow(self.columns)
        values = [row[column] for column in self.columns]
        table.writerow([f"{v:.8g}" if isinstance(v, float) else v for v in values])
        with open(self.path, "r+b" if self.size else "wb") as file:
            file.truncate(self.size)
            file.seek(self.size)
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()
        if self.trackers is not None:
            self.trackers.log(row, int(row["epoch"]))

    def state_dict(self) -> dict[str, int]:
        return {"metrics_size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Raises CheckpointError if the file is shorter than it was."""
        self.size = int(state["metrics_size"])
        if self.size and (not self.path.exists() or self.path.stat().st_size < self.size):
            raise CheckpointError(f"{self.path} is missing or cut off: only a new start can make it whole")


def read_metrics(path: Path) -> dict[str, list[float]]:
    """metrics.csv by column."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {column: [float(row[column]) for row in rows] for column in reader.fieldnames or []}


def spread_evenly(n: int) -> Tensor:
    """Up to 13 of n indices, the first and the last among them."""
    count = min(N_TRACED, n)
    return torch.arange(count) * (n - 1) // max(1, count - 1)


class Traces:
    """Metrics by step, and up to 13 entries of each learned parameter. Thinned out evenly above 1,000 records.

    Records of a model on a GPU stay there until `fetch`, so that the host does not wait for them.
    """

    def __init__(self, model: nn.Module):
        self.every = 1
        self.steps: list[int] = []
        self.numbers: dict[str, list[float]] = {}
        self.weights: list[Tensor] = []  # (number of traced entries)
        parameters = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
        self.parameters = list(parameters.values())
        self.picked = [spread_evenly(p.numel()).to(p.device) for p in self.parameters]
        self.names = list(parameters)
        self._on_device: list[tuple[int, tuple[str, ...], Tensor]] = []  # step, names of metrics, their values and weights

    def record(self, step: int, numbers: Mapping[str, Tensor | float]) -> None:
        """Record a step's metrics (the same names each time) and the weights. Skips steps that are no multiple of `every`."""
        if step % self.every:
            return
        values = [torch.as_tensor(value, dtype=torch.float64).detach().reshape(1) for value in numbers.values()]
        entries = [p.detach().flatten()[pick] for p, pick in zip(self.parameters, self.picked, strict=True)]
        self._on_device.append((step, tuple(numbers), torch.cat([*values, *entries])))
        if not entries[0].is_cuda or len(self._on_device) == N_RECORDS:
            self.fetch()

    def fetch(self) -> None:
        """Bring the records that are on the device to the host, in one transfer. Left out are metrics that are not finite."""
        if not self._on_device:
            return
        rows = torch.stack([row for _, _, row in self._on_device]).cpu()
        for (step, names, _), row in zip(self._on_device, rows, strict=True):
            values = row[: len(names)].tolist()
            if step % self.every == 0 and all(map(math.isfinite, values)):
                self._keep(step, dict(zip(names, values, strict=True)), row[len(names) :].float())
        self._on_device.clear()

    def _keep(self, step: int, numbers: Mapping[str, float], weights: Tensor) -> None:
        """Add a record, and leave out every other one if there are too many."""
        self.steps.append(step)
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(value)
        self.weights.append(weights)
        if len(self.steps) > N_RECORDS:
            self.every *= 2
            kept = [i for i, s in enumerate(self.steps) if s % self.every == 0]
            self.steps = [self.steps[i] for i in kept]
            self.numbers = {name: [values[i] for i in kept] for name, values in self.numbers.items()}
            self.weights = [self.weights[i] for i in kept]

    def by_parameter(self) -> dict[str, NDArray[np.floating]]:
        """The traced entries of each parameter: (number of records, up to 13)."""
        self.fetch()
        if not self.weights:
            return {}
        parts = torch.stack(self.weights).split([len(pick) for pick in self.picked], dim=1)
        return {name: part.numpy() for name, part in zip(self.names, parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        self.fetch()
        return {
            "every": self.every,
            "steps": list(self.steps),
            "numbers": {name: list(values) for name, values in self.numbers.items()},
            "weights": torch.stack(self.weights) if self.weights else torch.empty(0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.every, self.steps = state["every"], list(state["steps"])
        self.numbers = {name: list(values) for name, values in state["numbers"].items()}
        self.weights = list(state["weights"])
