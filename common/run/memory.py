"""Memory: the C library keeps it on a CPU; batches are split when it runs out."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from common import parallel
from common.errors import Failed

# parameters of mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory"
    r"|CUDA( driver)? error: out of memory|CUDA out of memory|Cuda failure.* 'out of memory'"  # the last from NCCL
    r"|CU[A-Z]+_(STATUS_)?(\w+_)?ALLOC(ATION)?_FAILED"  # cuBLAS, cuDNN (8; 9 has more words), cuSOLVER, cuFFT
)

T = TypeVar("T")


def tune_malloc() -> None:
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
    """True if an error says that memory has run out, on a GPU or a CPU, and nothing else."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # the CPU's allocator, the CUDA runtime and its libraries have no error class of their own
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


class MicroBatches:
    """Cuts batches into as few equal parts as memory allows: `size` samples go through a model at a time."""

    def __init__(self, batch_size: int, log: Callable[[str], None]):
        """`log` is told when memory runs out."""
        small = [size for size in range(1, math.isqrt(batch_size) + 1) if batch_size % size == 0]
        self.sizes = sorted({*small, *(batch_size // size for size in small)}, reverse=True)  # all divisors
        self.log = log

    @property
    def size(self) -> int:
        """Samples handled at a time."""
        return self.sizes[0]

    def run_in_parts(self, compute: Callable[[int], T], *, together: bool = False) -> T:
        """compute(size). When memory runs out, from the start again with a smaller size, which stays from then on.

        Several processes get by each for itself, until they work `together`: then all take the smallest of their sizes, and
        `compute` ends with `parallel.collect`, by which all learn that they are to begin again with a smaller one.
        Raises Failed if not even one sample fits.
        """
        smaller = parallel.largest(-len(self.sizes)) + len(self.sizes) if together else 0  # steps that another has taken
        if smaller:
            self.sizes = self.sizes[smaller:]
            self.log(f"out of memory in another process: batches go in parts of {self.size} from now on")
        while True:
            try:
                return compute(self.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                elsewhere = isinstance(error, parallel.OutOfMemoryElsewhere)
            # out here, the error and what it holds of the failed computation are gone
            if together and not elsewhere:
                parallel.agree(parallel.RETRY)
            if len(self.sizes) == 1:
                raise Failed("even one sample at a time does not fit into memory: a smaller model would")
            self.sizes.pop(0)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.log(f"out of memory: batches go in parts of {self.size} from now on, with the same result")
