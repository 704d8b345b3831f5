"""Command lines: options with their ranges, the dotted spelling, and the name that a command line gives to its run.

A run is named after its command line with the spaces escaped by dots, so options may also be typed in that form:
`-bs.50` is `-bs 50`, and the name of a run, pasted whole, is the command line that made it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Container, Mapping
from typing import Any, NoReturn

import torch

from common.errors import InputError


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line (and exit status 2), and without guessing at unfinished options."""

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


Token = tuple[str, str | None, str]  # option, value or None, and what its part of the name is


def split_command_line(parser: argparse.ArgumentParser, argv: list[str] | None, unnamed: Container[str]) -> list[Token]:
    """Cut a command line (sys.argv if None) into its options, whatever way they are spelled.

    `-bs 50`, `-bs=50` and `-bs.50` are the same option; `-bs.50-lr.0.1` is two. Values may begin with a dash. Options in
    `unnamed` (results_dir, say) are in no run's name, so their values go on to the end of the word: `-results_dir=my-lr.0.1`.
    Ends with the parser's error for words that are no option.
    """
    actions = parser._option_string_actions  # the one place where argparse keeps what options there are
    joined = "|".join(re.escape(option) for option in sorted(actions, key=len, reverse=True))
    option_starts = re.compile(rf"(?=(?:{joined})(?:[.=-]|$))")
    tokens: list[Token] = []
    words = list(sys.argv[1:] if argv is None else argv)
    while words:
        word = words.pop(0)
        start = re.match(rf"({joined})([.=-])", word)
        if start is not None and word not in actions and not (actions[start[1]].dest in unnamed and start[2] in ".="):
            word, *rest = [part for part in option_starts.split(word) if part]
            words[:0] = ["".join(rest)] if rest else []
        option, equals, value = word.partition("=") if "=" in word else (word, "", "")
        if option not in actions:
            option, equals, value = word.partition(".")
        if option not in actions:
            parser.error(f"unknown option {word!r}: -h lists the options")
        if actions[option].nargs == 0:
            if equals:
                parser.error(f"{option} takes no value, but {word!r} gives one")
            tokens.append((option, None, option))
        elif equals:
            tokens.append((option, value, word))
        elif not words or words[0] in actions:
            parser.error(f"{option} needs a value")
        else:
            value = words.pop(0)
            tokens.append((option, value, f"{option}.{value}"))
    return tokens


def parse_tokens(parser: argparse.ArgumentParser, tokens: list[Token]) -> argparse.Namespace:
    """The options of a command line that is cut up."""
    return parser.parse_args([option if value is None else f"{option}={value}" for option, value, _ in tokens])


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, unnamed: Container[str]
) -> tuple[argparse.Namespace, str, set[str]]:
    """Parse a command line (sys.argv if None) into options, the run's name, and the options that were given.

    The name holds the words as they were typed, in their order, defaults left out (as published), without the options in
    `unnamed`, which say where and how to run, not what.
    """
    tokens = split_command_line(parser, argv, unnamed)
    options = parse_tokens(parser, tokens)
    named = [token for token in tokens if parser._option_string_actions[token[0]].dest not in unnamed]
    name = "".join(text for _, _, text in named)
    again = split_command_line(parser, [name], unnamed) if name else []
    if [token[:2] for token in named] != [token[:2] for token in again]:
        parser.error(f"the run would be called {name!r}, which reads like other options: choose other values")
    given = {option.lstrip("-") for option, _, _ in tokens}
    return options, name, given


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
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available():
        parser.error(f"{dash}device cuda: PyTorch finds no GPU here")
    if reason := why_no_name(name):
        parser.error(f"the run would be called {name!r:.300}: {reason}")


def why_no_name(name: str) -> str | None:
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


def refuse_differences(noted: Any, options: Mapping[str, Any], what: str, hint: str) -> None:
    """Raises InputError for the first of the options that was noted with another value than it has now."""
    if not isinstance(noted, dict):
        raise InputError(f"{what} without options: {hint}")
    for name in (name for name in options if name in noted):
        before, now = (json.loads(json.dumps(value)) for value in (noted[name], options[name]))  # lists for tuples
        if before != now:
            raise InputError(f"{what} with {name} {before}, not {now}: {hint}")


def add_run_options(group: argparse._ArgumentGroup, what: str = "run") -> None:
    """The options of a run's directory, in the spelling with two dashes."""
    group.add_argument("--results-dir", default="results", metavar="DIR", help="where run directories are made [%(default)s]")
    group.add_argument("--resume", nargs="?", const="auto", choices=("auto",), help=f"continue a {what} that was interrupted")
    group.add_argument("--overwrite", action="store_true", help=f"replace a {what} of the same name")
    group.add_argument("--dry-run", action="store_true", help="check the options, print the run's name and exit")


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
    if reason := why_no_name(text):
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
