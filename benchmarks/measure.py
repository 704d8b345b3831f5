"""Common parts of the benchmarks: kinds of a step are timed in turn, each in a process of its own.

A benchmark is a function `run(bench)` that calls `bench.compare` for each of its questions. Kinds alternate, round by round, so
that a machine that slows down slows all of them. Each kind has its own process and, in it, its own memory policy: the C
library's, as the original programs have it, or that of this suite's scripts (common/run/memory.py). Ratios are medians of the
ratios of rounds, in CPU time with one thread (other processes disturb it little) and in wall time with more.

Every benchmark measures the processor's peak first (benchmarks/peak.py), and prints how many times the time of its products at
that rate each kind takes.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import records, table
from benchmarks.peak import machine, peaks
from common.run.memory import tune_malloc

# a kind's process imports the script twice: before it is forked, and as the main module
warnings.filterwarnings("ignore", "'benchmarks.* found in sys.modules", RuntimeWarning)

TURN = 0.1  # seconds: shorter steps are repeated in a turn
PAUSE = 0.02  # seconds between turns: threads of the last kind stop waiting for work

Step = Callable[[], object]


@dataclass(frozen=True)
class Kind:
    """One way to do a piece of work: `make()` makes its step, in the kind's own process (so it must be picklable)."""

    make: Callable[[], Step]
    tuned: bool = True  # the scripts' memory policy, not the C library's
    times: float = 1  # that the whole work takes of a step
    warm: bool = True  # a first step does not count


@dataclass
class Timings:
    """Seconds of a step, round by round; its peak memory in MiB beyond model and data; operations of its products."""

    wall: list[float]
    cpu: list[float]
    parts: list[dict[str, float]]  # of steps that return them: seconds by name
    mib: float | None
    operations: float


@dataclass
class Failure:
    """The answer of a kind's process that an error has ended."""

    traceback: str


def seconds(step: Step) -> float:
    """Wall seconds of a call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def memory(name: str) -> float | None:
    """VmRSS, resident memory of this process, or VmHWM, its peak; in MiB (Linux, elsewhere None)."""
    try:
        status = Path("/proc/self/status").read_text()  # not getrusage: its peak counts the parent's memory, too
    except OSError:
        return None
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Let VmHWM begin again at VmRSS, where Linux permits it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ---- a kind's process --------------------------------------------------------------------------------------------------------


def _serve(connection: Connection, kind: Kind, threads: int, count: bool) -> None:
    """A kind's process: warm-up, a turn for each True, at a False memory and operations. It ends early with the other end."""
    try:
        torch.set_num_threads(threads)
        if kind.tuned:
            tune_malloc()
        step = kind.make()
        forget_peak()
        before = memory("VmRSS")
        first = seconds(step) if kind.warm else math.inf
        calls = min(50, math.ceil(TURN / seconds(step))) if first < 10 * TURN else 1
        connection.send("ready")
        while connection.recv():
            connection.send(_turn(step, calls, kind.times))
        peak = memory("VmHWM")
        mib = None if before is None or peak is None else peak - before
        connection.send((mib, _operations(step) * kind.times if count else 0))
    except (EOFError, BrokenPipeError):
        pass  # another kind has failed
    except BaseException:
        connection.send(Failure(traceback.format_exc()))


