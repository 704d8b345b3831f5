"""collect_results.py: runs of all kinds, tables over seeds, the papers' figures, bad input."""

import argparse
import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import amortised_clustering
import collect_results as script
from common.gallery import runs as runs_module
from common.gallery.runs import find_runs, read_curves
from common.run import lock as lock_module
from common.run.lock import is_locked, take_lock
from common.run.run import Run, environment
from tests.collecting.runs import OPTIONS, metrics, write_clustering
from tests.command_lines import assert_one_line_and_nothing_made, exit_status

ROOT = Path(__file__).resolve().parents[2]


def collect(root: Path, *options: str) -> int:
    return exit_status(script.main, [str(root), *options])


def states(root: Path) -> dict[str, tuple[str, str]]:
    return {run.path: (run.state, run.note) for run in find_runs(root)}


# ---- runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_in_each_state(tmp_path: Path) -> None:
    runs = tmp_path / "amortised_clustering"
    write_clustering(runs / "done", 0.5)
    for name in ("running", "stopped", "failed", "killed early"):
        path = runs / f"{name}.part"
        path.mkdir()
        (path / "args.json").write_text(json.dumps(OPTIONS))
        (path / "log").write_text("it begins\n" + ("failed: the loss of epoch 2 is not finite\n" if name == "failed" else ""))
        if name != "killed early":
            (path / "last.pkl").write_bytes(b"a checkpoint")
            (path / "metrics.csv").write_text(metrics(0.5, 60, 2) + "3,30")  # the last row is half-written
    (runs / "empty.part").mkdir()
    (runs / "lost").mkdir()
    (runs / "lost" / "args.json").write_text(json.dumps(OPTIONS))
    lock = take_lock(runs / "running.part" / "lock")
    assert lock is not None
    before = {path.partition("/")[2]: state for path, state in states(tmp_path).items()}
    lock.close()
    assert {path: state for path, (state, _) in before.items()} == {
        "done": "finished", "running.part": "running", "stopped.part": "stopped", "failed.part": "failed",
        "killed early.part": "failed", "empty.part": "failed", "lost": "broken",
    }  # fmt: skip
    assert before["running.part"][1] == before["stopped.part"][1] == "epoch 2, 1.0 min"
    assert before["failed.part"][1] == "failed: the loss of epoch 2 is not finite"
    assert "before it saved anything" in before["empty.part"][1] and "no result.json" in before["lost"][1]
    assert states(tmp_path)["amortised_clustering/running.part"][0] == "stopped"  # nobody holds it any more
    run = next(run for run in find_runs(tmp_path) if run.state == "stopped")
    assert run.curves["step"] == [10, 20] and run.script == "amortised_clustering" and run.path.endswith("running.part")


BROKEN = {
    "no JSON": '{"script": "amort',
    "no object": "[1, 2]",
    "empty": "",
    "too deep": "[" * 100_000,
    "binary": "\x00\ufffd\x01",
    "of another form": '{"script": "cifar10_stitching", "layers": [3]}',
    "alignment without maps": '{"script": "cifar10_alignment", "published_deviation": null, "layers": [{"index": 1}]}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_results_are_rows_that_say_so(content: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_clustering(tmp_path / "amortised_clustering" / "whole", 0.5)
    broken = write_clustering(tmp_path / "amortised_clustering" / "broken", 0.5)
    (broken / "result.json").write_text(content)
    (run,) = (run for run in find_runs(tmp_path) if run.path.endswith("broken"))
    assert run.state == "broken" and "result.json" in run.note and run.options["type"] == "Swarm"
    assert collect(tmp_path) == 0 and "1 broken" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["os.scandir", "runs_module.add_options"])
