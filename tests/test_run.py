"""The life of a run: its directory and lock, second starts, what --overwrite may remove, and how a command ends."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import amortised_clustering
import cifar10_alignment
import cifar10_projections
import cifar10_stitching
from common import parallel
from common.errors import Failed, InputError, Interrupted
from common.run import dotted
from common.run import run as run_module
from common.run.clock import Clock
from common.run.command import Command
from common.run.lock import is_locked, take_lock
from common.run.run import FILES, Run, RunError, environment, git_revision
from common.run.state import rng_state, set_rng_state
from tests.command_lines import exit_status
from tests.test_options import BAD_NAMES

CPU = torch.device("cpu")
MAY_CHANGE = ("results_dir", "resume", "overwrite", "retry_failed", "to_stdout")


def make(place: Path, name: str = "a", *, script: str = "script", **options: Any) -> Run:
    """A run whose script has the usual options, and `a`."""
    args = {"results_dir": str(place), "resume": None, "overwrite": False, "retry_failed": False, "a": 1, "device": "cpu"}
    return Run(script, name, Namespace(**args | options), another="-run ID", may_change=MAY_CHANGE, files=("cells/*",))


def content(place: Path) -> dict[str, Any]:
    """Everything below a directory, links as links."""
    found: dict[str, Any] = {}
    for path in place.rglob("*"):
        kind = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(place))] = kind
    return found


def finished(place: Path, name: str = "a", result: dict[str, Any] | None = None, **options: Any) -> Path:
    with make(place, name, **options) as run:
        run.open()
        run.last.write_bytes(b"a state")
        run.finish(result or {"loss": 1.0})
    return run.final


def unfinished(place: Path, name: str = "a", **options: Any) -> Path:
    with make(place, name, **options) as run:
        run.open()
        run.last.write_bytes(b"a state")
    return run.part


Capture = pytest.CaptureFixture[str]


def refused(run: Run, capsys: Capture, message: str, then: Callable[[], object] = lambda: None) -> None:
    """With exit status 2 and one line; what is there stays as it is, and nothing stays locked."""
    before = content(Path(run.args.results_dir))
    with pytest.raises(SystemExit) as stopped, run:
        then()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert error.startswith(f"{run.script}.py: error: ") and error.count("\n") == 1
    assert content(Path(run.args.results_dir)) == before and run._lock is None


def says_finished(run: Run, capsys: Capture, status: int = 0) -> str:
    with pytest.raises(SystemExit) as stopped, run:
        pytest.fail("it has begun")
    assert stopped.value.code == status
    return capsys.readouterr().out


# ---- life of a directory -------------------------------------------------------------------------------------------------


def test_life_of_a_directory(tmp_path: Path, capsys: Capture) -> None:
    with make(tmp_path, "-a.1") as run:
        assert run.status == "new" and not list(tmp_path.iterdir())
        run.open(data="0123")
        assert run.begun and run.path == run.part == tmp_path / "script" / "-a.1.part" and is_locked(run.part / "lock")
        run.log("hello")
        run.last.touch()
        assert run.finish({"loss": 1.0}) == 0
    assert run.path == run.final == tmp_path / "script" / "-a.1" and not run.part.exists()
    assert sorted(p.name for p in run.path.iterdir()) == ["args.json", "last.pkl", "log", "result.json"]
    assert (run.path / "log").read_text() == capsys.readouterr().out == "hello\n"
    assert json.loads((run.path / "result.json").read_text()) == {"loss": 1.0}
    args = json.loads((run.path / "args.json").read_text())
    assert (args["script"], args["a"], args["data"], args["torch"]) == ("script", 1, "0123", torch.__version__)
    assert args.keys() == {"script", "data", *vars(run.args), *environment(CPU)}


def test_second_start_of_a_finished_run(tmp_path: Path, capsys: Capture) -> None:
    finished(tmp_path)
    refused(make(tmp_path), capsys, "has finished: -overwrite replaces it, -run ID starts another")
    before = content(tmp_path)
    assert "has finished: nothing to do" in says_finished(make(tmp_path, resume="auto"), capsys)
    assert "has finished: nothing to do" in says_finished(make(tmp_path, retry_failed=True), capsys)
    assert content(tmp_path) == before
    refused(make(tmp_path, resume="auto", a=2), capsys, "made with a 1, not 2")
    with make(tmp_path, overwrite=True) as run:
        assert run.status == "new" and content(tmp_path) == before
        run.open()
        assert sorted(p.name for p in run.part.iterdir()) == ["args.json", "lock", "log"] and not run.final.exists()


def test_second_start_of_an_unfinished_run(tmp_path: Path, capsys: Capture) -> None:
    part = unfinished(tmp_path)
    (part / "log").write_text("hello\n")
    refused(make(tmp_path), capsys, "was started before: -resume auto continues it, -overwrite replaces it, -run ID starts")
    refused(make(tmp_path, resume=str(part / "last.pkl")), capsys, "was started before")
    refused(make(tmp_path, resume="old/best.pkl"), capsys, "there is no checkpoint old/best.pkl")
    refused(make(tmp_path, resume="auto", a=2), capsys, "made with a 1, not 2")
    for option in ({"resume": "auto"}, {"retry_failed": True}):
        refused(make(tmp_path, overwrite=True, **option), capsys, "choose one")
    args = (part / "args.json").read_text()
    with make(tmp_path, resume="auto", to_stdout=False) as run:
        assert run.status == "unfinished" and run.last.read_bytes() == b"a state"
        run.open()
    assert (part / "args.json").read_text() == args and (part / "log").read_text() == "hello\nstarted again\n"
    with make(tmp_path, overwrite=True) as run:
        run.open()
        assert not run.last.exists() and (part / "log").read_text() == ""


def test_a_run_that_was_killed_before_it_saved_anything(tmp_path: Path, capsys: Capture) -> None:
    """It begins again; but one that was to start from a file does not start from nothing instead."""
    with make(tmp_path) as run:
        run.open()
        run.log("hello")
    assert sorted(p.name for p in run.part.iterdir()) == ["args.json", "log"]
    refused(make(tmp_path), capsys, "was started before")
    with make(tmp_path, resume="auto") as run:
        assert run.status == "new"
        run.open()
    assert (run.part / "log").read_text() == ""
    (run.part / "args.json").write_text(json.dumps({"resume": "old/best.pkl"}))
    refused(make(tmp_path, resume="auto"), capsys, "was to start from old/best.pkl and has not begun: -overwrite -resume old/")
    (run.part / "args.json").write_text("{")
    refused(make(tmp_path, resume="auto"), capsys, "args.json is damaged")


def test_a_run_is_resumed_only_with_what_it_was_made_from(tmp_path: Path, capsys: Capture) -> None:
    """Data and networks, whether a state has been saved or jobs alone have been done."""
    with make(tmp_path) as run:
        run.open(data="0123", drawn=[(1, 2)])
    for write in (lambda: None, lambda: run.last.touch()):
        write()
        for made_from in ({"data": "4567"}, {"drawn": [(2, 1)]}):
            again = make(tmp_path, resume="auto")
            refused(again, capsys, "was made with", lambda: again.open(**made_from))  # noqa: B023
        with make(tmp_path, resume="auto") as again:
            again.open(data="0123", drawn=[(1, 2)], more=3)
    with make(tmp_path, overwrite=True) as again:
        again.open(data="4567")


def test_best_without_last_is_not_thrown_away(tmp_path: Path, capsys: Capture) -> None:
    part = unfinished(tmp_path)
    (part / "last.pkl").rename(part / "best.pkl")
    refused(make(tmp_path, resume="auto"), capsys, "has a best.pkl but no last.pkl to resume from")


def test_overwrite_does_not_delete_what_it_is_to_start_from(tmp_path: Path, capsys: Capture) -> None:
    for path in (finished(tmp_path), unfinished(tmp_path, "b")):
        run = make(tmp_path, path.name.removesuffix(".part"), overwrite=True, resume=str(path / "last.pkl"))
        refused(run, capsys, "-overwrite would delete")


def test_killed_around_the_rename(tmp_path: Path, capsys: Capture) -> None:
    part = unfinished(tmp_path)
    (part / "result.json").write_text("{}")  # before it
    (part / "lock").touch()
    assert "nothing to do" in says_finished(make(tmp_path, resume="auto"), capsys)
    final = part.with_suffix("")
    assert final.exists() and not part.exists() and not (final / "lock").exists()
    (final / "lock").touch()  # after it
    assert "nothing to do" in says_finished(make(tmp_path, resume="auto"), capsys)
    assert not (final / "lock").exists()


def test_results_directory_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    run = make(tmp_path / "file")
    refused(run, capsys, "cannot write to", run.open)
    (tmp_path / "script").touch()
    run = make(tmp_path)
    refused(run, capsys, "name another place for results", run.open)


def test_a_run_on_a_cpu_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be full, or somebody else's: whatever starts CUDA takes memory there, or fails."""

    def fail() -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment(CPU)["gpu"] is None
    set_rng_state(rng_state())
    assert Clock().used() < 60


