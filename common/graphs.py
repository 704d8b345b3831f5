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


def record(step: Callable[[], T], *, warm_up: int = 1, pool: Any = None) -> Callable[[], T]:
    """Record a step without inputs, after `warm_up` plain runs. Calls of the result write to one place, which they return."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(warm_up):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = step()

    def replay() -> T:
        graph.replay()
        return out

    return replay


class GraphedModel:
    """Calls of a model on a GPU as CUDA graphs, one for each shape of its inputs; on a CPU they are plain calls.

    In training, a call has a graph of its backward pass, too, which has to run before the next call, with gradients that were
    cleared (`zero_grad`): each shape writes its outputs and gradients to one place. Without gradients, an output is overwritten
    by the next call. Graphs of all shapes share their working memory, and are all dropped if memory runs out while one is
    recorded. The model must not look at values on the host.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.pool: Any = None
        self.recorded: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if not inputs[0].is_cuda:
            return self.model(*inputs)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        key = (self.model.training, torch.is_grad_enabled(), autocast, shapes)
        if key not in self.recorded:
            try:
                self.recorded[key] = self.record(inputs)
            except RuntimeError:  # out of memory: the caller may retry with fewer samples, and needs the memory of the graphs
                self.recorded.clear()
                raise
        return self.recorded[key](*inputs)

    def record(self, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Record calls with inputs of these shapes. The device's random numbers are what they were before."""
        if not self.recorded:  # a pool that has lost its graphs cannot be used again
            self.pool = torch.cuda.graph_pool_handle()
        random_state = torch.cuda.get_rng_state(inputs[0].device)
        # gradients are added up on the stream of the recording, and PyTorch warns of that: it waits where it has to
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        static = tuple(tensor.clone() for tensor in inputs)
        # the cache would keep weights as they are now, in a lower precision
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            if torch.is_grad_enabled():
                call = _Call(self.model)
                graphed = torch.cuda.make_graphed_callables(call, static, pool=self.pool, allow_unused_input=True)
            else:
                graphed = self.record_forward(static)
        torch.cuda.set_rng_state(random_state, inputs[0].device)
        return graphed

    def record_forward(self, static: tuple[Tensor, ...]) -> Callable[..., Any]:
        replay = record(lambda: self.model(*static), pool=self.pool)

        def call(*inputs: Tensor) -> Any:
            for own, given in zip(static, inputs, strict=True):
                own.copy_(given)
            return replay()

        return call


class _Call(nn.Module):
    """A module for each shape: recording replaces a module's `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)
