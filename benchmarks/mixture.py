"""The amortised mixture of Gaussians against EM for each set (scikit-learn's GaussianMixture).

    python -m benchmarks.mixture RUN/best.pkl ...   # finished runs of amortised_mog.py; a minute of a core each

On 1,000 sets that no run has seen: log-likelihood in nats per point of the network's mixtures, of EM's with the true number of
Gaussians and diagonal covariances (one start, and ten), and of the true mixtures; and milliseconds per set for 1, 10 and 100
sets at a time. The network passes over all points once, EM many times: that is what "amortised" means.
All results are written to results/mixture/peers.json, with machine, threads and load.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

import amortised_mog as script
from benchmarks.peers import circumstances, finished_run
from benchmarks.records import ROOT
from common.datasets.mixtures import MixtureSets, draw_sets
from common.errors import InputError
from common.models.mixture import log_likelihood
from common.run.options import at_least
from common.run.records import write_json
from common.seeds import generator_of

OUT = ROOT / "results" / "mixture" / "peers.json"
N_SETS, SEED = 1000, 123456789
AT_A_TIME = (1, 10, 100)


def fit(sets: MixtureSets, starts: int) -> list[float]:
    """EM for each set: its log-likelihood in nats per point."""
    values = []
    for points, mask in zip(sets.points, sets.mask, strict=True):
        x = points[mask].numpy()
        mixture = GaussianMixture(sets.means.shape[1], covariance_type="diag", n_init=starts, random_state=0)
        values.append(mixture.fit(x).score(x))
    return values


def milliseconds(work: Callable[[], Any], n_sets: int, repeats: int) -> float:
    """Median time per set."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times) / n_sets


@torch.no_grad()
def compare(args: argparse.Namespace, model: torch.nn.Module, n_sets: int) -> dict[str, dict[str, Any]]:
    """Of each method: mean nats per point, how far below the truth, and milliseconds per set by sets at a time."""
    sets = draw_sets(n_sets, args.n_dim, args.n_clust, generator_of(SEED))
    oracle = log_likelihood(sets.points, script.true_mixture(sets), sets.mask)
    parts = [slice(start, start + 100) for start in range(0, n_sets, 100)]
    network = torch.cat([log_likelihood(sets.points[p], model(sets.points[p], sets.mask[p]), sets.mask[p]) for p in parts])
    methods: dict[str, tuple[Tensor, Callable[[MixtureSets], object]]] = {
        "network": (network, lambda part: model(part.points, part.mask)),
        "EM, 1 start": (torch.tensor(fit(sets, 1)), lambda part: fit(part, 1)),
        "EM, 10 starts": (torch.tensor(fit(sets, 10)), lambda part: fit(part, 10)),
    }
    rows = {}
    for name, (values, work) in methods.items():
        rows[name] = {"log_likelihood": values.mean().item(), "below_the_truth": (oracle - values).mean().item()}
        times = {}
        for n in AT_A_TIME:
            part = draw_sets(n, args.n_dim, args.n_clust, generator_of(SEED, n))
            times[str(n)] = milliseconds(lambda part=part, work=work: work(part), n, 5 if n < 100 else 3)
        rows[name]["milliseconds_per_set"] = times
    return rows | {"true mixture": {"log_likelihood": oracle.mean().item(), "below_the_truth": 0.0}}


def as_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'nats per point, below the truth':>46}   ms a set, by sets at a time"]
    for name, row in rows.items():
        times = ", ".join(f"{n}: {ms:.2f}" for n, ms in row.get("milliseconds_per_set", {}).items())
        lines.append(f"{name:>14} {row['log_likelihood']:15.4f} {row['below_the_truth']:15.4f}   {times}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("best", nargs="+", type=Path, metavar="BEST.PKL")
    parser.add_argument("--sets", type=at_least(1), default=N_SETS, help="[%(default)s]")
    parser.add_argument("--threads", type=at_least(1), default=1, help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=OUT, help="the file that is written [results/mixture/peers.json]")
    options = parser.parse_args(argv)
    try:
        networks = {path.parent.name: finished_run(script, path) for path in options.best}  # before the minutes that follow
    except InputError as error:
        parser.error(f"{error}; name the best.pkl of a finished run of amortised_mog.py")
    if len(networks) < len(options.best):
        parser.error("two of the runs have one name, by which their results are kept: rename a directory")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    result = {"script": "benchmarks.mixture", "sets": options.sets, **circumstances(options.threads), "runs": {}}
    with threadpool_limits(options.threads):
        for name, (args, model) in networks.items():
            result["runs"][name] = compare(args, model, options.sets)
            print(f"{name}\n{as_table(result['runs'][name])}\n")
    write_json(options.out, result)
    print(f"{options.threads} threads, load {result['load']} at the beginning; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
