"""Points of a user: read from a CSV or a .npy, in sets, checked, and brought to the scale of a model's training sets.

A CSV has a point a line, in columns separated by commas, semicolons, tabs or blanks. The first line is a header if none of its
fields is a number. A .npy has an array (E, D), one set, or (N, E, D), N sets of the same size.

Nothing here depends on the order of the points: sets are sorted before anything is summed up.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError, one_line

MAX_POINTS = 100_000  # of a set: a model of 128 hidden units takes 0.6 GB for them
MAX_LINE = 1_000_000  # characters of a first line
NPY = b"\x93NUMPY"  # how every .npy begins


@dataclass(frozen=True)
class Layout:
    """How a CSV is written: the separator (None: blanks), the header without its line's end, and the number of columns."""

    separator: str | None
    header: str | None
    n_columns: int

    def fields(self, line: str) -> list[str]:
        if self.separator is None:
            return line.split()
        return next(csv.reader([line], delimiter=self.separator, skipinitialspace=True), [])

    def count(self, line: str) -> int:
        """The number of fields."""
        return len(self.fields(line)) if self.separator is None or '"' in line else line.count(self.separator) + 1


@dataclass(frozen=True)
class Points:
    """P points in D dimensions, in sets, in the order of their file."""

    path: Path
    coordinates: NDArray[np.float64]  # (P, D), finite
    names: tuple[str, ...]  # of the coordinates
    set_of: NDArray[np.int64]  # (P), indices into set_names
    set_names: tuple[str, ...]  # one, which is empty, where the file does not tell sets apart
    layout: Layout | None  # of a CSV

    def __len__(self) -> int:
        return len(self.coordinates)

    def sets(self) -> list[NDArray[np.int64]]:
        """The points of each set, as indices in increasing order."""
        order = self.set_of.argsort(kind="stable")
        return np.split(order, np.bincount(self.set_of, minlength=len(self.set_names)).cumsum()[:-1])


# ---- reading -------------------------------------------------------------------------------------------------------------


def read(path: Path, *, columns: str | None = None, set_column: str | None = None, n_dim: int | None = None) -> Points:
    """Read points from a CSV or a .npy, without running code in it.

    `columns` are those of the coordinates, "x,y" or "1,2" (from 1), all but that of the sets if None. `set_column` has the ids
    of sets; a CSV whose header has a column `set` needs none. Raises InputError for what is missing, damaged, empty, no number
    or not finite, and for other than `n_dim` coordinates.
    """
    if not path.is_file():
        raise InputError(f"{path} is a directory, no file of points" if path.is_dir() else f"there is no file {path}")
    with open(path, "rb") as file:
        start = file.read(len(NPY))
    if not start:
        raise InputError(f"{path} is empty")
    if start == NPY:
        points = _read_npy(path, columns, set_column)
    elif path.suffix in (".npy", ".npz") or start[:4] == b"PK\x03\x04":
        raise InputError(f"{path} is no .npy file of one array, as numpy.save writes it")
    else:
        points = _read_csv(path, columns, set_column)
    D = points.coordinates.shape[1]
    if n_dim not in (None, D):
        names = one_line(", ".join(points.names), 100)
        hint = "-columns chooses others" if columns is not None or len(points.names) > 1 else "how are its columns separated?"
        raise InputError(f"{path} has {D} column{'s' * (D > 1)} of coordinates ({names}), the model takes {n_dim}: {hint}")
    if not len(points):
        raise InputError(f"{path} holds no points")
    return points


