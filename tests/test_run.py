"""One experiment's life, piece by piece: options and names, clock, backtracking, checkpoints, directory, signals, traces."""

import argparse
import errno
import fcntl
import json
import math
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

from common.run import checkpoint, directory, options
from common.run.backtracking import Backtracking
from common.run.checkpoint import CheckpointError
from common.run.clock import Clock
from common.run.directory import RunDirectory, RunError
from common.run.ending import refusing
from common.run.interruption import Interruption
from common.run.records import write_json
from common.run.traces import N_RECORDS, Metrics, Traces, read_metrics
from tests.reference import DATA

# ---- options -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parser() -> options.OneLineParser:
    parser = options.OneLineParser(prog="test.py")
    for name in ("-type", "-run", "-resume"):
        parser.add_argument(name)
    for name in ("-n_hidden", "-n_heads", "-n_iter", "-n_layers", "-bs", "-tasks", "-n"):
        parser.add_argument(name, type=options.at_least(1))
    for name in ("-lr", "-wc", "-dropout"):
        parser.add_argument(name, type=options.real(0, 1e6))
    parser.add_argument("-no_cuda", action="store_true")
    return parser


NAMES = {  # the original's examples
    "-type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50 -wc 60": (
        "-type.Swarm-n_hidden.128-n_iter.10-n_layers.1-dropout.0.0-bs.50-wc.60"
    ),
    "-type SetTransformer -n_heads 8 -no_cuda -run 2 -resume old/best.pkl -lr 1e-3": (
        "-type.SetTransformer-n_heads.8-no_cuda-run.2-lr.1e-3"
    ),
    "-lr 0.010 -type LSTMS -tasks=500": "-lr.0.010-type.LSTMS-tasks=500",
    "-n_hidden 8 -run 8 -resume 8": "-n_hidden.8-run.8",  # the original removed every 8
    "-resume=a/b.pkl -bs.50": "-bs.50",
}


@pytest.mark.parametrize("line", NAMES)
def test_names(parser: argparse.ArgumentParser, line: str) -> None:
    args, name, _ = options.parse(parser, line.split(), ("resume",))
    assert name == NAMES[line]
    pasted, again, _ = options.parse(parser, [name], ("resume",))  # a name is a command line
    assert again == name
    assert {**vars(pasted), "resume": None} == {**vars(args), "resume": None}


def test_spellings(parser: argparse.ArgumentParser) -> None:
    for spelling in ("-bs 50 -lr 1e-3", "-bs.50 -lr.1e-3", "-bs=50 -lr=1e-3", "-bs.50-lr.1e-3"):
        args, _, given = options.parse(parser, spelling.split(), ())
        assert (args.bs, args.lr, given) == (50, 1e-3, {"bs", "lr"})
    args, _, _ = options.parse(parser, ["-resume=r/-bs.3-lr.1/best.pkl", "-run.x"], ("resume",))
    assert (args.resume, args.run, args.bs) == ("r/-bs.3-lr.1/best.pkl", "x", None)
    args, _, _ = options.parse(parser, ["-n", "3", "-run", "a-b.c", "-no_cuda"], ())
    assert (args.n, args.run, args.no_cuda, args.n_hidden) == (3, "a-b.c", True, None)


