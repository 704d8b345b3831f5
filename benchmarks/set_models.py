"""Speed and memory of a training step of the Set Transformer and the LSTM, against the original's formulation.

    python -m benchmarks.set_models             # about a minute

A training step (forward, loss under the best matching, backward, Adam) of 50 sets of up to 594 entities, with the default
sizes: 128 hidden units, one layer; 4 heads and 10 inducing points in the Set Transformer. "plain" (benchmarks/plain_sets.py)
runs as the original does, with the C library's memory policy; "plain, tuned" and all others with that of the scripts.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from benchmarks.plain_sets import PlainLSTM, PlainSetTransformer
from benchmarks.swarm_layer import a_batch, training_step
from common.datasets.clustering import N_LABELS
from common.models.sets import make_set_model

MODELS = {"SetTransformer": PlainSetTransformer, "LSTM": PlainLSTM}


def make_step(name: str, kind: str, entities: int = 594) -> Step:
    """A training step of a model: plain, suite, or suite, bf16."""
    torch.manual_seed(0)
    model: nn.Module = make_set_model(name, 2, N_LABELS) if "suite" in kind else MODELS[name](2, N_LABELS)
    return training_step(model, a_batch(entities), "bf16" in kind)


def run(bench: Bench) -> None:
    for name in MODELS:
        kinds = {
            kind: Kind(partial(make_step, name, kind), tuned=kind != "plain")
            for kind in ("plain", "plain, tuned", "suite", "suite, bf16")
        }
        bench.compare(f"{name} step", kinds, 2 if bench.quick else 5, ("plain", "plain, tuned"), operations="")


if __name__ == "__main__":
    sys.exit(run_benchmark("set_models", run, __doc__))
