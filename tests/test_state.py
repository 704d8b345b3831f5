"""The parts of a training: state in last.pkl, means, rows, traces, clock, backtracking; and the walk over jobs."""

import json
import math
import os
import random
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import checkpoint
from common.checkpoint import CheckpointError
from common.errors import Failed, InputError, Interrupted
from common.run import state as state_module
from common.run.backtracking import Backtracking
from common.run.budget import BestModel
from common.run.clock import Clock
from common.run.command import Command
from common.run.jobs import Job, failures, pending
from common.run.lock import is_locked, take_lock
from common.run.metrics import N_RECORDS, Meter, Metrics, Traces, read_metrics
from common.run.records import RecordError, read_json, write_json
from common.run.run import Run
from common.run.state import State, check_finite
from common.seeds import seed_everything
from tests.reference import DATA


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the state of a training ---------------------------------------------------------------------------------------------


class Training:
    """A small one that has everything: dropout, batch norm, moments, rows, traces, a clock, draws from three generators."""

    def __init__(self, folder: Path, seed: int = 0, options: dict[str, Any] | None = None, data: str = "0123"):
        seed_everything(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.meter, self.metrics = Meter(), Metrics(folder / "metrics.csv", ("epoch", "loss"))
        self.traces, self.clock, self.backtracking = Traces(self.model), Clock(60), Backtracking(0.2)
        self.parts = {
            "optimizer": self.optimizer, "meter": self.meter, "metrics": self.metrics, "traces": self.traces,
            "clock": self.clock, "backtracking": self.backtracking,
        }  # fmt: skip
        self.command = Command("script")
        options = options or {"lr": 0.1, "layers": [1, 2]}
        self.state = State(folder / "last.pkl", options, self.command, data=data, model=self.model, **self.parts)

    def steps(self, n: int) -> None:
        """Epochs of three steps."""
        for _ in range(n):
            x = torch.rand(5, 3) * np.random.rand() * random.random()
            loss = self.model(x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.meter.add(len(x), {"loss": loss})
            self.traces.record(self.state.step + 1, {"loss": loss.item()})
            self.state.extra["x"] = self.state.extra.get("x", 0) + x.sum()
            self.state.after_step()
            if self.state.batch == 3:
                self.metrics.append({"epoch": self.state.epoch + 1, **self.meter.means()})
                self.backtracking.judge(self.meter.means()["loss"])
                self.meter.reset()
                self.state.end_epoch()

    def outcome(self) -> dict[str, Any]:
        """Everything that a resumed training is to have in common with an undisturbed one."""
        return {
            "progress": (self.state.epoch, self.state.batch, self.state.step),
            "weights": [tensor.tolist() for tensor in self.model.state_dict().values()],
            "moments": [[moment.tolist() for moment in of.values()] for of in self.optimizer.state.values()],
            "meter": self.meter.means(),
            "rows": self.metrics.path.read_bytes()[: self.metrics.size] if self.metrics.size else b"",
            "traces": (self.traces.steps, self.traces.numbers, torch.stack(self.traces.weights).tolist()),
            "backtracking": self.backtracking.state_dict(),
            "extra": self.state.extra["x"].item(),
            "draws": (torch.rand(1).item(), np.random.rand(), random.random(), torch.nn.Dropout()(torch.ones(9)).tolist()),
        }


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_a_resumed_training_continues_as_if_it_had_not_stopped(n: int, tmp_path: Path) -> None:
    """Stopped within an epoch and at its end: also the numbers drawn afterwards, by dropout for example, are the same."""
    (tmp_path / "whole").mkdir()
    whole = Training(tmp_path / "whole")
    whole.steps(7)
    expected = whole.outcome()
    first = Training(tmp_path)
    first.steps(n)
    first.state.save()
    first.metrics.append({"epoch": 9, "loss": 9.0})  # after the save, so it is cut off
    first.metrics.path.open("a").write("10,0.")
    second = Training(tmp_path, seed=1)
    before = files_of(tmp_path)
    second.state.resume()
    assert files_of(tmp_path) == before
    second.steps(7 - n)
    assert second.outcome() == expected


def test_the_clock_continues_and_the_time_between_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first = Training(tmp_path)
    now[0] += 20
    first.state.save()
    now[0] += 1000
    second = Training(tmp_path)
    now[0] += 5  # until it is read
    second.state.resume()
    now[0] += 1
    assert second.clock.used() == 21


def refuses(training: Training, message: str) -> None:
    """Resuming does, in one line, and changes nothing on the disk."""
    before = files_of(training.state.path.parent)
    with pytest.raises(InputError) as error:
        training.state.resume()
    told = str(error.value)
    assert message in told and str(training.state.path.parent) in told and "\n" not in told
    assert files_of(training.state.path.parent) == before


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    training = Training(tmp_path)
    training.steps(4)
    training.state.save()
    return tmp_path


def test_other_options_data_or_models_are_refused(saved: Path) -> None:
    refuses(Training(saved, options={"lr": 0.2, "layers": [1, 2]}), "made with lr 0.1, not 0.2: --overwrite starts again")
    refuses(Training(saved, options={"lr": 0.1, "layers": [1]}), "made with layers [1, 2], not [1]")
    Training(saved, options={"lr": 0.1, "is_new": 3}).state.resume()  # options of a later version
    refuses(Training(saved, data="4567"), "other data (fingerprint 0123, now 4567)")
    other = Training(saved)
    other.state.model = torch.nn.Linear(2, 3)
    refuses(other, "of another model")


def test_rows_that_are_cut_off_or_missing_are_noticed(saved: Path) -> None:
    metrics = saved / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-1])
    refuses(Training(saved), "metrics.csv is missing or cut off")
    metrics.unlink()
    refuses(Training(saved), "metrics.csv is missing or cut off")


