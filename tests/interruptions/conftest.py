"""Every test here runs on each case, quickly."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.models import zoo
from tests.interruptions.cases import LINES, Case, make_case, save_often_draw_nothing
from tests.small_images import smooth, write_mnist
from tests.test_images import write_cifar


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    save_often_draw_nothing(monkeypatch)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a zoo of three untrained networks."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder / "FashionMNIST", smooth(60), smooth(20, seed=1))
    write_cifar(folder, "CIFAR100")
    (folder / "zoo").mkdir()
    for i in range(3):
        torch.manual_seed(i)
        torch.save(zoo.make("mCNN", width=2).state_dict(), folder / "zoo" / f"{i}.pt")
    return folder


@pytest.fixture(params=LINES)
def case(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Case:
    return make_case(request.param, data, tmp_path / "results")
