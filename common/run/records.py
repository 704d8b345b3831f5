"""Small files of figures, written in one step."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.run.checkpoint import write_in_one_step


class RecordError(Exception):
    """Figures of a run that are missing, damaged or of another script; the message is one line."""


def write_text(path: Path, text: str) -> None:
    """A text file, in one step; half characters, as names of files may hold, become escapes. Raises OSError."""
    write_in_one_step(path, lambda file: file.write(text.encode(errors="backslashreplace")))


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


def read_results(places: Sequence[str], script: str) -> list[dict[str, Any]]:
    """What finished runs of a script have come to, from their result.json.

    Directories of figures and of unfinished runs, which `results/<script>/*` names, too, are passed over. Raises RecordError
    for others that hold no result, or one of another script, and if none is left.
    """
    results = []
    for place in map(Path, places):
        if place.name.startswith("figures-") or place.suffix == ".part":
            continue
        path = place / "result.json"
        if not path.is_file():
            raise RecordError(f"{place} is no finished run: it has no result.json")
        try:
            result = json.loads(path.read_text())
        except ValueError:
            raise RecordError(f"{path} is damaged: it is no JSON") from None
        if not isinstance(result, dict) or result.get("script") != script:
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
