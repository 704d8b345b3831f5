"""All runs below a directory, collected: tables over seeds, the papers' figures, and a page to look through them.

    python collect_results.py                 # results/: finished, running, stopped, failed and broken runs
    python collect_results.py DIR --watch     # again every 30 seconds, until Ctrl-C

writes DIR/index.html, which a browser opens as it lies, and for each experiment DIR/tables/<script>.csv, .md and .png. Runs
that differ by their seed alone are one row: mean, standard deviation (n - 1) and n of each figure. README.md says more.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from common import paper_figures
from common.run.collected import MISSHAPEN, Run, find_runs, is_run
from common.run.command import Command, echo
from common.run.figures import Figure, value_at
from common.run.lock import release_lock, take_lock
from common.run.options import OneLineParser, at_least
from common.run.page import write_page
from common.run.records import RecordError, finite, write_table, write_text
from common.run.run import RunError
from common.symmetry import pictures
from common.symmetry.penalties import merge_chunks

# what tells the rows of an experiment apart in the first place, as its paper's figure does
MAIN = {
    "amortised_clustering": ("type",),
    "swarm_transformer": ("data",),
    "train_ssl": ("model", "tx", "equi_tx"),
    "train_zoo": ("arch", "dataset"),
    "cifar10_stitching": ("arch", "dataset", "kind"),
    "cifar10_alignment": ("arch", "dataset", "similarity"),
    "routing_networks": ("data", "model", "decision"),
}
N_CURVES, N_ROWS = 20, 40  # of a figure; the best ones
SAME_LEVEL = 0.2  # by how much a level, such as an oracle's loss, may differ from run to run


def get_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="collect_results.py", description=__doc__)
    parser.add_argument("place", nargs="?", default="results", metavar="DIR", help="where the runs are [%(default)s]")
    parser.add_argument("--out", metavar="DIR", help="where index.html and tables/ go [the same]")
    parser.add_argument(
        "--watch", nargs="?", type=at_least(1), const=30, metavar="SECONDS", help="again and again, until Ctrl-C [%(const)s]"
    )
    return parser


# ---- tables --------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs of an experiment that differ by their seed alone."""

    options: dict[str, Any]
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "finished"]

    def figure(self, name: str) -> Figure | None:
        """Mean, deviation and n over runs; of a single one, over what it repeats within itself."""
        found = [run.figures[name] for run in self.finished if name in run.figures]
        if len(found) < 2:
            return found[0] if found else None
        means = [figure.mean for figure in found]
        return Figure(statistics.fmean(means), statistics.stdev(means), len(means))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. What a finished run alone knows of its options (kind) does not divide them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = repr(sorted((name, repr(value)) for name, value in run.options.items() if name != "kind"))
        groups.setdefault(key, []).append(run)
    return [Group(max(of, key=lambda run: len(run.options)).options, of) for of in groups.values()]


def varying(runs: Sequence[Run]) -> list[str]:
    """Options that are not the same in all runs, in the order of the command line's help."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    return [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]


def figure_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.figures))


def table_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each group: options that vary, figures as (mean, deviation, n), parameters, training time, device, runs."""
    names, rows = varying(runs), []
    for group in group_runs(runs):
        minutes = [run.minutes for run in group.finished if run.minutes is not None]
        row: dict[str, Any] = {name: group.options.get(name) for name in names}
        row |= {"runs": len(group.finished), "not finished": len(group.runs) - len(group.finished)}
        row |= {name: group.figure(name) for name in figure_names(runs)}
        row["parameters"] = next((run.parameters for run in group.finished if run.parameters), None)
        row["minutes"] = statistics.fmean(minutes) if minutes else None
        row["device"] = ", ".join(sorted({run.device for run in group.runs if run.device}))
        rows.append(row)
    return rows


