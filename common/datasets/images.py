"""Small image sets as uint8 tensors: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read from the published files.

BWCIFAR is the channel mean of CIFAR-10, SMALL its central 16x16 pixels.

Files are looked for in `data_dir/NAME` (idx files also in `data_dir/NAME/raw`), under torchvision's names, and then in
`data_dir` itself; Fashion-MNIST also, before `data_dir` itself, where Debian's package `dataset-fashion-mnist` puts it.
Files that are nowhere can be downloaded by torchvision.

No content is trusted:

- A gzip file is read to its end, so that its CRC-32 and length are compared. It may unpack to MAX_BYTES at most.
- A CIFAR archive of the published size must have the published md5 sum.
- An unpacked CIFAR batch has no checksum of its own. If it was pickled by Python 2, as the published ones were, and is as large
  as their pixels, it must have the published md5 sum.
- Any other CIFAR file is taken for a set of the user's own. It is loaded, and a note on stderr says so.
- Pickles may hold dictionaries, lists, numbers, texts and arrays of bytes; no code in them is run.
- An idx file that is not compressed carries no checksum: its header and its length are compared.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib
import io
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, library
from torch.nn.functional import interpolate

from common.errors import InputError, one_line, warn

SPLITS = ("train", "test")
PUBLISHED = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")
BY_OPTION = {name.lower(): name for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")}  # names in lower case
SHAPES = {  # (C, H, W)
    "MNIST": (1, 28, 28), "FashionMNIST": (1, 28, 28), "CIFAR10": (3, 32, 32), "CIFAR100": (3, 32, 32),
    "BWCIFAR": (1, 32, 32), "SMALL": (3, 16, 16),
}  # fmt: skip
N_CLASSES = {"MNIST": 10, "FashionMNIST": 10, "CIFAR10": 10, "CIFAR100": 100, "BWCIFAR": 10, "SMALL": 10}
FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
N_VALIDATION = 5000  # at most, of the training images
MAX_BYTES = 512 * 2**20  # that a gzip file may unpack to: CIFAR-10, the largest published set, has 186 MB
DEBIAN = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}
MNIST_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class CifarFiles:
    """Names, sizes and md5 sums (which torchvision has, too) of the files of a published CIFAR set."""

    archive: str
    archive_bytes: int
    archive_md5: str
    folder: str  # in the archive
    batches: dict[str, dict[str, str]]  # the md5 sum of each file of a split
    batch_images: dict[str, int]  # images in each file of a split
    labels: str  # key of the labels in a batch
    meta: str  # the file with the names of the classes
    meta_md5: str
    class_names: str  # key of the names in `meta`


CIFAR = {
    "CIFAR10": CifarFiles(
        archive="cifar-10-python.tar.gz",
        archive_bytes=170_498_071,
        archive_md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        batches={
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        batch_images={"train": 10_000, "test": 10_000},
        labels="labels",
        meta="batches.meta",
        meta_md5="5ff9c542aee3614f3951f8cda6e48888",
        class_names="label_names",
    ),
    "CIFAR100": CifarFiles(
        archive="cifar-100-python.tar.gz",
        archive_bytes=169_001_437,
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        batches={
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        batch_images={"train": 50_000, "test": 10_000},
        labels="fine_labels",
        meta="meta",
        meta_md5="7973b15100ade9c7d40fb424638fde48",
        class_names="fine_label_names",
    ),
}


class DataError(InputError):
    """Data that are missing, damaged, or of another kind than expected."""


@dataclass(frozen=True)
class ImageSet:
    """N images with their labels."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N) int64
    classes: tuple[str, ...]  # the name of each label

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    def fingerprint(self) -> str:
        """16 hex digits of a hash of all images and labels, in their order."""
        content = hashlib.sha256()
        for tensor in (self.images, self.labels):
            content.update(tensor.cpu().contiguous().numpy().data)
        return content.hexdigest()[:16]

    def __getitem__(self, index: Tensor | slice) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index], self.classes)


