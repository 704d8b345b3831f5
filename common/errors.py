"""The exceptions that end a command, or a job of it, in an orderly way, and their messages.

common/run/command.py maps them to exit statuses.
"""

import contextlib
import sys


class InputError(ValueError):
    """Input that cannot be used: options, files, data. The message is one line: what is wrong, and what to do."""


class Failed(Exception):
    """A run, or one job of it, that cannot be completed. The message is one line with the reason."""


class Interrupted(Exception):
    """A signal has come, and what is needed to resume is saved. The message says where the work stands."""


def one_line(text: object, limit: int = 600) -> str:
    """A text for a message: on one line, printable, and shortened in its middle to about `limit` characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"


def warn(text: str) -> None:
    """Print a line on stderr. If that is full or closed, nobody can be warned, and the program goes on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
