"""The amortised mixture of Gaussians against EM for each set (scikit-learn's GaussianMixture).

    python -m benchmarks.mixture BEST.PKL           # of a run of amortised_mog.py; about 3 minutes on two cores

On 1,000 sets that no run has seen: log-likelihood in nats per point of the network's mixtures, of EM's with the true number of
Gaussians and diagonal covariances (one start, and ten), and of the true mixtures; and milliseconds per set for 1, 10 and 100
sets at a time. The network passes over all points once, EM many times: that is what "amortised" means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.mixture import GaussianMixture

import amortised_mog as script
from common import checkpoint
from common.datasets.mixtures import MixtureSets, draw_sets
from common.models.mixture import log_likelihood
from common.seeds import generator_of

N_SETS, SEED = 1000, 123456789
AT_A_TIME = (1, 10, 100)


def network_of(path: Path) -> tuple[argparse.Namespace, torch.nn.Module]:
    """The options and the model of a finished run."""
    parser = script.get_parser()
    args = parser.parse_args([])
    for name, value in json.loads((path.parent / "args.json").read_text()).items():
        if name in args:
            setattr(args, name, value)
    args.device, args.seed = "cpu", SEED
    model = script.make_model(args)
    checkpoint.load_model(model, checkpoint.read(path)["model"], path)
    return args, model.eval()


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
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("best", type=Path, metavar="BEST.PKL")
    parser.add_argument("--sets", type=int, default=N_SETS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    args, model = network_of(options.best)
    sets = draw_sets(options.sets, args.n_dim, args.n_clust, generator_of(SEED))
    oracle = log_likelihood(sets.points, script.true_mixture(sets), sets.mask)
    parts = [slice(start, start + 100) for start in range(0, options.sets, 100)]
    network = torch.cat([log_likelihood(sets.points[p], model(sets.points[p], sets.mask[p]), sets.mask[p]) for p in parts])
    print(
        f"{options.sets} sets, {options.threads} thread(s), torch {torch.__version__}\n\nnats per point, and below the truth:"
    )
    rows = {"network": network, "EM, 1 start": torch.tensor(fit(sets, 1)), "EM, 10 starts": torch.tensor(fit(sets, 10))}
    for name, values in {**rows, "true mixture": oracle}.items():
        print(f"{name:>14} {values.mean().item():9.4f} {(oracle - values).mean().item():9.4f}")
    print("\nmilliseconds per set, by sets at a time:" + "".join(f"{n:>9}" for n in AT_A_TIME))
    for name, work in (
        ("network", lambda part: model(part.points, part.mask)),
        ("EM, 1 start", lambda part: fit(part, 1)),
        ("EM, 10 starts", lambda part: fit(part, 10)),
    ):
        numbers = []
        for n in AT_A_TIME:
            part = draw_sets(n, args.n_dim, args.n_clust, generator_of(SEED, n))
            numbers.append(milliseconds(lambda part=part, work=work: work(part), n, 5 if n < 100 else 3))
        print(f"{name:>40}" + "".join(f"{number:9.2f}" for number in numbers))


if __name__ == "__main__":
    main()
