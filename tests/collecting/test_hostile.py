"""collect_results.py on runs that were made to do harm, or have gone wrong: they cost no other run, and nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import collect_results as script
from common.gallery.key_metrics import read_rows
from common.gallery.runs import find_runs
from common.run.lock import take_lock
from tests.collecting.runs import write_clustering
from tests.command_lines import exit_status

ROOT = Path(__file__).resolve().parents[2]
LAYER = {"layer": 1, "penalty": 1.0, "deviation": None, "n": 1}
HOSTILE: dict[str, dict[str, Any]] = {
    "options that are a list": {"args.json": {"options": []}},
    "options in options": {"args.json": {"type": {"a": [1, {"b": None}]}, "lr": [[1]], "seed": "x"}},
    "too many options": {"args.json": {f"option{i}": i for i in range(10_000)}},
    "numbers beyond measure": {"result.json": {"parameters": 10**400, "seconds": 10**400, "model": {"accuracy": 10**400}}},
    "options beyond measure": {"args.json": {"wc": 10**400, "epochs": 10**400, "lr": float("nan")}},
    "surrogates": {"args.json": {"type": "\ud800"}, "result.json": {"script": "a\ud800"}},
    "a script with a long name": {"result.json": {"script": "x" * 5000}},
    "a script that is a path": {"result.json": {"script": "../../etc"}},
    "a script without a name": {"result.json": {"script": ""}},
    "results that are words": {"result.json": {"seconds": "long", "parameters": [], "model": 3, "name": None}},
    "mathematics": {"args.json": {"type": "$\\frac$"}},
    **{
        f"penalties of {value}": {"result.json": {"script": "cifar10_stitching", "layers": [LAYER | {"penalty": value}]}}
        for value in ("x", None, float("nan"), float("inf"), 1.7e308, [1], True)
    },
    "too many penalties": {
        "result.json": {"script": "cifar10_stitching", "layers": [LAYER | {"layer": i} for i in range(5000)]}
    },
    "a deep option": {"args.json": {"type": json.loads("[" * 600 + "]" * 600)}},
    "a deep result": {"result.json": {"x": json.loads("[" * 900 + "]" * 900)}},
}  # fmt: skip


def collect(root: Path, *options: str) -> int:
    return exit_status(script.main, [str(root), *options])


def states(root: Path) -> dict[str, tuple[str, str]]:
    return {run.path: (run.state, run.note) for run in find_runs(root)}


def page_data(root: Path) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', (root / "index.html").read_text(), re.S)[1])


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE)
def test_no_content_costs_the_other_runs(files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(2):  # what is read, and what is made of several
        path = write_clustering(tmp_path / "amortised_clustering" / str(i), 0.5 + i, seed=i)
        for name, content in files.items():
            (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | content))
    write_clustering(tmp_path / "amortised_clustering" / "healthy", 0.5, seed=5)
    assert collect(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "no picture" not in printed and max(map(len, printed.splitlines())) < 400
    assert states(tmp_path)["amortised_clustering/healthy"][0] == "finished"
    shown = page_data(tmp_path)
    assert len(shown["runs"]) == 3 and all(len(one["columns"]) < 1000 for one in shown["experiments"])
    assert not list(tmp_path.parent.glob("etc*"))


def test_no_name_or_kind_of_file_costs_the_other_runs(tmp_path: Path) -> None:
    runs = os.fsencode(tmp_path / "amortised_clustering")
    healthy = write_clustering(tmp_path / "amortised_clustering" / "healthy", 0.5)
    for i, name in enumerate((b"\xff\xfe", b"a\nb", b"x" * 240)):
        os.rename(write_clustering(tmp_path / "copy", 0.5), runs + b"/" + name)
        os.mkdir(os.fsencode(tmp_path) + b"/script " + name)
        os.rename(write_clustering(tmp_path / "copy", 0.5), os.fsencode(tmp_path) + b"/script " + name + b"/%d" % i)
    for name, content in {"args.json": b"{", "metrics.csv": b"epoch,step\n1,nan\nx,y\n", "log": b"\xed\xa0\x80"}.items():
        (write_clustering(tmp_path / "odd" / name, 0.5) / name).write_bytes(content)
    for name in ("lock", "metrics.csv", "log", "last.pkl", "args.json"):  # opening a pipe takes forever
        stuck = tmp_path / "pipes" / f"{name}.part"
        stuck.mkdir(parents=True)
        os.mkfifo(stuck / name)
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "1.last.pkl").write_bytes(b"")
    for name in ("1.csv", "1.lock", "2.json"):
        os.mkfifo(zoo / name)
    (zoo / "2.pt").write_bytes(b"")
    (zoo / f"{'9' * 240}.json").write_text("{}")
    (tmp_path / "a folder" / "result.json").mkdir(parents=True)
    assert collect(tmp_path) == 0 and healthy.exists()
    outcome = sorted(state for state, _ in states(tmp_path).values())
    assert outcome == [*["broken"] * 3, *["failed"] * 4, *["finished"] * 9, "stopped"]
    assert states(tmp_path)["pipes/args.json.part"] == ("broken", "args.json cannot be read: it is no regular file")


def test_directories_of_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clustering(tmp_path / "healthy" / "1", 0.5)
    for name, n in (("d", 1000), ("d" * 200, 30)):  # beyond Python's depth of calls, and the longest path
        monkeypatch.chdir(tmp_path)
        for _ in range(n):
            os.mkdir(name)
            os.chdir(name)
        os.mkdir("run")
        Path("run/result.json").write_text('{"script": "amortised_clustering"}')
    monkeypatch.chdir(tmp_path)
    try:
        assert collect(tmp_path) == 0
        outcome = {run.path[-5:]: (run.state, run.note) for run in find_runs(tmp_path)}
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d", tmp_path / ("d" * 200)], check=True)  # pytest cannot
    too_long = ("broken", "it cannot be searched: File name too long")
    assert outcome == {"thy/1": ("finished", ""), "d/run": ("finished", ""), "ddddd": too_long}


@pytest.mark.parametrize("name", ["result.json", "args.json", "metrics.csv"])
def test_files_beyond_a_sensible_size_are_not_read(name: str, tmp_path: Path) -> None:
    write_clustering(tmp_path / "amortised_clustering" / "healthy", 0.5)
    path = write_clustering(tmp_path / "amortised_clustering" / "huge", 0.5)
    os.truncate(path / name, 500 << 20)
    assert collect(tmp_path) == 0
    reason = "it has 500 MiB, more than 16"
    if name == "metrics.csv":
        with pytest.raises(OSError, match=reason):
            read_rows(path / name)
    else:
        assert states(tmp_path)["amortised_clustering/huge"] == ("broken", f"{name} cannot be read: {reason}")
    assert states(tmp_path)["amortised_clustering/healthy"] == ("finished", "")


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = write_clustering(tmp_path / "outside" / "secret", 0.123, type="secret")
    (secret / "log").write_text("failed: secret")
    lock = take_lock(secret / "lock")
    runs = tmp_path / "results" / "amortised_clustering"
    for name in ("log", "metrics.csv", "metrics.png", "args.json", "result.json", "lock", "last.pkl"):
        path = write_clustering(runs / f"{name}.part", 0.5)
        for file in ("result.json",) if name in ("log", "lock") else ():
            (path / file).unlink()
        (path / name).unlink(missing_ok=True)
        os.symlink(secret / name, path / name)
    os.symlink(secret, runs / "run")
    os.symlink(secret.parent, tmp_path / "results" / "folder")
    os.symlink(secret / "result.json", runs / "0.json")
    (runs / "0.pt").write_bytes(b"")
    root, out = tmp_path / "results", tmp_path / "out"
    assert collect(root, "--out", str(out)) == 0
    outcome = {path.rpartition("/")[2]: state for path, state in states(root).items()}
    lock.close()
    assert outcome.pop("log.part")[0] == outcome.pop("lock.part")[0] == "failed"
    assert {outcome.pop(name) for name in ("metrics.csv.part", "metrics.png.part", "last.pkl.part")} == {("finished", "")}
    assert outcome == {
        name.removesuffix(".json") if name == "0.json" else f"{name}.part": (
            "broken", f"{name} cannot be read: it is a link, and links are not followed"
        )
        for name in ("args.json", "result.json", "0.json")
    }  # fmt: skip
    assert "secret" not in (out / "index.html").read_text() and "0.123" not in (out / "index.html").read_text()
    files = {run["cells"]["run"]: run["files"] for run in page_data(out)["runs"]}
    assert "metrics.png" not in files["metrics.png"] and "metrics.png" in files["log"]


@pytest.mark.parametrize("link", ["tables", "index.html.new", "tables/amortised_clustering.md.new"])
def test_nothing_is_written_through_a_link(link: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "results"
    write_clustering(root / "amortised_clustering" / "1", 0.5)
    target = tmp_path / "target"
    target.mkdir() if link == "tables" else target.write_text("mine")
    (root / link).parent.mkdir(exist_ok=True)
    os.symlink(target, root / link)
    assert collect(root) == 2 and f"{link} is a link" in capsys.readouterr().err
    assert target.is_dir() and not list(target.iterdir()) if link == "tables" else target.read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "a\nb\x1b[31m", "z" * 5000])
def test_odd_names_on_the_command_line_are_one_short_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_clustering(tmp_path / "amortised_clustering" / "1", 0.5)
    for arguments in (
        [name],
        [name, "--out", str(tmp_path / "out")],
        [str(tmp_path), "--watch", name],
        [str(tmp_path), f"--{name}"],
    ):
        assert exit_status(script.main, arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 1000 and "\x1b" not in error
    if len(name) > 255:
        assert exit_status(script.main, [str(tmp_path), "--out", name]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "File name too long" in error and len(error) < 1000


def test_odd_names_are_printed_escaped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_clustering(tmp_path / "a\nb\x1b[31m" / "script\x1b[0m" / "1", 0.5)
    (tmp_path / "a\nb\x1b[31m" / "script\x1b[0m" / "1" / "result.json").write_text("{")
    assert collect(tmp_path / "a\nb\x1b[31m") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">/dev/full", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_output_that_goes_nowhere(streams: str, tmp_path: Path) -> None:
    write_clustering(tmp_path / "deepsets_exercise" / "1", 0.5)
    command = f"{sys.executable} collect_results.py {tmp_path} {streams}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(page_data(tmp_path)["runs"]) == 1
    assert done.stderr == ("cannot print: No space left on device\n" if streams == ">/dev/full" else "")
