"""What every script does with its command line, right or wrong."""

import argparse
import contextlib
import importlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from common.run import dotted

Main = Callable[[list[str]], int]


class Terminal(io.StringIO):
    """A stderr that shows progress bars."""

    def isatty(self) -> bool:
        return True


def exit_status(main: Main, argv: list[str]) -> int:
    """Run a script in this process; its exit status, also where argparse, or memory, ends it."""
    try:
        return main(argv)
    except SystemExit as stopped:
        return 1 if isinstance(stopped.code, str) else int(stopped.code or 0)


def assert_one_line_and_nothing_made(status: int, message: str, results: Path, capsys: pytest.CaptureFixture) -> None:
    """How a script that was to leave its run in `results` refuses: exit status 2, and one line with this message in it."""
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
    assert not results.exists()


def assert_help_shows_the_papers_options_first(main: Main, last_of_the_paper: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_status(main, ["-h"]) == 0
    text = capsys.readouterr().out.partition("  -h, --help")[2]
    places = [text.index(part) for part in ("options of the paper", last_of_the_paper, "options of this suite", "-seed")]
    assert places == sorted(places)


def get_parser(script: str) -> argparse.ArgumentParser:
    return importlib.import_module(script).get_parser()


def main_of(script: str) -> Main:
    return importlib.import_module(script).main


def dry_run(script: str, options: list[str]) -> tuple[int, str]:
    """Exit status and output of a script's dry run, or of its refusal."""
    dry = next(option for option in ("-dry_run", "--dry-run") if option in get_parser(script)._option_string_actions)
    return printed(main_of(script), [*options, dry])


def parse(script: str, options: list[str]) -> tuple[int, str]:
    """Exit status and message of a script's parser alone."""
    parser = get_parser(script)

    def main(words: list[str]) -> int:
        if "-seed" in parser._option_string_actions:  # a SWARM script
            dotted.parse(parser, words, ())
        else:
            parser.parse_args(words)
        return 0

    return printed(main, options)


def printed(main: Main, argv: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = exit_status(main, argv)
    return status, out.getvalue().strip()
