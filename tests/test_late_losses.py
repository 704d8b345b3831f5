"""Losses that stay on a GPU for some steps: when they are looked at, what never reaches a file, what a resumed run knows."""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import checkpoint, parallel
from common.run import state as state_module
from common.run.budget import BudgetedTraining as Training
from common.run.budget import make_adam
from common.run.metrics import N_RECORDS, Traces, read_metrics
from common.run.run import Run
from common.seeds import seed_everything

STEPS = 13  # of an epoch
FAILS_AT = 17  # step of the run, counted from 1, in the second epoch
Failure = Callable[[torch.Tensor], torch.Tensor]


def fail(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite, and gives weights that are not."""
    return loss * math.nan


def fail_alone(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite, with the gradient of one that is."""
    return loss + math.inf


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.2), torch.nn.Linear(3, 1))


def train_epoch(training: Training, failure: Failure, stop_at: int | None, noticed: list[int]) -> bool:
    """As the scripts do it; after step `stop_at` a signal comes."""
    for batch in range(training.batch, STEPS):
        x = torch.full((4, 2), 1.0 + batch / STEPS)
        loss = training.model(x).square().mean()
        if training.step + 1 == FAILS_AT and training.epoch == 1:
            loss = failure(loss)
        if not training.is_finite(loss):
            noticed.append(training.step + 1)
            return False
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        if training.step + 1 == stop_at:
            training.run.signal = "SIGTERM"
        training.record_step(len(x), loss)
    return training.fetch_losses()


def train(
    folder: Path,
    failure: Failure = fail,
    *,
    fetch_every: int | None,
    stop_at: int | None = None,
    resume: str | None = None,
    out_of_time: bool = False,
) -> tuple[dict[str, Any], list[int]]:
    """A run of three epochs: what is left of it, and the steps at which a loss was noticed to be not finite."""
    seed_everything(0)
    noticed: list[int] = []
    args = Namespace(results_dir=str(folder), resume=resume, overwrite=False)
    with Run("script", "name", args, another="-run ID", may_change=("results_dir", "resume")) as run:
        model = make_model()
        columns = ("epoch", "step", "train_loss", "val_loss", "lr")
        limits: dict[str, Any] = {"budget": 1e9, "horizon": 0.2, "alpha": 0.5}
        training = Training(run, model, make_adam(model, 0.01), columns=columns, **limits)
        training.fetch_every = fetch_every or training.fetch_every
        training.start(resume)
        while training.has_next_epoch(3):
            finite = train_epoch(training, failure, stop_at, noticed)
            loss = training.meter.means()["loss"] if finite else math.nan
            if out_of_time and not finite:
                training.clock.budget = 0.0
            training.conclude_epoch({"val_loss": loss}, "")
        state = checkpoint.read(run.last)
        left = {
            "rows": (run.part / "metrics.csv").read_bytes(),
            "weights": [tensor.tolist() for tensor in state["model"].values()],
            "moments": [[moment.tolist() for moment in of.values()] for of in state["optimizer"]["state"].values()],
            "traces": (state["traces"]["steps"], state["traces"]["numbers"], state["traces"]["weights"].tolist()),
            "progress": state["progress"],
            "best": checkpoint.read(run.best)["best_val_loss"],
        }
    return left, noticed


