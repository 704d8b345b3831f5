"""What a run leaves to look at: metrics.csv with a row an epoch, and traces of losses and of some weights by step."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

N_TRACED = 13  # entries of each parameter
N_RECORDS = 1000  # kept in memory and drawn


class Metrics:
    """metrics.csv, a row per epoch. `size` goes into the checkpoint: a resumed run cuts off what was written after it."""

    def __init__(self, path: Path, columns: tuple[str, ...], size: int = 0):
        self.path, self.columns = path, columns
        if size:
            os.truncate(path, size)
            self.size = size
        else:
            self.size = self._write(columns, "w")

    def append(self, row: Mapping[str, float | int | str]) -> None:
        """Add a row and make sure that it is on the disk. Raises OSError if it cannot be written."""
        values = [row[column] for column in self.columns]
        self.size = self._write([f"{v:.8g}" if isinstance(v, float) else v for v in values], "a")

    def _write(self, row: Any, mode: str) -> int:
        with open(self.path, mode, newline="") as file:
            csv.writer(file).writerow(row)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()


def read_metrics(path: Path) -> dict[str, list[float]]:
    """metrics.csv by column."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {column: [float(row[column]) for row in rows] for column in reader.fieldnames or []}


class Traces:
    """Numbers of each step (the loss, say) and up to 13 entries of every learned parameter; thinned out evenly when many."""

    def __init__(self, model: nn.Module):
        self.every = 1
        self.steps: list[int] = []
        self.numbers: dict[str, list[float]] = {}
        self.weights: list[Tensor] = []  # (number of traced entries)
        parameters = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
        self.parameters = list(parameters.values())
        # as many as 13 entries, spread evenly over the flattened tensor
        self.picked = [torch.linspace(0, p.numel() - 1, min(N_TRACED, p.numel())).long() for p in self.parameters]
        self.names = list(parameters)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Note a step's numbers, always of the same names, and the weights, unless it is one of those that are left out."""
        if step % self.every:
            return
        entries = [p.detach().flatten()[pick.to(p.device)] for p, pick in zip(self.parameters, self.picked, strict=True)]
        self.steps.append(step)
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(value)
        self.weights.append(torch.cat(entries).float().cpu())
        if len(self.steps) > N_RECORDS:
            self.every *= 2
            kept = [i for i, s in enumerate(self.steps) if s % self.every == 0]
            self.steps = [self.steps[i] for i in kept]
            self.numbers = {name: [values[i] for i in kept] for name, values in self.numbers.items()}
            self.weights = [self.weights[i] for i in kept]

    def by_parameter(self) -> dict[str, Tensor]:
        """The traced entries of each parameter: (number of records, up to 13)."""
        if not self.weights:
            return {}
        parts = torch.stack(self.weights).split([len(pick) for pick in self.picked], dim=1)
        return dict(zip(self.names, parts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "every": self.every,
            "steps": list(self.steps),
            "numbers": {name: list(values) for name, values in self.numbers.items()},
            "weights": torch.stack(self.weights) if self.weights else torch.empty(0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.every, self.steps = state["every"], list(state["steps"])
        numbers = state["numbers"] if "numbers" in state else {"loss": state["losses"].tolist()}  # of earlier versions
        self.numbers = {name: list(values) for name, values in numbers.items()}
        self.weights = list(state["weights"])