def test_the_revision_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's copy lies within the project, whose own revision may be another by then."""
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    assert git_revision() == "unknown"  # neither a copy nor a checkout
    (tmp_path / "REVISION").write_text("0123abc-dirty-4567def\n")
    assert git_revision() == environment(CPU)["git_revision"] == "0123abc-dirty-4567def"


def test_what_is_logged_and_printed(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path, "quiet") as run:
        run.quiet = True
        run.open()
        run.log("hello")
        assert capsys.readouterr().out == f"running in {run.part}\n" and (run.part / "log").read_text() == "hello\n"
    with make(tmp_path, "to stdout", to_stdout=True) as run:
        run.quiet = True
        run.open()
        run.log("hello")
        assert capsys.readouterr().out.endswith("\nhello\n") and not (run.part / "log").exists()
    with make(tmp_path) as run:
        run.open()
        run._log = open("/dev/full", "w")  # a full disk silences the log, not the run
        run.log("hello")
        told = capsys.readouterr()
        assert told.out == "hello\n" and told.err == "log: No space left on device: hello\n"
        monkeypatch.setattr(run._log, "close", lambda: None)


# ---- jobs that failed ----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_opened_again_to_repeat_its_failed_jobs(tmp_path: Path, capsys: Capture) -> None:
    failed = {"0-1": "the loss is not finite", "1-2": "it needs 0-1"}
    with make(tmp_path) as run:
        run.open()
        assert run.finish({"failed": failed}) == 1
    before = content(tmp_path)
    told = says_finished(make(tmp_path, resume="auto"), capsys, status=1)
    assert told == f"the run {run.final} has finished, but 2 jobs failed: -retry-failed repeats them\n"
    refused(make(tmp_path, retry_failed=True, a=2), capsys, "made with a 1, not 2")
    with make(tmp_path, retry_failed=True) as run:
        assert run.status == "unfinished" and content(tmp_path) | {"script/a/lock": b""} == content(tmp_path)
        assert is_locked(run.final / "lock")
        refused(make(tmp_path, retry_failed=True), capsys, "in use by another process")
        assert says_finished(make(tmp_path, resume="auto"), capsys, status=1) == told and is_locked(run.final / "lock")
    assert content(tmp_path) == before  # nothing was opened
    with make(tmp_path, retry_failed=True) as run:
        run.open()
        assert run.path == run.part and not run.final.exists() and not (run.part / "result.json").exists()
    assert not (run.part / "lock").exists()  # stopped early: it is one to be resumed now
    with make(tmp_path, resume="auto") as run:
        run.open()
        assert run.finish({}) == 0
    assert "nothing to do" in says_finished(make(tmp_path, retry_failed=True), capsys)


