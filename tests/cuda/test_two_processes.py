"""Two processes of torchrun, each with a simulated GPU, train as one on a CPU. Their collectives go through Gloo."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.run.metrics import read_metrics
from tests.command_lines import exit_status
from tests.cuda.processes import ROOT
from tests.small_images import smooth, write_mnist

# with the columns of metrics.csv that are compared
LINES = {
    "train_ssl --dataset mnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 16 --epochs 1 "
    "--warmup-epochs 1 --test-every 2 --tx sca rot --equi-tx rot --lr 0.0001 --dataset-root DATA --results-dir": (
        "train_total_loss",
        "train_model_group_0_loss_mean",
        "test_total_loss",
    ),
    "amortised_clustering -type Swarm -n_hidden 8 -n_iter 2 -tasks 30 -bs 7 -max_epochs 2 -results_dir": (
        "train_loss",
        "val_loss",
        "val_accuracy",
    ),
    "swarm_transformer -data MNIST -n_hidden 4 -n_iter 2 -bs 5 -epoch_images 12 -max_epochs 2 -n_samples 1 -data_dir DATA "
    "-results_dir": ("train_loss", "val_loss"),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_two_processes_train_as_one(line: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, smooth(40), smooth(20, seed=1))
    script, *words = line.replace("DATA", str(tmp_path)).split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.cuda.device"]
    done = subprocess.run(
        [*torchrun, str(ROOT / f"{script}.py"), *words, str(tmp_path / "two")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = next((tmp_path / "two").rglob("log")).read_text()
    assert "2 processes" in log and "on cuda:0" in log
    assert exit_status(importlib.import_module(script).main, [*words, str(tmp_path / "one")]) == 0
    two, one = (read_metrics(next((tmp_path / name).glob("*/*/metrics.csv"))) for name in ("two", "one"))
    for name in LINES[line]:
        assert two[name] == pytest.approx(one[name], rel=2e-3), name  # rounding, amplified by steps
    assert two["step"] == one["step"]
