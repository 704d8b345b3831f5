"""Memory of long runs on a CPU."""

from __future__ import annotations

import ctypes

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
