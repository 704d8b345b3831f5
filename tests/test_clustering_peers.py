"""benchmarks/clustering_peers.py: a network's labels and scikit-learn's, task by task."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

import amortised_clustering as script
from benchmarks import clustering_peers as peers
from common.datasets import clustering
from common.datasets.clustering import make_tasks


class Quadrants(nn.Module):
    """Labels a point by its quadrant, from 0 to 3."""

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        label = 2 * (points[..., 0] > 0) + (points[..., 1] > 0)
        return 9.0 * nn.functional.one_hot(label.long(), clustering.N_LABELS)


def test_labels_are_those_of_their_task() -> None:
    """In the order that is asked for, whatever the batches; and the index is scikit-learn's."""
    tasks, indices = make_tasks(130, 0), torch.randperm(130, generator=torch.Generator().manual_seed(0))
    args = script.get_parser().parse_args(["-type", "Swarm"])
    labels = peers.label(args, Quadrants(), tasks, indices)
    values = peers.rand_index(tasks, indices, labels)
    for task, predicted, value in zip(indices.tolist(), labels, values.tolist(), strict=True):
        of_task = slice(int(tasks.starts[task]), int(tasks.starts[task] + tasks.sizes[task]))
        x, y = tasks.points[of_task].unbind(1)
        assert torch.equal(predicted, 2 * (x > 0) + (y > 0).long())
        assert value == pytest.approx(adjusted_rand_score(tasks.labels[of_task], predicted))


@pytest.mark.slow
def test_a_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {name: make for name, make in peers.PEERS.items() if name.endswith("1 start")})
    line = f"-type Swarm -n_hidden 8 -n_iter 2 -tasks 60 -bs 9 -max_epochs 1 -results_dir {tmp_path}"
    assert script.main(line.split()) == 0
    (best,) = tmp_path.glob("*/*/best.pkl")
    capsys.readouterr()
    assert peers.main([str(best), "--quick", "--out", str(tmp_path / "peers.json")]) == 0
    out, written = capsys.readouterr().out, json.loads((tmp_path / "peers.json").read_text())
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == [*peers.PEERS, "oracle", "network, Swarm"] and written["threads"] == 1
    assert all(row["tasks"] == 6 and row["method"] in out for row in written["rows"])
    index = {name: row["adjusted_rand_index"] for name, row in rows.items()}
    assert index["network, Swarm"] < index["k-means, 1 start"] < index["oracle"]
    result = json.loads((best.parent / "result.json").read_text())
    for name, field in (("network, Swarm", "model"), ("oracle", "oracle")):
        assert index[name] == pytest.approx(result[field]["rand_index"], abs=1e-6)
    assert set(rows["network, Swarm"]["milliseconds_per_task"]) == {"1", "10"}


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main([str(tmp_path / "best.pkl")])
    assert stopped.value.code == 2 and "name the best.pkl of a finished run" in capsys.readouterr().err