def load(name: str, split: str, data_dir: str | Path = "data", *, download: bool = False) -> ImageSet:
    """Read the "train" or "test" split of one of SHAPES.

    Raises DataError if the files are missing (with `download`: and cannot be downloaded to `data_dir`) or damaged, and
    ValueError for another name or split.
    """
    if name not in SHAPES or split not in SPLITS:
        raise ValueError(f"there is no {split!r} split of {name!r}: choose from {', '.join(SPLITS)} and {', '.join(SHAPES)}")
    if name == "BWCIFAR":
        return channel_mean(load("CIFAR10", split, data_dir, download=download))
    if name == "SMALL":
        return central_crop(load("CIFAR10", split, data_dir, download=download), SHAPES["SMALL"][1])
    data_dir = Path(data_dir)
    reader = _read_cifar if name in CIFAR else _read_mnist
    data = reader(name, split, data_dir)
    if data is None and download:
        _download(name, data_dir)
        data = reader(name, split, data_dir)
    if data is None:
        files = f"{CIFAR[name].folder}/ or {CIFAR[name].archive}" if name in CIFAR else " and ".join(_mnist_files(split))
        raise DataError(f"{name} is not there: looked for {files} in {_places(name, data_dir)}; name a directory that has it")
    return data


def channel_mean(data: ImageSet) -> ImageSet:
    """Grey images: (N, 3, H, W) -> (N, 1, H, W), the mean over the channels, rounded down in exact integer arithmetic."""
    red, green, blue = (channel.to(torch.int16) for channel in data.images.unbind(1))
    return ImageSet(((red + green + blue) // 3).to(torch.uint8).unsqueeze(1), data.labels, data.classes)


def central_crop(data: ImageSet, size: int) -> ImageSet:
    """The central pixels: (N, C, H, W) -> (N, C, size, size)."""
    top, left = ((length - size) // 2 for length in data.images.shape[2:])
    return ImageSet(data.images[:, :, top : top + size, left : left + size].contiguous(), data.labels, data.classes)


def resize(data: ImageSet, side: int) -> ImageSet:
    """Scale to (N, C, side, side): bilinear, with antialiasing, as Pillow and torchvision do."""
    if data.images.shape[2:] == (side, side):
        return data
    parts = [
        interpolate(part, (side, side), mode="bilinear", antialias=True)  # keeps uint8
        for part in data.images.split(1000)
    ]
    return ImageSet(torch.cat(parts), data.labels, data.classes)


def split_validation(data: ImageSet, seed: int, share: float | None = None) -> tuple[ImageSet, ImageSet]:
    """Divide images into training and validation images, which are drawn by the seed.

    The validation images are that share of all, or 5,000 (a tenth, if that is less). Raises DataError if there are none.
    """
    n_validation = min(N_VALIDATION, len(data) // 10) if share is None else int(share * len(data))
    if n_validation < 1:
        raise DataError(f"there are {len(data)} training images: at least 10 are needed")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    return data[order[n_validation:]], data[order[:n_validation]]


def _directories(name: str, data_dir: Path) -> list[Path]:
    """Directories that may hold a set, in the order of the search.

    `data_dir` itself comes last: MNIST and Fashion-MNIST name their files alike, so files there may be the other set's.
    """
    if name in CIFAR:
        return [data_dir / name, data_dir]
    return [data_dir / name / "raw", data_dir / name, *([DEBIAN[name]] if name in DEBIAN else []), data_dir]


def _places(name: str, data_dir: Path) -> str:
    return ", ".join(str(directory) for directory in _directories(name, data_dir))


# ---- MNIST and Fashion-MNIST: idx files (http://yann.lecun.com/exdb/mnist), compressed or not ----------------------------


def _mnist_files(split: str) -> tuple[str, str]:
    return f"{MNIST_PREFIXES[split]}-images-idx3-ubyte[.gz]", f"{MNIST_PREFIXES[split]}-labels-idx1-ubyte[.gz]"


def _read_mnist(name: str, split: str, data_dir: Path) -> ImageSet | None:
    for directory in _directories(name, data_dir):
        paths = []
        for file in _mnist_files(split):
            plain, packed = directory / file.removesuffix("[.gz]"), directory / file.replace("[.gz]", ".gz")
            paths += [path for path in (plain, packed) if path.is_file()][:1]
        if len(paths) == 2:
            images, labels = read_idx(paths[0], n_dim=3).unsqueeze(1), read_idx(paths[1], n_dim=1)
            if images.shape[1:] != SHAPES[name]:
                raise DataError(f"{paths[0]} holds images of shape {tuple(images.shape[2:])}: {name} has 28 rows and columns")
            classes = FASHION_CLASSES if name == "FashionMNIST" else tuple("0123456789")
            return _image_set(images, labels, classes, paths[0], paths[1])
    return None


def read_idx(path: Path, n_dim: int) -> Tensor:
    """Read an idx file of bytes with `n_dim` axes, compressed or not. Raises DataError for another, or a damaged, file."""
    packed = _read(path)
    raw = _gunzip(packed, path) if path.suffix == ".gz" else packed
    header = 4 + 4 * n_dim
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, n_dim]):
        raise DataError(f"{path} is no idx file with {n_dim} axes of bytes: it begins with {raw[:4].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{n_dim}I", raw[4:header])
    if len(raw) - header != np.prod(shape, dtype=object):
        raise DataError(f"{path} is damaged: it holds {len(raw) - header} bytes, its header says {shape}; fetch it again")
    try:
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())
    except ValueError:  # no bytes, in sizes whose product without the zero overflows
        raise DataError(f"{path} is damaged: its header says {shape}; fetch it again") from None


# ---- CIFAR: pickled dictionaries of numpy arrays, in an archive or unpacked (https://www.cs.toronto.edu/~kriz/cifar.html) -


def _read_cifar(name: str, split: str, data_dir: Path) -> ImageSet | None:
    cifar = CIFAR[name]
    for directory in _directories(name, data_dir):
        source = directory / cifar.folder
        if not source.is_dir():
            source = directory / cifar.archive
        if source.exists():
            contents = _cifar_contents(source, name, split)
            *batches, meta = (_unpickle(raw, f"{source}: {file}") for file, raw in contents.items())
            images, labels, classes = _cifar_arrays(batches, meta, name, source)
            return _image_set(images, labels, classes, source, source)
    return None


def _cifar_contents(source: Path, name: str, split: str) -> dict[str, bytes]:
    """Files of a split, and last the one with the names of the classes, from a folder or an archive. Raises DataError."""
    cifar = CIFAR[name]
    sums = cifar.batches[split] | {cifar.meta: cifar.meta_md5}
    if source.is_dir():
        contents = {file: _read(source / file) for file in sums if (source / file).is_file()}
    else:
        packed = _read(source)
        if len(packed) == cifar.archive_bytes and _md5(packed) != cifar.archive_md5:
            raise DataError(f"{source} is damaged: it has the published size, and another md5 sum; fetch it again")
        contents = _untar(_gunzip(packed, source), source, cifar.folder, sums.keys())
    missing = [file for file in sums if file not in contents]
    if missing:
        raise DataError(f"{source} is not complete: {', '.join(missing)} is missing")
    differing = [file for file in sums if _md5(contents[file]) != sums[file]]
    for file in differing:
        raw, pixels = contents[file], cifar.batch_images[split] * math.prod(SHAPES[name])
        if file != cifar.meta and len(raw) > pixels and raw.startswith(b"\x80\x02}") and raw[6:7] == pickle.SHORT_BINSTRING:
            reason = f"{file} looks like the published file, and has another md5 sum"
            raise DataError(f"{source} is damaged: {reason}; fetch it again")
    if differing:
        _note(f"{source} differs from the published {name}: it is taken for a set of your own")
    return {file: contents[file] for file in sums}


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def _untar(raw: bytes, path: Path, folder: str, files: Collection[str]) -> dict[str, bytes]:
    """Read some files of `folder` from a tar archive. Raises DataError if it is damaged."""
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            for member in archive:
                file = member.name.removeprefix("./").removeprefix(f"{folder}/")
                if file in files and member.isfile() and not member.issparse():  # a sparse file may claim any size
                    contents[file] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except Exception as error:  # damaged bytes fail in many ways
        raise DataError(f"{path} is damaged: {_reason(error)}; fetch it again") from None
    return contents


def _cifar_arrays(
    batches: list[dict[str, Any]], meta: dict[str, Any], name: str, source: Path
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, 3, 32, 32), labels (N) and names of classes from unpickled files. Raises DataError."""
    cifar = CIFAR[name]
    try:
        images = torch.from_numpy(np.concatenate([batch["data"].array for batch in batches]))
        labels = [label for batch in batches for label in batch[cifar.labels]]
        classes = tuple(meta[cifar.class_names])
        types = {type(label) for label in labels} - {int}  # True is an int, too, and 3.0 == 3
        if types or not all(isinstance(text, str) for text in classes):
            raise ValueError(f"labels of type {types.pop().__name__}" if types else "names of classes that are no texts")
        if images.shape[1:] != (math.prod(SHAPES[name]),) or len(classes) != N_CLASSES[name]:
            raise ValueError(f"data of shape {tuple(images.shape)}, {len(classes)} classes")
        return images.view(-1, *SHAPES[name]), torch.tensor(labels, dtype=torch.int64), classes
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise DataError(f"{source} is no {name}: {_reason(error)}") from None


class _ArrayUnpickler(pickle._Unpickler):
    """Reads dictionaries, lists, numbers, texts and numpy arrays of bytes. Refuses other objects.

    This is the unpickler in Python: the one in C takes 16 bytes of memory for each number up to the largest that a pickle
    gives to an object, so a flipped bit there costs gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        # stand-ins: numpy's own classes trust the state that a pickle gives them, pointers included
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _ByteArray(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _ByteArray(),
            ("numpy", "ndarray"): _ByteArray,
            ("numpy", "dtype"): _ByteDtype,
        }
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it would call {f'{module}.{name}'[:60]!r}")
        return stand_ins[module, name]


class _ByteDtype:
    """Stands for numpy's dtype uint8 in a pickle. Other dtypes are refused."""

    def __init__(self, kind: object, *_: object):
        if kind != "u1":
            shown = kind[:9] if isinstance(kind, str) else type(kind).__name__
            raise pickle.UnpicklingError(f"it holds numbers of type {shown!r}, not bytes")

    def __setstate__(self, state: object) -> None:
        pass


class _ByteArray:
    """Stands for a numpy array of bytes in a pickle: `array`, once its state is read."""

    array: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, _, is_fortran, raw = state
        if not isinstance(raw, str | bytes):
            raise pickle.UnpicklingError("it holds an array without bytes")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.array = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C"))


def _unpickle(raw: bytes, what: str) -> dict[str, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()  # texts of Python 2, and the bytes of arrays
    except Exception as error:  # damaged and foreign bytes fail in many ways
        raise DataError(f"{what} cannot be read: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{what} holds no dictionary")
    return content


# ---- all of them ---------------------------------------------------------------------------------------------------------


@functools.cache
def _note(text: str) -> None:
    """Print a line on stderr, once."""
    warn(f"note: {one_line(text)}")


def _gunzip(packed: bytes, path: Path) -> bytes:
    """Unpack a gzip file to its end, where its CRC-32 and length stand. Raises DataError if they differ."""
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            raw = io.BytesIO()
            while raw.tell() <= MAX_BYTES and (part := file.read(2**20)):
                raw.write(part)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {_reason(error)}; fetch it again") from None
    if raw.tell() > MAX_BYTES:
        raise DataError(f"{path} unpacks to more than {MAX_BYTES:,} bytes: fetch it again, or unpack it if that is right")
    return raw.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _image_set(images: Tensor, labels: Tensor, classes: tuple[str, ...], image_file: Path, label_file: Path) -> ImageSet:
    """Put a set together. Raises DataError if images and labels do not belong together."""
    if len(images) != len(labels):
        raise DataError(f"{image_file} holds {len(images)} images, {label_file} {len(labels)} labels: they belong together")
    if len(images) == 0:
        raise DataError(f"{image_file} holds no images")
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= len(classes):
        outside = labels.max() if labels.max() >= len(classes) else labels.min()
        raise DataError(f"{label_file} holds the label {int(outside)}: there are {len(classes)} classes, from 0")
    return ImageSet(images, labels, classes)


def _download(name: str, data_dir: Path) -> None:
    """Let torchvision download a set to `data_dir`, where it checks md5 sums. Raises DataError if it cannot."""
    datasets = _torchvision_datasets()
    try:
        for train in (True, False):
            getattr(datasets, name)(str(data_dir), train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = f"is in none of {_places(name, data_dir)}, and cannot be downloaded: {_reason(error)}"
        raise DataError(f"{name} {reason}; name a directory that has it") from None


_declared: list[library.Library] = []


def _torchvision_datasets() -> Any:
    """Import torchvision.datasets, also with a CPU build of PyTorch.

    With such a build the compiled operators of PyPI's torchvision cannot be loaded, and its import fails unless these two
    are declared. Nothing here uses them.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except RuntimeError:
        operators = library.Library("torchvision", "DEF")
        operators.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        operators.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _declared.append(operators)  # they are gone with it
    return importlib.import_module("torchvision.datasets")