def test_a_run_that_finishes_while_it_is_read(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write_clustering(tmp_path / "amortised_clustering" / "swarm.part", 0.5)
    module, name = {"os": os, "runs_module": runs_module}[moment.partition(".")[0]], moment.partition(".")[2]
    original = getattr(module, name)

    def rename_first(*args: Any) -> Any:
        if part.exists() and (args[0] == part or name == "add_options"):
            part.rename(part.with_suffix(""))
            raise FileNotFoundError(part)
        return original(*args)

    monkeypatch.setattr(module, name, rename_first)
    assert states(tmp_path) == {"amortised_clustering/swarm": ("finished", "")}


def test_a_file_that_is_replaced_while_its_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clustering(tmp_path / "amortised_clustering" / "swarm", 0.5)
    monkeypatch.setattr(runs_module, "is_regular", lambda file: True)
    os.symlink("nowhere", path / "metrics.csv.new")
    monkeypatch.setattr(runs_module.os, "lstat", os.stat)  # fails for it, as for a file that has gone
    assert states(tmp_path) == {"amortised_clustering/swarm": ("finished", "")}


def test_curves_are_thinned_out_and_end_before_what_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(metrics(0.5, 60, 1000) + "1001,100")
    curves = read_curves(path)
    assert len(curves["epoch"]) == 200 and curves["epoch"][0] == 1 and curves["epoch"][-1] == 1000
    rows = [f"{i},{'nan' if i % 10 else i},{i}" for i in range(1, 801)]
    path.write_text("\n".join(["epoch,test_accuracy,train_loss", *rows]))
    accuracy = read_curves(path)["test_accuracy"]
    assert [value for value in accuracy if value is not None] == list(range(10, 801, 10))  # measured every tenth epoch
    path.write_text("epoch,val_loss\n1,2\n2,nan\n3,inf\n4,1\n")
    assert read_curves(path)["val_loss"] == [2, None, None, 1]
    path.write_text("run,epoch,val_loss\n0,1,2\n0,2,2\n1,1,2\n")  # of several trainings
    assert read_curves(path) == {}


def test_an_error_is_told_in_the_log_until_the_run_goes_on(tmp_path: Path) -> None:
    args = argparse.Namespace(results_dir=str(tmp_path), resume="auto", overwrite=False)
    with pytest.raises(ZeroDivisionError), Run("amortised_clustering", "fails", args, another="-run ID") as run:
        run.open()
        run.last.write_bytes(b"a checkpoint")
        1 / 0  # noqa: B018
    assert states(tmp_path) == {"amortised_clustering/fails.part": ("failed", "failed: division by zero")}
    with Run("amortised_clustering", "fails", args, another="-run ID") as run:
        assert run.status == "unfinished"
        run.open()
        assert states(tmp_path)["amortised_clustering/fails.part"][0] == "running"
    assert states(tmp_path)["amortised_clustering/fails.part"][0] == "stopped"


def test_looking_for_a_lock_takes_it_from_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path) and not path.exists()
    lock = take_lock(path)
    assert is_locked(path) and take_lock(path) is None
    lock.close()
    assert not is_locked(path) and take_lock(tmp_path / "gone" / "lock") is None
    with open(path) as look:  # as is_locked does, for an instant
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr(lock_module, "SECONDS", 1)
        threading.Timer(0.05, lambda: fcntl.flock(look, fcntl.LOCK_UN)).start()
        assert take_lock(path) is not None


