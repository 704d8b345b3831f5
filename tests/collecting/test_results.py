"""results/README.md: every figure that it says was measured is in a committed result.json, and its links lead somewhere."""

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "results"
TEXT = (RESULTS / "README.md").read_text()
SCALES = (1, 100, 1 / math.log(2))  # as it is; a share in per cent; nats in bits
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


def leaves(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a result, by their places."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{place}/{key}")
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from leaves(value, f"{place}/{i}")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield place, float(content)


def measured(pattern: str) -> list[float]:
    """All numbers of the runs that a pattern names; of several in a directory, mean and deviation of each number."""
    paths = sorted(RESULTS.glob(f"{pattern}/result.json"))
    assert paths, f"{pattern}: no such run"
    numbers: list[float] = []
    for folder in {path.parent.parent for path in paths}:
        results = [dict(leaves(json.loads(path.read_text()))) for path in paths if path.parent.parent == folder]
        for place in results[0]:
            values = [result[place] for result in results if place in result]
            numbers += [statistics.fmean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
    return numbers


def rows() -> Iterator[tuple[str, list[str]]]:
    """Rows of tables that name a run: its pattern, and the cells that say what was measured."""
    head: list[str] = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = [re.sub(r" \(.*", "", cell) for cell in cells]
        else:
            named = re.match(r"\[[^]]*\]\(([^)]+)\)|`([^`]+)`", cells[0])
            if named:
                yield (
                    named[1] or named[2],
                    [cell for name, cell in zip(head[1:], cells[1:]) if name not in ("n", "paper", "apart")],
                )


ROWS = list(rows())


@pytest.mark.parametrize("pattern, cells", ROWS, ids=[f"{pattern}-{i}" for i, (pattern, _) in enumerate(ROWS)])
def test_figures_are_those_of_committed_runs(pattern: str, cells: list[str]) -> None:
    numbers = measured(pattern)
    for cell in cells:
        for text in NUMBER.findall(cell):
            plain = text.replace(",", "")
            digits = len(plain.partition(".")[2])
            shapes = {f"{scale * value:.{digits}f}" for scale in SCALES for value in numbers}
            shapes |= {f"{value:.1e}".replace("e-0", "e-") for value in numbers}
            assert plain in shapes, f"{text} of {cell} is no figure of {pattern}"


def test_every_system_has_rows_and_every_link_leads_somewhere() -> None:
    assert len(ROWS) >= 25
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (RESULTS / target).exists(), target
