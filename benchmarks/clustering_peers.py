"""Amortised clustering next to what one would use instead: scikit-learn's KMeans and GaussianMixture.

    python -m benchmarks.clustering_peers RUN/best.pkl ...      # finished runs of amortised_clustering.py; 5 minutes of a core

scikit-learn is given the true number of clusters, the network nothing. Adjusted Rand index on each run's own validation tasks,
by number of clusters, too; and milliseconds per task for 1, 10 and 1,000 tasks at a time. scikit-learn fits one task after the
other; the network passes over 10 tasks as one batch, and over 1,000 in batches of 50 tasks of similar size. All results are
written to results/clustering/peers.json, with machine, threads and load: times of a busy machine are no figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

import amortised_clustering as script
from benchmarks.peers import circumstances, finished_run
from benchmarks.records import ROOT
from common import matching
from common.datasets import clustering
from common.datasets.clustering import N_LABELS, ClusteringTasks, make_tasks, padded_batch
from common.errors import InputError
from common.run.options import at_least
from common.run.records import write_json

OUT = ROOT / "results" / "clustering" / "peers.json"
SEED = 123456789  # of the tasks that are timed: as no run has it
AT_A_TIME = (1, 10, 1000)
TIMED, BATCH = 100, 50  # tasks that are timed one by one or ten by ten; tasks in a batch of 1,000
PEERS: dict[str, Callable[[int], Any]] = {
    "k-means, 1 start": lambda k: KMeans(k, n_init=1, random_state=0),
    "k-means, 10 starts": lambda k: KMeans(k, n_init=10, random_state=0),
    "Gaussian mixture, 1 start": lambda k: GaussianMixture(k, n_init=1, random_state=0),
    "Gaussian mixture, 10 starts": lambda k: GaussianMixture(k, n_init=10, random_state=0),
}


def fit(make: Callable[[int], Any], tasks: ClusteringTasks, indices: Tensor) -> list[Tensor]:
    """Labels (E) of each task by one of PEERS, which is told its number of clusters."""
    labels = []
    for task in indices.tolist():
        points = tasks.points[tasks.starts[task] :][: tasks.sizes[task]].numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EM has not converged after 100 steps
            labels.append(torch.from_numpy(make(int(tasks.n_clusters[task])).fit_predict(points)).long())
    return labels


def rand_index(tasks: ClusteringTasks, indices: Tensor, predicted: list[Tensor]) -> Tensor:
    """Adjusted Rand index of each task (N), from labels of each."""
    values = []
    for task, labels in zip(indices.split(1), predicted, strict=True):
        _, true, mask = padded_batch(tasks, task)
        values.append(matching.adjusted_rand_index(matching.contingency(labels[None], true, mask, N_LABELS)))
    return torch.cat(values)


@torch.no_grad()
def label(args: argparse.Namespace, model: torch.nn.Module, tasks: ClusteringTasks, indices: Tensor) -> list[Tensor]:
    """The network's labels (E) of each task, in the order of `indices`."""
    labels = {}
    for batch in clustering.batches_by_size(tasks, indices, BATCH):
        points, _, mask = padded_batch(tasks, batch)
        predicted = script.log_probs(model, points, mask, args.precision).argmax(2)
        labels |= {task: row[own] for task, row, own in zip(batch.tolist(), predicted, mask, strict=True)}
    return [labels[task] for task in indices.tolist()]


def summary(tasks: ClusteringTasks, indices: Tensor, values: Tensor) -> dict[str, Any]:
    """Mean and its standard error over tasks, and means by number of clusters."""
    n_clusters = tasks.n_clusters[indices]
    by_clusters = {str(k): values[n_clusters == k].mean().item() for k in sorted(set(n_clusters.tolist()))}
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return {
        "tasks": len(values),
        "adjusted_rand_index": values.mean().item(),
        "standard_error": error,
        "by_clusters": by_clusters,
    }


