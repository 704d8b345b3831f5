"""Two processes of torchrun, each with a simulated GPU, train as one on a CPU. Their collectives go through Gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_ssl
from common.run.metrics import read_metrics
from tests.command_lines import exit_status
from tests.cuda.processes import ROOT
from tests.small_images import smooth, write_mnist

LINE = (
    "--dataset mnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 16 --epochs 1 --warmup-epochs 1 "
    "--test-every 2 --tx sca rot --equi-tx rot --lr 0.0001"
)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    write_mnist(tmp_path, smooth(40), smooth(20, seed=1))
    line = [*LINE.split(), "--dataset-root", str(tmp_path), "--results-dir"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.cuda.device"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train_ssl.py"), *line, str(tmp_path / "two")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "cuda:0, 2 processes" in done.stdout, done.stderr[-3000:]
    assert exit_status(train_ssl.main, [*line, str(tmp_path / "one")]) == 0
    two, one = (read_metrics(next((tmp_path / name).glob("*/*/metrics.csv"))) for name in ("two", "one"))
    for name in ("train_total_loss", "train_model_group_0_loss_mean", "test_total_loss"):
        assert two[name] == pytest.approx(one[name], rel=2e-3), name  # rounding, amplified by steps
    assert two["step"] == one["step"] == [3]