def for_csv(row: dict[str, Any]) -> dict[str, Any]:
    """A figure becomes three columns."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Figure):
            flat |= {name: value.mean, f"{name}, deviation": value.deviation, f"{name}, n": value.n}
        else:
            flat[name] = value
    return flat


def as_text(value: Any) -> str:
    """A cell for people."""
    match value:
        case None:
            return ""
        case Figure(mean, deviation):
            return f"{mean:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table whose cells show what they hold, whatever that is."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|<>&~*`\[\]])", r"\\\1", " ".join(cell.split())) for cell in cells) + " |"

    head = list(rows[0])
    return "\n".join(
        [line(head), "| --- " * len(head) + "|", *(line([as_text(value) for value in row.values()]) for row in rows)]
    )


# ---- the papers' figures -------------------------------------------------------------------------------------------------


def draw(script: str, groups: Sequence[Group], folder: Path) -> list[Path]:
    """What the experiment's paper shows, from finished runs: the files. Raises RecordError, and MISSHAPEN for such results."""
    path = folder / f"{script}.png"
    results = [run.result for group in groups for run in group.finished]
    # where all jobs failed there is nothing to draw
    results = [result for result in results if all(result.get(name, True) for name in ("layers", "penalties", "published"))]
    if not results:
        return []
    match script:
        case "amortised_clustering":
            levels = {name: level(results, f"{name}.cross_entropy") for name in ("chance", "oracle")}
            draw_over_time(path, "clustering: validation loss over training time", "cross entropy", "val_loss", groups, levels)
        case "swarm_transformer":
            levels = {
                name: level(results, f"validation.levels.{name}", scale=1 / np.log(2)) for name in ("chance", "by position")
            }
            draw_over_time(path, "images: bits per dimension over training time", "validation bits", "val_bits", groups, levels)
        case "train_ssl":
            draw_points(path, "linear probe by transformation", "linear probe %", "chance_top_1", groups)
        case "train_zoo" | "routing_networks":
            draw_points(path, f"{script}: test accuracy", "test accuracy", "chance_accuracy", groups, scale=100)
        case "cifar10_stitching":
            return draw_penalties_of_joints(results, folder)
        case "cifar10_alignment":
            return draw_similarities(results, folder)
        case "cifar10_projections":
            for i, result in enumerate(results):
                bars = [
                    row | {"kind": f"{row['activation']}, {row['group']}", "inside_block": False} for row in result["penalties"]
                ]
                pictures.plot_penalties(folder / f"{script}-{i}.png", f"rotation test on {result['dataset']}", bars)
            return [folder / f"{script}-{i}.png" for i in range(len(results))]
        case _:
            return []
    return [path]


def labels(groups: Sequence[Group], script: str) -> list[str]:
    """Names for the groups: values of the main options, and others only where these do not tell them apart. No mathematics."""
    main = MAIN[script]
    short = [", ".join(str(group.options.get(name)) for name in main) for group in groups]
    full = []
    for label, group in zip(short, groups, strict=True):
        alike = [run for name, other in zip(short, groups, strict=True) if name == label for run in other.runs]
        full.append(", ".join([label, *(f"{name} {as_text(group.options.get(name))}" for name in varying(alike))]))
    return [label.replace("$", r"\$") for label in full]


def level(results: Sequence[dict[str, Any]], place: str, scale: float = 1.0) -> float | None:
    """A level to judge by that each run has measured for its own data; None where these have none in common."""
    found = [value for result in results if (value := value_at(result, place)) is not None]
    if not found or max(found) - min(found) > SAME_LEVEL * abs(max(found)):
        return None
    return scale * statistics.fmean(found)


def draw_over_time(
    path: Path, title: str, measure: str, column: str, groups: Sequence[Group], levels: dict[str, float | None]
) -> None:
    """A measure of metrics.csv, less of which is better, over minutes, a colour a group."""
    curves: dict[str, list[tuple[list[float], list[float]]]] = {}
    for label, group in zip(labels(groups, path.stem), groups, strict=True):
        for run in group.finished:
            both = zip(run.metrics.get("seconds", []), run.metrics.get(column, []), strict=False)
            points = [(s / 60, value) for s, value in both if s is not None and value is not None]
            if points:
                curves.setdefault(label, []).append(([x for x, _ in points], [y for _, y in points]))
    if not curves:
        raise RecordError(f"none of the runs has {column} in its metrics.csv")
    best = sorted(curves, key=lambda label: statistics.fmean(values[-1] for _, values in curves[label]))[:N_CURVES]
    shown = [(label, *curve) for label in best for curve in curves[label]]
    known = {name: level for name, level in levels.items() if level is not None}
    paper_figures.plot_over_time(path, title + best_of(len(best), len(curves)), measure, shown, known)


