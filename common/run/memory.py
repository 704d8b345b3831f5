"""Memory: keeping it on a CPU, and running out of it."""

from __future__ import annotations

import ctypes

import torch

# parameters of mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free for the next ones, instead of mapping large ones afresh from the system.

    Fresh pages are zeroed and faulted in one by one: a fifth of the time of a SWARM training step. Only glibc can be told
    so; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or a CPU, and nothing else."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # the CPU's allocator has no error class of its own
    return type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate memory" in str(error)
