"""Small image sets as uint8 tensors: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, from the files that are published.

Two more are made of CIFAR-10: BWCIFAR, its channel mean, and SMALL, its central 16x16 pixels.

Files are looked for one and two levels below a data directory, under the names that torchvision uses, and then in it; for
Fashion-MNIST, before the last, also where Debian's package `dataset-fashion-mnist` puts it. What is nowhere is downloaded by
torchvision, if that is wanted.
Everything that is read is checked, and no code in a file is run.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import math
import pickle
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, library
from torch.nn.functional import interpolate

from common.errors import InputError

DEBIAN = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}
SPLITS = ("train", "test")
MNIST_FILES = {"train": "train", "test": "t10k"}  # what the names of a split's files begin with
CIFAR_FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
CIFAR_ARCHIVES = {"CIFAR10": "cifar-10-python.tar.gz", "CIFAR100": "cifar-100-python.tar.gz"}
CIFAR_BATCHES = {
    "CIFAR10": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    "CIFAR100": {"train": ["train"], "test": ["test"]},
}
CIFAR_LABELS = {"CIFAR10": ("labels", "batches.meta", "label_names"), "CIFAR100": ("fine_labels", "meta", "fine_label_names")}
FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PUBLISHED = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")
BY_OPTION = {name.lower(): name for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")}  # --dataset cifar10
SHAPES = {  # (C, H, W)
    "MNIST": (1, 28, 28), "FashionMNIST": (1, 28, 28), "CIFAR10": (3, 32, 32), "CIFAR100": (3, 32, 32),
    "BWCIFAR": (1, 32, 32), "SMALL": (3, 16, 16),
}  # fmt: skip
N_CLASSES = {"MNIST": 10, "FashionMNIST": 10, "CIFAR10": 10, "CIFAR100": 100, "BWCIFAR": 10, "SMALL": 10}
N_VALIDATION = 5000  # images at most that are taken from the training images


class DataError(InputError):
    """Data that are missing, damaged, or something else than they should be."""


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
        """16 hex digits that other images, other labels, or another order of them do not have."""
        content = hashlib.sha256()
        for tensor in (self.images, self.labels):
            content.update(tensor.cpu().contiguous().numpy().data)
        return content.hexdigest()[:16]

    def __getitem__(self, chosen: Tensor | slice) -> ImageSet:
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes)


def load(name: str, split: str, data_dir: str | Path = "data", *, download: bool = False) -> ImageSet:
    """Read the "train" or "test" split of one of SHAPES.

    Raises DataError if the files are nowhere (and are not to be, or cannot be, downloaded to `data_dir`), or are damaged.
    """
    if name not in SHAPES or split not in SPLITS:
        raise ValueError(f"there is no {split!r} split of {name!r}: choose from {', '.join(SPLITS)} and {', '.join(SHAPES)}")
    if name == "BWCIFAR":
        return channel_mean(load("CIFAR10", split, data_dir, download=download))
    if name == "SMALL":
        return central_crop(load("CIFAR10", split, data_dir, download=download), SHAPES["SMALL"][1])
    data_dir = Path(data_dir)
    read = _find_cifar if name in CIFAR_FOLDERS else _find_mnist
    found = read(name, split, data_dir)
    if found is None and download:
        _download(name, data_dir)
        found = read(name, split, data_dir)
    if found is None:
        wanted = _cifar_wanted(name) if name in CIFAR_FOLDERS else " and ".join(_mnist_files(split))
        where = ", ".join(str(place) for place in _places(name, data_dir))
        raise DataError(f"{name} is not there: looked for {wanted} in {where}")
    return found


def channel_mean(data: ImageSet) -> ImageSet:
    """Grey images: (N, 3, H, W) -> (N, 1, H, W), the mean over the channels, rounded down (in whole numbers, so exactly)."""
    red, green, blue = (channel.to(torch.int16) for channel in data.images.unbind(1))
    return ImageSet(((red + green + blue) // 3).to(torch.uint8).unsqueeze(1), data.labels, data.classes)


def central_crop(data: ImageSet, size: int) -> ImageSet:
    """The central `size` rows and columns."""
    top, left = ((length - size) // 2 for length in data.images.shape[2:])
    return ImageSet(data.images[:, :, top : top + size, left : left + size].contiguous(), data.labels, data.classes)


def resize(data: ImageSet, side: int) -> ImageSet:
    """All images with `side` rows and columns, bilinear and smoothed where they shrink, as Pillow and torchvision do."""
    if data.images.shape[2:] == (side, side):
        return data
    parts = [
        interpolate(part, (side, side), mode="bilinear", antialias=True)  # keeps uint8
        for part in data.images.split(1000)
    ]
    return ImageSet(torch.cat(parts), data.labels, data.classes)


def split_validation(data: ImageSet, seed: int, share: float | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and validation images: 5,000 (a tenth of fewer), or that share, drawn by the seed, validate.

    Raises DataError for too few.
    """
    n_validation = min(N_VALIDATION, len(data) // 10) if share is None else int(share * len(data))
    if n_validation < 1:
        raise DataError(f"there are {len(data)} training images: at least 10 are needed")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    return data[order[n_validation:]], data[order[:n_validation]]


def _places(name: str, data_dir: Path) -> list[Path]:
    """Where files may lie, in the order in which they are looked for.

    The directory itself comes last: files of MNIST and Fashion-MNIST have the same names, so there they may be the other's.
    """
    if name in CIFAR_FOLDERS:
        return [data_dir / name, data_dir]
    return [data_dir / name / "raw", data_dir / name, *([DEBIAN[name]] if name in DEBIAN else []), data_dir]


# ---- MNIST and Fashion-MNIST: idx files (http://yann.lecun.com/exdb/mnist), compressed or not ----------------------------


def _mnist_files(split: str) -> tuple[str, str]:
    return f"{MNIST_FILES[split]}-images-idx3-ubyte[.gz]", f"{MNIST_FILES[split]}-labels-idx1-ubyte[.gz]"


def _find_mnist(name: str, split: str, data_dir: Path) -> ImageSet | None:
    for place in _places(name, data_dir):
        files = []
        for wanted in _mnist_files(split):
            plain, packed = place / wanted.removesuffix("[.gz]"), place / wanted.replace("[.gz]", ".gz")
            files += [file for file in (plain, packed) if file.is_file()][:1]
        if len(files) == 2:
            images, labels = read_idx(files[0], n_dim=3).unsqueeze(1), read_idx(files[1], n_dim=1)
            if images.shape[1:] != SHAPES[name]:
                raise DataError(f"{files[0]} holds images of shape {tuple(images.shape[2:])}: {name} has 28 rows and columns")
            classes = FASHION_CLASSES if name == "FashionMNIST" else tuple("0123456789")
            return _checked(images, labels, classes, files[0], files[1])
    return None


def read_idx(path: Path, n_dim: int) -> Tensor:
    """Read an idx file of bytes with `n_dim` axes, compressed or not. Raises DataError if it is none, or is cut off."""
    raw = _read(path)
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except Exception as error:  # damaged bytes fail in many ways
            raise DataError(f"{path} is damaged: {_one_line(error)}; fetch it again") from None
    header = 4 + 4 * n_dim
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, n_dim]):
        raise DataError(f"{path} is no idx file with {n_dim} axes of bytes: it begins with {raw[:4].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{n_dim}I", raw[4:header])
    if len(raw) - header != np.prod(shape, dtype=object):
        raise DataError(f"{path} is damaged: it holds {len(raw) - header} bytes, its header speaks of {shape}; fetch it again")
    try:
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())
    except ValueError:  # no bytes, of sizes whose product overflows all the same
        raise DataError(f"{path} is damaged: its header speaks of {shape}; fetch it again") from None


