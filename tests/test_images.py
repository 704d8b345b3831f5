"""Image sets: the real ones, the published formats, and files that are not what they should be."""

import gzip
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.datasets import images
from common.datasets.images import DataError, ImageSet
from tests.small_images import real, smooth, write_idx, write_mnist

# ---- the real sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "mean", "counts"),
    [
        ("MNIST", [5, 0, 4, 1, 9], 33.3184, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("FashionMNIST", [9, 0, 0, 3, 0], 72.9404, [6000] * 10),
    ],
)
def test_real_sets(name: str, first: list[int], mean: float, counts: list[int]) -> None:
    began = time.monotonic()
    data = real(name, "train")
    assert time.monotonic() - began < 2
    assert data.images.shape == (60_000, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.labels[:5].tolist() == first and data.labels.bincount().tolist() == counts
    assert data.images.float().mean().item() == pytest.approx(mean, abs=1e-3)
    assert len(data.classes) == 10
    assert real(name, "test").images.shape == (10_000, 1, 28, 28)


def test_a_fashionable_ankle_boot() -> None:
    data = real("FashionMNIST", "train")
    assert data.classes[data.labels[0]] == "ankle boot"


# ---- idx files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    return write_mnist(tmp_path / "data", smooth(20), smooth(10, seed=1))


def test_small_sets_are_read_back(mnist: Path) -> None:
    for split, expected in (("train", smooth(20)), ("test", smooth(10, seed=1))):
        data = images.load("MNIST", split, mnist)
        assert torch.equal(data.images, expected.images) and torch.equal(data.labels, expected.labels)


def test_fingerprints_tell_sets_apart() -> None:
    data = smooth(20)
    image, label = data.images.clone(), data.labels.clone()
    image[3, 0, 5, 5] += 1
    label[3] = 9
    others = ImageSet(image, data.labels, data.classes), ImageSet(data.images, label, data.classes), data[:19], data[1:]
    prints = [part.fingerprint() for part in (data, *others, data[torch.arange(19, -1, -1)])]
    assert len(set(prints)) == 6 and all(len(text) == 16 for text in prints)
    assert ImageSet(data.images.mT.contiguous().mT, data.labels, data.classes).fingerprint() == prints[0]


@pytest.mark.parametrize("below", ["", "MNIST", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_places(mnist: Path, tmp_path: Path, below: str, packed: bool) -> None:
    place = tmp_path / "elsewhere" / below
    place.mkdir(parents=True)
    for file in mnist.iterdir():
        content = file.read_bytes()
        (place / (file.name + packed * ".gz")).write_bytes(gzip.compress(content) if packed else content)
    assert len(images.load("MNIST", "train", tmp_path / "elsewhere")) == 20


def test_flat_files_are_taken_last(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST's and Fashion-MNIST's have the same names: where a place has a set's own name, or is Debian's, that one counts."""
    monkeypatch.setattr(images, "DEBIAN", {"FashionMNIST": tmp_path / "debian"})
    assert len(images.load("FashionMNIST", "train", mnist)) == 20
    for n, place in ((21, tmp_path / "debian"), (22, mnist / "FashionMNIST"), (23, mnist / "FashionMNIST" / "raw")):
        write_mnist(place, smooth(n), smooth(10))
        assert len(images.load("FashionMNIST", "train", mnist)) == n
        assert len(images.load("MNIST", "train", mnist)) == 20


def test_missing_files_are_named_and_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        images.load("MNIST", "test", tmp_path)
    message = str(error.value)
    assert "t10k-images-idx3-ubyte[.gz] and t10k-labels-idx1-ubyte[.gz]" in message
    for place in (tmp_path, tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        assert f"{place}" in message
    with pytest.raises(DataError, match=r"cifar-10-batches-py/ or cifar-10-python.tar.gz in"):
        images.load("CIFAR10", "train", tmp_path)
    with pytest.raises(ValueError, match="there is no 'val' split"):
        images.load("MNIST", "val", tmp_path)


def images_file(mnist: Path) -> Path:
    return mnist / "train-images-idx3-ubyte"


def damage_cut(mnist: Path) -> None:
    images_file(mnist).write_bytes(images_file(mnist).read_bytes()[:-1])


def damage_cut_gz(mnist: Path) -> None:
    packed = gzip.compress(images_file(mnist).read_bytes())
    images_file(mnist).unlink()
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(packed[: len(packed) // 2])


def damage_no_gz(mnist: Path) -> None:
    images_file(mnist).rename(mnist / "train-images-idx3-ubyte.gz")


def damage_foreign(mnist: Path) -> None:
    images_file(mnist).write_text("<html>404</html>")


def damage_empty(mnist: Path) -> None:
    images_file(mnist).write_bytes(b"")


def damage_labels_for_images(mnist: Path) -> None:
    images_file(mnist).write_bytes((mnist / "train-labels-idx1-ubyte").read_bytes())


def damage_size(mnist: Path) -> None:
    write_idx(images_file(mnist), torch.zeros(20, 28, 27))


def damage_count(mnist: Path) -> None:
    write_idx(images_file(mnist), torch.zeros(19, 28, 28))


def damage_label(mnist: Path) -> None:
    write_idx(mnist / "train-labels-idx1-ubyte", torch.arange(20) % 11)


def damage_none(mnist: Path) -> None:
    write_idx(images_file(mnist), torch.zeros(0, 28, 28))
    write_idx(mnist / "train-labels-idx1-ubyte", torch.zeros(0))


def damage_huge_header(mnist: Path) -> None:
    images_file(mnist).write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *3 * [2**32 - 1]) + b"x")


def damage_overflowing_header(mnist: Path) -> None:
    images_file(mnist).write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 0, 2**32 - 1, 2**32 - 1))


def damage_tiny_gz(mnist: Path) -> None:
    images_file(mnist).unlink()
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08")


DAMAGES = {
    damage_cut: "is damaged: it holds 15679 bytes",
    damage_cut_gz: "is damaged: Compressed file ended",
    damage_no_gz: "is damaged: Not a gzipped file",
    damage_foreign: "is no idx file with 3 axes of bytes: it begins with 3c 68 74 6d",
    damage_empty: "it begins with nothing",
    damage_labels_for_images: "is no idx file with 3 axes",
    damage_size: "images of shape (28, 27)",
    damage_count: "holds 19 images",
    damage_label: "holds the label 10: there are 10 classes",
    damage_none: "holds no images",
    damage_huge_header: "is damaged: it holds 1 bytes",
    damage_overflowing_header: "is damaged: its header says (0, 4294967295, 4294967295)",
    damage_tiny_gz: "is damaged: Compressed file ended",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_files(damage: types.FunctionType, mnist: Path) -> None:
    damage(mnist)
    with pytest.raises(DataError) as error:
        images.load("MNIST", "train", mnist)
    assert DAMAGES[damage] in str(error.value) and "\n" not in str(error.value) and str(mnist) in str(error.value)


def peak_of(refused: Callable[[], object], message: str) -> int:
    """Bytes that Python has allocated at once until a DataError."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            refused()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    bomb = gzip.compress(bytes(64 * 2**20), 1)
    images_file(mnist).unlink()
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    message = "unpacks to more than 1,048,576 bytes"
    assert peak_of(lambda: images.load("MNIST", "train", mnist), message) < 8 * 2**20
    (mnist / "cifar-10-python.tar.gz").write_bytes(bomb)
    assert peak_of(lambda: images.load("CIFAR10", "train", mnist), message) < 8 * 2**20


# ---- CIFAR ---------------------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes texts as Python 2 did, which made the published archives."""

    def save_text(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        short = len(raw) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) if short else pickle.BINSTRING + struct.pack("<i", len(raw)))
        self.write(raw)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_text, bytes: save_text}

    def save_global(self, obj: object, name: str | None = None) -> None:
        module, name = obj.__module__.replace("numpy._core", "numpy.core"), obj.__name__
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch[types.FunctionType] = dispatch[type] = save_global


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def cifar_files(name: str, training: ImageSet, test: ImageSet) -> dict[str, bytes]:
    """The files of an archive; training images spread over all batches."""
    cifar = images.CIFAR[name]
    files = {cifar.meta: python2_pickle({cifar.class_names: [f"class {i}" for i in range(images.N_CLASSES[name])]})}
    for split, data in (("train", training), ("test", test)):
        batches = cifar.batches[split]
        for batch, part in zip(batches, torch.arange(len(data)).tensor_split(len(batches)), strict=True):
            pixels = data.images[part].flatten(1).numpy()
            content = {
                "batch_label": batch,
                cifar.labels: data.labels[part].tolist(),
                "data": pixels,
                "filenames": ["a.png"] * len(part),
            }
            files[batch] = python2_pickle(content)
    return files


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_cifar(folder: Path, name: str = "CIFAR10", *, unpacked: bool = False) -> tuple[ImageSet, ImageSet]:
    """A set of 23 and 5 images."""
    cifar, training, test = images.CIFAR[name], smooth(23, (3, 32, 32)), smooth(5, (3, 32, 32), seed=1)
    files = cifar_files(name, training, test)
    if unpacked:
        (folder / cifar.folder).mkdir(parents=True)
        for file, content in files.items():
            (folder / cifar.folder / file).write_bytes(content)
    else:
        folder.mkdir(exist_ok=True)
        write_archive(folder / cifar.archive, cifar.folder, files)
    return training, test


def publish(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the CIFAR-10 of write_cifar be the published one."""
    cifar, archive = images.CIFAR["CIFAR10"], folder / "cifar-10-python.tar.gz"
    sums = {file: images._md5(raw) for file, raw in cifar_files("CIFAR10", *write_cifar(folder)).items()}
    published = replace(
        cifar,
        archive_bytes=archive.stat().st_size,
        archive_md5=images._md5(archive.read_bytes()),
        batches={split: {file: sums[file] for file in cifar.batches[split]} for split in cifar.batches},
        batch_images={"train": 4, "test": 5},
        meta_md5=sums[cifar.meta],
    )
    monkeypatch.setitem(images.CIFAR, "CIFAR10", published)


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar(name: str, unpacked: bool, tmp_path: Path) -> None:
    training, test = write_cifar(tmp_path, name, unpacked=unpacked)
    for split, expected in (("train", training), ("test", test)):
        data = images.load(name, split, tmp_path)
        assert torch.equal(data.images, expected.images) and torch.equal(data.labels, expected.labels)
        assert data.classes[3] == "class 3" and len(data.classes) == images.N_CLASSES[name]


def test_cifar_runs_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    for content in (Malicious(), {"data": Malicious()}):
        files = cifar_files("CIFAR10", smooth(5, (3, 32, 32)), smooth(5, (3, 32, 32)))
        files["test_batch"] = pickle.dumps(content)
        write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
        with pytest.raises(DataError, match=r"test_batch cannot be read: it would call 'posix.mkdir'"):
            images.load("CIFAR10", "test", tmp_path)
    assert not canary.exists()


def test_damaged_archives(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    good = archive.read_bytes()
    batches = images.CIFAR["CIFAR10"].batches["train"]
    files, row = cifar_files("CIFAR10", smooth(5, (3, 32, 32)), smooth(5, (3, 32, 32))), np.zeros((1, 3072), np.uint8)
    for content, message in (
        (good[: len(good) // 2], "is damaged"),
        (good[:3], "is damaged"),
        (b"<html>", "is damaged"),
        (b"", "is "),
    ):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=message):
            images.load("CIFAR10", "train", tmp_path)
    for changed, message in (
        ({"data_batch_3": None}, "data_batch_3 is missing"),
        ({"data_batch_3": python2_pickle([1])}, "holds no dictionary"),
        ({"data_batch_3": python2_pickle({"labels": [1]})}, "is no CIFAR10: 'data'"),
        ({"data_batch_3": python2_pickle({"labels": [1], "data": np.zeros((1, 5), np.uint8)})}, "is no CIFAR10"),
        ({"data_batch_3": python2_pickle({"labels": [1], "data": np.zeros((1, 3072))})}, "numbers of type .f8., not bytes"),
        ({"data_batch_3": python2_pickle({"labels": [], "data": np.zeros((1, 3072), np.uint8)})}, "4 labels"),
        ({"data_batch_3": python2_pickle({"labels": [10], "data": np.zeros((1, 3072), np.uint8)})}, "the label 10"),
        ({"data_batch_3": python2_pickle({"labels": [1.5], "data": row})}, "is no CIFAR10: labels of type float"),
        ({"data_batch_3": python2_pickle({"labels": [True], "data": row})}, "is no CIFAR10: labels of type bool"),
        ({"data_batch_3": python2_pickle({"labels": ["1"], "data": row})}, "is no CIFAR10: labels of type str"),
        ({batch: python2_pickle({"labels": [[1]], "data": row}) for batch in batches}, "is no CIFAR10: labels of type list"),
        ({"data_batch_3": python2_pickle({"labels": [2**70], "data": row})}, "is no CIFAR10: "),
        (
            {batch: python2_pickle({"labels": [1], "data": row.reshape(3, 1024)}) for batch in batches},
            r"data of shape .15, 1024., 10 classes",
        ),
        ({"batches.meta": python2_pickle({"label_names": ["a"]})}, "1 classes"),
        ({"batches.meta": python2_pickle({"label_names": list(range(10))})}, "names of classes that are no texts"),
    ):
        contents = {file: raw for file, raw in (files | changed).items() if raw is not None}
        write_archive(archive, "cifar-10-batches-py", contents)
        with pytest.raises(DataError, match=message) as error:
            images.load("CIFAR10", "train", tmp_path)
        assert "\n" not in str(error.value)


def test_no_flipped_bit_of_an_archive_goes_unnoticed(tmp_path: Path) -> None:
    """All bits of the header of gzip, 60 of the rest: refused, or the same images (a time in the header, say)."""
    training, _ = write_cifar(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    good, refused = archive.read_bytes(), 0
    for bit in (*range(80), *random.Random(0).sample(range(80, 8 * len(good)), 60)):
        archive.write_bytes(flipped(good, bit))
        try:
            data = images.load("CIFAR10", "train", tmp_path)
        except DataError:
            refused += 1
        else:
            assert torch.equal(data.images, training.images) and torch.equal(data.labels, training.labels), bit
            assert bit < 80 or data.classes == tuple(f"class {i}" for i in range(10))
    assert refused >= 75


def test_a_set_of_ones_own_is_loaded_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for unpacked in (False, True):
        write_cifar(tmp_path, unpacked=unpacked)
        for split in images.SPLITS:
            images.load("CIFAR10", split, tmp_path)
        source = tmp_path / ("cifar-10-batches-py" if unpacked else "cifar-10-python.tar.gz")
        expected = f"note: {source} differs from the published CIFAR10: it is taken for a set of your own\n"
        assert capsys.readouterr().err == expected


def test_the_published_archive_has_its_md5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch, tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    images.load("CIFAR10", "train", tmp_path)
    assert capsys.readouterr().err == ""
    archive.write_bytes(flipped(archive.read_bytes(), 4 * 8))  # of the time in gzip's header, that no CRC protects
    with pytest.raises(DataError, match="is damaged: it has the published size, and another md5 sum; fetch it again"):
        images.load("CIFAR10", "train", tmp_path)


def test_unpacked_published_batches_have_their_md5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flipped bit is refused, wherever it is; the same set, pickled again by Python 3, is one's own."""
    publish(monkeypatch, tmp_path)
    training, _ = write_cifar(tmp_path, unpacked=True)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    good = batch.read_bytes()
    images.load("CIFAR10", "train", tmp_path)
    assert capsys.readouterr().err == ""
    for bit in random.Random(0).sample(range(8 * 7, 8 * len(good)), 30):
        batch.write_bytes(flipped(good, bit))
        with pytest.raises(DataError, match="data_batch_3 looks like the published file, and has another md5 sum"):
            images.load("CIFAR10", "train", tmp_path)
    pixels = training.images[10:15].flatten(1).numpy()
    batch.write_bytes(pickle.dumps({"labels": [9] * 5, "data": pixels}, protocol=3))
    assert images.load("CIFAR10", "train", tmp_path).labels[10:15].tolist() == [9] * 5
    assert capsys.readouterr().err.count("taken for a set of your own") == 1


def test_arrays_in_the_order_of_fortran(tmp_path: Path) -> None:
    training, test = smooth(23, (3, 32, 32)), smooth(5, (3, 32, 32), seed=1)
    files = cifar_files("CIFAR10", training, test)
    pixels = np.asfortranarray(test.images.flatten(1).numpy())
    files["test_batch"] = python2_pickle({"labels": test.labels.tolist(), "data": pixels})
    write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
    assert torch.equal(images.load("CIFAR10", "test", tmp_path).images, test.images)


@pytest.mark.parametrize("big", ["array", "memo"])
def test_small_pickles_take_little_memory(big: str, tmp_path: Path) -> None:
    """An array whose bytes are a number (numpy makes as many zeros of it), and an object that has a huge number in the memo."""
    files = cifar_files("CIFAR10", smooth(5, (3, 32, 32)), smooth(5, (3, 32, 32)))
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\x00\x00\x00\x04\x85N\x89J\x00\x00\x00\x04tb"  # 2^26
    memo = b"]r\x00\x00\x00\x01"  # 2^24
    files["test_batch"] = b"\x80\x02}U\x04data" + (array if big == "array" else memo) + b"s."
    write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
    message = "an array without bytes" if big == "array" else "is no CIFAR10"
    assert peak_of(lambda: images.load("CIFAR10", "test", tmp_path), message) < 8 * 2**20


def test_grey_and_small() -> None:
    """The mean of each colour whose mean is a whole number is that number: the original has one less for 9 % of them."""
    r, g, b = torch.meshgrid(*3 * [torch.arange(0, 256, 3)], indexing="ij")
    colours = torch.stack([r, g, b]).flatten(1).T.reshape(-1, 3, 1, 1).to(torch.uint8)
    grey = images.channel_mean(ImageSet(colours, torch.zeros(len(colours), dtype=torch.long), ("a",)))
    assert grey.images.shape == (len(colours), 1, 1, 1)
    assert torch.equal(grey.images.flatten().int(), colours.int().sum(1).flatten() // 3)
    data = smooth(3, (3, 32, 32))
    small = images.central_crop(data, 16)
    assert torch.equal(small.images, data.images[:, :, 8:24, 8:24]) and small.images.is_contiguous()


def test_sets_that_are_made_of_cifar(tmp_path: Path) -> None:
    training, test = write_cifar(tmp_path)
    for split, source in (("train", training), ("test", test)):
        grey, small = images.load("BWCIFAR", split, tmp_path), images.load("SMALL", split, tmp_path)
        assert torch.equal(grey.images, images.channel_mean(source).images)
        assert torch.equal(small.images, source.images[:, :, 8:24, 8:24])
        for name, data in (("BWCIFAR", grey), ("SMALL", small)):
            assert data.images.shape[1:] == images.SHAPES[name] and len(data.classes) == images.N_CLASSES[name]
            assert torch.equal(data.labels, source.labels)


# ---- downloads -----------------------------------------------------------------------------------------------------------


def test_torchvision_beside_a_cpu_build_and_its_md5_sums() -> None:
    """It can be imported, and has the same sums."""
    code = """
from common.datasets import images
for name, cifar in images.CIFAR.items():
    theirs = getattr(images._torchvision_datasets(), name)
    assert (theirs.filename, theirs.tgz_md5, theirs.base_folder) == (cifar.archive, cifar.archive_md5, cifar.folder)
    assert [dict(theirs.train_list), dict(theirs.test_list)] == [cifar.batches["train"], cifar.batches["test"]]
    assert theirs.meta == {"filename": cifar.meta, "key": cifar.class_names, "md5": cifar.meta_md5}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not fetched; what is not, is; and a network that is not there is told in a line."""
    calls = []

    def fetch(root: str, train: bool, download: bool) -> None:
        calls.append(train)
        write_mnist(Path(root) / "MNIST" / "raw", smooth(20), smooth(10))

    def fail(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("Error downloading a.gz:\nTried https://a/, got:\n<urlopen error [Errno -2] Name not known>\n")

    monkeypatch.setattr(images, "_torchvision_datasets", lambda: types.SimpleNamespace(MNIST=fail))
    with pytest.raises(DataError, match=r"cannot be downloaded: Error .* got: <urlopen error .*; name a directory that has it"):
        images.load("MNIST", "train", tmp_path, download=True)
    monkeypatch.setattr(images, "_torchvision_datasets", lambda: types.SimpleNamespace(MNIST=fetch))
    for _ in range(2):
        assert len(images.load("MNIST", "train", tmp_path, download=True)) == 20
    assert calls == [True, False]


def test_make_data_fetches_every_published_set_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And looks at both splits of what came."""
    fetched, seen = [], []
    honest = images.load

    def mnist(name: str, root: str, train: bool, download: bool) -> None:
        fetched.append((name, train))
        write_mnist(Path(root) / name / "raw", smooth(20), smooth(10))

    def cifar(name: str, root: str, train: bool, download: bool) -> None:
        fetched.append((name, train))
        write_cifar(Path(root), name)

    def load(name: str, split: str, data_dir: str = "data", *, download: bool = False) -> ImageSet:
        seen.append((name, split))
        return honest(name, split, data_dir, download=download)

    sets = {name: partial(cifar if "CIFAR" in name else mnist, name) for name in images.PUBLISHED}
    monkeypatch.setattr(images, "_torchvision_datasets", lambda: types.SimpleNamespace(**sets))
    monkeypatch.setattr(images, "DEBIAN", {})
    monkeypatch.setattr(images, "load", load)
    monkeypatch.chdir(tmp_path)
    recipe = (Path(__file__).parent.parent / "Makefile").read_text().partition("\ndata:")[2]
    exec(recipe.split('"')[1].replace("\\\n\t", ""), {})
    assert fetched == [(name, train) for name in images.PUBLISHED for train in (True, False)]
    assert seen == [(name, split) for name in images.PUBLISHED for split in images.SPLITS]