def _read_npy(path: Path, columns: str | None, set_column: str | None) -> Points:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # damaged and foreign bytes fail in many ways
        reason = "it holds Python objects" if "Object arrays" in str(error) else "it is damaged"
        raise InputError(f"{path} cannot be read: {reason}; an array of numbers is needed, written by numpy.save") from None
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3) or array.shape[-1] == 0:
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}: real numbers (points, dimensions) or (sets, points, dimensions)"
        )
    flat = array.reshape(-1, array.shape[-1]).astype(np.float64)
    if array.ndim == 3:
        if set_column is not None:
            raise InputError(f"{path} has a set in each of its {len(array)} parts: leave -set out")
        set_of, set_names = np.repeat(np.arange(len(array)), array.shape[1]), tuple(map(str, range(len(array))))
    used, ids = _choose_columns(path, [], flat.shape[1], columns, set_column)
    if ids is not None:
        values, set_of = np.unique(flat[:, ids], return_inverse=True)
        set_names = tuple(f"{value:.17g}" for value in values)
    elif array.ndim == 2:
        set_of, set_names = np.zeros(len(flat), np.int64), ("",)
    coordinates = flat[:, used]
    finite = np.isfinite(flat[:, used if ids is None else [*used, ids]]).all(1)
    if not finite.all():
        row, n = int(finite.argmin()), int((~finite).sum())
        raise InputError(f"{path}: row {row} of {len(flat)} (from 0) is not finite{_and_others(n)}: leave such rows out")
    return Points(path, coordinates, tuple(f"x{i + 1}" for i in used), set_of, set_names, None)


def _read_csv(path: Path, columns: str | None, set_column: str | None) -> Points:
    try:
        layout = _layout(path)
        header = layout.fields(layout.header) if layout.header is not None else []
        used, ids = _choose_columns(path, header, layout.n_columns, columns, set_column)
        set_ids: dict[str, int] = {}
        table = _read_table(path, layout, used, ids, set_ids)
    except UnicodeDecodeError:
        raise InputError(f"{path} is neither a .npy nor a text in UTF-8") from None
    names = tuple(header[i].strip() if header else f"x{i + 1}" for i in used)
    if ids is None:
        return Points(path, table, names, np.zeros(len(table), np.int64), ("",), layout)
    return Points(path, table[:, :-1], names, table[:, -1].astype(np.int64), tuple(set_ids), layout)


def _read_table(path: Path, layout: Layout, used: list[int], ids: int | None, set_ids: dict[str, int]) -> NDArray[np.float64]:
    """The columns `used`, and last, of the column `ids`, the number of each id, which are collected in `set_ids`."""
    n_lines = 0

    def counted() -> Iterator[str]:
        nonlocal n_lines
        for n_lines, (number, line) in enumerate(_lines(path, layout), 1):  # noqa: B007
            if layout.count(line) != layout.n_columns:
                raise InputError(f"{path}: line {number} has {layout.count(line)} columns, the first has {layout.n_columns}")
            yield line

    number_of_id: dict[int | str, Callable[[str], int]] = {}
    if ids is not None:
        number_of_id[ids] = lambda text: set_ids.setdefault(text.strip(), len(set_ids))
    lines = counted()
    first = next(lines, None)
    if first is None:
        return np.empty((0, len(used) + (ids is not None)))
    try:
        table = np.loadtxt(
            itertools.chain([first], lines),
            delimiter=layout.separator,
            comments=None,
            quotechar='"',
            converters=number_of_id or None,
            usecols=used if ids is None else [*used, ids],
            ndmin=2,
            encoding="utf-8",
        )
    except InputError:
        raise
    except ValueError as error:  # of a UnicodeDecodeError, too, which is found again
        raise InputError(_complaint(path, layout, used) or f"{path} cannot be read: {one_line(error)}") from None
    if not np.isfinite(table).all():
        n = int((~np.isfinite(table).all(1)).sum())
        raise InputError(f"{_complaint(path, layout, used)}{_and_others(n)}: leave such points out")
    if "" in set_ids:
        raise InputError(f"{path} has points without a set (column {1 + (ids or 0)} is empty): leave them out")
    if len(table) != n_lines:
        raise InputError(f"{path} cannot be read: a quotation mark is not closed on its line")
    return table


def _lines(path: Path, layout: Layout) -> Iterator[tuple[int, str]]:
    """The lines of a CSV that have a point, and their numbers from 1."""
    with open(path, encoding="utf-8-sig", newline=None) as file:
        header_is_due = layout.header is not None
        for number, line in enumerate(file, 1):
            if not line.isspace():
                if not header_is_due:
                    yield number, line
                header_is_due = False