@pytest.mark.parametrize(
    ("word", "resume", "bs"),
    [
        ("-resume=my-bs", "my-bs", None),
        ("-resume=my-bs.3", "my-bs.3", None),
        ("-resume.my-bs.3", "my-bs.3", None),
        ("-resume=-lr.3=4-run", "-lr.3=4-run", None),
        ("-bs.7-resume=my-no_cuda", "my-no_cuda", 7),
    ],
)
def test_values_that_are_in_no_name_are_not_cut_up(
    parser: argparse.ArgumentParser, word: str, resume: str, bs: int | None
) -> None:
    args, name, given = options.parse(parser, [word], ("resume",))
    assert (args.resume, args.bs) == (resume, bs)
    assert name == ("-bs.7" if bs else "") and given == ({"resume", "bs"} if bs else {"resume"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-bs", "-bs needs a value"),
        ("-b 50", "unknown option '-b'"),
        ("-n_hid 50", "unknown option '-n_hid'"),
        ("50", "unknown option '50'"),
        ("--bs 50", "unknown option '--bs'"),
        ("-no_cuda=1", "takes no value"),
        ("-bs 0", "0 is too small: at least 1"),
        ("-bs -3", "-3 is too small"),
        ("-bs 3000000000", "3000000000 is too large"),
        ("-bs 1.5", "'1.5' is not a whole number"),
        ("-lr nan", "nan is out of range"),
        ("-lr inf", "inf is out of range"),
        ("-lr -1e-3", "-1e-3 is out of range: at least 0"),
        ("-lr fast", "'fast' is not a number"),
        ("-run " + 250 * "x", "characters"),
    ],
)
def test_wrong_command_lines(parser: argparse.ArgumentParser, line: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse(parser, line.split(), ())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("test.py: error: ")


def test_booleans_and_numbers() -> None:
    assert [options.boolean(text) for text in ("true", "1", "False", "0")] == [True, True, False, False]
    with pytest.raises(argparse.ArgumentTypeError, match="neither true nor false"):
        options.boolean("")
    assert [options.shortest(x) for x in (480.0, 0.001, 1e-05, 0.5, 1e6)] == ["480", "0.001", "1e-05", "0.5", "1e+06"]
    for x in (0.1 + 0.2, 1 / 3, 1234567.875, 5e-324):
        assert float(options.shortest(x)) == x


def test_not_defaults(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["-bs=5", "-lr=0.10", "-no_cuda", "-type=x"])
    assert options.not_defaults(parser, args, ("type",)) == ["bs.5", "lr.0.1", "no_cuda"]


def test_ranges() -> None:
    assert options.real(0, 1, above=True)("1") == 1 and options.real(0, 1, below=True)("0") == 0
    for wrong, kind in (("0", options.real(0, above=True)), ("1", options.real(0, 1, below=True)), ("1.1", options.real(0, 1))):
        with pytest.raises(argparse.ArgumentTypeError, match="out of range"):
            kind(wrong)
    assert options.run_id("a.b-2_c+") == "a.b-2_c+"
    for wrong in ("a/b", "", "a b", "ä", "..\n"):
        with pytest.raises(argparse.ArgumentTypeError):
            options.run_id(wrong)


# ---- clock ---------------------------------------------------------------------------------------------------------------


def test_clock_does_not_count_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(60, used=10)
    now[0] += 20
    with clock.paused():
        now[0] += 1000
        assert clock.used() == 30
    now[0] += 5
    assert (clock.used(), clock.left(), clock.is_up()) == (35, 25, False)
    now[0] += 25
    assert clock.is_up() and clock.left() == 0


# ---- backtracking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [1, 2, 3])
def test_backtracking_traces(trace: int) -> None:
    """Every epoch of the original's loop: what is saved, when it goes back, to which weights, at which rate."""
    t = json.loads((DATA / "swarm" / f"backtracking_{trace}.json").read_text())
    backtracking, rate, best_epoch, steps_of_best, steps = Backtracking(t["bt_horizon"]), t["lr"], None, None, 0
    for epoch, row in enumerate(t["epochs"]):
        last = t["time_up_in_last_epoch"] and epoch == len(t["epochs"]) - 1
        steps, weights_from = steps + 1, epoch
        verdict = backtracking.judge(row["val_loss"], last_epoch=last)
        if verdict == "best":
            best_epoch, steps_of_best = epoch, steps
        elif verdict == "back":
            rate, weights_from, steps = rate * t["bt_alpha"], best_epoch, steps_of_best
        assert (verdict == "best") == row["saved"], epoch
        assert (verdict == "back") == row["backtrack"], epoch
        assert backtracking.history[-1] == row["recorded_val_loss"]
        assert backtracking.best == row["best_val_loss"] and best_epoch == row["best_epoch"]
        assert (rate, weights_from, steps) == (
            pytest.approx(row["lr_after"]),
            row["weights_from_epoch"],
            row["adam_steps_after"],
        )


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_backtracking_from_what_is_not_finite(loss: float) -> None:
    backtracking = Backtracking(0.2)
    assert backtracking.judge(loss) == "back"  # before any epoch has succeeded
    assert backtracking.judge(1.0) == "best"
    assert backtracking.judge(loss) == "back"
    assert backtracking.history[1:] == [math.inf, 1.0, 1.0] and backtracking.best == 1.0
    assert backtracking.judge(loss, last_epoch=True) == "keep" and backtracking.best == 1.0
    assert backtracking.judge(0.5) == "best"


def test_backtracking_goes_on_from_its_state() -> None:
    t = json.loads((DATA / "swarm" / "backtracking_1.json").read_text())
    whole, parts = Backtracking(0.2), Backtracking(0.2)
    for loss in t["val_losses"]:
        fresh = Backtracking(0.2)
        fresh.load_state_dict(parts.state_dict())
        parts = fresh
        assert whole.judge(loss) == parts.judge(loss)


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def state_of(model: torch.nn.Module) -> dict:
    optimizer = torch.optim.Adam(model.parameters())
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "name": "x", "best_val_loss": 1.5}


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    model, other, path = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    checkpoint.save(state_of(model) | {"rng": checkpoint.rng_state()}, path)
    state = checkpoint.load(path)
    checkpoint.load_model(other, state, path)
    assert torch.equal(other.weight, model.weight) and state["best_val_loss"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["best.pkl"]
    first = torch.rand(3)
    checkpoint.set_rng_state(state["rng"])
    assert torch.equal(torch.rand(3), first)


def test_damaged_and_malicious_checkpoints(tmp_path: Path) -> None:
    good, path, canary = tmp_path / "good.pkl", tmp_path / "best.pkl", tmp_path / "executed"
    checkpoint.save(state_of(torch.nn.Linear(20, 30)), good)
    content = good.read_bytes()
    wrong = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "cut by one byte": content[:-1],
        "text": b"hello, world\n",
        "a pickle": pickle.dumps({"model": 1}),
        "code": pickle.dumps(Malicious(canary)),
        "zeros": bytes(len(content)),
    }
    for what, data in wrong.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), what
        assert path.read_bytes() == data
    torch.save(Malicious(canary), path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not canary.exists()
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no entry 'model'"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "nowhere.pkl")
    with pytest.raises(CheckpointError, match="is a directory"):
        checkpoint.load(tmp_path)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight is \(4, 2\) there and \(3, 2\) here"):
        checkpoint.load_model(model, state_of(torch.nn.Linear(2, 4)), path)
    with pytest.raises(CheckpointError, match="other names"):
        checkpoint.load_model(model, state_of(torch.nn.LSTM(2, 4)), path)
    assert torch.equal(model.weight, before)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pkl"
    checkpoint.save({"a": 1}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"a": 2}, path)
    assert checkpoint.load(path, ("a",)) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pkl"]


