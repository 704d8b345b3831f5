"""Forward and backward passes as CUDA graphs: all kernels of a pass are launched at once.

A SWARM step is some hundred short kernels. Launching them one by one takes the host several times as long as they run. A graph
is recorded for fixed shapes, so sets are padded to a multiple of 64 entities on a GPU, which gives few shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
MULTIPLE = 64  # of the padded number of entities on a GPU


def padded_length(n: int, device: torch.device) -> int:
    """The number of entities to which sets of at most n are padded: n on a CPU, a multiple of MULTIPLE on a GPU."""
    return n if device.type == "cpu" else -(-n // MULTIPLE) * MULTIPLE


def record(step: Callable[[], T], warm_up: int = 1) -> Callable[[], T]:
    """Record a step without inputs, after `warm_up` plain runs. Calls of the result write to one place, which they return."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(warm_up):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> T:
        graph.replay()
        return out

    return replay


class GraphedModel:
    """Calls of a model as CUDA graphs, one forward and one backward for each shape of its inputs.

    Only calls in training, with gradients, on a GPU are graphs; all others are plain calls. The backward pass of a call has to
    come before the next call, and gradients have to be cleared before it (`zero_grad`): each shape writes its results and
    gradients to one place. Graphs of all shapes share their working memory. The model must not look at values on the host.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.pool: Any = None
        self.by_shape: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if not (inputs[0].is_cuda and self.model.training and torch.is_grad_enabled()):
            return self.model(*inputs)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (autocast, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self.by_shape:
            self.by_shape[key] = self.record(inputs)
        return self.by_shape[key](*inputs)

    def record(self, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Record both passes for inputs of these shapes. The device's random numbers are what they were before."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        state = torch.cuda.get_rng_state(inputs[0].device)
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            static = tuple(tensor.clone() for tensor in inputs)
            graphed = torch.cuda.make_graphed_callables(_Call(self.model), static, pool=self.pool, allow_unused_input=True)
        torch.cuda.set_rng_state(state, inputs[0].device)
        return graphed


class _Call(nn.Module):
    """A module for each shape: recording replaces a module's `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)
