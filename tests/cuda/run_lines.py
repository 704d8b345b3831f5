"""Runs the lines of a script, one after another: python -m tests.cuda.device -m tests.cuda.run_lines SCRIPT DATA RESULTS

Each leaves RESULTS/NAME, RESULTS/NAME.stopped if it is to be stopped and resumed, and its report, RESULTS/NAME.json: exit
statuses of the runs, the text of an unexpected error, and the summary of its steps.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from common.run.state import State
from tests.command_lines import Main, exit_status
from tests.cuda.lines import LINES, Line
from tests.cuda.simulation import Device
from tests.stopping import signal_at


def run(line: Line, main: Main, data: Path, results: Path) -> dict[str, Any]:
    """Run a line, on the device; its report."""
    Device.active.forget()
    statuses = [exit_status(main, line.argv(data, results))]
    report = Device.active.summary()
    if line.stop is not None:
        argv, check_signal = line.argv(data, results.with_suffix(".stopped")), State.check_signal
        State.check_signal = signal_at(line.stop)  # type: ignore[method-assign]
        statuses.append(exit_status(main, argv))
        State.check_signal = check_signal  # type: ignore[method-assign]
        statuses.append(exit_status(main, [*argv, *line.resume]))
    return report | {"statuses": statuses, "error": ""}


if __name__ == "__main__":
    script, data, results = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    main = importlib.import_module(script).main
    for name, line in LINES.items():
        if line.script == script:
            try:
                report = run(line, main, data, results / name)
            except Exception:
                report = {"statuses": [1], "error": traceback.format_exc()}
            (results / f"{name}.json").write_text(json.dumps(report))