# ---- directory -----------------------------------------------------------------------------------------------------------


def test_life_of_a_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "script", "-a.1")
    assert run.check(resume=None, overwrite=False) == "new" and not list(tmp_path.iterdir())
    run.open({"a": 1}, overwrite=False, to_stdout=False)
    run.log("hello")
    with pytest.raises(RunError, match="in use by another process"):
        RunDirectory(tmp_path, "script", "-a.1").open({}, overwrite=False, to_stdout=False)
    with pytest.raises(RunError, match="-resume auto goes on with it"):
        run.check(resume=None, overwrite=False)
    assert run.check(resume="auto", overwrite=False) == "new"  # nothing to go on from yet
    run.last.touch()
    assert run.check(resume="auto", overwrite=False) == "unfinished"
    run.finish({"loss": 1.0})
    assert run.path == tmp_path / "script" / "-a.1"
    assert sorted(p.name for p in run.path.iterdir()) == ["args.json", "last.pkl", "log", "result.json"]
    assert (run.path / "log").read_text() == "hello\n" and json.loads((run.path / "args.json").read_text())["a"] == 1
    assert not run.part.exists()
    assert run.check(resume="auto", overwrite=False) == "finished"
    with pytest.raises(RunError, match="has finished"):
        run.check(resume=None, overwrite=False)
    assert run.check(resume=None, overwrite=True) == "new"
    run.open({}, overwrite=True, to_stdout=True)
    assert not run.final.exists() and sorted(p.name for p in run.part.iterdir()) == ["args.json", "lock"]
    run.close()


