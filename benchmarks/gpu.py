"""Checks and times this suite on a GPU in ten minutes: results, waits of the host, and speed, against targets.

    python -m benchmarks.gpu                     # on a machine with a GPU: results/gpu/<card>.json and the table README.md
    python -m benchmarks.gpu --only zoo DUET     # some sections, into the same file
    python -m benchmarks.gpu --long              # after them the published clustering line for real: an hour more
    python -m benchmarks.gpu --smoke             # everything tiny, on a simulated GPU (tests/cuda): does it run?
    python -m benchmarks.gpu --table             # only the table, from all files that are there

Each section (gpu_checks.py, gpu_speed.py) is a process with a time limit, whose values are written at once: a run that is cut
keeps what it has, a section that fails is recorded, and the next one runs. No network and no data sets are needed. Exit status:
0; 1 if a section failed or a result that has to be right is not; 2 if there is no GPU. Missed targets of speed or waits are
marked in the table, and are no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from common.errors import warn
from common.run.memory import tune_malloc
from common.run.records import read_json, write_json, write_text
from common.run.run import git_revision

ROOT = Path(__file__).parent.parent
# from short to long: module and function, and the seconds that a section may take on an H100
SECTIONS = {
    "versions": ("gpu_checks", "versions", 30),
    "agreement": ("gpu_checks", "agreement", 45),
    "CUDA graphs": ("gpu_checks", "cuda_graphs", 45),
    "torchrun": ("gpu_checks", "torchrun", 30),
    "waits": ("gpu_checks", "waits", 150),
    "clustering": ("gpu_speed", "clustering_section", 60),
    "images": ("gpu_speed", "images_section", 60),
    "mixture": ("gpu_speed", "mixture_section", 30),
    "routing": ("gpu_speed", "routing", 30),
    "stitching": ("gpu_speed", "stitching", 30),
    "similarity": ("gpu_speed", "similarity", 30),
    "resume": ("gpu_checks", "resume", 120),
    "resume, deterministic": ("gpu_checks", "resume_deterministic", 120),
    "zoo": ("gpu_speed", "zoo_section", 75),
    "DUET": ("gpu_speed", "duet", 75),
    "long": ("gpu_speed", "long", 75 * 60),
}
SMOKE_LIMIT = 240
ALL = 600  # seconds for all of them together, --long aside


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--long", action="store_true", help="also train the published clustering line: an hour")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on a simulated GPU")
    parser.add_argument("--table", action="store_true", help="only make the table")
    parser.add_argument("--section", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--out", type=Path, metavar="DIR", help="[results/gpu; --smoke: a temporary directory]")
    return parser


# ---- sections as processes -----------------------------------------------------------------------------------------------


def command(section: str, out: Path, smoke: bool) -> list[str]:
    """The command line of a section's process."""
    simulated = ["-m", "tests.cuda.device"] if smoke else []
    words = ["-m", "benchmarks.gpu", "--section", section, str(out), *(["--smoke"] if smoke else [])]
    return [sys.executable, *simulated, *words]


def write_section(section: str, out: Path, smoke: bool) -> None:
    """Run a section in this process, and write its values after each of them."""
    from benchmarks import gpu_device  # torch, and all models and scripts

    tune_malloc()
    module, function, _ = SECTIONS[section]
    values: dict[str, Any] = {}
    for name, value in getattr(import_module(f"benchmarks.{module}"), function)(smoke):
        values[name] = value
        write_json(out, {"not simulated": sorted(gpu_device.missing), "values": values})


def run_section(section: str, limit: float, smoke: bool) -> dict[str, Any]:
    """Run a section in a process of its own: its state, and the values that it came to.

    At the limit, it is ended with all processes that it has started.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "values.json", Path(folder) / "log"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command(section, out, smoke),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
            try:
                state = "done" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = f"ended at its limit of {limit:.0f} s"
            finally:
                end_group(process)
        record = {
            "state": state,
            "seconds": time.monotonic() - began,
            "made": f"{datetime.now(UTC):%Y-%m-%d}, {git_revision()}",
        }
        record |= read_json(out) if out.exists() else {"not simulated": [], "values": {}}
        if state == "failed":
            record["error"] = log.read_text(errors="replace")[-2000:]
    return record


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failures(record: dict[str, Any]) -> list[str]:
    """Why a section counts as failed: its state, and values that have to be right and are not."""
    reasons = [] if record["state"] == "done" else [record["state"]]
    wrong = [name for name, value in leaves(record["values"]) if is_bounded(value) and value["must"] and not value["met"]]
    return reasons + [f"wrong: {name}" for name in wrong]


def is_bounded(value: Any) -> bool:
    return isinstance(value, dict) and "at most" in value


def run_sections(sections: list[str], smoke: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """All sections in turn. --smoke, whose times mean nothing, runs two at a time."""
    end = time.monotonic() + ALL

    def run(section: str) -> dict[str, Any]:
        limit, left = SECTIONS[section][2], end - time.monotonic()
        if smoke or section == "long":
            return run_section(section, SMOKE_LIMIT if smoke else limit, smoke)
        return (
            run_section(section, min(limit, left), smoke)
            if left > 5
            else {"state": "not begun: no time was left", "values": {}}
        )

    with ThreadPoolExecutor(2 if smoke else 1) as pool:
        yield from zip(sections, pool.map(run, sections), strict=True)


# ---- the table -----------------------------------------------------------------------------------------------------------


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Measurements, bounded values and plain ones of a section, each with its name."""
    for name, value in values.items():
        if isinstance(value, dict) and not is_bounded(value) and "ms" not in value:
            yield from leaves(value, f"{prefix}{name}, ")
        else:
            yield prefix + name, value


