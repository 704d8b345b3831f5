"""benchmarks/curves.py: which runs pass k-means, and the figure."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import curves

PEERS = [
    {"method": "k-means, 1 start", "data": {"tasks": 60, "seed": 0}, "adjusted_rand_index": 0.8},
    {"method": "Gaussian mixture, 1 start", "data": {"tasks": 60, "seed": 0}, "adjusted_rand_index": 0.85},
    {"method": "network, Swarm", "data": {"tasks": 60, "seed": 0}, "adjusted_rand_index": 0.3, "run": "another"},
]


def write_run(path: Path, indices: list[float], seed: int = 0, **more: object) -> Path:
    """A finished run with an epoch of 100 steps and of a minute for each adjusted Rand index."""
    path.mkdir()
    levels = {
        name: {"cross_entropy": loss, "rand_index": index} for name, loss, index in (("oracle", 0.1, 0.9), ("chance", 2.3, 0.0))
    }
    result = {"script": "amortised_clustering", "parameters": 1234, **levels, **more}
    (path / "result.json").write_text(json.dumps(result))
    (path / "args.json").write_text(json.dumps({"type": "Swarm", "n_hidden": 8, "tasks": 60, "seed": seed}))
    rows = [f"{i + 1},{100 * (i + 1)},{60 * (i + 1)},{1 - index},{index}\n" for i, index in enumerate(indices)]
    (path / "metrics.csv").write_text("epoch,step,seconds,val_loss,val_rand_index\n" + "".join(rows))
    return path


@pytest.mark.parametrize(
    "indices, sentence",
    {
        (0.6, 0.7): "does not pass k-means, 1 start (0.800): 0.700 at best, 0.100 below, in 200 steps (2.0 min)",
        (0.7, 0.81, 0.79, 0.82): "after 200 steps (2.0 min), for good from step 400; ends with 0.820 after 400",
        (0.8, 0.9): "after 100 steps (1.0 min), for good from step 100; ends with 0.900 after 200",
        (0.7, 0.81, 0.79): "after 200 steps (2.0 min), not for good; ends with 0.790 after 300",
    }.items(),
)
def test_when_a_run_passes_k_means(indices: tuple[float, ...], sentence: str, tmp_path: Path) -> None:
    run = curves.read_run(write_run(tmp_path / "run", list(indices)), PEERS)
    assert set(run.rand_index) == {"k-means, 1 start", "Gaussian mixture, 1 start", "oracle"}
    (said,) = curves.passes(run)
    assert said.endswith(sentence)


def test_runs_that_went_on_with_the_one_before_are_one_curve(tmp_path: Path) -> None:
    """Of the first one there is only metrics.csv: it was stopped before its end."""
    for name, indices in (("a", [0.6, 0.7]), ("b", [0.75]), ("c", [0.81])):
        write_run(tmp_path / name, indices)
    for name in ("result.json", "args.json"):
        (tmp_path / "a" / name).unlink()
    run = curves.read_stages(",".join(str(tmp_path / name) for name in "abc"), PEERS)
    assert run.name == "c" and run.metrics["step"] == [100, 200, 300, 400] and run.metrics["epoch"] == [1, 2, 3, 4]
    assert run.metrics["val_rand_index"] == [0.6, 0.7, 0.75, 0.81]
    assert curves.passes(run)[0].startswith("passes k-means, 1 start (0.800) after 400 steps (4.0 min)")


def test_k_means_of_the_run_where_it_has_no_peers(tmp_path: Path) -> None:
    k_means = {"adjusted_rand_index": 0.75, "tasks": 6, "starts": 4}
    run = curves.read_run(write_run(tmp_path / "run", [0.7, 0.76], seed=1, k_means=k_means), PEERS)
    assert curves.passes(run)[0].startswith("passes k-means, 4 starts (0.750) after 200 steps")


def test_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the original's curve as it is committed; runs without any k-means, too."""
    runs = [str(write_run(tmp_path / f"run{seed}", [0.6, float("nan"), 0.7], seed)) for seed in range(2)]
    (tmp_path / "peers.json").write_text(json.dumps({"rows": PEERS}))
    out = tmp_path / "figure.png"
    assert curves.main([*runs, "--peers", str(tmp_path / "peers.json"), "--log", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "does not pass k-means" in said and "no level of k-means is known" in said
    with Image.open(out) as image:
        assert min(image.size) > 400 and np.array(image.convert("L")).std() > 10
    minutes, losses = curves.read_original(curves.FOLDER / "original_hour.csv")["original"]
    assert (minutes[0], losses[0]) == (18.86, 0.8356)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        curves.main([str(tmp_path), "--out", str(tmp_path / "figure.png")])
    assert stopped.value.code == 2 and "there is no" in capsys.readouterr().err


def test_a_picture_for_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        curves.main([str(write_run(tmp_path / "run", [0.6])), "--out", str(tmp_path / "missing" / "figure.png")])
    assert stopped.value.code == 2 and "there is no directory" in capsys.readouterr().err


def test_runs_on_a_gpu_are_told_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [0.6], device="cuda:0")
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | {"gpu": "a card"}))
    assert curves.read_run(run, PEERS).label.endswith(", a card")
    other = write_run(tmp_path / "other", [0.6], device="cpu")
    assert not curves.read_run(other, PEERS).label.endswith("None")


def test_runs_of_other_options_are_no_repeats(tmp_path: Path) -> None:
    for name, more in (("a", {"lr": 0.01}), ("b", {"lr": 0.01, "seed": 1}), ("c", {"lr": 0.02})):
        args = json.loads((write_run(tmp_path / name, [0.6]) / "args.json").read_text())
        (tmp_path / name / "args.json").write_text(json.dumps(args | more))
    a, b, c = (curve.label for curve in curves.tell_apart([curves.read_run(tmp_path / name, PEERS) for name in "abc"]))
    assert a == b and a.endswith(", -lr 0.01") and c.endswith(", -lr 0.02")
