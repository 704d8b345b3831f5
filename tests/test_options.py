"""Command lines: ranges, the dotted spelling, and names of runs."""

import argparse
import contextlib
import sys

import pytest

from common.errors import InputError
from common.run import dotted, options, trackers
from common.run.progress import bar

# what can be no run's name: not one component of a path, not printable, too long, or the suite's own
BAD_NAMES = (
    "", ".", "..", "a/b", "../a", "/etc", "a/", "x.part", "x.lock", "x.new", "figures-x",
    "a\tb", "a\nb", "a\0b", "\x7f", "\udcff", 250 * "x", 130 * "ä",
)  # fmt: skip


@pytest.fixture
def parser() -> options.OneLineParser:
    parser = options.OneLineParser(prog="test.py")
    for name in ("-type", "-run", "-resume", "-device"):
        parser.add_argument(name)
    for name in ("-n_hidden", "-n_heads", "-n_iter", "-n_layers", "-bs", "-tasks", "-n"):
        parser.add_argument(name, type=options.at_least(1))
    for name in ("-lr", "-wc", "-dropout"):
        parser.add_argument(name, type=options.real(0, 1e6))
    for name in ("-no_cuda", "-overwrite", "-retry_failed"):
        parser.add_argument(name, action="store_true")
    return parser


NAMES = {  # the original's examples
    "-type Swarm -n_hidden 128 -n_iter 10 -n_layers 1 -dropout 0.0 -bs 50 -wc 60": (
        "-type.Swarm-n_hidden.128-n_iter.10-n_layers.1-dropout.0.0-bs.50-wc.60"
    ),
    "-type SetTransformer -n_heads 8 -no_cuda -run 2 -resume old/best.pkl -lr 1e-3": (
        "-type.SetTransformer-n_heads.8-no_cuda-run.2-lr.1e-3"
    ),
    "-lr 0.010 -type LSTMS -tasks=500": "-lr.0.010-type.LSTMS-tasks=500",
    "-n_hidden 8 -run 8 -resume 8": "-n_hidden.8-run.8",  # the original removed every 8
    "-resume=a/b.pkl -bs.50": "-bs.50",
}


@pytest.mark.parametrize("line", NAMES)
def test_names(parser: argparse.ArgumentParser, line: str) -> None:
    args, name, _ = dotted.parse(parser, line.split(), ("resume",))
    assert name == NAMES[line] and options.name_error(name) is None
    pasted, again, _ = dotted.parse(parser, [name], ("resume",))  # a name is a command line
    assert again == name
    assert {**vars(pasted), "resume": None} == {**vars(args), "resume": None}


def test_spellings(parser: argparse.ArgumentParser) -> None:
    for spelling in ("-bs 50 -lr 1e-3", "-bs.50 -lr.1e-3", "-bs=50 -lr=1e-3", "-bs.50-lr.1e-3"):
        args, _, given = dotted.parse(parser, spelling.split(), ())
        assert (args.bs, args.lr, given) == (50, 1e-3, {"bs", "lr"})
    args, _, _ = dotted.parse(parser, ["-resume=r/-bs.3-lr.1/best.pkl", "-run.x"], ("resume",))
    assert (args.resume, args.run, args.bs) == ("r/-bs.3-lr.1/best.pkl", "x", None)
    args, _, _ = dotted.parse(parser, ["-n", "3", "-run", "a-b.c", "-no_cuda"], ())
    assert (args.n, args.run, args.no_cuda, args.n_hidden) == (3, "a-b.c", True, None)


