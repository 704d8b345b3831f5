"""A simulated GPU for machines without one: CUDA's errors with real values, and the places where the host waits for the device.

    python -m tests.cuda.device [--report FILE.json] SCRIPT.py [arguments ...]
    python -m tests.cuda.device [--report FILE.json] -m MODULE [arguments ...]

runs a script as on a machine with one GPU, `torch.cuda.is_available()` is true, and reports its usual step: how often the host
waits for the device, by kind and line (summary in simulation.py). A process that has not imported torch yet does the same by
`simulate(root)`. Needs Linux, a CPU build of PyTorch, and g++, as torch.compile does. Runs are two to ten times slower.

A tensor on the device wraps one on the CPU, and says cuda:0 to Python and C++, so that autocast, optimisers and composite
operators go CUDA's ways. Every operator runs on the CPU (simulation.py). shim.cpp is built once, into the user's cache.

Simulated are
- errors: operands on two devices, a random generator of another device, products of integers, .numpy() of a GPU's tensor;
- waits: .item(), copies between host and device that do not say non_blocking, operators whose shape or check depends on values
  (nonzero, masked indexing, unique, bincount, torch.linalg), torch.cuda.synchronize, Event.synchronize;
- random numbers: the device has a generator of its own, whose state a resumed run has to put back;
- launches: operators that are no views, as "kernels".
Not simulated are speed, memory, rounding (TF32, atomics, another order of sums), missing CUDA kernels, cuDNN (an LSTM goes cell
by cell), CUDA graphs and streams, and torch.compile, which leaves functions as they are. A process of torchrun has a GPU, and
Gloo in NCCL's place. On a GPU, torch.cuda.set_sync_debug_mode("warn") names the same waits.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cuda.simulation import Device

SHIM = Path(__file__).with_name("shim.cpp")


def build_shim() -> Path:
    """Compile shim.cpp for the PyTorch that would be imported, unless that has been done. Gives the library."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations is not None
    torch = Path(spec.submodule_search_locations[0])
    key = hashlib.sha256(SHIM.read_bytes() + str(torch).encode() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simulated_gpu"
    library = cache / f"shim_{key}.so"
    if library.exists():
        return library
    if shutil.which("g++") is None:
        raise SystemExit("the simulated GPU needs g++, to compile tests/cuda/shim.cpp: apt-get install g++")
    cache.mkdir(parents=True, exist_ok=True)
    descriptor, new = tempfile.mkstemp(dir=cache, suffix=".new")
    os.close(descriptor)
    flags = ["-std=c++20", "-fPIC", "-shared", f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run(["g++", *flags, str(SHIM), "-o", new, "-lc10", "-ltorch_cpu"], check=True)
    os.replace(new, library)  # processes that start together build it each, none loads a half one
    return library


def simulate(root: str | Path = ".") -> Device:
    """Put a simulated GPU into this process, to its end. Waits are attributed to the lines of files below `root`.

    Raises RuntimeError if torch has been imported.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported: a GPU can be simulated only before")
    ctypes.CDLL(str(build_shim()))
    from tests.cuda import simulation

    return simulation.start(Path(root))


def main(argv: list[str]) -> int:
    """Run a script or module on the simulated GPU; its exit status."""
    report = Path(argv[1]) if argv[0] == "--report" else None
    argv = argv[2:] if report else argv
    is_module = argv[0] == "-m"
    script, *arguments = argv[1:] if is_module else [str(Path(argv[0]).resolve()), *argv[1:]]
    root = Path.cwd() if is_module else Path(script).parent
    device = simulate(root)
    sys.argv, sys.path[0] = [script, *arguments], str(root)
    status = 0
    try:
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    summary = json.dumps(device.summary(), indent=1)
    if report:
        report.write_text(summary)
    else:
        print(summary, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