ENTRIES = (
    "options", "data", "progress", "extra", "rng", "model",
    "optimizer", "meter", "metrics", "traces", "clock", "backtracking",
)  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_needed_and_has_a_type(entry: str, saved: Path) -> None:
    state = checkpoint.read(saved / "last.pkl")
    assert state.keys() == {*ENTRIES, "description", "processes"}  # which older files do not have
    for wrong in (3, None, "x", [1]):
        checkpoint.save(state | {entry: wrong}, saved / "last.pkl")
        refuses(Training(saved), "--overwrite starts again" if entry != "model" else "of another model")
    del state[entry]
    checkpoint.save(state, saved / "last.pkl")
    refuses(Training(saved), f"has no entry {entry!r}, it is of another version or script; --overwrite starts again")


def test_a_missing_state(tmp_path: Path) -> None:
    refuses(Training(tmp_path), "there is no checkpoint")


def test_weights_that_are_not_finite_are_not_written(saved: Path) -> None:
    training = Training(saved)
    training.state.resume()
    before = files_of(saved)
    for broken in (math.nan, math.inf):
        with torch.no_grad():
            training.model[0].bias[3] = broken
        training.state.save()
        assert files_of(saved) == before


def test_saves_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    training, saved_at = Training(tmp_path), []
    monkeypatch.setattr(checkpoint, "save", lambda state, path: saved_at.append(state["progress"]))
    for _ in range(7):
        training.steps(1)
        now[0] += state_module.SAVE_SECONDS / 2.5
    assert saved_at == [(1, 1, 4), (2, 1, 7)]
    now[0] += state_module.SAVE_SECONDS
    training.state.end_epoch()
    assert saved_at[2:] == [(3, 0, 7)]


def test_a_signal_is_noticed_after_the_step_and_everything_is_saved(tmp_path: Path) -> None:
    training = Training(tmp_path)
    with training.command as command, pytest.raises(Interrupted, match="after step 5"):
        training.steps(4)
        training.state.check_signal()
        assert not training.state.path.exists()
        os.kill(os.getpid(), signal.SIGUSR1)
        training.steps(3)
    assert command.signal == "SIGUSR1"
    expected, resumed = training.outcome(), Training(tmp_path, seed=1)
    resumed.state.resume()
    assert resumed.outcome() == expected and resumed.state.step == 5


def test_a_loss_that_is_not_finite_is_a_failure() -> None:
    check_finite(1.5, "epoch 3")
    for loss in (math.nan, math.inf, -math.inf):
        with pytest.raises(Failed, match="the loss of epoch 3 is not finite: a smaller --lr may help"):
            check_finite(loss, "epoch 3")


# ---- jobs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Iterator[Command]:
    with Command("script") as command:
        yield command


def jobs_in(folder: Path) -> list[Job]:
    """b needs a, c needs b, d needs nothing."""
    return [Job(folder, name, needs) for name, needs in {"a": (), "b": ("a",), "c": ("b",), "d": ()}.items()]