@pytest.fixture(params=[60.0, -1.0], ids=["saved by the minute", "saved after each step"])
def save_seconds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How often a run is saved, and a look at all that is saved."""
    honest = checkpoint.save

    def save(state: dict[str, Any], path: Path) -> None:
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
        if path.name == "last.pkl":
            assert state["traces"]["weights"].isfinite().all()
            values = [*state["traces"]["numbers"].get("loss", []), *(total for total, _ in state["meter"].values())]
            assert all(map(math.isfinite, values))
        honest(state, path)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(state_module, "SAVE_SECONDS", request.param)


@pytest.mark.parametrize("failure", [fail, fail_alone])
@pytest.mark.parametrize("stop_at", [16, 18, 28])
def test_whole_and_resumed_runs_notice_at_the_same_step(
    stop_at: int, failure: Failure, save_seconds: None, tmp_path: Path
) -> None:
    """Stopped before a loss that is not finite, after it, when nobody has looked at it yet, and in the epoch after it."""
    whole, noticed = train(tmp_path / "whole", failure, fetch_every=5)
    assert noticed == [20] and whole["progress"] == (3, 0, 19 + STEPS)
    rows = read_metrics(tmp_path / "whole/script/name.part/metrics.csv")
    assert [math.isnan(loss) for loss in rows["train_loss"]] == [False, True, False] and rows["lr"][2] == 0.005
    traced = range(1, FAILS_AT) if failure is fail else (step for step in range(1, 20) if step != FAILS_AT)
    assert whole["traces"][0] == [*traced, *range(20, 20 + STEPS)]

    with pytest.raises(SystemExit, match="75"):
        train(tmp_path / "stopped", failure, fetch_every=5, stop_at=stop_at)
    left, noticed = train(tmp_path / "stopped", failure, fetch_every=5, resume="auto")
    assert left == whole and noticed == ([20] if stop_at < 20 else [])


def test_on_a_cpu_each_step_is_looked_at(save_seconds: None, tmp_path: Path) -> None:
    """Later looks change nothing of an epoch that goes well."""
    (at_once, noticed), (late, _) = (train(tmp_path / str(every), fetch_every=every) for every in (None, 5))
    assert noticed == [FAILS_AT]
    assert at_once["rows"].splitlines()[:2] == late["rows"].splitlines()[:2]
    assert at_once["traces"][2][: FAILS_AT - 1] == late["traces"][2][: FAILS_AT - 1]


def test_the_end_of_an_epoch_looks_at_all_losses(tmp_path: Path) -> None:
    left, noticed = train(tmp_path, fetch_every=1000)
    assert noticed == [] and left["progress"] == (3, 0, 3 * STEPS)
    rows = read_metrics(tmp_path / "script/name.part/metrics.csv")
    assert [math.isnan(loss) for loss in rows["train_loss"]] == [False, True, False]


def test_a_last_epoch_that_fails_leaves_the_best_model(save_seconds: None, tmp_path: Path) -> None:
    """There is no way back from the last epoch, but weights that are not finite are of no use."""
    left, noticed = train(tmp_path, fetch_every=5, out_of_time=True)
    assert noticed == [20] and left["progress"] == (2, 0, 19)
    best = checkpoint.read(tmp_path / "script/name.part/best.pkl")["model"]
    assert left["weights"] == [tensor.tolist() for tensor in best.values()]


@pytest.mark.parametrize("budget", [1e-9, 1e9])
def test_processes_resume_no_epoch_that_the_time_has_ended(
    budget: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come between its last step and its end: the resumed run takes no other step, as one process does."""
    with pytest.raises(SystemExit, match="75"):
        train(tmp_path, lambda loss: loss, fetch_every=5, stop_at=20)
    args = Namespace(results_dir=str(tmp_path), resume="auto", overwrite=False)
    with Run("script", "name", args, another="-run ID", may_change=("results_dir", "resume")) as run:
        model = make_model()
        training = Training(run, model, make_adam(model, 0.01), columns=(), budget=budget, horizon=0.2, alpha=0.5)
        training.fetch_every = 5
        training.start("auto")
        assert training.step == 20 and training.batch > 0
        for n_processes in (1, 2):
            monkeypatch.setattr(parallel, "world_size", lambda n=n_processes: n)
            assert training.time_is_up() == (budget < 1)


def test_records_that_wait_are_thinned_out_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 3)
    traces, late = Traces(model), Traces(model)
    fetch = late.fetch
    for step in range(1, 3 * N_RECORDS):
        model.weight.data.fill_(step)
        traces.record(step, {"loss": torch.tensor(step / 3)})
        monkeypatch.setattr(late, "fetch", fetch if step in (7, 2 * N_RECORDS) else lambda: None)
        late.record(step, {"loss": torch.tensor(step / 3)})
    monkeypatch.undo()
    assert (late.by_parameter()["weight"] == traces.by_parameter()["weight"]).all()
    assert late.steps == traces.steps and late.numbers == traces.numbers and late.every == traces.every


def test_adam_takes_states_of_a_gpu() -> None:
    """There it is fused, and its number of steps is a tensor on the device; here it stays what it is."""
    model = torch.nn.Linear(2, 3)
    optimizer, fused = make_adam(model, 0.1), torch.optim.Adam(model.parameters(), 0.3, fused=True)
    model(torch.ones(1, 2)).sum().backward()
    fused.step()
    optimizer.load_state_dict(fused.state_dict())
    assert optimizer.param_groups[0]["fused"] is None and optimizer.param_groups[0]["lr"] == 0.3
    assert fused.param_groups[0]["fused"] is True
    optimizer.step()
    assert [moments["step"].item() for moments in optimizer.state.values()] == [2, 2]
