"""Progress bars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from common import parallel


def bar(args: argparse.Namespace, iterable: Iterable[Any] | None = None, title: str | None = None, **options: Any) -> Any:
    """A tqdm bar in the first process: on a terminal or, if `args` has a true `progress`, everywhere."""
    disable = None if not getattr(args, "progress", False) else False  # None: unless stderr is a terminal
    if not parallel.is_main() or sys.stderr is None:
        disable = True
    return tqdm(iterable, title, disable=disable, leave=False, **options)