def milliseconds(work: Callable[[ClusteringTasks, Tensor], Any], quick: bool) -> dict[str, float]:
    """Wall time per task by tasks at a time: means over the same tasks, the medians of three rounds."""
    tasks, times = make_tasks(AT_A_TIME[-1], SEED), {}
    for n in AT_A_TIME[:2] if quick else AT_A_TIME:
        parts = torch.arange(max(n, 10 if quick else TIMED)).split(n)
        work(tasks, parts[0])
        rounds = []
        for _ in range(1 if quick or n == AT_A_TIME[-1] else 3):
            began = time.perf_counter()
            for part in parts:
                work(tasks, part)
            rounds.append(1e3 * (time.perf_counter() - began) / sum(len(part) for part in parts))
        times[str(n)] = statistics.median(rounds)
    return times


def compare(
    networks: dict[Path, tuple[argparse.Namespace, torch.nn.Module]], limit: int | None, quick: bool
) -> list[dict[str, Any]]:
    """A row for each network and, on the tasks of each, scikit-learn's methods and the oracle."""
    rows: list[dict[str, Any]] = []
    speeds = {name: milliseconds(partial(fit, make), quick) for name, make in PEERS.items()}
    done = set()
    for path, (args, model) in networks.items():
        tasks = make_tasks(args.tasks, args.seed)
        indices, of = clustering.split(args.tasks)[1][:limit], {"data": {"tasks": args.tasks, "seed": args.seed}}
        if (args.tasks, args.seed) not in done:
            done.add((args.tasks, args.seed))
            for name, make in PEERS.items():
                values = rand_index(tasks, indices, fit(make, tasks, indices))
                given = {"method": name, "given": "the number of clusters"} | of | summary(tasks, indices, values)
                rows.append(given | {"milliseconds_per_task": speeds[name]})
            oracle = script.measure_baselines(tasks, list(indices.split(1)), args.seed)["oracle"]["rand_index"]
            rows.append({"method": "oracle", "given": "the true mixture"} | of | summary(tasks, indices, oracle))
        values = rand_index(tasks, indices, label(args, model, tasks, indices))
        row = {"method": f"network, {args.type}", "given": "nothing", "run": path.parent.name} | of
        network = milliseconds(partial(label, args, model), quick)
        rows.append(row | summary(tasks, indices, values) | {"milliseconds_per_task": network})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """A row for each method: adjusted Rand index, that of some numbers of clusters, and times."""
    numbers = sorted({int(k) for row in rows for k in row["by_clusters"]})
    lines = [
        f"{'adjusted Rand index':>59}{'all tasks':>18}"
        + "".join(f"{k:>7}" for k in numbers)
        + "   ms a task, by tasks at a time"
    ]
    for row in rows:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
        by_clusters = (row["by_clusters"].get(str(k)) for k in numbers)
        cells = "".join(f"{'':>7}" if value is None else f"{value:7.3f}" for value in by_clusters)
        times = ", ".join(f"{n}: {ms:.2f}" for n, ms in row.get("milliseconds_per_task", {}).items())
        lines.append(
            f"{row['method'] + ', given ' + row['given']:>59}{row['adjusted_rand_index']:>10.3f}{error:8}{cells}   {times}"
        )
        if "run" in row:
            lines.append(f"{'':8}{row['run']}")
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("best", nargs="+", type=Path, metavar="BEST.PKL")
    parser.add_argument("--tasks", type=at_least(1), metavar="N", help="the first N validation tasks of each run [all]")
    parser.add_argument("--threads", type=at_least(1), default=1, help="[%(default)s]")
    parser.add_argument("--quick", action="store_true", help="few tasks are timed")
    parser.add_argument("--out", type=Path, default=OUT, help="the file that is written [results/clustering/peers.json]")
    options = parser.parse_args(argv)
    try:
        networks = {path: finished_run(script, path) for path in options.best}  # before the minutes that follow
    except InputError as error:
        parser.error(f"{error}; name the best.pkl of a finished run of amortised_clustering.py")
    torch.set_num_threads(options.threads)
    result = {"script": "benchmarks.clustering_peers", **circumstances(options.threads)}
    with threadpool_limits(options.threads):
        rows = compare(networks, options.tasks, options.quick)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result | {"rows": rows})
    print(f"{as_table(rows)}\n\n{options.threads} threads, load {result['load']} at the beginning; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
