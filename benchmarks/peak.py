"""The processor: its description, and its peak, the most floating-point operations a second that PyTorch reaches on it.

    python -m benchmarks.peak --threads 1     # a few seconds

Best of a matrix product (torch.mm), oneDNN's linear operator and a convolution, in fp32 and bf16, each of shapes that suit it.
In the other benchmarks, "the peak" is the time of a step: the operations of its products divided by this rate.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
SHAPES = ((2400, 128, 512), (2048, 2048, 2048))  # of torch.mm: rows, inner size, columns
SECONDS = 0.15  # that each operation is repeated for


def machine() -> dict[str, Any]:
    """Name, vendor, family, model, cores, caches of a core and instruction sets (Linux; elsewhere what Python knows)."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        cpuinfo = ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo, re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "vendor": fields.get("vendor_id"),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _caches() -> dict[str, str]:
    """Sizes of the data caches that the first core uses, as the system writes them: {"L1d": "32K", "L2": "1024K", ...}."""
    sizes = {}
    for place in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((place / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}" + ("d" if kind == "Data" else "")] = size
    return sizes


def multiplies_bf16(machine: dict[str, Any]) -> bool:
    """True if the processor has instructions for bfloat16 products."""
    return any(name.endswith("_bf16") for name in machine["instructions"])


def measure(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of each operation with the current number of threads."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    rates = {}
    for m, k, n in SHAPES:
        a, b, out = new(m, k), new(k, n), new(m, n)
        rates[f"torch.mm {m}x{k}x{n}"] = _rate(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2 * m * k * n)
    x, weight = new(600, 128), new(512, 128)
    if _linear_agrees(x, weight):
        rates["oneDNN linear 600x128x512"] = _rate(lambda: _linear(x, weight), 2 * 600 * 128 * 512)
    images, kernels = new(32, 64, 32, 32).contiguous(memory_format=torch.channels_last), new(64, 64, 3, 3)
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    rates["convolution 64x64x3x3"] = _rate(lambda: F.conv2d(images, kernels, padding=1), 2 * 32 * 32 * 32 * 64 * 64 * 9)
    return rates


def _rate(call: Callable[[], object], operations: int) -> float:
    """GFLOP/s of the fastest of as many calls as fit into SECONDS, after three that do not count."""
    for _ in range(3):
        call()
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return operations / fastest / 1e9


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _linear_agrees(x: Tensor, weight: Tensor) -> bool:
    """Whether this PyTorch has the operator, which is not a published one, and it computes the product."""
    try:
        torch.testing.assert_close(_linear(x, weight), x @ weight.T, atol=0.5, rtol=0.02)
    except (AttributeError, RuntimeError, TypeError, AssertionError):
        return False
    return True


def peaks() -> dict[str, float]:
    """GFLOP/s of the fastest operation by precision, with the current number of threads."""
    return {name: max(measure(dtype).values()) for name, dtype in DTYPES.items()}


def main(argv: list[str] | None = None) -> int:
    from benchmarks.measure import Bench, run_benchmark  # which imports this module

    def run(bench: Bench) -> None:
        for name, dtype in DTYPES.items():
            for operation, rate in measure(dtype).items():
                bench.add(f"peak, {name}", operation, value=rate, unit="GFLOP/s")

    return run_benchmark("peak", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