def test_killed_before_the_rename_with_jobs_that_failed(tmp_path: Path, capsys: Capture) -> None:
    part = unfinished(tmp_path)
    (part / "result.json").write_text('{"failed": {"0": "no"}}')
    with make(tmp_path, retry_failed=True) as run:
        assert run.status == "unfinished"
    assert "1 jobs failed" in says_finished(make(tmp_path, resume="auto"), capsys, status=1) and run.final.exists()


# ---- two processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [{"resume": "auto"}, {}, {"overwrite": True}, {"retry_failed": True}])
def test_a_run_in_use_is_left_alone(look: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    with make(tmp_path) as run:
        run.open()
        refused(make(tmp_path, **look), capsys, "is in use by another process: wait for it; -run ID starts another run")
        assert is_locked(run.part / "lock")


def test_a_state_without_its_options_is_not_resumed(tmp_path: Path, capsys: Capture) -> None:
    """They were written first: without them, nobody knows what the run is."""
    part = unfinished(tmp_path)
    (part / "args.json").unlink()
    refused(make(tmp_path, resume="auto"), capsys, "has a last.pkl but no args.json")


def test_two_directories_of_one_run(tmp_path: Path, capsys: Capture) -> None:
    part = unfinished(tmp_path)
    part.with_suffix("").mkdir()
    refused(make(tmp_path, resume="auto"), capsys, "are both there")


def test_who_has_looked_at_a_run_has_it_to_itself(tmp_path: Path, capsys: Capture) -> None:
    """From before last.pkl is read to the end: else two processes could resume from the same one, or from one that is old."""
    part = unfinished(tmp_path)
    assert not (part / "lock").exists()
    with make(tmp_path, resume="auto") as first:
        assert first.status == "unfinished"
        for look in ({"resume": "auto"}, {}, {"overwrite": True}):
            refused(make(tmp_path, **look), capsys, "in use by another process")
        first.open()
    refused(make(tmp_path), capsys, "was started before")
    with make(tmp_path, resume="auto") as first:
        assert first.status == "unfinished"
        first.finish({})
    assert [path.name for path in part.parent.iterdir()] == ["a"]
    assert "nothing to do" in says_finished(make(tmp_path, resume="auto"), capsys) and not (first.final / "lock").exists()


@pytest.mark.parametrize("other", [finished, unfinished])
def test_a_run_that_another_process_makes_between_look_and_open(other: Callable, tmp_path: Path, capsys: Capture) -> None:
    """It has finished, or has begun and stopped again: its files are there, nobody holds its lock."""
    run = make(tmp_path, resume="auto")
    with pytest.raises(SystemExit) as stopped, run:
        assert run.status == "new"
        path = other(tmp_path)
        before = content(tmp_path)
        run.open()
    assert stopped.value.code == 2 and f"another process has made {path} meanwhile" in capsys.readouterr().err
    assert content(tmp_path) == before and not is_locked(path / "lock")


def test_a_run_that_begins_between_look_and_open(tmp_path: Path, capsys: Capture) -> None:
    for options in ({}, {"overwrite": True}):
        run = make(tmp_path, **options)
        with make(tmp_path) as other:
            with pytest.raises(SystemExit) as stopped, run:
                if other.status == "new" and not other.begun:
                    other.open()
                    other.last.touch()
                before = content(tmp_path)
                run.open()
            assert stopped.value.code == 2 and "in use by another process" in capsys.readouterr().err
            assert content(tmp_path) == before and is_locked(other.part / "lock")
        shutil.rmtree(other.part)


def test_a_lock_that_was_let_go_of_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Its file was opened before another process finished: to lock it then says nothing about the directory."""
    unfinished(tmp_path)
    honest = fcntl.flock
    with make(tmp_path, resume="auto") as other:
        other.open()

        def late(file: object, how: int) -> None:
            other.close()
            honest(file, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(SystemExit), make(tmp_path, resume="auto"):
            pytest.fail("it has the lock")
    assert "in use by another process" in capsys.readouterr().err


# ---- names ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of several scripts, and what lies beside them, which no test changes."""
    results = tmp_path_factory.mktemp("project") / "results"
    for script in ("script", "cifar10_projections", "amortised_clustering", "cifar10_stitching"):
        for name in ("x", "projections", "-type.Swarm"):
            finished(results, name, script=script)
            unfinished(results, f"{name}-2", script=script)
        for name in ("figures-x", "x.lock", "x.new"):
            (results / script / name).mkdir()
            (results / script / name / "penalties.png").write_bytes(b"a picture")
    (results / "index.html").write_text("a page")
    (results.parent / "args.json").write_text('{"script": "script"}')
    return results


def shortened(value: object) -> str:
    return getattr(value, "__module__", ascii(value)[-40:])


@pytest.mark.parametrize("name", BAD_NAMES, ids=shortened)
def test_no_caller_can_remove_anything_by_a_name(name: str, results: Path, capsys: Capture) -> None:
    """As if no parser had looked at it."""
    before = content(results.parent)
    for look in ({"overwrite": True}, {"resume": "auto"}, {}):
        run = make(results, name, **look)
        with pytest.raises(SystemExit) as stopped, run:
            run.open()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "cannot be a run's name" in error and error.count("\n") == 1
        assert content(results.parent) == before


PROJECTIONS, CLUSTERING = cifar10_projections.main, amortised_clustering.main
LINES: list[tuple[Callable, list[str]]] = [
    *((PROJECTIONS, ["--overwrite", "--name", name]) for name in BAD_NAMES),
    (PROJECTIONS, ["--overwrite", "--name=.."]),
    *((CLUSTERING, ["-overwrite", "-type", "Swarm", "-run", name]) for name in BAD_NAMES),
    *((CLUSTERING, ["-overwrite", "-type", "Swarm", *more]) for more in (["-wc", "\t3"], ["-wc=3\n"], ["-lr.\t0.1"])),
    (CLUSTERING, ["-overwrite", "-type", "Swarm", "-lr", "0." + 240 * "0" + "1"]),
    *(
        (main, ["--overwrite", "--arch", "mCNN", *more])
        for main in (cifar10_stitching.main, cifar10_alignment.main)
        for more in (["--name", ".."], ["--pairs", "../x"], ["--pairs", "0-1", "\t0-2"])
    ),
]


@pytest.mark.parametrize(("main", "line"), LINES, ids=shortened)
def test_no_command_line_can_remove_anything_by_a_name(main: Callable, line: list[str], results: Path, capsys: Capture) -> None:
    before = content(results.parent)
    option = "-results_dir" if line[0] == "-overwrite" else "--results-dir"
    assert exit_status(main, [*line, option, str(results)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{main.__module__}.py: error: ") and error.count("\n") == 1
    reasons = ("cannot be part of a file name", "cannot be a run's name", "would be called", "is no pair of two networks")
    assert any(reason in error for reason in reasons)
    assert content(results.parent) == before


def test_nor_from_a_shell(results: Path) -> None:
    before = content(results.parent)
    command = [sys.executable, cifar10_projections.__file__, "--name", "..", "--overwrite", "--results-dir", str(results)]
    done = subprocess.run(command, cwd=results.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert content(results.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">/dev/full", ">/dev/full 2>&1", ">&- 2>&- <&-"])
def test_a_stream_that_is_full_or_closed(streams: str, tmp_path: Path) -> None:
    line = "-type Swarm -n_hidden 2 -n_iter 1 -tasks 10 -max_epochs 1 -results_dir results"
    script = f"{sys.executable} {amortised_clustering.__file__}"
    command = f"{script} {line} {streams} && {script} -h {streams} || exit 3; {script} -type Swarm -n_hidden 0 {streams}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line[:12] for line in done.stderr.splitlines()] == (["cannot print"] * 2 + ["amortised_cl"]) * (
        streams == ">/dev/full"
    )
    (result,) = tmp_path.glob("results/amortised_clustering/*/result.json")
    assert json.loads(result.read_text())["epochs"] == 1


# ---- what --overwrite may remove -----------------------------------------------------------------------------------------

OTHERS = {"b": None, "b/args.json": b'{"script": "script"}', "b/last.pkl": b"a state"}  # beside the run


def write(place: Path, files: dict[str, Any]) -> None:
    """Write files by relative path: bytes, None for a directory, text for the target of a link."""
    for name, kind in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind is None:
            path.mkdir(exist_ok=True)
        elif isinstance(kind, str):
            path.symlink_to(kind)
        else:
            path.write_bytes(kind)


DEEP = b"[" * 100_000
OWN = {  # what is removed
    "named by its script": {"args.json": b'{"script": "script"}', "thesis.tex": b"x", "sub/thesis.tex": b"x"},
    "of an older version": {"args.json": b'{"a": 1}', "last.pkl": b"x", "log": b"x", "cells/0.json": b"x", "metrics.png": b"x"},
    "damaged": {"args.json": b"{", "result.json": b"x"},
    "nested deep": {"args.json": DEEP, "result.json": b"x"},
    "no object": {"args.json": b"[]", "best.pkl": b"x"},
    "half-made": {"args.json.new": b"{", "lock": b""},
    "empty": {},
    "with links": {"args.json": b'{"script": "script"}', "to_file": "../b/last.pkl", "to_folder": "../b"},
}
FOREIGN = {  # what is refused, and why
    "a file": ({"args.json": b'{"a": 1}', "thesis.tex": b"x"}, "it holds thesis.tex"),
    "a file below": ({"last.pkl": b"x", "sub/deep/log": b"x"}, "it holds sub/deep/log"),
    "a file, and nested deep": ({"args.json": DEEP, "thesis.tex": b"x"}, "it holds thesis.tex"),
    "another script's": ({"args.json": b'{"script": "train_ssl"}', "last.pkl": b"x"}, "its args.json is of train_ssl"),
    "of no script": ({"args.json": b'{"script": 3}'}, "its args.json is of 3"),
    "a link": ({"last.pkl": b"x", "b": "../b"}, "it holds b"),
    "its own lock": ({"lock": b"precious", "thesis.tex": b"x"}, "it holds thesis.tex"),
}


@pytest.mark.parametrize("name", ["a", "a.part"])
@pytest.mark.parametrize("files", OWN.values(), ids=OWN)
def test_overwrite_removes_a_run_of_this_script(files: dict[str, Any], name: str, tmp_path: Path) -> None:
    write(tmp_path / "script", OTHERS)
    (tmp_path / "script" / name).mkdir()
    write(tmp_path / "script" / name, files)
    with make(tmp_path, overwrite=True) as run:
        assert run.status == "new"
        run.open()
        run.finish({})
    assert {path.name for path in run.final.iterdir()} == {"args.json", "log", "result.json"} and not run.part.exists()
    shutil.rmtree(run.final)
    assert content(tmp_path / "script") == OTHERS


@pytest.mark.parametrize("name", ["a", "a.part"])
@pytest.mark.parametrize(("files", "why"), FOREIGN.values(), ids=FOREIGN)
def test_overwrite_removes_nothing_else(files: dict[str, Any], why: str, name: str, tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "script", OTHERS)
    write(tmp_path / "script" / name, files)
    refused(make(tmp_path, overwrite=True), capsys, f"{name} is no run of script.py, {why}: move it away, or use another name")


@pytest.mark.parametrize("name", ["a", "a.part"])
@pytest.mark.parametrize("target", ["b", "nowhere", "b/last.pkl"])
def test_overwrite_follows_no_link(target: str, name: str, tmp_path: Path, capsys: Capture) -> None:
    """In place of a run; and no lock is taken where it leads."""
    write(tmp_path / "script", OTHERS)
    (tmp_path / "script" / name).symlink_to(target)
    refused(make(tmp_path, overwrite=True), capsys, f"{name} is no directory: -overwrite removes nothing else")


@pytest.mark.parametrize("name", ["a", "a.part"])
def test_overwrite_removes_no_file_in_place_of_a_run(name: str, tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "script", OTHERS | {name: b"precious"})
    refused(make(tmp_path, overwrite=True), capsys, f"{name} is no directory")


def test_nothing_happens_to_a_run_that_trains(tmp_path: Path, capsys: Capture) -> None:
    line = ["-type", "Swarm", "-results_dir", str(tmp_path)]
    args, name, _ = dotted.parse(amortised_clustering.get_parser(), [*line, "-run", "x"], amortised_clustering.NOT_IN_NAME)
    with Run("amortised_clustering", name, args, another="-run ID") as run:
        run.open()
        run.last.write_bytes(b"a state")
        before = content(tmp_path)
        for more in (["-run", "x", "-overwrite"], ["-run", "x.part", "-overwrite"], ["-run", "x", "-resume", "auto"]):
            assert exit_status(CLUSTERING, [*line, *more]) == 2
            assert capsys.readouterr().err.count("\n") == 1
            assert content(tmp_path) == before and is_locked(run.part / "lock")


def test_torchrun_is_refused_by_a_run_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The second process would find the first one's run in use, and torchrun would end both."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(SystemExit) as stopped, make(tmp_path):
        pass
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "start this one with python" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- how a command ends --------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device", "last.pkl")
ENDINGS = {  # error, whether the work has begun, exit status, the line on stderr
    "input": (InputError("no such thing"), False, 2, "script.py: error: no such thing"),
    "input, begun": (RunError("no such thing"), True, 2, "script.py: error: no such thing"),
    "failed": (Failed("the loss is not finite"), True, 1, "script.py: failed: the loss is not finite"),
    "failed, not begun": (Failed("the loss is not finite"), False, 1, "script.py: failed: the loss is not finite"),
    "refused by the system": (
        PermissionError(errno.EACCES, "Permission denied", "x"), False, 2, "script.py: error: cannot use x: Permission denied",
    ),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "x"), False, 2, "cannot use x: File name too long"),
    "no reason": (OSError("what"), False, 2, "script.py: error: cannot use a file: what"),
    "a full disk": (
        FULL, True, 75,
        "stopped: cannot write last.pkl: No space left on device; what was saved is intact, --resume auto continues from there",
    ),
    "memory": (MemoryError(), False, 2, "too large? MemoryError"),
    "memory of the CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), False, 2, "too large? Default",
    ),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory.\nTry this"), False, 2, "too large? CUDA out of memory."),
    "memory, begun": (
        torch.OutOfMemoryError("CUDA out of memory.\nTry this"), True, 1,
        "script.py: failed: out of memory; less is needed with --precision bf16, or a smaller --batch-size",
    ),
    "more than can be counted": (RuntimeError("Storage size calculation overflowed with sizes=[9]"), False, 2, "? Storage"),
}  # fmt: skip


