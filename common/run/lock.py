"""A lock that one process holds and that ends with it: a killed job holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TextIO


def take_lock(path: Path) -> TextIO | None:
    """Lock a file, made if it is not there, for this process, as long as what is returned stays open.

    None if another process has it, or has just removed it. Raises OSError if there is no place for it.
    """
    try:
        lock = open(path, "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever had it may have removed or renamed it after it was opened here
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    return None


def release_lock(lock: TextIO, path: Path) -> None:
    """Remove a file that this process has locked, which lies at `path` now, and let go of it."""
    with contextlib.suppress(OSError):
        path.unlink()
    lock.close()
