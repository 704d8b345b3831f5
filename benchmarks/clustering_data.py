"""How fast clustering tasks are made, and how long a run takes until its first training step.

python -m benchmarks.clustering_data
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.datasets.clustering import batches_by_size, make_tasks, padded_batch

ROUNDS = 5
TASKS = 10_000


def main() -> None:
    make_tasks(100, 0)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        tasks = make_tasks(TASKS, seed=0)
        times.append(time.perf_counter() - began)
    making = statistics.median(times)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"making {TASKS:,} tasks with {len(tasks.points):,} points: {making:.2f} s, {TASKS / making:,.0f} tasks/s")

    batches = batches_by_size(tasks, torch.arange(TASKS), 100)
    began = time.perf_counter()
    for chosen in batches:
        padded_batch(tasks, chosen)
    print(f"padding them to {len(batches)} batches: {time.perf_counter() - began:.2f} s")

    # the line that the run logs just before its first step; all options that matter for the start are defaults
    script = Path(__file__).parent.parent / "amortised_clustering.py"
    starts = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as results:
            command = [sys.executable, "-u", str(script), "-type", "Swarm", "-to_stdout", "-results_dir", results]
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("9000 training tasks"):
                        break
                starts.append(time.perf_counter() - began)
                process.kill()
    print(f"from start of the script to the first training step, {TASKS:,} tasks: {statistics.median(starts):.2f} s")


if __name__ == "__main__":
    main()
