"""results/: README.md has the figures of the runs there, by key; their commands make them; and there is little else."""

import json
import shlex
import statistics
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import collect_results
from common.errors import InputError
from common.gallery.published import SPEC, figure, published_page
from tests.command_lines import dry_run, exit_status, get_parser

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
TABLES = tomllib.loads((RESULTS / SPEC).read_text())["tables"]
ROWS = [(table, row) for table in TABLES for row in table["rows"]]
MIB = 2**20


def test_the_page_is_that_of_the_committed_runs() -> None:
    text = (RESULTS / "README.md").read_text()
    assert text == published_page(RESULTS), "it is made by `python collect_results.py --published`"


@pytest.mark.parametrize("table", TABLES, ids=[table["title"] for table in TABLES])
def test_every_column_is_a_field_of_some_run(table: dict[str, Any]) -> None:
    paths = [path for row in table["rows"] for path in RESULTS.glob(row["runs"])]
    results = [json.loads((path / "result.json" if path.is_dir() else path).read_text()) for path in paths]
    for name, column in table["columns"].items():
        assert any(figure([result], column, {**table, **row}).values for result in results for row in table["rows"]), name


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{i}-{row['runs']}" for i, (_, row) in enumerate(ROWS)])
def test_the_command_of_a_row_is_that_of_its_runs(table: dict[str, Any], row: dict[str, Any]) -> None:
    if "label" in row and "options" not in row and any("options" in other for other in table["rows"]):
        return  # what runs measure besides their model, such as chance
    words = shlex.split(f"{table['commands'][-1]} {row.get('options', '')}".removeprefix("python ").removeprefix("-u "))
    script, options = words[0].removesuffix(".py"), words[1:]
    for path in sorted(RESULTS.glob(row["runs"])):
        own = path / "result.json" if path.is_dir() else path
        result = json.loads((own if script == "train_zoo" else own.with_name("result.json")).read_text())
        assert result["script"] == script
        parser = get_parser(script)
        if script == "train_zoo":  # a model of a zoo has no name
            given = vars(parser.parse_args(options))
            assert (
                result["options"].items()
                >= {name: given[name] for name in ("arch", "dataset", "recipe", "epochs", "subset", "width", "seed")}.items()
            )
            continue
        seed = next(option for option in ("-seed", "--seed") if option in parser._option_string_actions)
        seeds = [seed, str(result["options"]["seed"] if "options" in result else result["seed"])]
        status, name = dry_run(script, [*options, *seeds])
        assert status == 0 and parts(name, script) == parts(result["name"], script)


def parts(name: str, script: str) -> Any:
    """A run's name such that two names of the same options are equal: some scripts keep them in the order of typing."""
    name = name.replace("_", "-")
    if script not in ("amortised_clustering", "amortised_mog"):
        return name
    return sorted(f"-{part}" for part in name.removesuffix("-seed.0").split("-") if part)


# ---- the page of any runs ------------------------------------------------------------------------------------------------

SMALL = """
end = "The end."
[[tables]]
title = "Layers"
page = "layers.md"
source = "Paper: none."
commands = ["python layers.py --layers 3"]
of = "model"
[tables.columns]
accuracy = { field = "{of}.accuracy", scale = 100, form = ".1f" }
penalty = { field = "cells[layer=3,best=True].accuracy", below = "level" }
[[tables.rows]]
runs = "run?"
options = "--width 4"
paper = [50.0]
note = "another data set"
[[tables.rows]]
runs = "run?"
label = "chance"
of = "chance"
without = ["penalty"]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for i, accuracy in enumerate((0.4, 0.8)):
        cells = [{"layer": layer, "best": best, "accuracy": accuracy} for layer in (2, 3) for best in (False, True)]
        (tmp_path / f"run{i}").mkdir()
        result = {"model": {"accuracy": accuracy}, "chance": {"accuracy": 0.1}, "level": 1.0, "cells": cells}
        (tmp_path / f"run{i}" / "result.json").write_text(json.dumps(result))
    (tmp_path / SPEC).write_text(SMALL)
    return tmp_path


def test_means_deviations_and_differences_are_computed(small: Path) -> None:
    assert exit_status(collect_results.main, [str(small), "--published"]) == 0
    text = (small / "README.md").read_text()
    deviation = statistics.stdev([0.4, 0.8])
    row = f"60.0 ± {100 * deviation:.1f} | 0.400 ± {deviation:.3f} | 2 | 50.0 | +10.0: another data set |"
    assert f"| `run?`, `--width 4` | {row}\n" in text
    assert "| `run?`, chance | 10.0 |  | 2 |  |  |\n" in text
    assert "    python layers.py --layers 3 ...  # and the row's options\n" in text and text.endswith("The end.")


WRONG = {
    "no such run": ('runs = "run?"', 'runs = "gone*"', "gone*: there is no such run"),
    "a field of some runs": ('"cells[layer=3,best=True].accuracy"', '"rare"', "rare is missing in 1 of 2 runs"),
    "no number": ('"cells[layer=3,best=True].accuracy"', '"model"', "no finite number"),
    "more values than others": ('"cells[layer=3,best=True].accuracy"', '"cells[layer=3].accuracy"', "a row has one n"),
    "an unknown key": ("paper = [50.0]", "papers = [50.0]", "papers is no key of a row"),
    "an unknown column": ('without = ["penalty"]', 'without = ["loss"]', "'loss', which is no column"),
    "no page": ('page = "layers.md"', "", "a table or row lacks 'page'"),
    "no TOML": ("[tables.columns]", "[tables.columns", "is no TOML"),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_table_is_said(old: str, new: str, message: str, small: Path) -> None:
    rare = json.loads((small / "run0" / "result.json").read_text()) | {"rare": 1}
    (small / "run0" / "result.json").write_text(json.dumps(rare))
    assert old in SMALL
    (small / SPEC).write_text(SMALL.replace(old, new))
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        published_page(small)


def test_published_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for line, message in ((f"{tmp_path} --published", SPEC), (f"{RESULTS} --published --out {tmp_path}", "leave --out")):
        assert exit_status(collect_results.main, line.split()) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- what is committed ---------------------------------------------------------------------------------------------------


def test_what_is_committed_is_little_and_of_use() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "results"], capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    if not paths:
        pytest.skip("no git, so nobody knows what is committed")
    assert sum(path.stat().st_size for path in paths) < 4 * MIB
    assert not [path for path in paths if path.stat().st_size > (2 if path.parent.name == "models" else 1) * MIB]
    kinds = {path.name if path.suffix == "" else path.suffix for path in paths}
    assert kinds <= {".json", ".csv", ".png", ".pt", ".pkl", ".md", ".toml"}, kinds
    csv = {path.name for path in paths if path.suffix == ".csv"}
    assert csv == {"metrics.csv", "original_hour.csv"}, "tables are in README.md"
    runs = [path.parent for path in paths if path.name == "result.json"]
    assert all((run / "args.json").exists() for run in runs)
