"""Command lines: options that many scripts have, types of options with their ranges, and names of runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NoReturn

import torch

from common import parallel
from common.errors import InputError, one_line
from common.precision import PRECISIONS
from common.run import trackers
from common.run.command import echo

# options that do not change what a run computes: they are not in its name, and may change when it is resumed
RUN_OPTIONS = (
    "results_dir", "resume", "retry_failed", "overwrite", "dry_run", "progress", "device", "tensorboard", "wandb_project",
    "jobs",
)  # fmt: skip


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line (and exit status 2), and without guessing at unfinished options."""

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        for word in words:
            if word == "--" or word.endswith("=--"):  # argparse would drop it, also where a value belongs
                self.error(f"{word!r} is neither an option nor a value")
        return super().parse_args(words, namespace)

    def print_help(self, file: object = None) -> None:
        echo(self.format_help().rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n" if parallel.speaks() else None)


def not_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace, left_out: Container[str]) -> list[str]:
    """Options that are not at their defaults, dotted, for the name of a run: ["bs.50", "lr.0.1", "no_cuda"]."""
    parts = []
    for action in parser._actions:  # all options, in the order of the help
        value = getattr(args, action.dest, action.default)
        if action.dest not in left_out and value != action.default:
            text = shortest(value) if isinstance(value, float) else str(value).lower()
            word = action.option_strings[0].lstrip("-")
            parts.append(word if action.nargs == 0 else f"{word}.{text}")
    return parts


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    """End with the parser's error for what no script can do: choices that exclude each other, a name that is no file's."""
    dash = "-" if "-resume" in parser._option_string_actions else "--"
    if getattr(args, "overwrite", False) and (getattr(args, "resume", None) == "auto" or getattr(args, "retry_failed", False)):
        typed = "retry-failed" if getattr(args, "retry_failed", False) else "resume"
        parser.error(f"{dash}{typed} continues what is there, {dash}overwrite replaces it: choose one")
    if getattr(args, "no_cuda", False) and args.device == "cuda":
        parser.error("-no_cuda means -device cpu, but -device cuda was given: leave one out")
    # the machine of a dry run may be another than that of the run
    elsewhere = getattr(args, "dry_run", False)
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available() and not elsewhere:
        parser.error(f"{dash}device cuda: PyTorch finds no GPU here")
    if getattr(args, "precision", None) == "tf32" and device_of(args).type == "cpu" and not elsewhere:
        parser.error(f"{dash}precision tf32 is a format of NVIDIA GPUs, and this would run on a CPU: leave it out")
    try:
        if hasattr(args, "device"):
            parallel.local_device(device_of(args).type)
        trackers.check(args, dash)
    except InputError as error:
        parser.error(str(error))
    if hasattr(args, "jobs") and parallel.launched():
        parser.error("torchrun is for scripts that train one model: --jobs N starts N processes for the jobs of this one")
    if reason := name_error(name):
        parser.error(f"the run would be called {name!r}: {reason}")


def name_error(name: str) -> str | None:
    """Why a text cannot be the name of a run's directory, or None if it can."""
    if name in ("", ".", "..") or "/" in name:
        return "a name is one component of a path"
    if not name.isprintable():
        return "it has characters that cannot be printed"
    if name.endswith((".part", ".lock", ".new")) or name.startswith("figures-"):
        return "names that end in .part, .lock or .new, or begin with figures-, are the suite's own"
    if len(os.fsencode(name)) > 240:
        return f"it has {len(os.fsencode(name))} characters, and file systems take 255: leave out defaults"
    return None


def check_same_options(noted: Any, options: Mapping[str, Any], what: str, hint: str) -> None:
    """Raises InputError for the first of the options that was noted with another value than it has now."""
    if not isinstance(noted, dict):
        raise InputError(f"{what} without options: {hint}")
    for name in (name for name in options if name in noted):
        before, now = (json.loads(json.dumps(value)) for value in (noted[name], options[name]))  # lists for tuples
        if before != now:
            raise InputError(f"{what} with {name} {before}, not {now}: {hint}")


def add_run_options(group: argparse._ArgumentGroup, what: str = "run") -> None:
    """The options of a run's directory, in the spelling with two dashes."""
    group.add_argument("--results-dir", default="results", metavar="DIR", help="directory of all runs [%(default)s]")
    group.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help=f"resume an interrupted {what}")
    group.add_argument("--overwrite", action="store_true", help=f"replace a {what} of the same name")
    group.add_argument("--dry-run", action="store_true", help="check the options, print the run's name, exit")


def add_jobs_option(group: argparse._ArgumentGroup, what: str) -> None:
    """The option for the number of processes that share the jobs of a run (common/run/workers.py)."""
    text = f"processes that share the {what}, on this machine's GPUs in turn, or its CPU cores [%(default)s]"
    group.add_argument("--jobs", type=at_least(1, 1024), default=1, metavar="N", help=text)


def add_device_options(group: argparse._ArgumentGroup, dash: str = "--") -> None:
    """Options of the device and its arithmetic."""
    group.add_argument(f"{dash}device", choices=("cpu", "cuda"), help="processor [cuda when available]")
    add_arithmetic_options(group, dash)


def add_arithmetic_options(group: argparse._ActionsContainer, dash: str = "--") -> None:
    """Options that `common.precision.set_backend_flags` takes."""
    text = "number format of matrix products and convolutions: float32, TF32 (NVIDIA GPUs), bfloat16 [%(default)s]"
    group.add_argument(f"{dash}precision", choices=PRECISIONS, default="fp32", help=text)
    text = "bitwise reproducible results also on a GPU, but slower"
    group.add_argument(f"{dash}deterministic", action="store_true", help=text)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device of the options; without one, a GPU where there is one."""
    if getattr(args, "no_cuda", False):
        return torch.device("cpu")
    return torch.device(getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))


def add_tracker_options(group: argparse._ArgumentGroup, dash: str = "--") -> None:
    """Options of programs that show metrics."""
    project = "-wandb_project" if dash == "-" else "--wandb-project"
    group.add_argument(f"{dash}tensorboard", action="store_true", help="log metrics to TensorBoard, in the run's directory")
    group.add_argument(project, metavar="NAME", help="log metrics to this project of Weights & Biases")


def at_least(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An integer option from `low` to `high`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {high}")
        return value

    return integer


def real(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """A real option from `low` to `high`; `above` and `below` exclude that end. Infinity and NaN are refused."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        inside = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not math.isfinite(value) or not inside:
            upper = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {'above' if above else 'at least'} {low:g}{upper}")
        return value

    return number


def run_id(text: str) -> str:
    """A word that can be a run's name, or part of one."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of a file name: use letters, digits and _ . + -")
    if reason := name_error(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a run's name: {reason}")
    return text


def boolean(text: str) -> bool:
    """An option that is true or false (1 or 0)."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def shortest(value: float) -> str:
    """The shortest text that is read as this number: 480, 0.001, 1e-05."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
