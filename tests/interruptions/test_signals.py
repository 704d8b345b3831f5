"""A run that is stopped by signals, full disks or real kills, and resumed, ends as if nothing had happened, bit for bit.

All scripts that train. Nothing here depends on how fast the machine is.
"""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.interruptions.cases import LINES, Case, assert_equal, make_case, save_often_draw_nothing, undisturbed
from tests.interruptions.disk import fail_at, watch
from tests.stopping import Signals

pytestmark = pytest.mark.slow

# processes are forked from a server that has imported the scripts: they start in milliseconds
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(sorted({line.split()[0] for line in LINES.values()}))


def test_signals_between_all_steps(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first start is stopped at its first look for signals, the second, which resumes it, at its second, and so on."""
    expected, _ = undisturbed(case, keep=False)
    signals, stopped = Signals(monkeypatch), 0
    for start in range(200):
        signals.left, signals.number = 1 + start, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[start % 3]
        status = case.run()
        if status == 0:
            break
        assert status == 75, capsys.readouterr().err
        assert f"stopped by {signals.number.name}" in logged(case) + capsys.readouterr().out
        stopped += 1
    assert status == 0 and stopped >= 3
    assert_equal(case.outcome(), expected)


def logged(case: Case) -> str:
    return "".join(log.read_text() for log in case.results.rglob("log"))


def test_a_full_disk_at_every_operation(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stops with one line, resumable (or, before anything was made, refused), and resumes when there is room."""
    expected, disk = undisturbed(case, keep=False)
    n = len(disk.operations)
    for number in range(1, n + 1, max(1, n // 8)):
        shutil.rmtree(case.results, ignore_errors=True)
        with watch(case.results, keep=False, before=fail_at(number)):
            status = case.run()
        error = capsys.readouterr().err
        assert status in (2, 75) and "No space left on device" in error and "Traceback" not in error, (number, status, error)
        assert case.run() == 0
        assert_equal(case.outcome(), expected, f"full at {disk.operations[number - 1]} {number}: ")


def run_and_die(script: str, line: list[str], results: Path, number: int) -> None:
    """In a process of its own: a real kill before a file operation."""
    save_often_draw_nothing(pytest.MonkeyPatch())
    sys.stdout = sys.stderr = open(os.devnull, "w")

    def die(n: int) -> None:
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with watch(results, keep=False, before=die):
        sys.exit(importlib.import_module(script).main(line))


def killed(case: Case, number: int) -> int | None:
    process = SERVER.Process(target=run_and_die, args=(case.script, case.line, case.results, number))
    process.start()
    process.join(120)
    return process.exitcode


def test_real_kills_and_kills_of_the_resumes(case: Case) -> None:
    expected, disk = undisturbed(case, keep=False)
    assert killed(case, len(disk.operations) // 3) == -signal.SIGKILL
    for number in (10, 30):  # of what is left, if it has so many
        assert killed(case, number) in (-signal.SIGKILL, 0)
    assert case.run() == 0
    assert_equal(case.outcome(), expected)


def test_the_runs_are_worth_interrupting(data: Path, tmp_path: Path) -> None:
    """They return to the best model, and draw random numbers while they train."""
    for kind in ("clustering", "images"):
        case = make_case(kind, data, tmp_path / kind)
        outcome, _ = undisturbed(case, keep=False)
        rows = next(content for name, content in outcome.items() if name.endswith("metrics.csv"))
        assert float(rows[-1]["lr"]) < float(rows[0]["lr"]), f"no backtracking in {kind}: choose other options"