def _operations(step: Step) -> int:
    """Floating-point operations of the products and convolutions of a step."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # which PyTorch does not count, see common/processor.py
    mapping = {linear: lambda x, weight, *_, out_shape: 2 * math.prod(out_shape) * x[-1]} if linear else {}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return counter.get_total_flops()


def _turn(step: Step, calls: int, times: float) -> tuple[float, float, dict[str, float]]:
    """Wall and CPU seconds of a step, and of its parts if it returns them."""
    wall, cpu, parts = time.perf_counter(), time.process_time(), None
    for _ in range(calls):
        parts = step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return wall / calls * times, cpu / calls * times, parts if isinstance(parts, dict) else {}


def alternate(kinds: dict[str, Kind], rounds: int, threads: int, counted: str | None = None) -> dict[str, Timings]:
    """Time kinds in turn, and count the operations of the kind `counted`.

    Raises RuntimeError with the traceback of a kind that fails, and EOFError if its process was killed (out of memory).
    """
    context = multiprocessing.get_context("forkserver")
    ends, processes = {}, []

    def answer(name: str) -> Any:
        reply = ends[name].recv()
        if isinstance(reply, Failure):
            raise RuntimeError(f"{name}: {reply.traceback}")
        return reply

    try:
        timings = {}
        for name, kind in kinds.items():
            ends[name], end = context.Pipe()
            processes.append(context.Process(target=_serve, args=(end, kind, threads, name == counted)))
            processes[-1].start()
            end.close()
            timings[name] = Timings([], [], [], None, 0)
            answer(name)
        for _ in range(rounds):
            for name, values in timings.items():
                time.sleep(PAUSE)
                ends[name].send(True)
                wall, cpu, parts = answer(name)
                values.wall.append(wall), values.cpu.append(cpu), values.parts.append(parts)
        for name, values in timings.items():
            ends[name].send(False)
            values.mib, values.operations = answer(name)
        return timings
    finally:
        for end in ends.values():
            end.close()  # the process ends at its next look for a message
        for process in processes:
            process.join()


# ---- a benchmark -------------------------------------------------------------------------------------------------------------


class Bench:
    """A run of a benchmark with a number of threads: what it has measured, printed and, with `save`, written as it comes."""

    def __init__(self, name: str, threads: int, quick: bool = False, save: bool = False):
        self.threads, self.quick, self.save = threads, quick, save
        torch.set_num_threads(threads)
        self.machine, self.peak = machine(), peaks()
        self.record = records.new(name, threads, quick, self.peak)
        # imported once, and then forked with each kind
        multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.measure", f"benchmarks.{name}"])
        caches = ", ".join(f"{cache} {size}" for cache, size in self.machine["caches"].items())
        print(f"{name}: {records.title(self.machine)}, {caches}, {' '.join(self.machine['instructions'])}")
        print(f"{self.record['date']}, revision {self.record['revision']}, torch {torch.__version__}, {threads} threads")
        peak = ", ".join(f"{rate:.0f} GFLOP/s in {precision}" for precision, rate in self.peak.items())
        print(f"load {self.record['load']}; peak {peak}", flush=True)

    def add(self, work: str, kind: str, **values: Any) -> None:
        """Note and print a measurement; benchmarks/records.py says which values there are."""
        measurements = self.record["measurements"]
        if not measurements or measurements[-1]["work"] != work:
            print(f"\n{work}")
        measurements.append({"work": work, "kind": kind} | values)
        print(f"  {kind:<20}  {records.describe(values)}", flush=True)
        if self.save:
            records.save(self.machine, self.record)

    def compare(
        self,
        work: str,
        kinds: dict[str, Kind],
        rounds: int,
        baselines: tuple[str, ...] = ("plain",),
        floors: tuple[str, ...] = ("products",),
        operations: str = "products",
    ) -> dict[str, Timings]:
        """Time the kinds of a piece of work in turn.

        Says of each how many times as fast as the `baselines` it is, how many times the time of the `floors` it takes, and of
        that which the operations of one kind, `operations`, would take at the processor's peak.
        """
        timings = alternate(kinds, rounds, self.threads, operations)
        clocks = {name: values.cpu if self.threads == 1 else values.wall for name, values in timings.items()}

        def ratios(name: str, others: Iterable[str]) -> dict[str, float]:
            """Medians over the rounds of the kind's time, divided by that of each other kind."""
            others = [other for other in others if other in kinds and other != name]
            pairs = {other: zip(clocks[name], clocks[other], strict=True) for other in others}
            return {other: statistics.median(a / b for a, b in pairs[other]) for other in others}

        for name, values in timings.items():
            noted: dict[str, Any] = {"n": rounds, "seconds": statistics.median(values.wall)}
            noted |= {"cpu_seconds": statistics.median(values.cpu), "mib": values.mib, "overhead": {}}
            if name not in floors:
                noted["speedup"] = {other: 1 / ratio for other, ratio in ratios(name, baselines).items()}
                noted["overhead"] = ratios(name, (floor for floor in floors if ("bf16" in floor) == ("bf16" in name)))
            if timings.get(operations, values).operations:
                peak = self.peak["bf16" if "bf16" in name else "fp32"]
                noted["at_peak"] = timings[operations].operations / peak / 1e9
                noted["overhead"]["peak"] = statistics.median(clocks[name]) / noted["at_peak"]
            if values.parts[0]:
                noted["parts"] = {part: statistics.median(p[part] for p in values.parts) for part in values.parts[0]}
            self.add(work, name, **{key: value for key, value in noted.items() if value not in (None, {})})
        return timings


def run_benchmark(name: str, run: Callable[[Bench], None], description: str | None, argv: list[str] | None = None) -> int:
    """The main function of a benchmark: its options, its run, exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of the most important parts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/PROCESSOR.json and the table of machines")
    args = parser.parse_args(argv)
    bench = Bench(name, args.threads, args.quick, args.save)
    began = time.perf_counter()
    try:
        run(bench)
    except Exception as error:
        traceback.print_exc()
        bench.record["error"] = (str(error).strip() or repr(error)).splitlines()[-1]
        print(f"{name}: failed", file=sys.stderr)
    bench.record["took"] = round(time.perf_counter() - began, 1)
    print(f"\n{name}: {bench.record['took']:.0f} s")
    if args.save:
        records.save(bench.machine, bench.record)
        table.write()
    return 1 if bench.record["error"] else 0
