"""A lock that one process holds and that ends with it: a killed job holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

LOOKS, SECONDS = 5, 0.01  # is_locked takes a lock for an instant: try again before taking it for somebody's


def take_lock(path: Path) -> TextIO | None:
    """Lock a file, made if it is not there, for this process, as long as what is returned stays open.

    None if another process has it, or the file or its directory is gone. Raises OSError if it cannot be opened.
    """
    for look in range(LOOKS):
        time.sleep(SECONDS * (look > 0))
        try:
            lock = open(path, "a")  # a link may lead to somebody's file
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever had it may have removed or renamed it after it was opened here
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
            lock.close()
            return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            lock.close()
    return None


def is_locked(path: Path) -> bool:
    """True if a process holds a lock. False where there is no file that can be opened."""
    try:
        if path.is_file():  # opening anything else may take forever
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def release_lock(lock: TextIO, path: Path) -> None:
    """Remove a file that this process has locked, which lies at `path` now, and let go of it."""
    with contextlib.suppress(OSError):
        path.unlink()
    lock.close()
