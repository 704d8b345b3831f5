"""TensorBoard, Weights & Biases and progress bars in every script that trains."""

import io
import re
import sys
import time
from pathlib import Path

import pytest

import deepsets_exercise
from tests.command_lines import Terminal, exit_status
from tests.interruptions.cases import Case, make_case

# what each script is to show, and how many times (epochs, of all its jobs)
TRACKED = {
    "clustering": ("val_loss", 4),
    "images": ("val_loss", 5),
    "duet": ("train_total_loss", 2),
    "zoo": ("train_loss", 4),
    "routing": ("train_loss", 2),
    "stitching": ("val_accuracy", 4),
    "rotations": ("train_loss", 4),
}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric in all event files below a folder."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = []
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        board = accumulators.EventAccumulator(str(path))
        board.Reload()
        events += [(event.step, event.value) for event in board.Scalars(name)]
    return events


def logged_offline(folder: Path, name: str) -> list[float]:
    """Values of a metric in all files of Weights & Biases below a folder: protobufs of a key, and of a number as text."""
    files = sorted(folder.rglob("*.wandb"))
    assert files
    values = []
    for content in (file.read_bytes() for file in files):
        for found in re.finditer(rb"%b\x82\x01(.)" % name.encode(), content, re.DOTALL):  # field 16, and its length
            values.append(float(content[found.end() :][: found[1][0]]))  # what follows may begin with a digit
    return values


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRACKED)
def test_trackers_get_each_row(kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    case = make_case(kind, data, tmp_path / "results")
    dash = "-" if "-results_dir" in case.line else "--"
    case.line += [f"{dash}tensorboard", f"{dash}wandb{'_' if dash == '-' else '-'}project", "symmetry"]
    assert case.run() == 0
    name, n = TRACKED[kind]
    events = scalars(case.results, name)
    assert len(events) == n
    values, deadline = sorted({value for _, value in events}), time.monotonic() + 60
    # each twice: in the history and, the last, in the summary; they are written by a process of their own
    while len(set(logged_offline(case.results, name))) < len(values) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert values == pytest.approx(sorted(set(logged_offline(case.results, name))), rel=1e-5)


@pytest.mark.slow
def test_trackers_of_the_exercise(tmp_path: Path) -> None:
    line = ["--steps", "201", "--no-sweep", "--tensorboard", "--results-dir", str(tmp_path)]
    assert exit_status(deepsets_exercise.main, line) == 0
    assert [step for step, _ in scalars(tmp_path, "loss")] == [0, 100, 200] * 3


@pytest.mark.slow
def test_a_bar_is_shown_on_a_terminal_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert case.run() == 0
    assert "\r" in terminal.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("kind", ["zoo", "stitching", "alignment", "rotations"])
def test_progress_shows_the_bar_everywhere(
    kind: str, progress: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    case = make_case(kind, data, tmp_path / "results")
    case.line += ["--progress"] if progress else []
    assert case.run() == 0
    assert ("\r" in file.getvalue()) == progress
