"""Commands in a process with the simulated GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def simulated(report: Path, *command: str) -> dict[str, Any]:
    """Run a script, or -m and a module, on the simulated GPU; its report. Raises AssertionError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "tests.cuda.device", "--report", str(report), *command]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads(report.read_text())