# ---- CIFAR: pickled dictionaries of numpy arrays, in an archive or unpacked (https://www.cs.toronto.edu/~kriz/cifar.html) -


def _cifar_wanted(name: str) -> str:
    return f"{CIFAR_FOLDERS[name]}/ or {CIFAR_ARCHIVES[name]}"


def _find_cifar(name: str, split: str, data_dir: Path) -> ImageSet | None:
    key, meta_file, meta_key = CIFAR_LABELS[name]
    for place in _places(name, data_dir):
        folder, archive = place / CIFAR_FOLDERS[name], place / CIFAR_ARCHIVES[name]
        source = folder if folder.is_dir() else archive
        if not source.exists():
            continue
        wanted = [*CIFAR_BATCHES[name][split], meta_file]
        contents = _read_folder(source, wanted) if source == folder else _read_archive(source, CIFAR_FOLDERS[name], wanted)
        *batches, meta = (_unpickled(contents[file], f"{source}: {file}") for file in wanted)
        try:
            images = torch.from_numpy(np.concatenate([batch["data"].array for batch in batches]))
            labels = torch.tensor([label for batch in batches for label in batch[key]])
            classes = tuple(str(label) for label in meta[meta_key])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DataError(f"{source} is no {name}: {_one_line(error)}") from None
        # bytes, a row an image, by the reader of pickles; true, 3.5 and [3] are no labels
        if images.shape[1:] != (math.prod(SHAPES[name]),) or labels.dtype != torch.int64 or labels.ndim != 1:
            shapes = f"data of shape {tuple(images.shape)}, labels of shape {tuple(labels.shape)} and {labels.dtype}"
            raise DataError(f"{source} is no {name}: {shapes}")
        if len(classes) != N_CLASSES[name]:
            raise DataError(f"{source} is no {name}: {len(classes)} classes")
        images = images.view(-1, *SHAPES[name])
        return _checked(images, labels, classes, source, source)
    return None


