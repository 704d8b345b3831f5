"""--jobs N: what N processes leave is what one leaves, bit for bit, whoever of them is stopped or killed on the way."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cifar10_alignment
import cifar10_projections
import cifar10_stitching
import train_zoo
from common.errors import Failed
from common.run import state, workers
from common.run.command import Command
from common.run.lock import is_locked
from common.run.state import State
from common.run.workers import Worker
from tests.interruptions import cases
from tests.interruptions.cases import LINES, Case, assert_equal, make_case
from tests.interruptions.test_trackers import scalars

ROOT = Path(__file__).parents[2]
SCRIPTS = {  # cases, and the scripts' parts that run in other processes
    "zoo": train_zoo.work,
    "stitching": cifar10_stitching.work,
    "alignment": cifar10_alignment.work,
    "rotations": cifar10_projections.work,
}
VICTIMS = {"zoo": "1", "stitching": "0-1_layer_3_run_0", "alignment": "run1", "rotations": "relu_orthogonal_layer_5_run_0"}
SIGNALS = {"zoo": signal.SIGTERM, "stitching": signal.SIGINT, "alignment": signal.SIGUSR1}
KILLED = ("zoo", "rotations")


@pytest.fixture(autouse=True)
def started_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """args.json says how a run was started."""
    monkeypatch.setattr(cases, "PASSING", (*cases.PASSING, "jobs", "progress"))


def with_jobs(case: Case, n: int) -> int:
    return Case(case.script, [*case.line, "--jobs", str(n)], case.results).run()


@pytest.fixture
def whole(kind: str, data: Path, tmp_path: Path) -> dict[str, Any]:
    """The files that one process leaves."""
    case = make_case(kind, data, tmp_path / "whole")
    assert case.run() == 0
    return case.outcome()


@pytest.fixture
def begun(kind: str, data: Path, tmp_path: Path) -> Case:
    return make_case(kind, data, tmp_path / "results")


# ---- what other processes do in these tests: functions that they can import ------------------------------------------------


def at_look(job: str, n: int, act: Callable[[], None]) -> None:
    """In this process `act` at the n-th look for signals in a job: between steps, or blocks of images."""
    looks = iter(range(1, 10**6))

    def look(at: str) -> None:
        if at == job and next(looks) == n:
            act()

    check_state, check = State.check_signal, Command.check_signal

    def check_signal_of_state(self: State) -> None:
        look(self.path.name.removesuffix(".last.pkl"))
        check_state(self)

    def check_signal(self: Command, where: str) -> None:
        look(where.removeprefix("in "))
        check(self, where)

    State.check_signal, Command.check_signal = check_signal_of_state, check_signal  # type: ignore[method-assign]
    state.SAVE_SECONDS = -1.0


def killed(worker: Worker, *arguments: Any) -> None:
    kind = next(kind for kind, line in LINES.items() if line.split()[0] == worker.script)
    at_look(VICTIMS[kind], 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    SCRIPTS[kind](worker, *arguments)


def stopping(worker: Worker, *arguments: Any) -> None:
    """The run's process gets a signal while this one is in a job; it does not go on before that has been passed on."""
    kind = next(kind for kind, line in LINES.items() if line.split()[0] == worker.script)

    def stop() -> None:
        os.kill(os.getppid(), SIGNALS[kind])
        wait_until(lambda: worker.signal)

    at_look(VICTIMS[kind], 3, stop)
    SCRIPTS[kind](worker, *arguments)


def failing_base(worker: Worker, *arguments: Any) -> None:
    at_look("relu", 2, fail)
    cifar10_projections.work(worker, *arguments)


def fail() -> None:
    raise Failed("it was told to")