def walk(command: Command, jobs: list[Job], fails: tuple[str, ...] = (), retry_failed: bool = False) -> list[tuple[int, str]]:
    """Do the jobs that are left; those are returned."""
    done = []
    for i, job in pending(command, jobs, retry_failed=retry_failed):
        with job:
            assert is_locked(job.lock)
            done.append((i, job.name))
            job.last.touch()
            if job.name in fails:
                raise Failed("the loss is not finite")
            job.finish({"name": job.name})
    return done


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_jobs_are_done_once(tmp_path: Path, command: Command) -> None:
    jobs = jobs_in(tmp_path)
    write_json(tmp_path / "b.json", {"name": "b"})
    (tmp_path / "b.last.pkl").touch()  # the leftovers of a process that was killed at its very end
    (tmp_path / "b.lock").touch()
    (tmp_path / "d.lock").touch()  # of one that was killed before
    assert walk(command, jobs) == [(1, "a"), (3, "c"), (4, "d")]
    assert names_in(tmp_path) == ["a.json", "b.json", "c.json", "d.json"]
    assert [job.read()["name"] for job in jobs] == ["a", "b", "c", "d"] and failures(jobs) == {}
    assert walk(command, jobs) == []


def test_jobs_of_another_process_are_left_to_it(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture) -> None:
    jobs = jobs_in(tmp_path)
    (tmp_path / "a.last.pkl").touch()
    lock = take_lock(tmp_path / "a.lock")
    assert walk(command, jobs) == [(2, "b"), (3, "c"), (4, "d")]
    assert capsys.readouterr().out == "a is left to another process, which is at it\n"
    assert (tmp_path / "a.last.pkl").exists() and is_locked(tmp_path / "a.lock")
    lock.close()
    assert walk(command, jobs) == [(1, "a")] and names_in(tmp_path) == [f"{name}.json" for name in "abcd"]


def test_failures_are_noted_and_the_others_done(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture) -> None:
    jobs = jobs_in(tmp_path)
    assert walk(command, jobs, fails=("a",)) == [(1, "a"), (4, "d")]
    reasons = {
        "a": "the loss is not finite",
        "b": "it needs a, which failed: the loss is not finite",
        "c": "it needs b, which failed: it needs a, which failed: the loss is not finite",
    }
    assert failures(jobs) == reasons
    told = "".join(f"{name} failed: {reason}\n" for name, reason in reasons.items())
    assert capsys.readouterr().out == told
    assert names_in(tmp_path) == ["a.failed.json", "d.json"]
    assert json.loads((tmp_path / "a.failed.json").read_text()) == {
        "job": "a",
        "reason": "the loss is not finite",
        "options": {},
    }
    assert walk(command, jobs) == [] and capsys.readouterr().out == told  # they are not tried again
    assert walk(command, jobs, retry_failed=True, fails=("b",)) == [(1, "a"), (2, "b")]
    assert failures(jobs).keys() == {"b", "c"}
    assert walk(command, jobs, retry_failed=True) == [(2, "b"), (3, "c")]
    assert failures(jobs) == {} and names_in(tmp_path) == [f"{name}.json" for name in "abcd"]


def test_a_signal_between_two_jobs(tmp_path: Path, command: Command) -> None:
    jobs = jobs_in(tmp_path)
    with pytest.raises(Interrupted, match="before b"):
        for _, job in pending(command, jobs):
            with job:
                os.kill(os.getpid(), signal.SIGTERM)
                job.finish({})
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [Interrupted("after step 3"), ValueError("x"), KeyboardInterrupt(), OSError("full")])
def test_an_exception_within_a_job_leaves_its_state_and_no_lock(error: BaseException, tmp_path: Path, command: Command) -> None:
    jobs = jobs_in(tmp_path)
    with pytest.raises(type(error)):
        for _, job in pending(command, jobs):
            with job:
                job.last.touch()
                raise error
    assert names_in(tmp_path) == ["a.last.pkl"]
    assert walk(command, jobs) == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


# ---- metrics -------------------------------------------------------------------------------------------------------------


def test_means_are_weighted_and_of_each_metric() -> None:
    meter, resumed = Meter(), Meter()
    meter.add(3, {"loss": torch.tensor(1.0, requires_grad=True), "accuracy": 0.5})
    meter.add(1, {"loss": torch.tensor(5.0, dtype=torch.bfloat16)})
    resumed.load_state_dict(meter.state_dict())
    for one in (meter, resumed):
        one.add(2, {"accuracy": 1})
        assert one.means() == {"loss": 2.0, "accuracy": pytest.approx(0.7)}
        one.reset()
        assert one.means() == {}


def test_sums_are_of_double_precision() -> None:
    meter = Meter()
    for value in (1e8, 1.0, -1e8):
        meter.add(1, {"loss": torch.tensor(value)})
    assert meter.means()["loss"] == pytest.approx(1 / 3)


