"""Precision and determinism of products and convolutions: the meaning of --precision and --deterministic, in one place.

| precision | products and convolutions of float32 tensors |
| --- | --- |
| fp32 | IEEE float32, on every device |
| tf32 | inputs are rounded to 10 bits of mantissa, sums are float32: NVIDIA GPUs of compute capability 8 and later |
| bf16 | of the model's forward pass, and what follows from it backwards, in bfloat16 (autocast); all others as in fp32 |

Weights, statistics and losses are float32 in all three. PyTorch's own default is another: TF32 in cuDNN's convolutions and
recurrent networks, IEEE float32 in matrix products.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, backends

PRECISIONS = ("fp32", "tf32", "bf16")
# what can be rounded: on NVIDIA GPUs, and on CPUs (by oneDNN)
OPERATORS: tuple[Any, ...] = (
    backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul,  # type: ignore[attr-defined]
    backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul,  # type: ignore[attr-defined]
)  # fmt: skip
STRICT = ("ieee",) * 6
TF32 = ("tf32",) * 3 + ("ieee",) * 3
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, as PyTorch demands


def set_backend_flags(precision: str, *, deterministic: bool = False) -> None:
    """Set PyTorch's global flags for one of PRECISIONS. To be called before anything is computed on a GPU.

    `deterministic`: the same command computes the same bits on the same GPU; operations that cannot raise RuntimeError.
    cuDNN takes its algorithms by its own rules: timing them took 20 s for DUET on an H100, and found none that is faster.
    Raises ValueError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    with warnings.catch_warnings(action="ignore"):  # some versions announce the end of the older flags
        _set_fp32_precision(TF32 if precision == "tf32" else STRICT)
    if deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in DETERMINISTIC_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = DETERMINISTIC_WORKSPACES[0]
    if deterministic != torch.are_deterministic_algorithms_enabled():  # it imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(deterministic)
    backends.cudnn.deterministic = deterministic
    backends.cudnn.benchmark = False


def autocast(x: Tensor, precision: str) -> torch.autocast:
    """A context for a model's forward pass on x: bf16 computes products and convolutions in bfloat16, others change nothing."""
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def strict_fp32() -> Iterator[None]:
    """Products and convolutions in IEEE float32, whatever the flags say: for measures, and for what is no part of a model.

    A `with` block, or a decorator: @strict_fp32().
    """
    before = tuple(operator.fp32_precision for operator in OPERATORS)
    if before == STRICT:
        yield
        return
    _set_fp32_precision(STRICT)
    try:
        yield
    finally:
        _set_fp32_precision(before)


def _set_fp32_precision(values: tuple[str, ...]) -> None:
    """Set all OPERATORS, and the two older flags to the same: PyTorch raises where it asks for one that says otherwise."""
    torch.set_float32_matmul_precision("high" if values[2] == "tf32" else "highest")
    backends.cudnn.allow_tf32 = values[0] == "tf32"
    for operator, value in zip(OPERATORS, values, strict=True):
        operator.fp32_precision = value