# ---- tests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_stops_all_and_another_number_goes_on(
    kind: str, begun: Case, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun.line.append("--progress")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(begun.script), "work", stopping)
        assert with_jobs(begun, 2) == 75
    printed = capfd.readouterr()
    assert f"stopped by {SIGNALS[kind].name} with" in printed.out and "Traceback" not in printed.err
    bars = printed.err.replace("\r", "\n").split("\n")
    assert any(line.startswith("jobs: ") for line in bars)
    assert not any("epoch" in line or "cka" in line for line in bars)  # of the other processes
    assert with_jobs(begun, 1 if kind == "zoo" else 3) == 0
    assert_equal(begun.outcome(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_process_that_is_killed_loses_its_own_job_alone(
    kind: str, begun: Case, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(begun.script), "work", killed)
        assert with_jobs(begun, 2) == 1
    script, error = begun.script, capfd.readouterr().err
    message = f"{script}.py: failed: a process was killed by SIGKILL at {VICTIMS[kind]}, with 1 of 2 jobs done: --resume"
    assert error.startswith(message) and error.count("\n") == 1
    assert with_jobs(begun, 2) == 0
    assert_equal(begun.outcome(), whole)


@pytest.mark.slow
def test_jobs_that_need_one_that_failed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with one process: those of the other network are done, and the run ends, with the reasons."""
    outcomes = []
    for n in (1, 2):
        case = make_case("rotations", data, tmp_path / str(n))
        case.line[case.line.index("relu") :] = ["relu", "sigmoid", *case.line[case.line.index("relu") + 1 :]]
        with monkeypatch.context() as patch:
            if n == 1:
                patch.setattr(State, "check_signal", State.check_signal)  # put back what the next line changes
                patch.setattr(Command, "check_signal", Command.check_signal)
                at_look("relu", 2, fail)
            else:
                patch.setattr(cifar10_projections, "work", failing_base)
            assert with_jobs(case, n) == 1
        outcomes.append(case.outcome())
    assert_equal(*outcomes)
    result = next(content for name, content in outcomes[1].items() if name.endswith("result.json"))
    reason = "it was told to"
    assert result["failed"] == {"relu": reason, "relu_orthogonal_layer_5_run_0": f"it needs relu, which failed: {reason}"}


@pytest.mark.slow
def test_nobody_outlives_a_run_that_is_killed(data: Path, tmp_path: Path) -> None:
    """The others save and go, and until then nobody else gets at the run. It can be continued."""
    case = make_case("rotations", data, tmp_path / "results")
    case.line += ["--epochs", "1000", "--activations", "relu", "sigmoid"]
    command = [sys.executable, str(ROOT / f"{case.script}.py"), *case.line, "--jobs", "2"]
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    wait_until(lambda: all([*case.results.rglob(f"{job}.lock")] for job in ("relu", "sigmoid")))
    others = children(run.pid)
    for process in others:
        os.kill(process, signal.SIGSTOP)
    run.kill()
    run.wait()
    (lock,) = case.results.rglob("lock")
    assert len(others) == 2 and is_locked(lock)
    for process in others:
        os.kill(process, signal.SIGCONT)
    wait_until(lambda: not is_locked(lock), seconds=30)
    wait_until(lambda: not any(map(alive, others)), seconds=10)
    assert {path.name for path in case.results.rglob("*.last.pkl")} == {"relu.last.pkl", "sigmoid.last.pkl"}


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """The processes that do jobs for another one."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(parent)], capture_output=True, text=True, check=True
    )
    return [int(row.split()[0]) for row in found.stdout.splitlines() if "spawn_main" in row]


def alive(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.slow
def test_trackers_get_the_rows_of_all_processes(data: Path, tmp_path: Path) -> None:
    case = make_case("stitching", data, tmp_path / "results")
    case.line.append("--tensorboard")
    assert with_jobs(case, 2) == 0
    assert sorted(step for step, _ in scalars(case.results, "val_accuracy")) == [1, 1, 2, 2]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_what_is_no_number_of_processes(begun: Case, capsys: pytest.CaptureFixture[str]) -> None:
    for n, message in {0: "--jobs: 0 is too small: at least 1", 5000: "--jobs: 5000 is too large"}.items():
        assert with_jobs(begun, n) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not begun.results.exists()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_torchrun_is_not_for_jobs(begun: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert begun.run() == 2
    error = capsys.readouterr().err
    assert "--jobs N starts N processes" in error and error.count("\n") == 1 and not begun.results.exists()


def test_gpus_are_named_as_they_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, expected in {"": ["0", "1"], "3,5": ["3", "5"], "GPU-a,GPU-b,-1,7": ["GPU-a", "GPU-b"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert workers.visible_gpus() == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert workers.visible_gpus() == ["0", "1"]
