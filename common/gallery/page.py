"""The page: one HTML file with style, script and data in it; pictures stay where they are.

It needs no network, and its Content-Security-Policy lets no other script run. Names, options and logs of runs are data in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.gallery.runs import Run, why_broken
from common.gallery.tables import as_text
from common.run.records import write_text

HERE = Path(__file__).parent


def write_page(path: Path, data: dict[str, Any]) -> None:
    """Write the page of some data, in one step. Raises OSError, and ValueError for a number that is not finite."""
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src 'self' file:; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # without "<", data can neither end the script element nor begin a comment
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"POLICY": policy, "STYLE": style, "DATA": text, "SCRIPT": script}
    write_text(path, re.sub("@([A-Z]+)@", lambda match: parts[match[1]], (HERE / "page.html").read_text()))


def digest(text: str) -> str:
    """The name of a script or a style in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def entry(run: Run, paths: set[str], out: Path) -> dict[str, Any]:
    """The page's data of a run, given the paths of all; if the run cannot be shown, those of a broken one."""
    try:
        return full_entry(run, paths, out)
    except Exception as error:
        return full_entry(Run(run.path, run.script, run.folder, note=why_broken(error)), paths, out)


def full_entry(run: Run, paths: set[str], out: Path) -> dict[str, Any]:
    """All cells are texts, curves have five digits. The key of a run is the path that it has when it has finished."""
    final = run.path.removesuffix(".part")
    metric = next(iter(run.key_metrics), None)  # the first of an experiment stands for all in the table of all runs
    cells = {
        "experiment": run.script, "run": final.removeprefix(f"{run.script}/"), "state": run.state, **run.options,
        "seed": run.seed, "metric": metric, "value": run.key_metrics.get(metric or ""), **run.key_metrics,
        "parameters": run.parameters, "minutes": run.minutes, **run.about,
    }  # fmt: skip
    return {
        "key": run.path if final in paths else final,
        "path": run.path,
        "note": run.note,
        "log": run.log,
        "cells": {name: text for name, value in cells.items() if (text := as_text(value, name))},
        "curves": {name: [None if y is None else float(f"{y:.5g}") for y in values] for name, values in run.curves.items()},
        "files": {name: address(run.folder / name, out) for name in run.files},
    }


def address(path: Path, out: Path) -> str:
    """A file's address, relative to the page."""
    return quote(os.fsencode(os.path.relpath(path, out)))
