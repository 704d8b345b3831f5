"""The use of trained models from the command line: what -apply, -draw and -complete share.

They train nothing, make no run's directory, and write two files: a result, and a picture next to it. Everything is checked
before anything is computed or written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from common import parallel, plotting, points, trained
from common.checkpoint import CheckpointError, atomic_write
from common.errors import InputError, one_line, warn
from common.precision import set_backend_flags
from common.run import options
from common.run.command import Command, echo

SCRIPTS = {  # that train what a constructor makes
    "make_set_model": "amortised_clustering.py", "MixtureNetwork": "amortised_mog.py", "zoo.make": "train_zoo.py",
    "ImageTransformer": "swarm_transformer.py", "CifarResNet": "train_ssl.py", "make_routed": "routing_networks.py",
}  # fmt: skip
POINTS_OPTIONS = ("apply", "output", "set", "columns", "raw")  # by their names in the parser
IMAGES_OPTIONS = ("draw", "complete", "classes", "output")
ANY_MODE = ("resume", "overwrite", "device", "no_cuda", "precision", "deterministic")  # others that are of use
MOST_LINES, MOST_PANELS, MOST_DOTS = 10, 6, 20_000  # printed and drawn: sets, sets, points of a set


def add_points_options(parser: argparse.ArgumentParser, result: str, contents: str) -> None:
    """The options of -apply; `result` ends the name of the file that is written, `contents` says what it holds."""
    group = parser.add_argument_group("options of a trained model's use, without training")
    add = group.add_argument
    add("-apply", metavar="POINTS", help="a CSV or a .npy of your points, for the model of -resume: best.pkl, or its directory")
    add("-o", dest="output", metavar="FILE", help=f"{contents}; a picture goes next to it [POINTS.{result}.csv]")
    add("-set", metavar="COLUMN", help="name, or number from 1, of the column that tells sets apart [set, if it is there]")
    add("-columns", metavar="X,Y", help="names, or numbers from 1, of the columns of coordinates [all but that of the sets]")
    add("-raw", action="store_true", help="points have the scale of training sets already [each set is brought to it]")


def add_images_options(parser: argparse.ArgumentParser) -> None:
    """The options of -draw and -complete."""
    group = parser.add_argument_group("options of a trained model's use, without training")
    add = group.add_argument
    add("-draw", type=options.at_least(1, 10**6), metavar="N", help="draw N images of -resume: best.pkl, or its directory")
    add("-complete", metavar="IMAGES", help="draw the lower halves of a .npy, a PNG, or the PNGs of a folder")
    add("-classes", metavar="A,B", help="names or numbers of the images' classes, in turn, of a model with -cond [all]")
    add("-o", dest="output", metavar="FILE", help="the images; a picture goes next to them [drawn.npy, IMAGES.completed.npy]")


def check_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    given: Iterable[str],
    modes: Sequence[str],
    belong: Container[str],
    useful: Container[str] = (),
) -> bool:
    """True if one of the modes is asked for, "apply" for example. Ends with the parser's error if options do not suit it.

    `given` are options as they are typed, without dash; `belong`, of the names of those of trained models, and `useful` of
    others that the modes take.
    """
    asked = [mode for mode in modes if getattr(args, mode) is not None]
    if len(asked) > 1:
        parser.error(f"-{asked[0]} or -{asked[1]}: choose one")
    for word in sorted(given):
        name = parser._option_string_actions[f"-{word}"].dest
        if not asked and name in belong:
            parser.error(f"-{word} is of use with -{' or -'.join(modes)} alone")
        if asked and name not in belong and name not in useful and name not in ANY_MODE:
            parser.error(f"-{asked[0]} trains nothing, and has no use for -{word}: leave it out")
    if asked and parallel.launched():
        parser.error(f"-{asked[0]} runs in one process, without torchrun")
    if asked and args.resume in (None, "auto"):
        parser.error(f"-{asked[0]} needs a trained model: -resume FILE, a best.pkl or a run's directory")
    if asked:
        options.check(parser, args, "trained")
        set_backend_flags(args.precision, deterministic=args.deterministic)
    return bool(asked)


def command(script: str) -> Command:
    """Turns errors into exit statuses. Nothing is saved on the way: a signal ends it at once."""
    made = Command(script, dash="-")
    made.signals = ()
    return made


def load_model(args: argparse.Namespace, constructor: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of -resume, in evaluation mode on the device of the options, and its description.

    Raises CheckpointError if it is damaged, or of another script than the one that `constructor` is of.
    """
    path = trained.file_of(Path(args.resume))
    weights, described, _ = trained.read(path)
    script = SCRIPTS.get(str(described.get("constructor")))
    if script is not None and script != SCRIPTS[constructor]:
        raise CheckpointError(f"{path} is a model of {script}, this is {SCRIPTS[constructor]}")
    return trained.build(described, weights, path).to(options.device_of(args)), described