@pytest.mark.parametrize(("error", "begun", "status", "message"), ENDINGS.values(), ids=ENDINGS)
def test_errors_end_with_a_status_and_one_line(
    error: Exception, begun: bool, status: int, message: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stopped, Command("script") as command:
        command.begun = begun
        raise error
    told = capsys.readouterr()
    assert stopped.value.code == status and told.out == "" and message in told.err and told.err.count("\n") == 1


@pytest.mark.parametrize("spoken", [False, True])
def test_of_several_processes_one_says_why_they_end(spoken: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "speaks", lambda: not spoken)
    for error, begun, status, _ in ENDINGS.values():
        with pytest.raises(SystemExit) as stopped, Command("script") as command:
            command.begun = begun
            raise error
        assert stopped.value.code == status and capsys.readouterr().err.count("\n") == (0 if spoken else 1)
    lost, told = RuntimeError("Connection closed by peer [::1]:3. Good luck\nat frame 0"), "(Connection closed by peer [::1]:3)"
    for begun, status in ((False, 2), (True, 75)):
        with pytest.raises(SystemExit) as stopped, Command("script") as command:
            command.begun = begun
            raise lost
        out, err = capsys.readouterr()
        assert stopped.value.code == status and (told in out) == begun and (told in err) == (not begun and not spoken)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x"), RecursionError(), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("begun", [True, False])
def test_other_errors_are_shown_as_they_are(error: BaseException, begun: bool) -> None:
    with pytest.raises(type(error)), Command("script") as command:
        command.begun = begun
        raise error


def test_signals_are_noted_and_end_with_75(capsys: Capture) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with pytest.raises(SystemExit) as stopped, Command("script", dash="-") as command:
            command.check_signal("before the first")
            assert command.signal is None
            os.kill(os.getpid(), number)
            assert command.signal == number.name
            command.check_signal("before the second")
        told = f"stopped by {number.name} before the second: -resume auto continues from there\n"
        assert stopped.value.code == 75 and capsys.readouterr().out == told
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    with pytest.raises(KeyboardInterrupt), Command("script"):  # twice: at once
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as stopped, Command("script"):  # torchrun's other processes have not had it
        raise Interrupted("after step 3")
    assert stopped.value.code == 75 and "stopped by a signal to another process after step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Failed("the loss is\nnot finite"), "failed: the loss is not finite"),
        (InputError("of another model"), "failed: of another model"),
        (ZeroDivisionError("division by zero"), "failed: division by zero"),
        (KeyError(), "failed: KeyError"),
        (FULL, ""),
        (Interrupted("after step 3"), "stopped by a signal to another process after step 3: -resume auto continues from there"),
        (KeyboardInterrupt(), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_log_tells_how_a_run_ended(error: BaseException, line: str, tmp_path: Path) -> None:
    """For who sees the directory alone. A run that is stopped can be resumed, so it has not failed."""
    with pytest.raises((SystemExit, type(error))), make(tmp_path) as run:
        run.open()
        raise error
    assert (run.part / "log").read_text().strip() == line
    assert not (run.part / "lock").exists() and take_lock(run.part / "lock") is not None
    with pytest.raises((SystemExit, type(error))), make(tmp_path, "b") as run:
        raise error
    assert [path.name for path in (tmp_path / "script").iterdir()] == ["a.part"]  # it had not begun


def test_patterns_of_files_are_known() -> None:
    assert {"args.json", "best.pkl", "last.pkl", "result.json", "lock", "log", "metrics.csv"} <= set(FILES)
