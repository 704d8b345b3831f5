"""Sweeps without a cluster: the published ones, what a line may be, how lines stand, local.sh, the scripts' own errors."""

import importlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import cifar10_alignment
import cifar10_stitching
from slurm import make_sweeps, sweep
from tests.slurm.cluster import ROOT, Project, need
from tests.slurm.test_slurm import LONG, SHORT, WITHOUT_DATA, trains

Alone = Callable[..., Project]


SWEEPS = sorted((ROOT / "slurm" / "sweeps").glob("*.txt"))


# ---- the published sweeps ------------------------------------------------------------------------------------------------


def test_sweeps_are_as_made() -> None:
    assert {path.name: path.read_text() for path in SWEEPS} == make_sweeps.sweeps()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_line_of_every_sweep_parses(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scripts' own dry runs, which make nothing; and no two lines make the same."""
    monkeypatch.chdir(tmp_path)
    lines = sweep.read(path)
    made = [(line.final, line.models) for line in lines]
    assert len(set(made)) == len(lines) == path.read_text().count(".py ")
    assert not list(tmp_path.iterdir())


def test_reproduce_submits_every_sweep_of_the_papers() -> None:
    submitted = re.findall(r"submit (\w+)", (ROOT / "slurm" / "reproduce.sh").read_text().partition("submit()")[2])
    assert sorted(submitted[1:]) == sorted(
        Path(name).stem for name in make_sweeps.published()
    )  # the first is in the comment of the function


def test_zoos_are_complete_and_what_needs_them_finds_them() -> None:
    models: dict[Path, list[int]] = {}
    for name, n_zoos, n_models in (("zoo.txt", 4, 100), ("zoo_fashion.txt", 3, 4)):
        own: dict[Path, list[int]] = {}
        for line in sweep.read(ROOT / "slurm" / "sweeps" / name):
            own.setdefault(line.final, []).extend(line.models)
        assert len(own) == n_zoos and all(numbers == list(range(n_models)) for numbers in own.values())
        models |= own
    for name, script in (
        ("stitching.txt", cifar10_stitching),
        ("stitching_crossval.txt", cifar10_stitching),
        ("stitching_fashion.txt", cifar10_stitching),
        ("alignment.txt", cifar10_alignment),
    ):
        for line in sweep.read(ROOT / "slurm" / "sweeps" / name):
            assert Path(script.parse(script.get_parser(), list(line.words[1:])).zoo) in models


# ---- lines ---------------------------------------------------------------------------------------------------------------

BAD = {
    "train_zoo.py --arch lenet": "line 2: train_zoo.py: error: argument --arch: invalid choice: 'lenet'",
    "train_zoo.py --arch mCNN --resume": "--resume has no place in a sweep",
    "train_ssl.py --tx sca --model simclr --dataset-root=/data": "--dataset-root has no place in a sweep",
    "amortised_clustering.py -type LSTM -results_dir.x": "-results_dir has no place in a sweep",
    "amortised_clustering.py -type.LSTM-results_dir./elsewhere": "-results_dir has no place in a sweep",
    "amortised_clustering.py -type.LSTM-overwrite": "-overwrite has no place in a sweep",
    "amortised_clustering.py -type.LSTM-dry_run": "-dry_run has no place in a sweep",
    "swarm_transformer.py -data.MNIST-data_dir.x": "-data_dir has no place in a sweep",
    "deepsets_exercise.py --steps.2--overwrite": "--overwrite has no place in a sweep",
    "train_zoo.py --arch mCNN --overwrite": "--overwrite has no place in a sweep",
    "train_zoo.py -h": "-h has no place in a sweep",
    "routing_networks.py --compare results/a": "--compare has no place in a sweep",
    "train_ssl.py --knn results/a": "--knn has no place in a sweep",
    "train_zoo.py --arch mCNN --num_models 2 --num_chunks 3 --chunk 0": "no model in this chunk of results/zoo/cifar10-mCNN",
    "train_zoo.py --arch mCNN\a": "without quotes or variables, and printable",
    "train_zoo.py --arch 'mCNN'": "without quotes or variables",
    "train_zoo.py --arch $ARCH": "without quotes or variables",
    "python train_zoo.py --arch mCNN": "python is no script of this suite",
    "../train_zoo.py --arch mCNN": "../train_zoo.py is no script of this suite",
    "missing.py": "missing.py is no script of this suite",
    "train_zoo.py   --arch resnet20": "line 2 is line 1 again",
    "train_zoo.py --num_models 2 --arch resnet20": "line 2 is line 1 again: both make results/zoo/cifar10-resnet20",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_refused(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text(f"train_zoo.py --arch resnet20\n{line}\n")
    assert sweep.main(["prepare", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and BAD[line] in err and str(path) in err and err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.txt"]


def test_an_empty_or_missing_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.txt").write_text("# nothing yet\n\n")
    assert sweep.main(["status", str(tmp_path / "sweep.txt")]) == 2
    assert "has no command line" in capsys.readouterr().err
    assert sweep.main(["status", str(tmp_path / "none.txt")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_sweep_that_is_no_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.txt"
    path.write_bytes("# über\n".encode("latin1"))
    assert sweep.main(["status", str(path)]) == 2
    assert capsys.readouterr().err.endswith(f"error: {path} is not UTF-8 text: byte 2 is 0xfc\n")


def test_a_data_directory_with_a_space(capsys: pytest.CaptureFixture[str]) -> None:
    """A job would read the rest of its name as another word of the line."""
    assert sweep.main(["prepare", str(SWEEPS[0]), "--data-dir", "my data"]) == 2
    assert "--data-dir 'my data'" in capsys.readouterr().err


def test_what_jobs_add_to_a_line() -> None:
    """In each script's own spelling: goes on, and finds the site's data."""
    for text, added in {
        "amortised_clustering.py -type LSTM": "-resume auto",
        "swarm_transformer.py -data MNIST -bs.50": "-resume auto -data_dir /data",
        "train_ssl.py --model simclr --tx sca rot": "--resume auto --dataset-root /data",
        "train_zoo.py --arch mCNN": "--resume auto --data-dir /data",
        "cifar10_stitching.py --arch mCNN": "--resume auto --data-dir /data",
        "deepsets_exercise.py": "",
    }.items():
        complete = sweep.complete(sweep.parse(1, tuple(text.split())), "/data")
        assert complete == f"{text} {added}".strip()
        script = importlib.import_module(text.partition(".")[0])
        assert script.main([*complete.split()[1:], sweep.spelling(script, "dry_run")]) == 0


# ---- how lines stand -----------------------------------------------------------------------------------------------------


def test_a_run_through_its_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = "amortised_clustering.py -type LSTM -bs 50 -wc 60"
    line = sweep.parse(1, tuple(text.split()))
    part, final = (Path(f"results/amortised_clustering/-type.LSTM-bs.50-wc.60{end}") for end in (".part", ""))
    assert sweep.state_of(line, {}) == "new"
    assert sweep.state_of(line, {line.key: sweep.Task("7_1", "waiting", "Resources")}) == "waiting"

    part.mkdir(parents=True)
    (part / "last.pkl").touch()
    (part / "args.json").write_text(json.dumps({"wc": 60}))
    (part / "metrics.csv").write_text("epoch,step,seconds,train_loss,val_accuracy\n3,90,600,2.0,0.75\n")
    record = line.record("exit")
    record.parent.mkdir(parents=True)
    assert sweep.state_of(line, {}) == "resumable"  # killed: nobody could note how it ended
    assert sweep.progress(line) == "epoch 3, val_accuracy 0.75, train_loss 2, 10.0 min, 50.0 to go"
    (part / "args.json").write_text(json.dumps({"wc": 60, "max_epochs": 4}))  # the budget that ends first
    assert sweep.progress(line).endswith("10.0 min, 3.3 to go")
    for status, state in {"75": "resumable", "1": "failed", "2": "failed"}.items():
        record.write_text(f"{status}\n")
        assert sweep.state_of(line, {}) == state
    assert sweep.state_of(line, {line.key: sweep.Task("7_1", "running", "1:00")}) == "running"

    line.record("out").write_text("".join(f"line {i}\n" for i in range(9)))
    sweep.status(Path("s.txt"), [line])
    out = capsys.readouterr().out
    assert "1 line: 1 failed" in out and "exit status 2" in out and "| line 8\n" in out and "| line 3\n" not in out

    part.rename(final)
    (final / "result.json").write_text(json.dumps({"script": "amortised_clustering", "model": {"accuracy": 0.8}}))
    assert sweep.state_of(line, {}) == "finished"  # whatever is noted about earlier starts
    assert sweep.progress(line) == "accuracy 0.8"
    (final / "result.json").write_text(json.dumps({"script": "cifar10_stitching", "layers": [], "failed": {"1": "no"}}))
    assert sweep.state_of(line, {}) == "finished" and sweep.progress(line).endswith(", 1 failed")


def test_a_run_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = sweep.parse(1, ("amortised_clustering.py", "-type", "LSTM"))
    cells = line.path / "cells"
    assert cells.parent.name == "-type.LSTM.part"
    cells.mkdir(parents=True)
    for name in ("0.json", "1.json", "2.failed.json", "3.last.pkl"):
        (cells / name).touch()
    assert sweep.progress(line) == "2 done, 1 failed"


def test_a_zoo_through_its_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = sweep.parse(1, ("train_zoo.py", "--arch", "mCNN", "--num_models", "4", "--num_chunks", "2", "--chunk", "1"))
    zoo = Path("results/zoo/cifar10-mCNN")
    zoo.mkdir(parents=True)
    (zoo / "0.pt").touch()  # of the other chunk
    assert line.models == (2, 3) and sweep.state_of(line, {}) == "new"
    (zoo / "2.last.pkl").touch()
    (zoo / "2.csv").write_text("epoch,step,seconds,train_loss,validation_accuracy\n1,90,60,2.0,0.5\n")
    assert sweep.state_of(line, {}) == "resumable"
    assert sweep.progress(line) == "0 of 2 models; epoch 1, validation_accuracy 0.5, train_loss 2, 1.0 min"
    (zoo / "2.last.pkl").unlink()
    (zoo / "2.pt").touch()
    assert sweep.state_of(line, {}) == "resumable" and sweep.progress(line) == "1 of 2 models"
    (zoo / "3.failed.json").touch()
    assert sweep.state_of(line, {}) == "resumable" and sweep.progress(line) == "1 of 2 models, 1 failed"
    (zoo / "3.failed.json").unlink()
    (zoo / "3.pt").touch()
    assert sweep.state_of(line, {}) == "finished"


# ---- without SLURM -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_local(alone: Alone) -> None:
    """The same file without SLURM: two at a time, a failure is shown and stops no other; again, and only that is tried."""
    project = alone(SHORT[0], WITHOUT_DATA, SHORT[1])
    out, _ = project.call("local.sh", "-j", "2", status=2)  # that of the line that failed
    assert "2 finished, 1 failed" in out and "CIFAR10 is not there" in out
    project.write(SHORT[0], SHORT[1])
    before = sorted((path, path.stat().st_mtime_ns) for path in project.folder.glob("results/zoo/*/*"))
    assert len(before) == 6
    assert "2 finished" in project.call("local.sh")[0]
    assert before == sorted((path, path.stat().st_mtime_ns) for path in project.folder.glob("results/zoo/*/*"))


@pytest.mark.parametrize("gpus, chosen", [("4,7", {"1": "4", "2": "7", "3": "7"}), ("", {"1": "", "2": "", "3": ""})])
def test_runs_here_share_gpus_and_cores(gpus: str, chosen: dict[str, str], alone: Alone) -> None:
    """Each has the GPU with the fewest runs: the second run ends before the first, so the third has its GPU."""
    project = alone(*SHORT[:3])
    note = 'echo "$2:$CUDA_VISIBLE_DEVICES:$OMP_NUM_THREADS" >>ran.txt'
    (project.folder / "slurm" / "run_line.sh").write_text(
        f'#!/bin/sh\n{note}\n[ "$2" != 1 ] || sleep 3\n[ "$2" != 2 ] || sleep 1\n'
    )
    project.environment["CUDA_VISIBLE_DEVICES"] = gpus
    del project.environment["OMP_NUM_THREADS"]
    project.call("local.sh", "-j", "2")
    ran = [line.split(":") for line in (project.folder / "ran.txt").read_text().split()]
    assert {number: gpu for number, gpu, _ in ran} == chosen
    assert {threads for *_, threads in ran} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_runs_here(number: signal.Signals, alone: Alone) -> None:
    """Ctrl-C, which a terminal sends to all, and SIGTERM to local.sh alone: it waits for the run, and starts no other."""
    project = alone(LONG, SHORT[0])
    process = project.start("local.sh")
    trains(project)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=120)
    assert process.returncode == 75 and project.states() == {1: "resumable", 2: "new"}
    assert "stopped by SIGTERM" in project.run_output()


@pytest.mark.slow
def test_requeues_have_an_end(alone: Alone) -> None:
    """A run that never comes to its end is not requeued for ever: the fifth requeue was the last that site.sh allows."""
    project = alone(LONG)
    line = sweep.parse(1, tuple(LONG.split()))
    lines = project.folder / "prepared.lines"
    lines.write_text(f"{line.key}\t{sweep.complete(line, 'data')}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "5"}
    command = [str(project.folder / "slurm" / "run_line.sh"), str(lines), "1"]
    process = subprocess.Popen(command, cwd=project.folder, env=project.environment | job, stdout=subprocess.PIPE, text=True)
    trains(project)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "was requeued 5 times" in out and "back into the queue" not in out


def test_what_would_be_submitted(alone: Alone) -> None:
    need("git")
    project = alone("# two", *SHORT[:2])
    files = sorted(project.folder.rglob("*"))
    out, err = project.call("submit.sh", "--time=1:00:00", "--partition=gpu", own=["--dry-run", "--at-once", "7"])
    assert out == "JOB\n" and "--array=2,3%7" in err and f"    2  {SHORT[0]} --resume auto --data-dir data\n" in err
    assert err.index("--time=30") < err.index("--time=1:00:00") < err.index("array.slurm")  # the last one counts
    assert [path for path in sorted(project.folder.rglob("*")) if "__pycache__" not in str(path)] == files


@pytest.mark.parametrize(
    "command, message",
    {
        "submit.sh": "which sweep?",
        "submit.sh none.txt": "there is no sweep none.txt",
        "submit.sh --at-once 0 none.txt": "--at-once 0",
        "submit.sh --time=1 none.txt": "unknown option --time=1: options of sbatch come after the sweep",
        "submit.sh --multi-gpu slurm/sweeps/routing.txt": "--multi-gpu: a run of routing_networks.py takes one GPU",
        "local.sh": "which sweep?",
        "local.sh none.txt": "there is no sweep none.txt",
        "local.sh README.md -j 0": "-j 0: -j N is the only option",
        "status.sh": "which sweep?",
    }.items(),
)
def test_wrong_command_lines(command: str, message: str) -> None:
    script, *options = command.split()
    done = subprocess.run([str(ROOT / "slurm" / script), *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_shell_scripts_are_clean() -> None:
    need("shellcheck")
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.slurm"), *ROOT.glob("tests/slurm/*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