@pytest.mark.parametrize(
    ("word", "resume", "bs"),
    [
        ("-resume=my-bs", "my-bs", None),
        ("-resume=my-bs.3", "my-bs.3", None),
        ("-resume.my-bs.3", "my-bs.3", None),
        ("-resume=-lr.3=4-run", "-lr.3=4-run", None),
        ("-bs.7-resume=my-no_cuda", "my-no_cuda", 7),
    ],
)
def test_values_that_are_in_no_name_are_not_cut_up(
    parser: argparse.ArgumentParser, word: str, resume: str, bs: int | None
) -> None:
    args, name, given = dotted.parse(parser, [word], ("resume",))
    assert (args.resume, args.bs) == (resume, bs)
    assert name == ("-bs.7" if bs else "") and given == ({"resume", "bs"} if bs else {"resume"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-bs", "-bs needs a value"),
        ("-b 50", "unknown option '-b'"),
        ("-n_hid 50", "unknown option '-n_hid'"),
        ("50", "unknown option '50'"),
        ("--bs 50", "unknown option '--bs'"),
        ("-no_cuda=1", "takes no value"),
        ("-bs 0", "0 is too small: at least 1"),
        ("-bs -3", "-3 is too small"),
        ("-bs 3000000000", "3000000000 is too large"),
        ("-bs 1.5", "'1.5' is not a whole number"),
        ("-lr nan", "nan is out of range"),
        ("-lr inf", "inf is out of range"),
        ("-lr -1e-3", "-1e-3 is out of range: at least 0"),
        ("-lr fast", "'fast' is not a number"),
        ("-lr --", "'-lr=--' is neither an option nor a value"),
        ("-run=--", "'-run=--' is neither an option nor a value"),
        ("\x1b[31m\u200b", "unknown option '\\x1b[31m\\u200b'"),
        (f"-n {5000 * 'x'}", "xxx' is not a whole number"),
    ],
)
def test_wrong_command_lines(parser: argparse.ArgumentParser, line: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        dotted.parse(parser, line.split(), ())
    assert_refused(stopped.value.code, message, capsys)


def assert_refused(status: object, message: str, capsys: pytest.CaptureFixture) -> None:
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.startswith("test.py: error: ")
    assert error.count("\n") == 1 and error[:-1].isprintable() and len(error) < 700


@pytest.mark.parametrize(
    ("line", "name", "message"),
    [
        *(("", name, "the run would be called") for name in BAD_NAMES),
        ("-overwrite -resume auto", "a", "choose one"),
        ("-overwrite -retry_failed", "a", "choose one"),
        ("-device cuda", "a", "finds no GPU"),
        ("-no_cuda -device cuda", "a", "leave one out"),
    ],
)
def test_what_no_script_can_do(
    parser: argparse.ArgumentParser, line: str, name: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.check(parser, parser.parse_args(line.split()), name)
    assert_refused(stopped.value.code, message, capsys)


def test_what_is_no_problem(parser: argparse.ArgumentParser) -> None:
    for line in ("", "-overwrite -resume old/best.pkl", "-resume auto -retry_failed"):
        options.check(parser, parser.parse_args(line.split()), "a.b")
    parser.add_argument("-dry_run", action="store_true")  # the run may be on another machine
    options.check(parser, parser.parse_args(["-device", "cuda", "-dry_run"]), "a.b")
    for name in ("-bs.50", "a..b", "part", "a.partial", ".hidden", 240 * "x", "a b", "ä"):
        assert options.name_error(name) is None


def test_words_that_are_part_of_a_name() -> None:
    for right in ("a.b-2_c+", "1", "a..b"):
        assert options.run_id(right) == right
    for wrong in (*BAD_NAMES, "a b", "ä", "..\n", "a\n"):
        with pytest.raises(argparse.ArgumentTypeError):
            options.run_id(wrong)


def test_booleans_and_numbers() -> None:
    assert [options.boolean(text) for text in ("true", "1", "False", "0")] == [True, True, False, False]
    with pytest.raises(argparse.ArgumentTypeError, match="neither true nor false"):
        options.boolean("")
    assert [options.shortest(x) for x in (480.0, 0.001, 1e-05, 0.5, 1e6)] == ["480", "0.001", "1e-05", "0.5", "1e+06"]
    for x in (0.1 + 0.2, 1 / 3, 1234567.875, 5e-324):
        assert float(options.shortest(x)) == x


def test_not_defaults(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["-bs=5", "-lr=0.10", "-no_cuda", "-type=x"])
    assert options.not_defaults(parser, args, ("type",)) == ["bs.5", "lr.0.1", "no_cuda"]


def test_ranges() -> None:
    assert options.real(0, 1, above=True)("1") == 1 and options.real(0, 1, below=True)("0") == 0
    for wrong, kind in (("0", options.real(0, above=True)), ("1", options.real(0, 1, below=True)), ("1.1", options.real(0, 1))):
        with pytest.raises(argparse.ArgumentTypeError, match="out of range"):
            kind(wrong)


@pytest.mark.parametrize("project", ["", "a/b", "a:b", 129 * "x"])
def test_names_of_projects(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(InputError, match="is no name of a project"):
        trackers.check(argparse.Namespace(wandb_project=project))


def test_a_bar_on_a_full_disk_is_lost_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert list(bar(argparse.Namespace(progress=True), range(3), "title", mininterval=0)) == [0, 1, 2]
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.write("x\n")
        with contextlib.suppress(OSError):
            full.close()
