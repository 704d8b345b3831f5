"""All benchmarks, and the table of machines (results/benchmarks/README.md).

    python -m benchmarks             # with one thread and with two: about 22 minutes on two cores
    python -m benchmarks --quick     # with all cores, less of each: 5 minutes

Each runs in a process of its own. One that fails is named at the end, with exit status 1; what others measured is kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from benchmarks.records import ROOT

BENCHMARKS = (
    "peak",
    "swarm_layer",
    "set_models",
    "swarm_transformer",
    "similarity",
    "train_ssl",
    "zoo",
    "stitching",
    "routing",
    "clustering_data",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of each, with all cores")
    args = parser.parse_args(argv)
    cores = os.cpu_count() or 1
    threads = [cores] if args.quick else sorted({1, min(2, cores)})
    failed, took = [], {}
    for benchmark in BENCHMARKS:
        for n in threads:
            command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--threads", str(n), "--save"]
            began = time.perf_counter()
            status = subprocess.run(command + ["--quick"] * args.quick, cwd=ROOT).returncode
            took[benchmark, n] = time.perf_counter() - began
            failed += [f"{benchmark} with {n} threads"] * (status != 0)
            print(flush=True)
    print("seconds: " + ", ".join(f"{benchmark} ({n}) {duration:.0f}" for (benchmark, n), duration in took.items()))
    print(f"{sum(took.values()) / 60:.1f} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
