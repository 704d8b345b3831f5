"""Tables and a page of all runs below a directory.

    python collect_results.py                 # results/: finished, running, stopped, failed and broken runs
    python collect_results.py DIR --watch     # again every 30 seconds, until Ctrl-C

writes DIR/index.html, which a browser opens as it is, and for each experiment DIR/tables/<script>.csv, .md and .png. Runs
that differ by their seed alone are one row: mean, standard deviation (n - 1) and n of each key metric.

    python collect_results.py --published     # results/README.md: the figures that results/published.toml names
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import one_line
from common.gallery.page import address, entry, write_page
from common.gallery.pictures import draw
from common.gallery.published import SPEC, published_page
from common.gallery.runs import Run, find_runs, is_run
from common.gallery.tables import file_stem, metric_names, rows_over_seeds, varying_options, write_tables
from common.run.command import Command, echo
from common.run.lock import release_lock, take_lock
from common.run.options import OneLineParser, at_least
from common.run.records import write_text
from common.run.run import RunError

# of the page's table of runs
LAST_COLUMNS = ["parameters", "minutes", "device", "written"]
ALL_COLUMNS = ["experiment", "run", "state", "seed", "metric", "value", *LAST_COLUMNS]
ALL = {"script": "", "columns": ALL_COLUMNS, "rows": [], "pictures": []}


def get_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="collect_results.py", description=__doc__)
    parser.add_argument("place", nargs="?", default="results", metavar="DIR", help="where the runs are [%(default)s]")
    parser.add_argument("--out", metavar="DIR", help="where index.html and tables/ go [the same]")
    parser.add_argument(
        "--watch", nargs="?", type=at_least(1), const=30, metavar="SECONDS", help="again and again, until Ctrl-C [%(const)s]"
    )
    text = f"instead, write the tables that DIR/{SPEC} describes, into DIR/README.md"
    parser.add_argument("--published", action="store_true", help=text)
    return parser


class Collection:
    """Tables, pictures and page of all runs below a directory. Pictures are drawn again only when a run has finished."""

    def __init__(self, root: Path, out: Path):
        self.root, self.out, self.tables = root, out, out / "tables"
        self.pictures: dict[str, tuple[list[Any], list[Path]]] = {}  # by experiment: finished runs, files

    def write(self, watch: int | None) -> list[Run]:
        """Read all runs and write everything. Raises OSError, and RunError if another process is writing there."""
        runs = list(find_runs(self.root))
        for path in (self.tables, *self.out.glob("index.html*"), *self.tables.glob("*")):
            if path.is_symlink():
                raise RunError(f"{path} is a link, and may lead to a file that is not to be overwritten: remove it")
        self.tables.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.tables / "lock")
        if lock is None:
            raise RunError(f"{self.tables} is being written by another process: try again")
        try:
            paths = {run.path for run in runs}
            data = {
                "place": str(self.root),
                "collected": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                "watch": watch,
                "experiments": [ALL, *(self.write_experiment(script, own) for script, own in by_script(runs).items())],
                "runs": [entry(run, paths, self.out) for run in runs],
            }
            write_page(self.out / "index.html", data)
        finally:
            release_lock(lock, self.tables / "lock")
        return runs

    def write_experiment(self, script: str, runs: list[Run]) -> dict[str, Any]:
        """Write the tables and pictures of an experiment. Returns the page's data of them."""
        finished = [(run.path, run.key_metrics) for run in runs if run.state == "finished"]
        known, files = self.pictures.get(script, ([], []))
        if finished != known:
            try:
                files = draw(script, runs, self.tables)
            except Exception as error:  # tables and page are written all the same
                files = []
                echo(one_line(f"{script}: no picture: {error}"))
            self.pictures[script] = finished, files
        columns = ["run", "state", *varying_options(runs), "seed", *metric_names(runs), *LAST_COLUMNS]
        rows = write_tables(self.tables / file_stem(script), rows_over_seeds(runs))
        pictures = [[path.name, address(path, self.out)] for path in files]
        return {"script": script, "columns": columns, "rows": rows, "pictures": pictures}


def by_script(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {script: [run for run in runs if run.script == script] for script in sorted({run.script for run in runs})}


def summary(runs: Sequence[Run]) -> str:
    """A line for each experiment."""
    lines = []
    for script, own in by_script(runs).items():
        states = [run.state for run in own]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines.append(f"{one_line(script, 60):>22}: {counts}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    if "" in (args.place, args.out):
        parser.error("an empty name is no directory")
    root, out = Path(args.place), Path(args.out or args.place)
    if not os.path.isdir(root):
        parser.error(f"{root} is no directory: name the one that runs are in, as --results-dir did")
    if args.published and (args.out or args.watch):
        parser.error("--published writes DIR/README.md, once: leave --out and --watch out")
    collection = Collection(root, out)
    command = Command("collect_results")
    if args.watch is None:
        command.signals = ()  # they end it as they end any program
    with command:
        if args.published:
            write_text(root / "README.md", published_page(root))
            echo(one_line(root / "README.md"))
            return 0
        if is_run(root, os.listdir(root)):
            parser.error(f"{root} is a run itself: name the directory above it")
        if args.watch is None:
            if next(find_runs(root), None) is None:
                parser.error(f"there is no run below {root}")
            echo(summary(collection.write(None)))
        else:
            watch(collection, args.watch, command)
    echo(one_line(f"{out / 'index.html'}, {out / 'tables'}/"))
    return 0


def watch(collection: Collection, seconds: int, command: Command) -> None:
    """Collect again and again until a signal comes. The page that is left then does not reload itself any more."""
    echo(one_line(f"{collection.out / 'index.html'} is written every {seconds} seconds, until Ctrl-C"))
    while command.signal is None:
        try:
            states = [run.state for run in collection.write(seconds)]
            echo(f"{datetime.now():%H:%M:%S}  {len(states)} runs, {states.count('running')} running")
        except (OSError, RunError) as error:  # which may pass
            echo(one_line(f"{datetime.now():%H:%M:%S}  not written: {error}"))
        until = time.monotonic() + seconds
        while command.signal is None and time.monotonic() < until:
            time.sleep(0.1)
    collection.write(None)


if __name__ == "__main__":
    sys.exit(main())