def shown(value: Any) -> str:
    """A value as it stands in the table."""
    if is_bounded(value):
        return f"{shown(value['value'])} (at most {value['at most']:.3g}: {'met' if value['met'] else '**missed**'})"
    if isinstance(value, dict):
        images = f", {value['images/s']:,.0f} images/s" if "images/s" in value else ""
        return f"{value['ms']:.3g} ms (n = {value['n']}), {value['peak MiB']:,.0f} MiB{images}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table for each section, with a column for each card."""
    lines = [
        "# Measured on GPUs",
        "",
        "Made by `python -m benchmarks.gpu`; medians of n steps. docs/gpu.md says what is measured.",
    ]
    for section in dict.fromkeys(name for result in results for name in result["sections"]):
        records = [result["sections"].get(section, {"state": "not run", "values": {}}) for result in results]
        columns = [dict(leaves(record["values"])) for record in records]
        names = dict.fromkeys(name for column in columns for name in column)
        states = [f"{record['state']}, {record.get('seconds', 0):.0f} s" for record in records]
        lines += [
            "",
            f"## {section}",
            "",
            f"| | {' | '.join(result['card'] for result in results)} |",
            "| --- " * (len(results) + 1) + "|",
        ]
        lines += [f"| | {' | '.join(states)} |"]
        lines += [
            f"| {name} | {' | '.join(shown(column[name]) if name in column else '' for column in columns)} |" for name in names
        ]
        left_out = sorted({what for record in records for what in record.get("not simulated", [])})
        lines += ["", f"Not simulated: {'; '.join(left_out)}."] if left_out else []
    return "\n".join(lines) + "\n"


def write_tables(folder: Path) -> str:
    """README.md of a folder, from the JSON files in it; its text."""
    text = table([read_json(path) for path in sorted(folder.glob("*.json"))])
    write_text(folder / "README.md", text)
    return text


# ---- the command ---------------------------------------------------------------------------------------------------------


def find_card(smoke: bool) -> tuple[str, dict[str, Any]]:
    """The name of the card, and the record of the section that says it. Ends the command with status 2 if there is none."""
    record = run_section("versions", SMOKE_LIMIT if smoke else SECTIONS["versions"][2], smoke)
    if "card" not in record["values"]:
        reason = (record.get("error") or record["state"]).strip().splitlines()[-1]
        warn(f"benchmarks.gpu: error: PyTorch finds no GPU here ({reason}); --smoke simulates one")
        raise SystemExit(2)
    return record["values"]["card"], record


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if args.section:
        write_section(args.section[0], Path(args.section[1]), args.smoke)
        return 0
    folder = args.out or (Path(tempfile.mkdtemp(prefix="gpu-smoke-")) if args.smoke else ROOT / "results" / "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(write_tables(folder))
        return 0
    card, record = find_card(args.smoke)
    path = folder / f"{card.replace(' ', '-').replace('/', '-')}.json"
    result = json.loads(path.read_text()) if path.exists() else {"card": card, "sections": {}}
    sections = args.only or [section for section in SECTIONS if section != "long" or args.long or args.smoke]
    failed = False

    def keep(section: str, record: dict[str, Any]) -> None:
        nonlocal failed
        result["sections"][section] = record
        write_json(path, result)
        reasons = failures(record)
        failed = failed or bool(reasons)
        print(f"{section}: {', '.join(reasons) or 'done'}, {record.get('seconds', 0):.0f} s", flush=True)
        if "error" in record:
            print(record["error"], file=sys.stderr)

    keep("versions", record)
    for section, record in run_sections([section for section in sections if section != "versions"], args.smoke):
        keep(section, record)
    write_tables(folder)
    print(f"{path}\n{folder / 'README.md'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