def _layout(path: Path) -> Layout:
    """Look at the first line that is not blank."""
    with open(path, encoding="utf-8-sig") as file:
        line = "\n"
        while line and line.isspace():
            line = file.readline(MAX_LINE)
    if len(line) == MAX_LINE or "\0" in line:
        raise InputError(f"{path} is neither a .npy nor a table of points in text")
    if not line:
        raise InputError(f"{path} is empty")
    text = line.rstrip("\r\n").lstrip("# ")
    separator = next((mark for mark in "\t;," if mark in text), None)
    fields = Layout(separator, None, 0).fields(text)
    is_header = line.startswith("#") or not any(_is_number(field.replace(",", ".")) for field in fields)
    return Layout(separator, text if is_header else None, len(fields))


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return "_" not in text  # 1_000 is one in Python alone
    return False


def _choose_columns(
    path: Path, header: Sequence[str], n_columns: int, columns: str | None, set_column: str | None
) -> tuple[list[int], int | None]:
    """Indices of the columns of coordinates, and of that of the sets, or None."""
    names = [name.strip() for name in header]

    def index_of(word: str) -> int:
        if names.count(word) == 1:
            return names.index(word)
        if word in names:
            raise InputError(f"{path} has {names.count(word)} columns {word!r}: name it by its number, from 1")
        if word.isdecimal() and 1 <= int(word) <= n_columns:
            return int(word) - 1
        there = f"{one_line(', '.join(names), 200)}; or 1 to {n_columns}" if names else f"1 to {n_columns}"
        raise InputError(f"{path} has no column {one_line(word, 100)!r}: choose from {there}")

    if set_column is None and names.count("set") == 1:
        set_column = "set"
    ids = None if set_column is None else index_of(set_column)
    used = (
        [i for i in range(n_columns) if i != ids]
        if columns is None
        else [index_of(word.strip()) for word in columns.split(",")]
    )
    if len(set(used)) < len(used) or ids in used:
        raise InputError(f"-columns {columns} names a column twice" + (", one of them for the sets" if ids in used else ""))
    return used, ids


def _complaint(path: Path, layout: Layout, used: Sequence[int]) -> str | None:
    """The first field that is no finite number, or None: slow, for when something is wrong."""
    header = layout.fields(layout.header) if layout.header is not None else []
    for number, line in _lines(path, layout):
        fields = layout.fields(line.rstrip("\r\n"))
        if len(fields) != layout.n_columns:
            return f"{path}: line {number} has {len(fields)} columns, the first has {layout.n_columns}"
        for i in used:
            text = fields[i].strip()
            where = f"{path}: line {number}, column {i + 1}" + (f" ({one_line(header[i].strip(), 60)})" if header else "")
            if not text:
                return f"{where} is empty"
            if _is_number(text.replace(",", ".")) and "," in text:
                return f"{where} is {one_line(text, 60)}: decimal points are needed"
            if not _is_number(text):
                return f"{where} is no number, but {one_line(text, 60)!r}: -columns chooses others"
            if not np.isfinite(float(text)):
                return f"{where} is {one_line(text, 60)}"
    return None


def _and_others(n: int) -> str:
    return "" if n == 1 else f" ({n:,} such points in all)"


# ---- writing -------------------------------------------------------------------------------------------------------------


def write_with_columns(file: IO[bytes], points: Points, columns: Mapping[str, Iterable[str]]) -> None:
    """Write the points' CSV again, each line as it is, with further columns; a .npy as x1, x2, ..., after its sets."""
    if points.layout is None:
        separator, lines = ",", _lines_of(points)
        header: str | None = ",".join([*(["set"] if len(points.set_names) > 1 else []), *points.names])
    else:
        separator = points.layout.separator or " "
        header, lines = points.layout.header, (line for _, line in _lines(points.path, points.layout))
    if header is not None:
        taken, names = [name.strip() for name in header.replace('"', "").split(separator)], list(columns)
        while not set(names).isdisjoint(taken):
            names = [f"predicted_{name}" if name in taken else name for name in names]
        file.write((separator.join([header, *names]) + "\n").encode())
    try:
        for line, *values in zip(lines, *columns.values(), strict=True):
            file.write((separator.join([line.rstrip("\r\n"), *values]) + "\n").encode())
    except ValueError:
        raise InputError(f"{points.path} has changed in the meantime") from None


