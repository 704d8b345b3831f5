"""The accuracy that bf16 costs: small trainings in fp32 and bf16, with the same seeds, data and epochs.

    python -m benchmarks.precision --save    # about 25 minutes on two cores; --quick: one tiny epoch each, to see that it runs

(a) A zoo of three mCNNs of width 16 on 10,000 images of Fashion-MNIST: test accuracy in %.
(b) The paper's clustering model with 32 hidden units, three seeds: best validation loss in nats.

Mean and standard deviation over seeds. Not a part of `make bench`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Bench, run_benchmark
from benchmarks.records import ROOT

SEEDS = 3
CLUSTERING = "amortised_clustering.py -type Swarm -n_hidden 32 -n_iter 10 -lr 0.01 -bs 20"
ZOO = f"train_zoo.py --arch=mCNN --dataset=fashionmnist --num_models={SEEDS}"


def train(bench: Bench, line: str) -> None:
    """Run a script. Raises CalledProcessError, after its messages, if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads)}
    subprocess.run([sys.executable, *line.split()], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def clustering_losses(bench: Bench, precision: str, folder: str) -> list[float]:
    """Validation losses (nats) of the seeds."""
    size = "-tasks 100 -max_epochs 1" if bench.quick else "-tasks 2000 -max_epochs 8"
    for seed in range(SEEDS):
        train(bench, f"{CLUSTERING} {size} -seed {seed} -precision {precision} -results_dir {folder}")
    return [json.loads(path.read_text())["model"]["cross_entropy"] for path in sorted(Path(folder).rglob("result.json"))]


def zoo_accuracies(bench: Bench, precision: str, folder: str) -> list[float]:
    """Test accuracies (%) of the networks."""
    size = "--width=1 --subset=400 --epochs=1" if bench.quick else "--width=16 --subset=10000 --epochs=4"
    train(bench, f"{ZOO} {size} --precision={precision} --out={folder}/zoo")
    records = [json.loads((Path(folder) / "zoo" / f"{i}.json").read_text()) for i in range(SEEDS)]
    return [100 * record["test"]["accuracy"] for record in records]


def run(bench: Bench) -> None:
    for work, unit, measure in (
        ("zoo, mCNN of width 16: test accuracy", "%", zoo_accuracies),
        ("clustering, 32 hidden: validation loss", "nats", clustering_losses),
    ):
        means, deviations = {}, {}
        for precision in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory() as folder:
                values = measure(bench, precision, folder)
            means[precision], deviations[precision] = statistics.mean(values), statistics.stdev(values)
            noted = {"n": SEEDS, "value": means[precision], "sd": deviations[precision], "unit": unit}
            bench.add(work, precision, **noted, overhead={"fp32": means[precision] / means["fp32"]})
        # by the deviation of a single run
        shift = (means["fp32"] - means["bf16"]) / deviations["fp32"]
        bench.add(work, "bf16 below fp32", value=shift, unit="standard deviations", n=SEEDS)


if __name__ == "__main__":
    sys.exit(run_benchmark("precision", run, __doc__))
