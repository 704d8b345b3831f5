"""Matrix products on a CPU, and which library computes them."""

from pathlib import Path

import pytest
import torch

from common import processor

ZEN5 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\n"


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "oneDNN" and not processor._onednn_agrees():
        pytest.skip("this PyTorch has no such operator")
    monkeypatch.setattr(processor, "fp32_products", lambda: request.param)
    return request.param


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(64, 32, 300), (512, 128, 600), (64, 2000, 32), (3, 1, 5), (0, 4, 5), (4, 0, 5)])
def test_products_are_those_of_float32(m: int, k: int, n: int, transposed: bool, library: str) -> None:
    """To 2e-6 of the norm (bfloat16 has 2e-3, TF32 3e-4), of matrices as they lie or as views."""
    torch.manual_seed(0)
    a, b, total = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    exact = a.double() @ b.double()
    assert (processor.product(a, b) - exact).norm() <= 2e-6 * exact.norm()
    with_total = total + exact
    processor.add_product(total, a, b)
    assert total.dtype == torch.float32 and (total - with_total).norm() <= 2e-6 * with_total.norm()


def test_other_dtypes_are_left_to_pytorch(library: str) -> None:
    a, total = torch.rand(4, 4).bfloat16(), torch.zeros(4, 4)
    processor.add_product(total, a, a)
    assert processor.product(a, a).dtype == torch.bfloat16 and torch.equal(total, (a @ a).float())
    assert processor.product(a.double(), a.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (ZEN5, "oneDNN"),
        (ZEN5.replace("26", "25"), "MKL"),  # Zen 4: half as wide, so that MKL's code fills it
        (ZEN5.replace("AuthenticAMD", "GenuineIntel"), "MKL"),
        (ZEN5.replace(" avx512f", ""), "MKL"),
        ("", "MKL"),
    ],
)
def test_library_follows_the_processor(cpu: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: cpu)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert processor.fp32_products.__wrapped__() == expected
    if expected == "oneDNN":  # an operator that is missing, or computes something else
        for operator in (None, lambda a, b, *_: a):
            monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator)
            assert processor.fp32_products.__wrapped__() == "MKL"


def test_cache_size() -> None:
    assert 2**17 <= processor.cache_size.__wrapped__() <= 2**26


def test_views_with_gaps_are_left_to_pytorch(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_onednn", lambda a, b: pytest.fail("it would take hundreds of times as long"))
    x = torch.rand(32, 3, 64)
    torch.testing.assert_close(processor.product(x[:, 0], x[:, 1].T), x[:, 0] @ x[:, 1].T)
