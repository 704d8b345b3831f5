"""Progress bars."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from common import parallel


class _Stderr:
    """stderr for bars: if it is full, they are lost, and the work goes on."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def __eq__(self, other: object) -> bool:
        return other is sys.stderr  # by which tqdm finds the bars that are to be cleared when something is printed

    __hash__ = None  # type: ignore[assignment]


def bar(args: argparse.Namespace, iterable: Iterable[Any] | None = None, title: str | None = None, **options: Any) -> Any:
    """A tqdm bar in the first process: on a terminal or, if `args` has a true `progress`, everywhere."""
    disable = None if not getattr(args, "progress", False) else False  # None: unless stderr is a terminal
    if not parallel.is_main() or sys.stderr is None:
        disable = True
    return tqdm(iterable, title, disable=disable, leave=False, file=_Stderr(), **options)
