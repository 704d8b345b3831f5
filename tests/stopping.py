"""Signals that come at a counted place, and what runs leave. As a script: train_ssl.py, one process of which gets a signal.

torchrun --nproc-per-node=2 tests/stopping.py RANK N --model duet ...  # SIGTERM to process RANK at its N-th look for one
"""

import csv
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.run.state import State

TIMED = ("seconds", "platform", "git_revision")


def signal_at(n: int) -> Callable[[State], None]:
    """A State.check_signal for which SIGTERM comes at the n-th call: after a step, or before a batch of a test."""
    check_signal, calls = State.check_signal, itertools.count(1)

    def check(self: State) -> None:
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        check_signal(self)

    return check


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a finished run leaves, but for times and places."""
    result = json.loads((run / "result.json").read_text())
    with open(run / "metrics.csv") as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    last = torch.load(run / "last.pkl", weights_only=True)
    saved = {file.name: torch.load(file, weights_only=True)["model"] for file in run.glob("*.pt")}
    state = {name: value for name, value in last.items() if name not in ("clock", "metrics", "rng")}
    return {
        "result": {name: value for name, value in result.items() if name not in TIMED},
        "rows": rows,
        "files": sorted(str(file.relative_to(run)) for file in run.rglob("*")),
        "tensors": as_bytes([state, saved]),
    }


def as_bytes(content: Any) -> Any:
    """Nested values with tensors as bytes, so that == compares them bit for bit."""
    if isinstance(content, torch.Tensor):
        return str(content.dtype), tuple(content.shape), content.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(content, dict):
        return {key: as_bytes(value) for key, value in content.items()}
    return [as_bytes(value) for value in content] if isinstance(content, list | tuple) else content


if __name__ == "__main__":
    import train_ssl

    if os.environ["RANK"] == sys.argv[1]:
        State.check_signal = signal_at(int(sys.argv[2]))  # type: ignore[method-assign]
    sys.exit(train_ssl.main(sys.argv[3:]))