def test_a_run_that_finishes_between_check_and_open_is_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "s", "n")
    assert run.check(resume="auto", overwrite=False) == "new"
    (tmp_path / "s" / "n").mkdir(parents=True)
    with pytest.raises(RunError, match=r"another process has made .*s/n meanwhile"):
        run.open({}, overwrite=False, to_stdout=False)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["n"]


def test_a_run_that_begins_between_check_and_open_is_left_alone(tmp_path: Path) -> None:
    """The other one has begun, and has stopped again: its files are there, nobody holds its lock."""
    run, other = RunDirectory(tmp_path, "s", "n"), RunDirectory(tmp_path, "s", "n")
    assert run.check(resume="auto", overwrite=False) == "new"
    other.open({}, overwrite=False, to_stdout=False)
    other.last.touch()
    other.close()
    with pytest.raises(RunError, match=r"another process has made .*s/n.part meanwhile"):
        run.open({}, overwrite=False, to_stdout=False)
    assert other.check(resume="auto", overwrite=False) == "unfinished"  # what was refused holds no lock


def test_who_has_looked_at_a_run_has_it_to_itself(tmp_path: Path) -> None:
    """From before last.pkl is read to the end: else two processes could go on from the same one, or from one that is old."""
    with RunDirectory(tmp_path, "s", "n") as first:
        first.open({}, overwrite=False, to_stdout=False)
        first.last.touch()
    assert not (first.part / "lock").exists()
    first, second = (RunDirectory(tmp_path, "s", "n") for _ in range(2))
    with first:
        assert first.check(resume="auto", overwrite=False) == "unfinished"
        for resume, overwrite in (("auto", False), (None, False), (None, True)):
            with pytest.raises(RunError, match="in use by another process"):
                second.check(resume=resume, overwrite=overwrite)
        first.open({}, overwrite=False, to_stdout=False)
    with second, pytest.raises(RunError, match="was started before"):
        second.check(resume=None, overwrite=False)
    with first:
        assert first.check(resume="auto", overwrite=False) == "unfinished"
        first.finish({})
    with second:
        assert second.check(resume="auto", overwrite=False) == "finished"
        second.finish_interrupted_rename()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["n"] and not (second.final / "lock").exists()


def test_a_lock_that_was_let_go_of_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file was opened before another process finished: to lock it then says nothing about the directory."""
    run, other = RunDirectory(tmp_path, "s", "n"), RunDirectory(tmp_path, "s", "n")
    other.open({}, overwrite=False, to_stdout=False)
    honest = fcntl.flock

    def late(file: object, how: int) -> None:
        other.close()
        honest(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunError, match="in use by another process"):
        run.check(resume="auto", overwrite=False)


def test_killed_before_the_rename(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "script", "a")
    run.open({}, overwrite=False, to_stdout=True)
    (run.part / directory.RESULT).write_text("{}")
    run.close()
    assert run.check(resume="auto", overwrite=False) == "finished"
    run.finish_interrupted_rename()
    assert run.final.exists() and not run.part.exists() and not (run.final / "lock").exists()
    (run.final / "lock").touch()  # killed right after the rename
    assert run.check(resume="auto", overwrite=False) == "finished"
    run.finish_interrupted_rename()
    assert not (run.final / "lock").exists()


def test_best_without_last_is_not_thrown_away(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "script", "a")
    run.part.mkdir(parents=True)
    run.best.touch()
    with pytest.raises(RunError, match="no last"):
        run.check(resume="auto", overwrite=False)


def test_the_revision_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's copy lies within the project, whose own revision may be another by then."""
    monkeypatch.setattr(directory, "ROOT", tmp_path)
    assert directory.git_revision() == "unknown"  # neither a copy nor a checkout
    (tmp_path / "REVISION").write_text("0123abc-dirty-4567def\n")
    assert directory.git_revision() == directory.environment()["git_revision"] == "0123abc-dirty-4567def"


