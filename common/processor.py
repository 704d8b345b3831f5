"""The CPU: its cache, and matrix products by the library that is fastest on it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

CACHE_SIZE = 2**20  # where the system does not say


@functools.cache
def cache_size() -> int:
    """Bytes of the cache that a core has for itself (level 2)."""
    for index in range(4):
        try:
            place = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}")
            if (place / "level").read_text().strip() == "2":
                return int((place / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            break
    return CACHE_SIZE


@functools.cache
def fp32_products() -> str:
    """The library of `product` for float32 on this CPU: oneDNN or MKL (or what PyTorch has been built with).

    MKL takes no AVX-512 on processors of AMD, which leaves half of one of family 26 and later (Zen 5) idle; oneDNN does. Family
    25 (Zen 4) executes AVX-512 in halves: both are equally fast. The choice goes by the processor, not by a measurement, so
    that a resumed run makes the same one.
    """
    usual = "MKL" if torch.backends.mkl.is_available() else "BLAS"
    try:
        cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return usual
    family = re.search(r"^cpu family\s*: (\d+)$", cpu, re.MULTILINE)
    wide = "AuthenticAMD" in cpu and " avx512f " in cpu and family is not None and int(family[1]) >= 26
    return "oneDNN" if wide and _onednn_agrees() else usual


def _onednn_agrees() -> bool:
    """Whether PyTorch has the operator, which is none of its published ones, and it computes float32 products."""
    a = torch.linspace(-1, 1, 32 * 64, dtype=torch.float32, device="cpu").sin().view(32, 64)
    exact = a.double() @ a.double().T
    try:
        return bool((_onednn(a, a.T) - exact).norm() < 1e-6 * exact.norm())
    except (AttributeError, RuntimeError, TypeError):  # it is missing, or takes other arguments
        return False


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is to multiply: it is hundreds of times slower on views with gaps, and slow on a few rows or columns."""
    if fp32_products() != "oneDNN" or a.dtype != torch.float32 or a.device.type != "cpu":
        return False
    dense = all(x.is_contiguous() or x.T.is_contiguous() for x in (a, b))
    return dense and min(*a.shape, *b.shape) >= 16


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, without gradients."""
    return _onednn(a, b) if _suits_onednn(a, b) else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without gradients. The sum has the dtype of total."""
    if total.dtype != a.dtype or _suits_onednn(a, b):
        total += product(a, b)
    else:
        total.addmm_(a, b)
