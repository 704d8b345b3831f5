"""Common parts of clustering_peers.py and mixture.py, which set trained networks next to what one would use instead."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import sklearn
import torch
from torch import nn

import common
from benchmarks.peak import machine
from benchmarks.records import revision
from common.run.records import read_json


def finished_run(script: ModuleType, best: Path) -> tuple[argparse.Namespace, nn.Module]:
    """The options of a finished run, from the args.json next to its best.pkl, and its model on the CPU, in evaluation mode.

    Raises RecordError and CheckpointError.
    """
    args = script.get_parser().parse_args([])
    for name, value in read_json(best.parent / "args.json").items():
        if name in args:
            setattr(args, name, value)
    args.device, args.compile = "cpu", False
    return args, common.load(best, script.describe(args))


def circumstances(threads: int) -> dict[str, Any]:
    """The conditions of a measurement: machine, threads, load at its beginning, date, revision and versions."""
    return {
        "machine": machine(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
        "revision": revision(),
        "torch": torch.__version__,
        "scikit_learn": sklearn.__version__,
    }
