"""A run that is killed or interrupted, at any moment and however often, ends as if nothing had happened, bit for bit."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from common.run.traces import read_metrics
from tests.small_images import real, write_mnist

# horizons, and rates, with which they backtrack within their 25 epochs
LINES = {
    # two layers and dropout: two generators' worth of state
    "amortised_clustering": (
        "-type Swarm -n_hidden 12 -n_iter 3 -n_layers 2 -dropout 0.1 -tasks 60 -bs 6 -max_epochs 25 -lr 0.03 -bt_horizon 0.6 "
        "-update_interval 0.05 -resume auto"
    ),
    # 180 of 200 real images train; 77 of them in each epoch, the last batch of which is a small one
    "swarm_transformer": (
        "-data FashionMNIST -n_hidden 8 -n_iter 2 -bs 9 -epoch_images 77 -max_epochs 25 -lr 1.0 -bt_horizon 0.0 -cond "
        "-n_samples 2 -update_interval 0.1 -resume auto"
    ),
    # the last batch of an epoch is a small one, a test comes every third epoch
    "train_ssl": (
        "--dataset fashionmnist --encoder cifar10_resnet20 --encoder-width 2 --image-size 8 --batch-size 48 --epochs 9 "
        "--warmup-epochs 2 --test-every 3 --lr 0.01 --tx sca rot fli blu --equi-tx rot --resume"
    ),
}
OPTIONS = {"train_ssl": ("--results-dir", "--dataset-root")}  # how a script spells these
# processes are forked from a server that has imported the scripts: they start in milliseconds, so moments are random indeed
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(list(LINES))


def run_script(script: str, line: list[str]) -> None:
    from common.run import epochs, training

    torch.set_num_threads(1)
    training.SAVE_SECONDS = epochs.SAVE_SECONDS = 0.02  # save within epochs, too
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(importlib.import_module(script).main(line))


@dataclass
class Case:
    """A script, and its command line but for the place of the results."""

    script: str
    line: list[str]
    results_option: str

    def start(self, results: Path) -> BaseProcess:
        process = SERVER.Process(target=run_script, args=(self.script, [*self.line, self.results_option, str(results)]))
        process.start()
        return process

    def finish(self, results: Path) -> None:
        process = self.start(results)
        process.join(120)
        assert process.exitcode == 0


@pytest.fixture(scope="module", params=LINES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    line = LINES[request.param].split()
    results_option, data_option = OPTIONS.get(request.param, ("-results_dir", "-data_dir"))
    if request.param != "amortised_clustering":
        folder = tmp_path_factory.mktemp("images")
        write_mnist(folder / "FashionMNIST", real("FashionMNIST", "train")[:200], real("FashionMNIST", "test")[:20])
        line += [data_option, str(folder)]
    return Case(request.param, line, results_option)


def logged(results: Path) -> str:
    return "".join(log.read_text() for log in results.glob("*/*.part/log"))


def outcome(results: Path) -> dict:
    """Everything that a run leaves, but for times."""
    (path,) = results.glob("*/*")
    result = json.loads((path / "result.json").read_text())
    metrics = read_metrics(path / "metrics.csv")
    saved = {file.name: torch.load(file, weights_only=True) for file in path.glob("*.p[kt]*")}
    for timed in (result, metrics, saved["last.pkl"]):
        del timed["seconds"]
    del saved["last.pkl"]["metrics_size"]  # the digits of the times have lengths of their own
    for one in saved.values():  # where the results are is said in the options of a saved encoder
        one.pop("options", None)
    return {"files": sorted(p.name for p in path.iterdir()), "result": result, "metrics": metrics, "saved": saved}


def assert_equal(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), where  # NaN: no test in that epoch


@pytest.fixture(scope="module")
def undisturbed(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, float]:
    """What a run leaves that nobody disturbs, and how long it took."""
    results = tmp_path_factory.mktemp("undisturbed")
    case.finish(results / "first")  # also starts the server
    began = time.monotonic()
    case.finish(results / "second")
    duration = time.monotonic() - began
    assert_equal(outcome(results / "first"), outcome(results / "second"))
    return outcome(results / "second"), duration


def test_the_run_is_worth_disturbing(case: Case, undisturbed: tuple[dict, float]) -> None:
    left, _ = undisturbed
    if case.script == "train_ssl":
        assert left["metrics"]["step"] == list(range(5, 46, 5)) and len(left["saved"]) == 2
        return
    assert left["metrics"]["epoch"] == list(range(1, 26))
    rates = left["metrics"]["lr"]
    assert min(rates) < rates[0], "no backtracking happened: choose other options"
    assert left["saved"]["last.pkl"]["traces"]["steps"] == list(range(1, 25 * 9 + 1))


def test_kill_at_25_random_moments(case: Case, undisturbed: tuple[dict, float], tmp_path: Path) -> None:
    """The same losses at every step (so the same data in the same order), the same weights, moments, generators, rows."""
    expected, duration = undisturbed
    moments = random.Random(0)
    kills, runs = 0, 0
    while kills < 25:
        results = tmp_path / str(runs)
        process = case.start(results)
        # a tenth of the run on the average: some kills hit the start, some the training, some the report
        process.join(0.02 + moments.expovariate(10 / duration))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it has come to its end in spite of all: once more
            assert_equal(outcome(results), expected)
            runs += 1
    case.finish(tmp_path / str(runs))
    assert_equal(outcome(tmp_path / str(runs)), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_stop_with_75(number: signal.Signals, case: Case, undisturbed: tuple[dict, float], tmp_path: Path) -> None:
    expected, duration = undisturbed
    moments = random.Random(int(number))
    stopped = 0
    for _ in range(6):
        before = logged(tmp_path)
        process = case.start(tmp_path)
        while logged(tmp_path) == before and process.is_alive():  # what it logs first, it logs with its handlers in place
            time.sleep(0.005)
        time.sleep(moments.uniform(0, duration / 8))
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            os.kill(process.pid, number)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == 75
        stopped += 1
        assert f"stopped by {number.name}" in logged(tmp_path).removeprefix(before)
    assert stopped >= 3
    case.finish(tmp_path)
    assert_equal(outcome(tmp_path), expected)
