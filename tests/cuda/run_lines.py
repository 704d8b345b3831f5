"""Runs the lines of a script, one after another: python -m tests.cuda.device -m tests.cuda.run_lines SCRIPT DATA RESULTS

Each leaves RESULTS/NAME, RESULTS/NAME.stopped if it is to be stopped and resumed, and its report, RESULTS/NAME.json: exit
statuses of the runs, the text of an unexpected error, and the summary of its steps.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.run.state import State
from common.ssl import models as ssl_models
from tests.command_lines import exit_status
from tests.cuda.lines import LINES, Line
from tests.interruptions.cases import draw_nothing, shorten_mixtures
from tests.stopping import signal_at


class ShortLBFGS(torch.optim.LBFGS):
    """With three iterations: the probes of an encoder take 300, each of 600 operators."""

    def __init__(self, parameters: Iterable[torch.Tensor], **options: Any):
        super().__init__(parameters, **options | {"max_iter": 3})


def run(line: Line, data: Path, results: Path, *, draw: bool = False, resume: bool = False, stop: int | None = None) -> int:
    """Run a line in this process, with a signal at look `stop` for one; its exit status."""
    argv = line.argv(data, results) + (line.resume if resume else [])
    if not torch.cuda.is_available():
        argv = ["cpu" if word == "cuda" else word for word in argv]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl_models, "HIDDEN", 8)
        shorten_mixtures(patch)
        patch.setattr(torch.optim, "LBFGS", ShortLBFGS)
        if stop is not None:
            patch.setattr(State, "check_signal", signal_at(stop))
        if not draw:
            draw_nothing(patch)
        return exit_status(importlib.import_module(line.script).main, argv)


def report_of(line: Line, data: Path, results: Path, name: str) -> dict[str, Any]:
    """Run a line on the device; exit statuses and usual step."""
    from tests.cuda.simulation import Device  # which is in no other process

    Device.active.forget()
    statuses = [run(line, data, results / name, draw=line.draw)]
    report = Device.active.summary()
    if line.stop is not None:
        stopped = results / f"{name}.stopped"
        statuses += [run(line, data, stopped, stop=line.stop), run(line, data, stopped, resume=True)]
    return report | {"statuses": statuses, "error": ""}


if __name__ == "__main__":
    script, data, results = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for name, line in LINES.items():
        if line.script == script:
            try:
                report = report_of(line, data, results, name)
            except Exception:  # the test of this line shows the text; the other lines run
                report = {"statuses": [1], "error": traceback.format_exc()}
            (results / f"{name}.json").write_text(json.dumps(report))
