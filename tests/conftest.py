"""All tests use the CPU, where they compare bit for bit; `pytest -m cuda` runs those for GPUs instead."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch reads it at its first look for a GPU; subprocesses inherit it


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU and -m cuda")
