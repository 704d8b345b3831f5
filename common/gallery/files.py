"""Reading of files that anybody may have made."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from common.run.records import RecordError

MAX_MIB = 16  # of a file that is read whole; the largest that a script has written has 0.1
MAX_NAMES = 500  # options, key metrics or columns of a run: more would bury those of all others


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for others: links are not followed, and pipes not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "it is a link, and links are not followed" if error.errno == errno.ELOOP else error.strerror
        raise OSError(error.errno, reason, str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def is_regular(path: Path) -> bool:
    """True if there is a regular file. A link is none."""
    return path.is_file() and not path.is_symlink()


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, also for one that is too large."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MIB << 20:
            raise OSError(errno.EFBIG, f"it has {size >> 20} MiB, more than {MAX_MIB}", str(path))
        return file.read(size)


def read_json_if_exists(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. Raises OSError, and RecordError for any other content."""
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        raise RecordError(f"{path.name} is damaged: it is no JSON") from None
    if not isinstance(content, dict) or not content:
        raise RecordError(f"{path.name} is damaged: it holds no JSON object with content")
    return content
