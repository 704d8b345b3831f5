"""The SWARM scripts with two processes of torchrun: what they compute, stops, kills, and what is refused."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

from common import parallel
from common.datasets.mixtures import draw_sets
from common.run import state
from common.seeds import generator_of
from tests import parallel_swarm
from tests.interruptions.cases import assert_equal, make_case, outcome, save_often_draw_nothing
from tests.parallel_swarm import KINDS, REFUSED
from tests.small_images import smooth, write_mnist
from tests.stopping import signal_at

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [*command, str(ROOT / "tests" / "parallel_swarm.py"), str(folder), *words]
    with subprocess.Popen(line, cwd=folder, env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            out, error = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # which ends the processes, too
            raise
        return subprocess.CompletedProcess(line, process.returncode, out, error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of two processes, after two kills, and those of one process."""
    folder, threads = tmp_path_factory.mktemp("parallel"), torch.get_num_threads()
    write_mnist(folder / "data" / "FashionMNIST", smooth(60), smooth(20, seed=1))
    for rank, n in ((1, 3), (0, 2)):
        done = torchrun(folder, "kill", "clustering", str(rank), str(n))
        assert done.returncode == 1 and "exitcode  : -9" in done.stderr, done.stderr[-3000:]
        assert not list(folder.glob("killed/**/*.new"))
    with pytest.MonkeyPatch.context() as patch:
        save_often_draw_nothing(patch)
        torch.save(parallel_swarm.all_steps(folder), folder / "of one.pt")
        patch.setattr(state.State, "check_signal", signal_at(2))
        assert make_case("clustering", folder / "data", folder / "of_one").run() == 75
    torch.set_num_threads(threads)
    done = torchrun(folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


@pytest.fixture(scope="module")
def left(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"left by {rank}.pt", weights_only=True) for rank in (0, 1)]


def numbers(place: Path) -> dict[str, float]:
    """All numbers of the run below a place: of metrics.csv and result.json, but for times and sizes."""
    (result,) = place.rglob("result.json")
    (metrics,) = place.rglob("metrics.csv")
    found = {}

    def walk(name: str, value: Any) -> None:
        for key, part in value.items() if isinstance(value, dict) else ():
            walk(f"{name}/{key}", part)
        if isinstance(value, float | int) and not name.endswith("seconds"):
            found[name] = float(value)

    walk("", json.loads(result.read_text()))
    with open(metrics, newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            walk(f"row {i}", {name: float(value) for name, value in row.items()})
    return found


@pytest.mark.parametrize("precision", ["double", "single"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(kind: str, precision: str, folder: Path, left: list[dict[str, Any]]) -> None:
    """Losses and gradients of each step, validation, and the final metrics: also of batches that do not halve."""
    name = f"{kind} {precision}"
    one = torch.load(folder / "of one.pt", weights_only=True)[name]
    first, second = (of_rank["steps"][name] for of_rank in left)
    assert torch.equal(first, second)  # so their weights never part
    tolerance = 1e-10 if precision == "double" else 1e-5
    scale = one[:, :-1].abs().amax(1)
    # in single precision the steps of Adam amplify rounding: the first is compared
    n = len(one) if precision == "double" else 1
    assert len(one) == len(first) >= 4
    assert ((first - one)[:n, :-1].abs().amax(1) / scale[:n]).max() < tolerance
    assert ((first - one)[:n, -1] / one[:n, -1]).abs().max() < tolerance
    of_one, of_two = (numbers(folder / n / name) for n in ("1", "2"))
    assert of_one.keys() == of_two.keys() and len(of_one) > 15
    # metrics.csv has eight digits
    for key, value in of_one.items():
        assert math.isclose(of_two[key], value, rel_tol=2e-7 if precision == "double" else 2e-3, abs_tol=1e-9), key


@pytest.mark.parametrize("kind", [*KINDS, "late"])
def test_signals_to_one_of_two_stop_both_and_change_nothing(kind: str, folder: Path, left: list[dict[str, Any]]) -> None:
    """At every place in turn: what is left at the end is that of an undisturbed run, bit by bit, with dropout."""
    statuses, whole = left[0]["stopped"][kind], "clustering" if kind == "late" else kind  # looks as rarely as on a GPU
    assert statuses == left[1]["stopped"][kind] == [75] * (len(statuses) - 1) + [0] and len(statuses) >= 3
    assert left[0]["whole"][whole] == left[1]["whole"][whole] == 0
    assert_equal(outcome(folder / "stopped" / kind), outcome(folder / "whole" / whole))
    (log,) = (folder / "stopped" / kind).rglob("log")
    assert "stopped by SIGTERM after step" in log.read_text()
    assert "stopped by a signal to another process after step" in log.read_text()


def test_after_kills_of_either_process_the_run_goes_on(folder: Path, left: list[dict[str, Any]]) -> None:
    assert [of_rank["killed"] for of_rank in left] == [0, 0]
    assert_equal(outcome(folder / "killed"), outcome(folder / "whole" / "clustering"))
    (log,) = (folder / "killed").rglob("log")
    assert "failed" not in log.read_text()


def test_the_first_process_says_when_the_time_is_up(folder: Path, left: list[dict[str, Any]]) -> None:
    """To both after the same step; the model is validated and saved."""
    assert [of_rank["out of time"] for of_rank in left] == [0, 0]
    found = numbers(folder / "out of time")
    assert found["/steps"] == found["row 0/step"] == 3 and found["/epochs"] == 1


def test_processes_that_are_short_of_memory_agree_on_a_size(folder: Path) -> None:
    (log,) = (folder / "short").rglob("log")
    text = log.read_text()
    assert "out of memory in another process: batches go in parts of 1 from now on" in text
    whole, short = numbers(folder / "2" / "images single"), numbers(folder / "short")
    assert whole.keys() == short.keys()
    for name, value in whole.items():
        assert math.isclose(short[name], value, rel_tol=1e-3, abs_tol=1e-9), name


def test_what_is_refused_is_one_line(folder: Path, left: list[dict[str, Any]]) -> None:
    refused = left[0]["refused"]
    assert len(refused) == len(REFUSED) + 1
    for line, of_line in refused.items():
        message = REFUSED.get(
            line, "was made by 1 processes, this is one of 2, which would go on differently: without torchrun"
        )
        assert of_line["statuses"] == [2, 2] and message in of_line["text"], (line, of_line)
        assert of_line["text"].count("\n") == 1, (line, of_line)
    assert not (folder / "refused").exists()


def test_no_thread_of_the_group_outlives_it(left: list[dict[str, Any]]) -> None:
    """One that does can abort the process when the interpreter ends."""
    for of_process in left:
        assert not [name for name in of_process["threads"] if "gloo" in name], of_process["threads"]


def test_sets_are_dealt_out_by_entities(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.randint(100, 1001, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(parallel.deal(sizes), torch.arange(50))
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    dealt = []
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        dealt.append(parallel.deal(sizes))
    assert sorted(torch.cat(dealt).tolist()) == list(range(50)) and all(torch.equal(d, d.sort().values) for d in dealt)
    entities = [int(sizes[d].sum()) for d in dealt]
    assert max(entities) - min(entities) < 0.03 * max(entities)
    sets = draw_sets(5, 2, 3, generator_of(0))
    some = sets[torch.tensor([1, 3])]
    assert some.points.shape[1] == int(some.mask.sum(1).max())
    assert all(torch.equal(some.points[i][some.mask[i]], sets.points[j][sets.mask[j]]) for i, j in ((0, 1), (1, 3)))