def test_results_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to"):
        RunDirectory(tmp_path / "file", "script", "a").open({}, overwrite=False, to_stdout=False)


# ---- endings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("there is a run"), "there is a run"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "cannot use x: File name too long"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cannot use x: Permission denied"),
        (MemoryError(), "too large? MemoryError"),
        (RuntimeError("Storage size calculation overflowed with sizes=[2147483647, 2147483647]"), "too large? Storage"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "too large? Default"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTry this"), "too large? CUDA out of memory."),
    ],
)
def test_refusals(error: Exception, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped, refusing(options.OneLineParser(prog="test.py")):
        raise error
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1 and message in told


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x"), RecursionError()])
def test_errors_that_are_no_refusals_are_shown_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), refusing(options.OneLineParser(prog="test.py")):
        raise error


# ---- signals -------------------------------------------------------------------------------------------------------------


def test_signals_set_a_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with Interruption() as interruption:
            assert interruption.signal is None
            os.kill(os.getpid(), number)
            assert interruption.signal == number.name
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


# ---- traces --------------------------------------------------------------------------------------------------------------


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.csv", ("epoch", "loss"))
    metrics.append({"epoch": 1, "loss": 0.5})
    size = metrics.size
    metrics.append({"epoch": 2, "loss": math.nan})
    (tmp_path / "metrics.csv").open("a").write("3,0.")  # half a row
    metrics = Metrics(tmp_path / "metrics.csv", ("epoch", "loss"), size)
    metrics.append({"epoch": 2, "loss": 1 / 3})
    assert read_metrics(tmp_path / "metrics.csv") == {"epoch": [1, 2], "loss": [0.5, 0.33333333]}


def test_traces_stay_bounded_evenly_spaced_and_resumable() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Linear(20, 1))
    traces, resumed = Traces(model), Traces(model)
    for step in range(1, 5 * N_RECORDS):
        with torch.no_grad():
            model[0].bias.fill_(step)
        traces.record(step, {"loss": float(step)})
        if step == 2345:
            resumed.load_state_dict(traces.state_dict())
        elif step > 2345:
            resumed.record(step, {"loss": float(step)})
    assert N_RECORDS // 2 <= len(traces.steps) <= N_RECORDS
    assert set(torch.tensor(traces.steps).diff().tolist()) == {traces.every}
    assert traces.numbers["loss"] == traces.steps
    by_parameter = traces.by_parameter()
    assert list(by_parameter) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert [v.shape[1] for v in by_parameter.values()] == [13, 13, 1, 13]
    assert by_parameter["0.bias"][:, 0].tolist() == traces.steps
    old = traces.state_dict()  # runs that were started before numbers other than the loss were traced go on
    old["losses"] = torch.tensor(old.pop("numbers")["loss"])
    resumed.load_state_dict(old)
    assert resumed.numbers == traces.numbers
    assert resumed.steps == traces.steps and torch.equal(resumed.by_parameter()["0.bias"], by_parameter["0.bias"])


def test_records_are_json_that_everybody_reads(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"matrix": [[math.nan, 1.0], (math.inf, 2)], "n": 3})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "matrix": [[None, 1.0], [None, 2]],
        "n": 3,
    }