def draw_points(path: Path, title: str, figure: str, chance: str, groups: Sequence[Group], scale: float = 1.0) -> None:
    """A figure's mean and deviation, in per cent, a row a group, the best first."""
    rows: list[dict[str, Any]] = []
    for label, group in zip(labels(groups, path.stem), groups, strict=True):
        found = group.figure(figure)
        if found is not None:
            half = None if found.deviation is None else scale * found.deviation
            by_chance = level([run.result for run in group.finished], chance, scale)
            rows.append({"label": label, "accuracy": scale * found.mean, "half": half, "n": found.n, "chance": by_chance})
    if not rows:
        raise RecordError(f"none of the runs has measured {figure}")
    rows.sort(key=lambda row: -row["accuracy"])
    shown = rows[:N_ROWS]
    paper_figures.plot_intervals(path, f"{title}, mean and standard deviation{best_of(len(shown), len(rows))}", shown)


def best_of(shown: int, all_of_them: int) -> str:
    return f" (the {shown} best of {all_of_them})" if shown < all_of_them else ""


def draw_penalties_of_joints(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Penalties by layer, a figure for each kind of networks."""
    files: list[Path] = []
    for kind in sorted({(of["arch"], of["dataset"], of["zoo"]) for of in results}):
        own = merge_chunks([of for of in results if (of["arch"], of["dataset"], of["zoo"]) == kind])
        rows = [{"kind": of["kind"], **layer} for of in own for layer in of["layers"]]
        files.append(new_file(folder, "cifar10_stitching", *kind[:2], taken=files))
        pictures.plot_penalties(files[-1], f"{kind[0]} on {kind[1]}: stitching penalty, mean and deviation over pairs", rows)
    return files


def draw_similarities(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Heat maps beside each other, a figure for each kind of networks."""
    files: list[Path] = []
    for kind in sorted({(of["arch"], of["dataset"], tuple(pictures.layer_labels(of["layers"]))) for of in results}):
        maps: dict[str, Any] = {}
        for of in results:
            if (of["arch"], of["dataset"], tuple(pictures.layer_labels(of["layers"]))) == kind:
                again = f", seed {of['seed']}" if of["similarity"] in maps else ""
                maps[of["similarity"] + again] = np.array(of["published"], float)
        files.append(new_file(folder, "cifar10_alignment", *kind[:2], taken=files))
        pictures.plot_heat_maps(files[-1], f"{kind[0]} on {kind[1]}: similarity, means of pairs", list(kind[2]), maps)
    return files


def new_file(folder: Path, script: str, *of: str, taken: Sequence[Path]) -> Path:
    """A picture's place, none of those that are taken; what comes from a run is no path."""
    stem = "-".join([script, *(file_stem(part) for part in of)])
    numbered = [folder / f"{stem}.png", *(folder / f"{stem}-{i}.png" for i in range(2, len(taken) + 2))]
    return next(path for path in numbered if path not in taken)


def file_stem(text: str) -> str:
    """A text as part of a file's name; what had to be changed for that gets a number of its own."""
    if re.fullmatch(r"\w{1,80}", text, re.ASCII):
        return text
    return f"{re.sub(r'[^a-zA-Z0-9]+', '_', text)[:60]}-{zlib.crc32(text.encode(errors='replace')):08x}"


def printable(text: str) -> str:
    """A text on one line that every terminal can show."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


# ---- everything together -------------------------------------------------------------------------------------------------


class Collection:
    """What is below a directory, written out: tables, figures, page."""

    def __init__(self, place: Path, out: Path):
        self.place, self.out, self.tables = place, out, out / "tables"
        self.pictures: dict[str, list[Path]] = {}  # of each experiment
        self.drawn: dict[str, list[tuple[str, float]]] = {}  # finished runs that they show

    def write(self, watch: int | None) -> list[Run]:
        """Read all runs and write what they come to. Raises OSError if there is no place for it, RunError if it is taken."""
        runs = list(find_runs(self.place))
        self.tables.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.tables / "lock")
        if lock is None:
            raise RunError(f"{self.tables} is being written by another process: try again")
        try:
            self.write_all(runs, watch)
        finally:
            release_lock(lock, self.tables / "lock")
        return runs

    def write_all(self, runs: list[Run], watch: int | None) -> None:
        experiments = [
            self.write_experiment(script, [run for run in runs if run.script == script]) for script in scripts_of(runs)
        ]
        data = {
            "place": str(self.place),
            "collected": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "watch": watch,
            "experiments": experiments,
            "runs": self.for_page(runs),
        }
        write_page(self.out / "index.html", finite(data))

    def write_experiment(self, script: str, runs: list[Run]) -> dict[str, Any]:
        """The tables and figures of one; what the page needs of them."""
        rows, name = table_of(runs), file_stem(script)
        write_table(self.tables / f"{name}.csv", [for_csv(row) for row in rows])
        write_text(self.tables / f"{name}.md", markdown(rows) + "\n")
        finished = [(run.path, run.modified) for run in runs if run.state == "finished"]
        if self.drawn.get(script) != finished:
            self.pictures[script] = []
            try:
                self.pictures[script] = draw(script, [group for group in group_runs(runs) if group.finished], self.tables)
            except (RecordError, *MISSHAPEN) as error:
                echo(f"{printable(script)}: no figure: {printable(str(error))}")
            self.drawn[script] = finished
        pictures = [{"name": path.name, "source": self.address(path)} for path in self.pictures.get(script, [])]
        groups = [list(rows[0]), *([as_text(value) for value in row.values()] for row in rows)]
        return {
            "script": script, "varying": varying(runs), "figures": figure_names(runs), "pictures": pictures, "groups": groups
        }  # fmt: skip

    def for_page(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """What the page shows of runs. They keep their key when they finish: it is the path that they have then."""
        paths = {run.path for run in runs}
        shown = [self.one_for_page(run) for run in runs]
        for run in shown:
            final = run["path"].removesuffix(".part")
            run["key"] = run["path"] if final in paths else final
        return shown

    def one_for_page(self, run: Run) -> dict[str, Any]:
        files = [{"name": name, "source": self.address(self.place / run.folder / name)} for name in run.files]
        shown = asdict(run) | {"name": run.name, "written": run.written, "files": files}
        shown["pictures"] = [file for file in files if file["name"].endswith(".png")]
        shown["metrics"] = {
            name: [None if value is None else float(f"{value:.5g}") for value in values] for name, values in run.metrics.items()
        }
        del shown["result"], shown["folder"]
        return shown

    def address(self, path: Path) -> str:
        """Where the page finds a file."""
        return quote(os.fsencode(os.path.relpath(path, self.out)))


def scripts_of(runs: Sequence[Run]) -> list[str]:
    return sorted({run.script for run in runs})


def summary(runs: Sequence[Run]) -> str:
    """A line an experiment."""
    lines = []
    for script in scripts_of(runs):
        states = [run.state for run in runs if run.script == script]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        lines.append(f"{printable(script):>22}: {counts}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    if "" in (args.place, args.out):
        parser.error("an empty name is no directory")
    place, out = Path(args.place), Path(args.out or args.place)
    if not place.is_dir():
        parser.error(f"{place} is no directory: name the one that runs are in, as --results-dir did")
    collection = Collection(place, out)
    command = Command("collect_results")
    if args.watch is None:
        command.signals = ()  # they end it as they end any program
    with command:
        if is_run(place, os.listdir(place)):
            parser.error(f"{place} is a run itself: name the directory above it")
        if args.watch is None:
            if next(find_runs(place), None) is None:
                parser.error(f"there is no run below {place}")
            echo(summary(collection.write(None)))
        else:
            watch(collection, args.watch, command)
    echo(f"{out / 'index.html'}, {out / 'tables'}/")
    return 0


def watch(collection: Collection, seconds: int, command: Command) -> None:
    """Collect again and again, until a signal comes; the page that is left then does not reload itself any more."""
    echo(f"{collection.out / 'index.html'} is written every {seconds} seconds, until Ctrl-C")
    while command.signal is None:
        try:
            states = [run.state for run in collection.write(seconds)]
            echo(f"{datetime.now():%H:%M:%S}  {len(states)} runs, {states.count('running')} at work")
        except (OSError, RunError) as error:  # which may pass
            echo(f"{datetime.now():%H:%M:%S}  not written: {error}")
        until = time.monotonic() + seconds
        while command.signal is None and time.monotonic() < until:
            time.sleep(0.1)
    collection.write(None)


if __name__ == "__main__":
    sys.exit(main())
