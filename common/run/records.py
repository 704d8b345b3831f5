"""Small files of figures, written in one step."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.run.checkpoint import write_in_one_step


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is easy to read. Raises OSError."""
    text = json.dumps(content, indent=2) + "\n"
    write_in_one_step(path, lambda file: file.write(text.encode()))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file with a column for each key that some row has. Raises OSError."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    table.writeheader()
    table.writerows(rows)
    write_in_one_step(path, lambda file: file.write(text.getvalue().encode()))
