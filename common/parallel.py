"""Training one model with the processes of `torchrun`, each with a part of every batch, as one process would with all of it.

Every process computes the whole batch's loss, from everybody's outputs, with the gradient through its own rows alone; the sum
of the processes' gradients is then the gradient of the one loss. Without torchrun all functions here do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import InputError


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
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
    if not launched():
        yield device
        return
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
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


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by the sum over all processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def any_process(flag: bool) -> bool:
    """True if a flag is set in any process: all have to stop at the same step."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    any_process(False)


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