@dataclass(frozen=True)
class Outputs:
    """Where a result and its picture go."""

    result: Path
    picture: Path

    def write(self, write: Callable[[IO[bytes]], object]) -> None:
        """Write the result, in one step."""
        atomic_write(self.result, write)

    def __str__(self) -> str:
        return f"{one_line(self.result, 4096)}\n{one_line(self.picture, 4096)}"


def next_to(source: Path, ending: str) -> Path:
    """Where a result goes without -o: next to its source. Raises InputError for a path without a name."""
    source = source if source.name else source.resolve()  # "."
    if not source.name:
        raise InputError(f"{source} has no name that the result's could be made of: -o FILE says it")
    return source.with_name(f"{source.stem}.{ending}")


def outputs_of(args: argparse.Namespace, source: Path | None, ending: str) -> Outputs:
    """The files to be written: -o, or SOURCE.ending, and a picture of that name. Without a source, the ending is the name.

    Raises InputError if they are there, without -overwrite, or cannot be written, or would replace what is read.
    """
    default = Path(ending) if source is None else next_to(source, ending)
    result = default if args.output is None else Path(args.output)
    inputs = [Path(args.resume), *([] if source is None else [source])]
    found = Outputs(result, result.with_suffix(".png") if result.name else result)
    if result.suffix != default.suffix:
        raise InputError(f"-o {result}: the result is a {default.suffix} file, give it that ending")
    folder = result.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {result}: {folder} is no directory that can be written to; -o FILE names another place")
    for path in (found.result, found.picture):
        if path.resolve() in [file.resolve() for file in inputs]:
            raise InputError(f"{path} would be replaced, and is read here: -o FILE names another place")
        if path.is_dir():
            raise InputError(f"cannot write {path}, it is a directory: -o FILE names another place")
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} is there: -overwrite replaces it, -o FILE names another place")
    return found


def read_points(args: argparse.Namespace, n_dim: int, n_training: tuple[int, int]) -> points.Points:
    """The points of -apply, for a model of `n_dim` dimensions. Raises InputError."""
    read = points.read(Path(args.apply), columns=args.columns, set_column=args.set, n_dim=n_dim)
    points.check_sizes(read, n_training)
    return read


def panels_of(read: points.Points, title: str) -> tuple[Figure, list[tuple[Axes, NDArray[np.int64]]]]:
    """A figure with panels for the first sets, and for each the points that are to be drawn in it, as indices."""
    shown = read.sets()[:MOST_PANELS]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(4.6 * columns, 6), 4.4 * rows + 0.4), layout="constrained")
    plotting.headline(figure, title)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name, members in zip(panels, read.set_names, shown, strict=False):
        panel.set(xlabel=plotting.plain(read.names[0]), ylabel=plotting.plain(read.names[1]) if len(read.names) > 1 else "")
        panel.set_title(plotting.plain(title_of(name, len(members))), fontsize=9)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    some = [members[:: -(-len(members) // MOST_DOTS)] for members in shown]
    return figure, list(zip(panels, some, strict=False))


def title_of(name: str, n: int) -> str:
    """A set of n points in words."""
    return (f"set {one_line(name, 60)}, " if name else "") + f"{n:,} point{'s' * (n != 1)}"


def conclude(
    read: points.Points, words: Sequence[str], strange: Sequence[Sequence[str]], deviation: float | None, outputs: Outputs
) -> None:
    """Print the words about each set, how it was scaled, and what was written.

    A line on stderr says which sets are strange, unlike anything that the model was trained on, in words of `points.oddities`.
    """
    if odd := [index for index, found in enumerate(strange) if found]:
        several = len(read.set_names) > 1
        examples = [(f"{one_line(read.set_names[i], 60)}: " if several else "") + ", ".join(strange[i]) for i in odd[:3]]
        which = f"{len(odd):,} of {len(strange):,} sets look" if several else "these points look"
        more = "; ..." if len(odd) > 3 else ""
        warn(f"note: {which} unlike anything that the model was trained on: {'; '.join(examples)}{more}")
    shown = list(zip(read.set_names, read.sets(), words, strict=True))[:MOST_LINES]
    lines = [f"{title_of(name, len(members))}: {about}" for name, members, about in shown]
    lines += [f"... and {len(words) - MOST_LINES:,} sets more"] if len(words) > MOST_LINES else []
    how = "points were taken as they are: of the scale of training sets"
    if deviation is not None:
        how = (
            f"each set was scaled to mean 0 and deviation {deviation:.2f} in each coordinate, as training sets have on average"
        )
    echo("\n".join([*lines, how, str(outputs)]))