def _lines_of(points: Points) -> Iterator[str]:
    several = len(points.set_names) > 1
    for row, index in zip(points.coordinates.tolist(), points.set_of.tolist(), strict=True):
        yield ",".join([*([points.set_names[index]] if several else []), *map(repr, row)])


# ---- what models need ----------------------------------------------------------------------------------------------------


def check_sizes(points: Points, n_training: tuple[int, int]) -> None:
    """Raises InputError for a set with more than MAX_POINTS."""
    sizes = np.bincount(points.set_of, minlength=len(points.set_names))
    largest = int(sizes.argmax())
    if sizes[largest] > MAX_POINTS:
        name = (
            f"set {one_line(points.set_names[largest], 60)} of {points.path}" if points.set_names[largest] else str(points.path)
        )
        raise InputError(
            f"{name} has {sizes[largest]:,} points, at most {MAX_POINTS:,} fit in one forward pass, and training sets have "
            f"{n_training[0]:,} to {n_training[1]:,}: take a random part of them, or put them into sets"
        )


def canonical_order(points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An order (E) that sorts points (E, D), and for each place in it the place of the first point that is equal.

    What is computed in this order, of the first of equal points, does not depend on the order that they came in.
    """
    order = np.lexsort(points.T[::-1])
    ordered = points[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(1)])
    return order, np.flatnonzero(starts)[starts.cumsum() - 1]


@dataclass(frozen=True)
class Scaling:
    """(points - shift) / scale, coordinate by coordinate: each (D)."""

    shift: NDArray[np.float64]
    scale: NDArray[np.float64]

    def __call__(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return (points - self.shift) / self.scale


def scaling_to(points: NDArray[np.float64], deviation: float | None) -> Scaling:
    """Brings each coordinate of points (E, D) to mean 0 and this deviation; None: to what they are.

    A coordinate without spread is only shifted. Raises InputError if the numbers are too large for a deviation.
    """
    D = points.shape[1]
    if deviation is None:
        return Scaling(np.zeros(D), np.ones(D))
    with np.errstate(over="ignore", invalid="ignore"):
        shift, spread = points.mean(0), points.std(0)
    if not np.isfinite([shift, spread]).all():
        raise InputError(f"coordinates up to {np.abs(points).max():.3g} are too large to be scaled")
    spread = np.where(np.ptp(points, axis=0) == 0, 0, spread)  # a mean of equal numbers may be another one
    return Scaling(shift, np.where(spread > 0, spread / deviation, 1))


# ---- how they compare with training sets ---------------------------------------------------------------------------------


def features(points: NDArray[np.float64]) -> dict[str, float]:
    """Summary statistics of a scaled set (E, D), by which `oddities` compares it with training sets."""
    centred, spread = points - points.mean(0), points.std(0)
    whitened = centred / np.where(spread > 0, spread, 1)
    correlations = np.linalg.eigvalsh(whitened.T @ whitened / len(points))
    return {
        "mean of a coordinate": float(np.abs(points.mean(0)).max()),
        "smallest deviation of a coordinate": float(spread.min()),
        "largest deviation of a coordinate": float(spread.max()),
        "farthest coordinate, in deviations": float(np.abs(whitened).max()),
        "smallest eigenvalue of the correlations": float(correlations[0]),
    }


def feature_ranges(sets: Iterable[NDArray[np.float64]], deviation: float | None) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each feature over training sets, scaled as a user's are."""
    measured = [features(scaling_to(points, deviation)(points)) for points in sets]
    return {name: (min(of[name] for of in measured), max(of[name] for of in measured)) for name in measured[0]}


def oddities(points: NDArray[np.float64], n_training: tuple[int, int], ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """How a scaled set (E, D) differs from all training sets, in words."""
    fewest, most = n_training
    found = []
    if not fewest <= len(points) <= most:
        found.append(f"{len(points):,} point{'s' * (len(points) != 1)} (training sets: {fewest:,} to {most:,})")
    for name, value in features(points).items():
        low, high = ranges[name]
        if not low - 1e-6 <= value <= high + 1e-6:
            found.append(f"{name} {value:.3g} (training sets: {low:.3g} to {high:.3g})")
    return found
