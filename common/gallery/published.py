"""The tables of published figures: DIR/README.md, made from the runs and fields that DIR/published.toml names.

The head of results/published.toml says how a row is written.
"""

from __future__ import annotations

import re
import statistics
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.gallery.files import read_json_if_exists
from common.gallery.key_metrics import is_number

SPEC = "published.toml"
PART = re.compile(r"([^.\[\]]+)(?:\[([^\]]*)\])?")  # of a field: a name and, for a list, which of its items
ROW_KEYS = {"runs", "options", "label", "without", "paper", "note"}
INTRODUCTION = f"""# Results

What was run, what it measured, and what the paper reports. `python collect_results.py --published` makes this page:
[{SPEC}]({SPEC}) names the runs, and the fields of their `result.json`. Figures are mean ± standard deviation (n - 1)
of n values; one value has no deviation. "Difference" is ours minus the paper's. The page of each system discusses them.
"""


class Figure(NamedTuple):
    """The values that a cell stands for, and the format of its numbers."""

    values: list[float]
    form: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        if len(set(self.values)) < 2:  # also parameters, which are the same in all runs
            return f"{self.mean:z{self.form}}" if self.values else ""  # z: no -0.0
        return f"{self.mean:z{self.form}} ± {statistics.stdev(self.values):{self.form}}"


def published_page(root: Path) -> str:
    """The text of DIR/README.md. Raises OSError, RecordError, and InputError for what cannot be a table."""
    try:
        spec = tomllib.loads((root / SPEC).read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{root / SPEC} is no TOML: {error}") from None
    try:
        return "\n".join([INTRODUCTION, *(table_text(root, table) for table in spec["tables"]), spec.get("end", "")])
    except KeyError as error:
        raise InputError(f"{root / SPEC}: a table or row lacks {error}; its head says how they are written") from None


def table_text(root: Path, table: Mapping[str, Any]) -> str:
    """A section: the paper, command lines, protocol and table of an experiment."""
    in_fields = {name for column in table["columns"].values() for name in re.findall(r"{(\w+)}", str(column))}
    unknown = {name for row in table["rows"] for name in row} - ROW_KEYS - in_fields
    if unknown:
        raise InputError(f"{table['title']}: {min(unknown)} is no key of a row, and no column's field has it in braces")
    if left_out := {name for row in table["rows"] for name in row.get("without", [])} - {*table["columns"]}:
        raise InputError(f"{table['title']}: without {min(left_out)!r}, which is no column")
    commands = [f"    {line}" for line in table.get("commands", [])]
    if commands and any(row.get("options") for row in table["rows"]):
        commands[-1] += " ...  # and the row's options"
    paper = [f"    {table['paper_command']}  # the paper's"] if "paper_command" in table else []
    rows = [row_cells(root, table, row) for row in table["rows"]]
    lines = [["runs", *table["columns"], "n", "paper", "difference"], ["---"] * (len(table["columns"]) + 4), *rows]
    if not any(cell for row in rows for cell in row[-2:]):
        lines = [line[:-2] for line in lines]
    return "\n".join(
        [
            f"## {table['title']}",
            "",
            f"[{table['page']}](../docs/{table['page']}). {table['source']}",
            "",
            *([*paper, *commands, ""] if commands else []),
            *([table["protocol"], ""] if "protocol" in table else []),
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
        ]
    )


def row_cells(root: Path, table: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """The cells of a row. Raises InputError if its runs do not have the same number of values in each column."""
    results = read_results(root, row["runs"])
    try:
        figures = [
            Figure([], "") if name in row.get("without", []) else figure(results, column, {**table, **row})
            for name, column in table["columns"].items()
        ]
    except InputError as error:
        raise InputError(f"{row['runs']}: {error}") from None
    counts = {len(figure.values) for figure in figures} - {0}
    if len(counts) != 1:
        raise InputError(f"{row['runs']}: columns have {sorted(counts)} values, and a row has one n")
    runs = f"[{row['runs']}]({row['runs']})" if (root / row["runs"]).is_dir() else f"`{row['runs']}`"
    what = [runs, row.get("label", ""), f"`{row['options']}`" if "options" in row else ""]
    paper = row.get("paper", "")
    difference = row.get("note", "")
    if isinstance(paper, list):
        pairs = [(figure, value) for figure, value in zip(figures, paper, strict=False) if is_number(value)]
        differences = ", ".join(f"{ours.mean - value:+z{ours.form}}" for ours, value in pairs)
        paper = ", ".join(f"{value:{ours.form}}" for ours, value in pairs)
        difference = f"{differences}: {difference}" if difference else differences
    return [", ".join(filter(None, what)), *map(str, figures), str(*counts), paper, difference]


def read_results(root: Path, pattern: str) -> list[dict[str, Any]]:
    """The result.json of each run, or the JSON files, that a pattern names. Raises InputError if there is none."""
    paths = sorted(root.glob(pattern if pattern.endswith(".json") else f"{pattern}/result.json"))
    if not paths:
        raise InputError(f"{pattern}: there is no such run in {root}")
    return [read_json_if_exists(path) for path in paths]


def figure(results: list[dict[str, Any]], column: str | Mapping[str, Any], names: Mapping[str, Any]) -> Figure:
    """The values of a column in some runs; none if no run has its field. Raises InputError if only some have."""
    column = {"field": column} if isinstance(column, str) else column
    field, below = (column.get(key, "").format_map(names) for key in ("field", "below"))
    found = [values_at(result, field) for result in results]
    if not all(found) and any(found):
        raise InputError(f"{field} is missing in {found.count([])} of {len(found)} runs")
    if below:
        for values, result in zip(found, results, strict=True):
            levels = values_at(result, below)
            levels = levels * len(values) if len(levels) == 1 else levels
            if len(levels) != len(values):
                raise InputError(f"{below} has {len(levels)} values, {field} has {len(values)}")
            values[:] = [level - value for level, value in zip(levels, values, strict=True)]
    values = [column.get("scale", 1) * value for of_run in found for value in of_run]
    return Figure(values, column.get("form", ".3f"))


def values_at(content: Any, field: str) -> list[float]:
    """All numbers at a field such as `test.accuracy`, `published.0.0` or `cells[layer=3,run=0].penalty`; [] if it is not there.

    Raises InputError for what is no finite number.
    """
    found = [content]
    for name, conditions in PART.findall(field):
        found = [child for value in found for child in children(value, name)]
        if conditions:
            pairs = [condition.split("=") for condition in conditions.split(",")]
            found = [item for items in found for item in items if all(str(item.get(key)) == value for key, value in pairs)]
    found = [value for item in found for value in (item if isinstance(item, list) else [item])]
    for value in found:
        if not is_number(value):
            raise InputError(f"{field} is {value!r:.50}: no finite number")
    return [float(value) for value in found]


def children(value: Any, name: str) -> list[Any]:
    """The value of a JSON object's key, or of a list's index, in a list; an empty list if it has none."""
    if isinstance(value, dict):
        return [value[name]] if name in value else []
    return [value[int(name)]] if isinstance(value, list) and name.isdigit() and int(name) < len(value) else []
