"""Progress bars."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
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


def wanted(args: argparse.Namespace) -> bool | None:
    """Whether bars are shown: yes if `args` has a true `progress`, None (on a terminal) if not.

    Never in other processes than the first, nor in one that a run has started: its jobs are in the run's own bar.
    """
    if not parallel.is_main() or multiprocessing.parent_process() is not None or sys.stderr is None:
        return False
    return True if getattr(args, "progress", False) else None


def bar(args: argparse.Namespace, iterable: Iterable[Any] | None = None, title: str | None = None, **options: Any) -> Any:
    """A tqdm bar where it is `wanted`."""
    shown = wanted(args)
    return tqdm(iterable, title, disable=None if shown is None else not shown, leave=False, file=_Stderr(), **options)