def test_rows_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.csv", ("epoch", "loss"))
    metrics.append({"epoch": 1, "loss": 0.5})
    state = metrics.state_dict()
    metrics.append({"epoch": 2, "loss": math.nan})
    metrics.append({"epoch": 3, "loss": 0.25})
    (tmp_path / "metrics.csv").open("a").write("3,0.")  # half a row
    metrics = Metrics(tmp_path / "metrics.csv", ("epoch", "loss"))
    metrics.load_state_dict(state)
    metrics.append({"epoch": 2, "loss": 1 / 3})
    assert read_metrics(tmp_path / "metrics.csv") == {"epoch": [1, 2], "loss": [0.5, 0.33333333]}
    Metrics(tmp_path / "metrics.csv", ("epoch", "loss")).append({"epoch": 1, "loss": 2.0})  # a new start begins anew
    assert read_metrics(tmp_path / "metrics.csv") == {"epoch": [1], "loss": [2.0]}


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
    assert resumed.numbers == traces.numbers
    assert resumed.steps == traces.steps and np.array_equal(resumed.by_parameter()["0.bias"], by_parameter["0.bias"])


def test_records_are_json_that_everybody_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"matrix": [[math.nan, 1.0], (math.inf, 2)], "n": 3})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == read_json(path)
    assert read_json(path) == {"matrix": [[None, 1.0], [None, 2]], "n": 3}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "[" * 100_000, "\x00", b"\xff\xfe"])
def test_what_is_no_record(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecordError, match="is damaged: it holds no JSON object"):
        read_json(path)
    os.mkfifo(tmp_path / "fifo")
    for name in ("none.json", "fifo"):
        with pytest.raises(RecordError, match="there is no"):
            read_json(tmp_path / name)


# ---- clock ---------------------------------------------------------------------------------------------------------------


def test_clock_does_not_count_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(60)
    clock.load_state_dict({"seconds": 10})
    now[0] += 20
    with clock.paused():
        now[0] += 1000
        assert clock.used() == 30 and clock.state_dict() == {"seconds": 30}
    now[0] += 5
    assert (clock.used(), clock.left(), clock.is_up()) == (35, 25, False)
    now[0] += 25
    assert clock.is_up() and clock.left() == 0
    now[0] += 10
    assert clock.left() == 0
    assert not Clock().is_up()


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


def test_backtracking_continues_from_its_state() -> None:
    t = json.loads((DATA / "swarm" / "backtracking_1.json").read_text())
    whole, parts = Backtracking(0.2), Backtracking(0.2)
    for loss in t["val_losses"]:
        fresh = Backtracking(0.2)
        fresh.load_state_dict(parts.state_dict())
        parts = fresh
        assert whole.judge(loss) == parts.judge(loss)


class Best:
    """A best model, and a step of training that changes it."""

    def __init__(self, run: Run):
        self.model = torch.nn.Linear(2, 3)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.best = BestModel(run, self.model, self.optimizer, horizon=0.2, alpha=0.9)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()

    @property
    def weights(self) -> list[float]:
        return self.model.weight.flatten().tolist()

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def n_steps(self) -> float:
        return next(iter(self.optimizer.state.values()))["step"].item()


def test_best_model_is_saved_and_returned_to(tmp_path: Path, new_run: Run) -> None:
    a = Best(new_run)
    a.step()
    assert a.best.judge(2.0, last_epoch=False) == " | best so far, saved" and a.best.loss == 2.0
    best, state = a.weights, checkpoint.read(new_run.best)
    assert (state["name"], state["best_val_loss"]) == ("name", 2.0) and state.keys() == {
        "model", "optimizer", "name", "best_val_loss", "description",
    }  # fmt: skip
    for i in (1, 2):  # the rate is that of now, each time, not the one that was saved
        a.step()
        assert a.weights != best
        assert a.best.judge(math.nan, last_epoch=False) == f" | back to the best, lr {0.1 * 0.9**i:.4g}"
        assert a.weights == best and a.n_steps == 1 and a.rate == pytest.approx(0.1 * 0.9**i)
    a.step()
    assert a.best.judge(3.0, last_epoch=True) == "" and a.weights != best

    b = Best(new_run)
    b.best.load_state_dict(a.best.state_dict())
    assert b.best.loss == 2.0
    b.best.load()
    assert b.weights == best and b.n_steps == 1
    checkpoint.save(state | {"model": torch.nn.Linear(2, 4).state_dict()}, new_run.best)
    with pytest.raises(CheckpointError, match="of another model"):
        b.best.load_state_dict(a.best.state_dict())
    new_run.best.unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        b.best.load_state_dict(a.best.state_dict())


@pytest.fixture
def new_run(tmp_path: Path) -> Iterator[Run]:
    with Run("script", "name", Namespace(results_dir=str(tmp_path), resume=None, overwrite=False), another="-run ID") as run:
        run.open()
        yield run
