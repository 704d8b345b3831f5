"""Dotted command lines, as the SWARM scripts publish them.

A run is named after its command line with the spaces escaped by dots, so options may also be typed in that form:
`-bs.50` is `-bs 50`, and the name of a run, pasted whole, is the command line that made it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque
from collections.abc import Container

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
    words = deque(sys.argv[1:] if argv is None else argv)
    while words:
        word = words.popleft()
        start = re.match(rf"({joined})([.=-])", word)
        if start is not None and word not in actions and not (actions[start[1]].dest in unnamed and start[2] in ".="):
            word, *rest = [part for part in option_starts.split(word) if part]
            if rest:
                words.appendleft("".join(rest))
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
            value = words.popleft()
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
