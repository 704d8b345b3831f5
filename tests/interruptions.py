"""Processes that are killed, or sent a signal, while they train."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


def disturb(start: Callable[[], BaseProcess], folder: Path, seconds: float, number: signal.Signals) -> int | None:
    """Start a process that saves last.pkl files below a folder, and send it a signal `seconds` after its first one.

    Returns its exit status: 0 where it was faster than that.
    """
    before = last_saved(folder)
    process = start()
    while process.is_alive() and last_saved(folder) <= before:  # it is still importing
        time.sleep(0.002)
    time.sleep(seconds)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


def last_saved(folder: Path) -> int:
    """When any last.pkl was last written."""
    times = [0]
    for last in folder.rglob("*last.pkl"):
        with contextlib.suppress(FileNotFoundError):
            times.append(last.stat().st_mtime_ns)
    return max(times)


def stands_within_an_epoch(folder: Path) -> bool:
    """Whether a last.pkl goes on from the middle of an epoch."""
    return any(torch.load(last, weights_only=True)["progress"][1] > 0 for last in folder.rglob("*last.pkl"))
