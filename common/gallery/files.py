"""Reading of files and text that anybody may have made."""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from common.run.records import RecordError


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError."""
    if not path.is_file():  # opening a pipe may take forever
        raise OSError(0, "it is no regular file", str(path))
    return open(path, "rb")


def is_regular(path: Path) -> bool:
    """Whether there is a regular file."""
    return path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. Raises OSError, and RecordError for any other content."""
    if not os.path.lexists(path):
        return {}
    with open_regular(path) as file:
        data = file.read()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise RecordError(f"{path.name} is damaged: it is no JSON") from None
    if not isinstance(content, dict) or not content:
        raise RecordError(f"{path.name} is damaged: it holds no JSON object with content")
    return content


def one_line(text: str, limit: int = 300) -> str:
    """A text on one line that every terminal can show: odd characters escaped, the middle of a long text left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def file_stem(text: str) -> str:
    """A text as part of a file's name. A checksum is added to a text that had to be changed for that."""
    if re.fullmatch(r"\w{1,80}", text, re.ASCII):
        return text
    return f"{re.sub(r'[^a-zA-Z0-9]+', '_', text)[:60]}-{zlib.crc32(text.encode(errors='replace')):08x}"