def _read_folder(folder: Path, wanted: list[str]) -> dict[str, bytes]:
    missing = [file for file in wanted if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{folder} is not complete: {', '.join(missing)} is missing")
    return {file: _read(folder / file) for file in wanted}


def _read_archive(path: Path, folder: str, wanted: list[str]) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(path, "r|gz") as archive:  # one pass
            for member in archive:
                file = member.name.removeprefix("./").removeprefix(f"{folder}/")
                if file in wanted and member.isfile():
                    contents[file] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except Exception as error:  # damaged bytes fail in many ways
        raise DataError(f"{path} is damaged: {_one_line(error)}; fetch it again") from None
    missing = [file for file in wanted if file not in contents]
    if missing:
        raise DataError(f"{path} is not complete: {', '.join(missing)} is missing")
    return contents


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, texts and numpy arrays; anything else a pickle could make is refused."""

    def find_class(self, module: str, name: str) -> Any:
        # stand-ins: numpy's own classes trust the state that a pickle gives them, pointers included
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _ArrayOfBytes(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _ArrayOfBytes(),
            ("numpy", "ndarray"): _ArrayOfBytes,
            ("numpy", "dtype"): _Dtype,
        }
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return stand_ins[module, name]


class _Dtype:
    """What stands for numpy's type of bytes in a pickle; others are refused."""

    def __init__(self, kind: object, *_: object):
        if kind != "u1":
            raise pickle.UnpicklingError(f"it holds numbers of type {kind!r}, not bytes")

    def __setstate__(self, state: object) -> None:
        pass


class _ArrayOfBytes:
    """What stands for a numpy array of bytes in a pickle: `array`, once its state is read."""

    array: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, _, _, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        self.array = np.frombuffer(raw, np.uint8).reshape(shape)


def _unpickled(raw: bytes, what: str) -> dict[str, Any]:
    try:
        content = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()  # texts of Python 2, arrays' bytes among them
    except Exception as error:  # damaged and foreign bytes fail in many ways
        raise DataError(f"{what} cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{what} holds no dictionary")
    return content


# ---- all of them ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _checked(images: Tensor, labels: Tensor, classes: tuple[str, ...], image_file: Path, label_file: Path) -> ImageSet:
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
    """Let torchvision fetch a set, with its checksums, into `data_dir`. Raises DataError if it cannot."""
    datasets = _torchvision_datasets()
    try:
        for train in (True, False):
            getattr(datasets, name)(str(data_dir), train=train, download=True)
    except (OSError, RuntimeError) as error:
        where = ", ".join(str(place) for place in _places(name, data_dir))
        raise DataError(
            f"{name} is in none of {where}, and cannot be downloaded: {_one_line(error)}; name a directory that has it"
        ) from None


_declared: list[library.Library] = []


def _torchvision_datasets() -> Any:
    """torchvision.datasets, also beside a CPU build of PyTorch.

    There the compiled operators of the package index's torchvision cannot be loaded, and its import fails unless these two
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
