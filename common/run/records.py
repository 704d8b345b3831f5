"""Small files of results: JSON and CSV, written in one step."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import atomic_write
from common.errors import InputError


class RecordError(InputError):
    """Results that are missing, damaged or of another script."""


def write_text(path: Path, text: str) -> None:
    """A text file, in one step; half characters, as names of files may hold, become escapes. Raises OSError."""
    atomic_write(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is easy to read; what is not finite becomes null, which every reader knows. Raises OSError."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Plain values in which what is not finite has become None."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RecordError if the file is missing or holds none."""
    if not path.is_file():
        raise RecordError(f"there is no {path}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RecordError(f"{path} is damaged: it holds no JSON object")
    return content


def read_results(places: Sequence[str], script: str) -> list[dict[str, Any]]:
    """The result.json of each finished run of a script.

    Directories of figures and of unfinished runs, which `results/<script>/*` names, too, are left out. Raises RecordError
    for others that hold no result, or one of another script, and if none is left.
    """
    results = []
    for place in map(Path, places):
        if place.name.startswith("figures-") or place.suffix == ".part":
            continue
        if not (place / "result.json").is_file():
            raise RecordError(f"{place} is no finished run: it has no result.json")
        result = read_json(place / "result.json")
        if result.get("script") != script:
            raise RecordError(f"{place} is no run of {script}.py")
        results.append(result)
    if not results:
        raise RecordError(f"no finished run of {script}.py among {', '.join(places)}")
    return results


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file with a column for each key that some row has. Raises OSError."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())
