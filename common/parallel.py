"""Training one model with the processes of `torchrun`, each with a part of every batch, as one process would with all of it.

A loss that is a sum over samples is summed by each process over its own ones, divided by the size of the whole batch. A loss
that compares samples is computed by every process from everybody's outputs, with the gradient through its own rows alone.
Either way the sum of the processes' gradients is the gradient of the one loss. Without torchrun all functions here do nothing.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import InputError
from common.seeds import seed_of

PATIENCE = timedelta(hours=1)  # of processes that wait while the first draws or saves; a dead one is noticed at once
LOST = re.compile(r"gloo|nccl|TCPStore|Connection (closed|reset|refused)", re.IGNORECASE)
GO_ON, STOP, RETRY = range(3)  # what processes agree on: stop for a signal, or retry with less, as memory has run out

T = TypeVar("T")


class OutOfMemoryElsewhere(MemoryError):
    """Memory has run out in another process."""


def world_size() -> int:
    """The number of processes that train the model; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched() -> bool:
    """True if torchrun has started this process."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_main() -> bool:
    """True in the process that writes; also before the group is made."""
    return not launched() or int(os.environ["RANK"]) == 0


def local_device(device_type: str) -> torch.device:
    """This process's device. Raises InputError if torchrun has started more processes than the machine has GPUs."""
    if device_type != "cuda" or not launched():
        return torch.device(device_type)
    index, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= n_gpus:
        raise InputError(f"process {index} of torchrun has no GPU, this machine has {n_gpus}: --nproc-per-node={n_gpus}")
    return torch.device("cuda", index)


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """Join the other processes that torchrun has started, if any; gives this process's device. Raises as `local_device`."""
    device = local_device(device_type)
    if not launched() or dist.is_initialized():
        yield device
        return
    if device_type == "cuda":
        torch.cuda.set_device(device)
    # Its functions keep the group that exists at their import, as a default. Adam would import them in its first step: the
    # group would never be destroyed, and one of its threads can abort the process when the interpreter ends.
    import_module("torch.distributed.nn.functional")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def chunk(n: int, index: int, count: int) -> slice:
    """The chunk `index` of n items that are cut into `count` chunks: consecutive items, sizes as equal as can be."""
    return slice(n * index // count, n * (index + 1) // count)


def shard(n: int) -> slice:
    """This process's rows of a batch of n."""
    return chunk(n, rank(), world_size())


def gather(own: Tensor, n: int, copies: int = 1) -> Tensor:
    """Everybody's rows of a batch, in order; gradient flows to the own ones alone. `copies` rows belong to each of n images."""
    if world_size() == 1:
        return own
    rows = shard(n)
    first, last = copies * rows.start, copies * rows.stop
    everybody = own.new_zeros(copies * n, *own.shape[1:])
    everybody[first:last] = own.detach()
    dist.all_reduce(everybody)
    return torch.cat([everybody[:first], own, everybody[last:]])


def deal(sizes: Tensor) -> Tensor:
    """This process's share of sets, given their numbers of entities (N): indices in order. All get nearly as many entities.

    The largest set that is left goes to the process with the fewest entities so far.
    """
    if world_size() == 1:
        return torch.arange(len(sizes))
    dealt: list[list[int]] = [[] for _ in range(world_size())]
    entities = [0] * world_size()
    for index in sizes.argsort(descending=True, stable=True).tolist():
        poorest = entities.index(min(entities))
        dealt[poorest].append(index)
        entities[poorest] += int(sizes[index])
    return torch.tensor(sorted(dealt[rank()]))


def own(pieces: Sequence[T]) -> Sequence[T]:
    """This process's share of independent pieces of work."""
    return pieces[rank() :: world_size()]


def collect(results: list[T]) -> list[T]:
    """Everybody's results of their `own` pieces, which lie on the CPU, in the order of the pieces. Raises as `agree` does."""
    if world_size() == 1:
        return results
    agree(GO_ON)
    everybodys: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everybodys, results)
    return [everybodys[i % world_size()][i // world_size()] for i in range(sum(map(len, everybodys)))]


def sum_gradients(parameters: Iterable[nn.Parameter], *numbers: Tensor | float) -> list[Tensor]:
    """Replace every gradient by the sum over all processes, in one reduction a dtype.

    Numbers go along in the first of them; returns their sums, each a scalar of that dtype.
    """
    if world_size() == 1:
        return [torch.as_tensor(number) for number in numbers]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    sums: list[Tensor] = []
    for gradients in by_dtype.values():
        more = [gradients[0].new_full((1,), n) if not isinstance(n, Tensor) else n.reshape(1).to(gradients[0]) for n in numbers]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), *(more if not sums else [])])
        dist.all_reduce(flat)
        parts = flat.split([*(gradient.numel() for gradient in gradients), len(flat) - sum(g.numel() for g in gradients)])
        torch._foreach_copy_(gradients, [part.view_as(g) for g, part in zip(gradients, parts, strict=False)])
        sums = sums or list(parts[-1].unbind())
    return sums


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def agree(on: int) -> int:
    """The most urgent of GO_ON, STOP and RETRY that a process says. Raises OutOfMemoryElsewhere if another says RETRY."""
    agreed = largest(on)
    if agreed == RETRY and on != RETRY:
        raise OutOfMemoryElsewhere("out of memory in another process")
    return agreed


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    largest(0)


