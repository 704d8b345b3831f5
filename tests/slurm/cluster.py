"""A real SLURM of one node for tests, and projects that submit to it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.small_images import smooth, write_mnist

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts daemons
TICK = 30.0  # seconds between two looks of slurmctld at time limits
SITE = f"""\
# shellcheck shell=bash disable=SC2034
SBATCH_OPTIONS=(--time=30 --cpus-per-task=1)
MAX_AT_ONCE=4
MAX_REQUEUES=5
PYTHON={sys.executable}
DATA_DIR=data
setup() {{ export SET_UP=yes; }}
"""


def need(*commands: str) -> None:
    """The test is skipped where one of the commands is missing, but never in CI, which says so."""
    missing = [command for command in commands if shutil.which(command, path=PATH) is None]
    if missing and os.environ.get("REQUIRE_SLURM"):
        pytest.fail(f"{', '.join(missing)} not found, and REQUIRE_SLURM is set")
    if missing:
        pytest.skip(f"{', '.join(missing)} not found")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds:g} s"
        time.sleep(0.1)


class Cluster:
    """munged, slurmctld and slurmd on free ports of the loopback, with all their files in a folder of their own."""

    def __init__(self) -> None:
        need("munged", "slurmctld", "slurmd", "sbatch", "srun", "ps", "git")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path: sockets' names have an end
        ports = {f"{name}_PORT": str(free_port()) for name in ("CTLD", "SLURMD")}
        # what an outer SLURM, or torchrun, has set is not for the jobs
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MASTER_"))}
        self.environment = inherited | ports | {
            "PATH": PATH, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        # also if these tests are killed
        stop = f"tail --pid={os.getpid()} -f /dev/null; {HERE}/stop.sh {self.folder}; rm -r {self.folder}"
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.watcher = subprocess.Popen(["sh", "-c", stop], env=self.environment, start_new_session=True, **quiet)
        self.call(str(HERE / "start.sh"), str(self.folder))

    def stop(self) -> None:
        os.killpg(self.watcher.pid, signal.SIGKILL)
        self.watcher.wait()
        self.call(str(HERE / "stop.sh"), str(self.folder))
        shutil.rmtree(self.folder)

    def call(self, *command: str, cwd: Path = ROOT) -> str:
        """What a command that has to succeed prints."""
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def seconds_to_the_next_tick(self) -> float:
        """Until slurmctld looks at time limits, which it does every 30 s from its start on."""
        started = re.search(r"\[(\S+)\] slurmctld version \S+ started", (self.folder / "log" / "slurmctld.log").read_text())
        assert started is not None
        moment = time.mktime(time.strptime(started[1].partition(".")[0], "%Y-%m-%dT%H:%M:%S"))
        return TICK - (time.time() - moment) % TICK

    def tasks(self, job: str) -> dict[str, dict[str, str]]:
        """What SLURM knows of the tasks of an array, by their numbers."""
        records = [
            dict(re.findall(r"(\w+)=(\S*)", row)) for row in self.call("scontrol", "-o", "show", "job", job).splitlines()
        ]
        return {record["ArrayTaskId"]: record for record in records}

    def running(self) -> int:
        return len(self.call("squeue", "-h", "-r", "-t", "running,completing", "-o", "%i").splitlines())

    def wait(self, *jobs: str, seconds: float = 180) -> None:
        """Until all tasks of some jobs are over."""
        wait_until(lambda: not self.call("squeue", "-h", "-j", ",".join(jobs)), f"the end of {jobs}", seconds)

    def daemons_of(self, job: str) -> list[int]:
        """What SLURM itself has running for a job."""
        found = [folder for folder in Path("/proc").glob("[0-9]*") if command_line(folder).startswith(f"slurmstepd: [{job}.")]
        assert found
        return [int(folder.name) for folder in found]

    def kill_slurmd(self) -> None:
        subprocess.run(["kill", "-KILL", (self.folder / "run" / "slurmd.child").read_text().strip()], check=True)

    def node_is_down(self) -> None:
        """What slurmctld finds out by itself, when slurmd has not answered for SlurmdTimeout."""
        self.call("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=dead")

    def start_slurmd(self) -> None:
        self.call("scontrol", "update", "NodeName=n1", "State=RESUME")
        self.call(str(HERE / "start.sh"), str(self.folder), "slurmd")


def command_line(process: Path) -> str:
    """Of a process in /proc; nothing if it has ended."""
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Project:
    """A checkout of this project, with small images, a site.sh for tests, and a sweep."""

    def __init__(self, folder: Path, environment: dict[str, str], *lines: str):
        self.folder, self.environment = folder, environment
        for name in ("common", "slurm"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*ROOT.glob("*.py"), ROOT / ".gitignore"):
            shutil.copy(path, folder)
        (folder / "slurm" / "site.sh").write_text(SITE)
        write_mnist(folder / "data" / "MNIST", smooth(100), smooth(20, seed=1))
        author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        for command in (["init", "-q"], ["add", "--all"], [*author, "commit", "-q", "-m", "as it stands"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
        self.sweep = folder / "sweep.txt"
        self.write(*lines)

    def write(self, *lines: str) -> None:
        self.sweep.write_text("".join(f"{line}\n" for line in lines))

    def start(self, script: str, *options: str, own: Sequence[str] = ()) -> subprocess.Popen[str]:
        """A script of slurm/ with this project's sweep, after its `own` options, and before others."""
        command = [str(self.folder / "slurm" / script), *own, str(self.sweep), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd="/", env=self.environment, start_new_session=True, **pipes)

    def call(self, script: str, *options: str, own: Sequence[str] = (), status: int = 0) -> tuple[str, str]:
        """What it prints, once it has ended with this status."""
        process = self.start(script, *options, own=own)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, out + err
        return out, err

    def submit(self, *options: str, own: Sequence[str] = ()) -> str:
        """The id of the job."""
        return self.call("submit.sh", *options, own=own)[0].strip()

    def states(self) -> dict[int, str]:
        """How the lines stand, by their numbers, as status.sh says."""
        return {int(number): state for number, state in re.findall(r"^ +(\d+)  (\w+)", self.call("status.sh")[0], re.M)}

    def job_output(self, number: int) -> str:
        """What the jobs of a line have printed."""
        paths = sorted((self.folder / "results" / "slurm" / "jobs").glob(f"*_{number}.out"))
        return "".join(path.read_text() for path in paths)

    def run_output(self) -> str:
        """What all lines' runs have printed."""
        return "".join(path.read_text() for path in (self.folder / "results" / "slurm" / "runs").glob("*.out"))
