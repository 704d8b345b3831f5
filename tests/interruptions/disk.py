"""A run's disk at every moment: what a kill before each file operation, and halfway through each write, would leave.

    with watch(folder) as disk:
        main(line)
    for moment in disk.moments:
        moment.restore(folder)      # as the kill would have left it
        main([*line, "--resume"])

The process itself is not killed: after SIGKILL nothing of it remains but the disk. So one run gives all its moments, and each
costs one resume. Watched are opening for writing, write, truncate, fsync, rename, unlink, mkdir and rmdir below the folder.
Moments are one if they differ in nothing that a start reads: not in the lines of a log, nor in what NAME.new holds, which
nobody may open for reading (that is checked). Not simulated is a power cut, which may lose what was not synced.
"""

import builtins
import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

Files = dict[str, bytes | None]  # by path below the folder; None is a directory
OPERATIONS = ("fsync", "replace", "rename", "unlink", "remove", "truncate", "mkdir", "rmdir")


@dataclass
class Moment:
    """The disk before one operation, or halfway through it."""

    before: str
    files: Files

    def restore(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            path = folder / name
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


@dataclass
class Disk:
    """Counts the operations below a folder, and keeps its moments."""

    folder: Path
    keep: bool = True
    before: Callable[[int], None] = lambda number: None  # called before each operation with its number, from 1
    operations: list[str] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def contains(self, path: object) -> bool:
        return isinstance(path, str | Path) and self.folder in Path(os.path.abspath(path)).parents

    def files(self) -> Files:
        found: Files = {}
        for path in sorted(self.folder.rglob("*")):
            found[str(path.relative_to(self.folder))] = None if path.is_dir() else content_of(path)
        return found

    def operation(self, what: str, path: object) -> None:
        self.operations.append(what)
        if self.keep:
            self.add(f"{what} {path}", self.files())
        self.before(len(self.operations))

    def halfway(self, file: "WatchedFile", content: bytes) -> None:
        """The moment at which half of some bytes has been written."""
        if not self.keep or len(content) < 2:
            return
        files, name, half = self.files(), str(Path(str(file.name)).relative_to(self.folder)), content[: len(content) // 2]
        old, position = files.get(name) or b"", file.tell()
        files[name] = old[:position] + half + old[position + len(half) :]
        self.add(f"the second half of write {file.name}", files)

    def add(self, before: str, files: Files) -> None:
        unread = ("log", ".new")
        key = hash(tuple((name, None if name.endswith(unread) else content) for name, content in files.items()))
        if key not in self.seen:
            self.seen.add(key)
            self.moments.append(Moment(before, files))


def content_of(path: Path) -> bytes:
    with io.FileIO(path) as file:
        return file.readall()


class WatchedFile(io.FileIO):
    disk: Disk

    def write(self, content: bytes) -> int:  # type: ignore[override]
        content = bytes(content)
        self.disk.operation("write", self.name)
        self.disk.halfway(self, content)
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        self.disk.operation("truncate", self.name)
        return super().truncate(size)


@contextlib.contextmanager
def watch(folder: Path, *, keep: bool = True, before: Callable[[int], None] = lambda number: None) -> Iterator[Disk]:
    """Watch the file operations of this process below a folder. `before` is called before each, and may raise."""
    disk = Disk(folder.resolve(), keep, before)
    real_open = builtins.open

    def opened(file: object, mode: str = "r", buffering: int = -1, *more: object, **named: object) -> object:
        if not disk.contains(file):
            return real_open(file, mode, buffering, *more, **named)  # type: ignore[call-overload]
        if set(mode).isdisjoint("wax+"):
            assert not str(file).endswith(".new"), f"{file} is half-written, and is read"
            return real_open(file, mode, buffering, *more, **named)  # type: ignore[call-overload]
        disk.operation(f"open {mode}", file)
        raw = WatchedFile(os.path.abspath(file), mode.replace("b", "").replace("t", ""))  # type: ignore[type-var]
        raw.disk = disk
        large = 1 << 24  # a file is one write, as it would be many equal ones
        buffered = io.BufferedRandom(raw, large) if "+" in mode else io.BufferedWriter(raw, large)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **named)  # type: ignore[arg-type]

    def watched(name: str) -> Callable:
        real = getattr(os, name)

        def operation(path: object, *more: object, **named: object) -> object:
            if named.get("dir_fd") is not None or isinstance(path, int) or disk.contains(path):
                disk.operation(name, path)
            return real(path, *more, **named)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for name in OPERATIONS:
            patch.setattr(os, name, watched(name))
        yield disk


def fail_at(number: int) -> Callable[[int], None]:
    """For `before`: operation `number`, and all after it, find the disk full."""

    def before(n: int) -> None:
        if n >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before