def run_on_main(compute: Callable[[], Any], *expected: type[Exception]) -> Any:
    """Compute in the first process, and send the result to all. An `expected` error is raised there, and ends the others."""
    if world_size() == 1:
        return compute()
    value, problem = None, None
    if rank() == 0:
        try:
            value = compute()
        except expected as error:
            problem = error
    said = [value, problem is None]
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    if problem is not None:
        raise problem
    if not said[1]:
        raise SystemExit(2)  # the first process says why
    return said[0]


def main_first(load: Callable[[], Any], *expected: type[Exception]) -> None:
    """Let the first process find out whether something can be loaded, and fetch it, while the others wait."""
    if world_size() > 1:
        run_on_main(lambda: load() and None, *expected)


def seed_step(seed: int, step: int) -> None:
    """Let each of several processes draw numbers of its own in a step (dropout), the same ones when it is taken again.

    One process goes on with the global generators, whose state is saved.
    """
    if world_size() > 1:
        torch.manual_seed(seed_of(seed, step, rank()))


# ---- what can go wrong ---------------------------------------------------------------------------------------------------


def speaks() -> bool:
    """True in the process that asks first, so that one process prints what all find out. Works before the group is made."""
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    address, start = os.environ["MASTER_ADDR"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]
        return store.add(f"spoken/{start}", 1) == 1
    except (RuntimeError, ValueError):
        return True


def check_joined() -> None:
    """Raises InputError if torchrun has started a script whose processes do not join a `process_group`."""
    if launched() and not dist.is_initialized():
        raise InputError("torchrun is for scripts that train one model with several processes: start this one with python")


def check_same(**values: object) -> None:
    """Check that processes agree in values: tensors, or what has a repr. Raises InputError, in all of them, if not."""
    if world_size() == 1:
        return
    prints = {name: fingerprint(value) for name, value in values.items()}
    everybodys: list[dict[str, object]] = [{} for _ in range(world_size())]
    dist.all_gather_object(everybodys, prints)
    for name in prints:
        for other, theirs in enumerate(everybodys):
            if theirs[name] != everybodys[0][name]:
                raise InputError(
                    f"process {other} has other {name} than the first ({theirs[name]}, not {everybodys[0][name]}): start all "
                    "with the same line, code and data"
                )


def fingerprint(value: object) -> str:
    """Eight digits that tell values apart: a tensor, tensors by name, or what has a repr."""
    if isinstance(value, Tensor):
        return f"{zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data):08x}"
    if isinstance(value, dict):
        value = {name: fingerprint(part) if isinstance(part, Tensor) else part for name, part in value.items()}
    return f"{zlib.crc32(repr(value).encode()):08x}"


def check_batches(sizes: Iterable[int], what: str) -> None:
    """Raises InputError if a batch of so many samples has none for some process."""
    smallest = min(sizes)
    if smallest < world_size():
        raise InputError(
            f"a batch of {smallest} {what} is too small for {world_size()} processes: take fewer, or another batch size that "
            "leaves more for the last batch of an epoch"
        )


def is_lost(error: BaseException | None) -> bool:
    """True if an error says that another process has gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or LOST.search(str(error)) is not None


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all processes: (B, C) or (B, C, H, W).

    On any device, and the host never waits for a GPU. torch.nn.SyncBatchNorm is for GPUs alone, and looks there which
    processes have no rows, which makes the host wait in every layer.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"{input.ndim} axes: (B, C) or (B, C, H, W) are expected")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = input if input.dtype == torch.float64 else input.float()
        n = x.new_full((), x.numel() // x.shape[1])
        dist.all_reduce(n)
        mean = _Sum.apply(x.sum(axes)) / n
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / n
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[operator, arg-type, union-attr]
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)  # type: ignore[operator, arg-type, union-attr]
        y = centred * (variance + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Let all batch norms of a model see all processes' rows."""
    if world_size() == 1:
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                synchronised = SyncBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight)
                synchronised.load_state_dict(child.state_dict())
                setattr(parent, name, synchronised)
    return model
