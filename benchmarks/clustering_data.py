"""How fast clustering tasks are made, and how long a run takes until its first training step.

python -m benchmarks.clustering_data
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import Bench, Kind, Step, run_benchmark, seconds
from common.datasets.clustering import batches_by_size, make_tasks, padded_batch

TASKS = 10_000


def make_padding(n_tasks: int) -> Step:
    """All padded batches of a data set."""
    tasks = make_tasks(n_tasks, seed=0)
    batches = batches_by_size(tasks, torch.arange(n_tasks), 100)

    def pad() -> None:
        for indices in batches:
            padded_batch(tasks, indices)

    return pad


def make_tasks_step(n_tasks: int) -> Step:
    return partial(make_tasks, n_tasks, seed=0)


def start_script(threads: int) -> None:
    """Run amortised_clustering.py until its first training step: until the line that it logs just before."""
    script = Path(__file__).parent.parent / "amortised_clustering.py"
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-u", str(script), "-type", "Swarm", "-to_stdout", "-results_dir", results]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            try:
                if not any(line.startswith("9000 training tasks") for line in process.stdout):
                    raise RuntimeError(f"{script.name} ended with status {process.wait()} before its first step")
            finally:
                process.kill()


def run(bench: Bench) -> None:
    rounds = 2 if bench.quick else 5
    bench.compare("making 10,000 clustering tasks", {"suite": Kind(partial(make_tasks_step, TASKS))}, rounds)
    bench.compare("padding 10,000 tasks to 100 batches", {"suite": Kind(partial(make_padding, TASKS))}, rounds)
    times = [seconds(partial(start_script, bench.threads)) for _ in range(rounds)]
    bench.add("start of amortised_clustering.py to its first step", "suite", n=rounds, seconds=statistics.median(times))


if __name__ == "__main__":
    sys.exit(run_benchmark("clustering_data", run, __doc__))
