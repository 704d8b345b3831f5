"""benchmarks/mixture.py: a network next to EM, set by set."""

import json
from pathlib import Path

import pytest
import torch

import amortised_mog as script
from benchmarks import mixture


def test_a_table_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """EM is fitted to the points that it is measured on, so it is above the truth; an untrained network is far below."""

    def finished_run(_: object, best: Path) -> tuple[object, torch.nn.Module]:
        args = script.get_parser().parse_args(["-n_hidden", "8", "-n_clust", "2", "-seed", best.parent.name])
        return args, script.make_model(args).eval()

    monkeypatch.setattr(mixture, "finished_run", finished_run)
    out = tmp_path / "new" / "peers.json"
    assert mixture.main([f"{seed}/best.pkl" for seed in (1, 2)] + ["--sets", "4", "--out", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["1", "2"] and "EM, 1 start" in capsys.readouterr().out
    for rows in runs.values():
        below = {name: row["below_the_truth"] for name, row in rows.items()}
        assert below["EM, 10 starts"] < 0 == below["true mixture"] < below["network"]
        assert set(rows["network"]["milliseconds_per_set"]) == {"1", "10", "100"}
    assert runs["1"]["EM, 1 start"]["log_likelihood"] == runs["2"]["EM, 1 start"]["log_likelihood"]

    with pytest.raises(SystemExit) as stopped:
        mixture.main(["a/1/best.pkl", "b/1/best.pkl"])
    assert stopped.value.code == 2 and "one name" in capsys.readouterr().err


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run is read before the first is measured."""
    with pytest.raises(SystemExit) as stopped:
        mixture.main([str(tmp_path / "best.pkl"), "--out", str(tmp_path / "peers.json")])
    assert stopped.value.code == 2 and "name the best.pkl of a finished run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
