"""Every script on the simulated GPU ends with the CPU's metrics, resumes exactly, and seldom waits for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.models import zoo
from common.run.records import read_json
from tests.cuda.lines import LINES
from tests.cuda.processes import simulated
from tests.cuda.run_lines import run
from tests.interruptions.cases import assert_equal, outcome
from tests.small_images import smooth, write_mnist
from tests.test_images import write_cifar

PLACES = ("device", "gpu", "options")  # entries that differ between devices; options: by --device


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a zoo of two untrained networks."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, smooth(80), smooth(30, seed=1))
    for name in ("CIFAR10", "CIFAR100"):
        write_cifar(folder, name)
    (folder / "zoo").mkdir()
    for i in range(2):
        torch.manual_seed(i)
        torch.save(zoo.make("mCNN", width=2).state_dict(), folder / "zoo" / f"{i}.pt")
    return folder


@pytest.mark.parametrize("script", sorted({line.script for line in LINES.values()}))
def test_lines(script: str, data: Path, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """One process runs all lines of a script on the device; those for the CPU run here."""
    on_device, on_cpu = tmp_path / "device", tmp_path / "cpu"
    on_device.mkdir()
    simulated(tmp_path / "report.json", "-m", "tests.cuda.run_lines", script, str(data), str(on_device))
    for name, line in LINES.items():
        if line.script != script:
            continue
        report = read_json(on_device / f"{name}.json")
        with subtests.test(f"{name} ends"):
            assert report["statuses"] == ([0] if line.stop is None else [0, 75, 0]), report["error"]
        if line.stop is not None:
            with subtests.test(f"{name} resumes exactly"):
                assert_equal(outcome(on_device / f"{name}.stopped"), outcome(on_device / name))
        if line.relative is not None:
            with subtests.test(f"{name} has the metrics of the CPU"):
                assert run(line, data, on_cpu / name) == 0
                assert_close(metrics(on_device / name), metrics(on_cpu / name), line.relative)
        if line.waits is not None:
            with subtests.test(f"{name} waits at most {line.waits} times in a usual step"):
                assert report["steps"] > 1 and report["waits"] <= line.waits, report


def metrics(folder: Path) -> dict[str, Any]:
    """All records and tables of a run, without what differs between devices."""
    left = outcome(folder)
    return {name: without_places(left[name]) for name in left if name.endswith((".json", ".csv")) and "args" not in name}


def without_places(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: without_places(value) for key, value in content.items() if key not in PLACES}
    return [without_places(value) for value in content] if isinstance(content, list) else content


def assert_close(a: Any, b: Any, relative: float, where: str = "") -> None:
    """Equal; numbers close to each other, also those that a table holds as text."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], relative, f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, relative, f"{where}/{i}")
    elif is_number(a) and is_number(b):
        assert float(a) == pytest.approx(float(b), rel=relative, abs=relative / 10, nan_ok=True), where
    else:
        assert a == b, where


def is_number(x: Any) -> bool:
    try:
        float(x)
    except (TypeError, ValueError):
        return False
    return True