def test_models_of_a_zoo_are_runs(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo" / "cifar10-mCNN"
    zoo.mkdir(parents=True)
    for index, accuracy in enumerate((0.8, 0.9)):
        record = {"script": "train_zoo", "model": index, "options": {"arch": "mCNN", "seed": 0}, "test": {"accuracy": accuracy}}
        (zoo / f"{index}.json").write_text(json.dumps(record))
    (zoo / "2.last.pkl").write_bytes(b"a checkpoint")
    (zoo / "2.csv").write_text(metrics(0.5, 60, 2))
    (zoo / "3.json").write_text("{")
    for index in (0, 4):  # the first has been repeated since
        (zoo / f"{index}.failed.json").write_text(json.dumps({"reason": "the loss of epoch 2 is not finite"}))
    (zoo / "3.pt").write_bytes(b"weights")
    (zoo / "5.failed.json").write_text("[]")
    (zoo / "2019.json").write_text('{"a": 1}')  # somebody's file
    runs = {run.path: run for run in find_runs(tmp_path)}
    assert {name: run.state for name, run in runs.items()} == {
        "zoo/cifar10-mCNN/0": "finished", "zoo/cifar10-mCNN/1": "finished", "zoo/cifar10-mCNN/2": "stopped",
        "zoo/cifar10-mCNN/3": "broken", "zoo/cifar10-mCNN/4": "failed", "zoo/cifar10-mCNN/5": "broken",
    }  # fmt: skip
    assert runs["zoo/cifar10-mCNN/4"].note == "failed: the loss of epoch 2 is not finite"
    assert all(run.about["written"] for run in runs.values() if run.files)
    assert runs["zoo/cifar10-mCNN/1"].seed == 1 and runs["zoo/cifar10-mCNN/1"].options == {"arch": "mCNN"}


def test_a_finished_run_says_how_many_of_its_jobs_failed(tmp_path: Path) -> None:
    path = write_clustering(tmp_path / "amortised_clustering" / "one", 0.5)
    result = json.loads((path / "result.json").read_text())
    for failed, note in (({}, ""), ({"0-1": "no", "1-2": "no"}, "2 of its jobs failed"), (3, ""), ("x", "")):
        (path / "result.json").write_text(json.dumps(result | {"failed": failed}))
        assert states(tmp_path) == {"amortised_clustering/one": ("finished", note)}


# ---- tables and pictures -------------------------------------------------------------------------------------------------


def test_the_machine_is_no_option() -> None:
    assert environment(torch.device("cpu")).keys() <= runs_module.NOT_OPTIONS


def test_tables_over_seeds(tmp_path: Path) -> None:
    runs = tmp_path / "amortised_clustering"
    for seed, loss in enumerate((0.4, 0.5, 0.9)):
        where = {"fp32_products": ("MKL", "oneDNN")[seed % 2], "processes": 1 + seed % 2, "raw": False, "jobs": 1 + seed}
        write_clustering(runs / f"swarm{seed}", loss, seed=seed, seconds=20.5 * (seed + 1), **where)
    write_clustering(runs / "lstm", 0.7, type="LS|TM <b>", seed=5, lr=0.0123456)
    stopped = write_clustering(runs / "swarm3.part", 0.1, seed=3)
    (stopped / "result.json").unlink()
    (stopped / "last.pkl").write_bytes(b"a checkpoint")
    assert collect(tmp_path) == 0
    with open(tmp_path / "tables" / "amortised_clustering.csv") as file:
        rows = {row["type"]: row for row in csv.DictReader(file)}
    swarm, lstm = rows["Swarm"], rows["LS|TM <b>"]
    assert float(swarm["cross entropy"]) == pytest.approx(0.6)
    assert float(swarm["cross entropy, deviation"]) == pytest.approx(0.07**0.5)
    assert (swarm["cross entropy, n"], swarm["runs"], swarm["not finished"]) == ("3", "3", "1")
    assert float(swarm["minutes"]) == pytest.approx(41 / 60, abs=1e-12)  # all digits
    assert swarm["parameters"] == "9226" and swarm["device"] == "CPU, 1 thread"
    assert lstm["cross entropy, deviation"] == "" and lstm["cross entropy, n"] == "1"
    assert "bs" not in swarm and "seed" not in swarm  # what does not vary, and what is averaged over
    table = (tmp_path / "tables" / "amortised_clustering.md").read_text()
    assert "| 0.6 ± 0.26 |" in table and "| 0.683 |" in table and r"| LS\|TM \<b\> | 0.0123456 |" in table
    assert (tmp_path / "tables" / "amortised_clustering.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    line = f"-type SetLinear -tasks 20 -bs 5 -max_epochs 3 -results_dir {tmp_path}"
    assert exit_status(amortised_clustering.main, line.split()) == 0
    (run,) = find_runs(tmp_path)
    result = json.loads((tmp_path / run.path / "result.json").read_text())
    assert run.state == "finished" and run.options["type"] == "SetLinear" and run.seed == 0
    assert run.key_metrics["cross entropy"].mean == result["model"]["cross_entropy"] and run.curves["epoch"] == [1, 2, 3]
    assert run.files[:3] == ["metrics.png", "weights.png", "samples.png"]


@pytest.mark.slow
def test_what_is_committed(tmp_path: Path) -> None:
    """All committed runs are read, and have tables and pictures."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "results"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git, so nobody knows what is committed")
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    results, tables = tmp_path / "results", tmp_path / "out" / "tables"
    assert collect(results, "--out", str(tables.parent)) == 0
    assert {state for state, _ in states(results).values()} == {"finished"}
    scripts = {run.script for run in find_runs(results)}
    assert len(scripts) >= 8 and {path.stem for path in tables.glob("*.md")} == scripts
    assert len(list(tables.glob("*.png"))) >= 5


def test_pictures_of_many_groups_show_the_best(tmp_path: Path) -> None:
    for i in range(60):
        write_clustering(tmp_path / "amortised_clustering" / str(i), 0.5 + i, lr=i)
        zoo = tmp_path / "zoo" / str(i)
        zoo.mkdir(parents=True)
        record = {"script": "train_zoo", "model": 0, "options": {"arch": str(i)}, "test": {"accuracy": i / 60}}
        (zoo / "0.json").write_text(json.dumps(record))
    assert collect(tmp_path) == 0
    for script_name in ("amortised_clustering", "train_zoo"):
        height = int.from_bytes((tmp_path / "tables" / f"{script_name}.png").read_bytes()[20:24], "big")
        assert height < 3000


def test_two_collectors_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_clustering(tmp_path / "amortised_clustering" / "a", 0.5)
    (tmp_path / "tables").mkdir()
    lock = take_lock(tmp_path / "tables" / "lock")
    assert collect(tmp_path) == 2 and "is being written by another process" in capsys.readouterr().err
    lock.close()
    assert collect(tmp_path) == 0 and not (tmp_path / "tables" / "lock").exists()


@pytest.mark.slow
def test_five_hundred_runs_within_ten_seconds(tmp_path: Path) -> None:
    for i in range(500):
        kind = ("Swarm", "LSTM", "SetLinear", "SetTransformer")[i % 4]
        write_clustering(tmp_path / "amortised_clustering" / str(i), 0.5 + i / 1000, type=kind, lr=i // 20, seed=i, n_rows=300)
    began = time.process_time()  # other tests are at work beside this one
    assert collect(tmp_path) == 0
    assert time.process_time() - began < 10


# ---- command line --------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_clustering(tmp_path / "run", 0.5)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for root, options, message in (
        (tmp_path / "nowhere", [], "nowhere is no directory"),
        (run, [], "is a run itself: name the directory above it"),
        (tmp_path / "empty", [], "there is no run below"),
        (tmp_path, ["--watch", "0"], "--watch"),
        (Path("results"), ["--out", ""], "an empty name is no directory"),
    ):
        status = collect(root, "--out", str(out), *options)
        assert_one_line_and_nothing_made(status, message, out, capsys)
    out.write_text("a file")
    assert collect(tmp_path, "--out", str(out)) == 2 and "cannot use" in capsys.readouterr().err


@pytest.mark.slow
def test_watching_until_a_signal(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    command = [sys.executable, "collect_results.py", str(tmp_path), "--watch", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def wait_for(text: str) -> None:
        until = time.monotonic() + 60
        while not (page.exists() and text in page.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)

    wait_for('"runs":[]')  # nothing is there yet
    write_clustering(tmp_path / "amortised_clustering" / "first", 0.5)
    wait_for('"path":"amortised_clustering/first"')
    assert '"watch":1' in page.read_text()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and '"watch":null' in page.read_text() and "1 runs, 0 running" in out
