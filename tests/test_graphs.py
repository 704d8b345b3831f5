"""CUDA graphs of a model where memory runs out. What they compute is checked on a GPU (benchmarks/gpu_checks.py)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.graphs import GraphedModel


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda _: True)  # type: ignore[assignment]


def test_graphs_are_dropped_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller inputs then get the memory of all, in a pool of their own: PyTorch takes none again that has lost its graphs."""
    pools: list[Any] = []

    def record(call: nn.Module, inputs: tuple[Tensor, ...], *, pool: Any, **_: Any) -> Callable[..., Any]:
        pools.append(pool)
        if len(inputs[0]) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    graphed = GraphedModel(nn.Linear(3, 1))
    for n in (4, 5, 4):
        graphed(torch.ones(n, 3).as_subclass(OnGPU))
    assert len(pools) == len(graphed.recorded) == 2 and pools[0] is pools[1]
    with pytest.raises(torch.OutOfMemoryError):
        graphed(torch.ones(8, 3).as_subclass(OnGPU))
    assert not graphed.recorded
    graphed(torch.ones(4, 3).as_subclass(OnGPU))
    assert len(graphed.recorded) == 1 and pools[3] not in pools[:3]
