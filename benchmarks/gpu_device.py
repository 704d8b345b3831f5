"""Times, memory, waits and CUDA graphs of a GPU; and, in this one place, what a simulated GPU (tests/cuda) cannot do."""

from __future__ import annotations

import collections
import functools
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.records import ROOT
from common import graphs

Step = Callable[[], object]
Values = Iterator[tuple[str, Any]]  # of a section, by name

# what a simulated GPU leaves out; `missing` are those that this process came by
TIMES = "times and memory (figures are those of the CPU, or 0)"
GRAPHS = "CUDA graphs (steps are launched kernel by kernel)"
COMPILE = "torch.compile (functions run as they are)"
WAITS = "torch.cuda.set_sync_debug_mode (the simulation counts waits itself)"
NCCL = "NCCL (an all-reduce is gloo's, on the CPU)"
DRIVER = "the driver"
missing: set[str] = set()


@functools.cache
def is_simulated() -> bool:
    return torch.cuda.get_device_name() == "simulated"


def not_simulated(what: str) -> bool:
    """Return True on a simulated GPU, and note what is left out there."""
    if is_simulated():
        missing.add(what)
    return is_simulated()


def bounded(value: float, at_most: float, *, must: bool = False) -> dict[str, Any]:
    """A value with its target; with `must`, missing it is a failure of the section."""
    return {"value": value, "at most": at_most, "met": value <= at_most, "must": must}


def measure(step: Step, n: int, warm_up: int = 3) -> dict[str, float]:
    """Measure a step: median, smallest and largest milliseconds between n + 1 events in a full queue, and peak MiB."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    not_simulated(TIMES)
    times = [start.elapsed_time(end) for start, end in pairwise(events)]
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"ms": statistics.median(times), "min": min(times), "max": max(times), "n": n, "peak MiB": peak}


def capture(step: Step) -> Step:
    """Record a step of constant shapes as a CUDA graph; the result launches all its kernels at once."""
    return step if not_simulated(GRAPHS) else graphs.record(step, warm_up=3)


def count_waits(run: Step) -> dict[str, Any]:
    """Run something that trains: how often the host waits for the device in its usual optimiser step, and where.

    The usual step is the one in the middle by its waits, the first left out.
    """
    steps: list[collections.Counter[str]] = []
    if not_simulated(WAITS):
        from tests.cuda.simulation import Device, waits

        Device.active.forget()
        run()
        steps = [collections.Counter({"": waits(events)}) for events in Device.active.steps]
        places = Device.active.summary()["events"]
    else:
        steps = _warned_steps(run)
    ordered = sorted(steps[1:] or steps or [collections.Counter()], key=collections.Counter.total)
    usual = ordered[len(ordered) // 2]
    return {"waits": usual.total(), "steps": len(steps), "places": places if is_simulated() else dict(usual)}


def _warned_steps(run: Step) -> list[collections.Counter[str]]:
    """The places of PyTorch's warnings about waits, by optimiser step."""
    steps: list[collections.Counter[str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def end_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if isinstance(optimizer, torch.optim.LBFGS):  # of a linear probe, after training
                return
            waits = [seen for seen in caught if "synchronizing" in str(seen.message)]
            places = (f"{seen.filename.removeprefix(f'{ROOT}/')}:{seen.lineno}" for seen in waits)
            steps.append(collections.Counter(places))
            caught.clear()

        hook = register_optimizer_step_post_hook(end_step)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            hook.remove()
    return steps


def command_of(*words: str) -> list[str]:
    """A command line for another process of this Python on the same GPU: words are those behind `python`."""
    return [sys.executable, *(("-m", "tests.cuda.device") if is_simulated() else ()), *words]


def driver() -> str:
    """The version of NVIDIA's driver."""
    if not_simulated(DRIVER):
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
