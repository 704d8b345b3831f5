"""Checkpoints: replaced in one step, read without running code, refused if a single bit has changed."""

import errno
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common import checkpoint
from common.checkpoint import CheckpointError
from common.models import zoo
from common.models.resnet import CifarResNet
from common.run.command import Command
from common.run.metrics import Meter
from common.run.state import State, rng_state
from common.ssl import models

N_FLIPS = 300  # bits of a file


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters())
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "name": "x", "best_val_loss": 1.5}


def trained(model: torch.nn.Module) -> dict[str, Any]:
    """The same with moments."""
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}


def same(a: Any, b: Any) -> bool:
    """Whether two contents of checkpoints are equal to the last bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def refuses(path: Path, read: Callable[[Path], object] = checkpoint.read, message: str = "") -> None:
    """With one line that names the file, which stays as it is."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and message in str(error.value)
    assert before is None or path.read_bytes() == before


# ---- writing -------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    model, other, path = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    checkpoint.save(state_of(model), path)
    state = checkpoint.read(path)
    checkpoint.load_model(other, state["model"], path)
    assert torch.equal(other.weight, model.weight) and same(state, state_of(model))
    assert [p.name for p in tmp_path.iterdir()] == ["best.pkl"]


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pkl"
    checkpoint.save({"a": 1}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"a": 2}, path)
    assert checkpoint.read(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pkl"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"intact")
    (tmp_path / "file.new").symlink_to("victim")
    (tmp_path / "file").symlink_to("victim")
    checkpoint.atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "victim").read_bytes() == b"intact"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


def test_a_write_that_fails_gives_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The zip writer of PyTorch hides it."""
    full = open("/dev/full", "wb")
    monkeypatch.setattr(checkpoint, "atomic_write", lambda path, write: write(full))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"a": torch.zeros(100_000)}, tmp_path / "last.pkl")
    with pytest.raises(OSError, match="No space left"):
        full.close()


# ---- damage --------------------------------------------------------------------------------------------------------------


def last(path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    state = State(path, {"lr": 0.1}, Command("script"), data="0123", model=model, meter=Meter())
    state.save()


FILES: dict[str, Callable[[Path], None]] = {
    "last.pkl": last,
    "best.pkl": lambda path: checkpoint.save(trained(torch.nn.Linear(2, 3)), path),
    "0.pt": lambda path: checkpoint.save(torch.nn.Linear(20, 30).state_dict(), path),
    "zeros.pt": lambda path: checkpoint.save({"a": torch.zeros(1000)}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_noticed_or_of_no_account(name: str, tmp_path: Path) -> None:
    path, chance, refused = tmp_path / name, random.Random(name), 0
    FILES[name](path)
    content, honest = path.read_bytes(), checkpoint.read(path)
    noted = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # what the archive says of the first tensor
    bits = [*chance.sample(range(8 * len(content)), N_FLIPS), *range(8 * noted, 8 * noted + 8 * 46)]
    for bit in bits:
        path.write_bytes(flipped(content, bit))
        try:
            state = checkpoint.read(path)
        except CheckpointError:
            refused += 1
        else:  # padding, or what is noted twice
            assert same(state, honest), f"bit {bit} has changed what is read"
    assert refused > N_FLIPS / 3


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def with_a_flip_in(path: Path, tensor: torch.Tensor) -> None:
    """Change a bit of a saved tensor that PyTorch itself reads without a word."""
    content = path.read_bytes()
    place = content.index(tensor.numpy().tobytes())
    path.write_bytes(flipped(content, 8 * place + 2))
    before, after = tensor.clone(), torch.load(path, weights_only=True)
    assert not any(same(before, found) for found in tensors_of(after))


def tensors_of(content: Any) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def test_a_flip_that_torch_accepts_is_refused(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    checkpoint.save(state_of(model), path)
    with_a_flip_in(path, model.weight.detach())
    refuses(path, message="damaged")


def test_checksums_are_compared_before_anything_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    checkpoint.save(state_of(model), path)
    with_a_flip_in(path, model.weight.detach())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was used"))
    refuses(path)


def test_saved_networks_are_checked(tmp_path: Path) -> None:
    """A model of a zoo, and an encoder."""
    member, path = zoo.make("mCNN", width=2), tmp_path / "0.pt"
    checkpoint.save(member.state_dict(), path)
    assert same(zoo.load(path, "mCNN").state_dict(), member.state_dict())
    with_a_flip_in(path, next(iter(member.state_dict().values())))
    refuses(path, lambda path: zoo.load(path, "mCNN"), "damaged")

    settings = {"blocks": [1, 1, 1], "width": 2}
    encoder, path = CifarResNet(**settings), tmp_path / "encoder.pt"
    weights = {f"base_network.{name}": tensor for name, tensor in encoder.state_dict().items()}
    checkpoint.save({"model": weights, "encoder": settings, "options": {}}, path)
    assert same(models.load_encoder(path).state_dict(), encoder.state_dict())
    with_a_flip_in(path, next(iter(weights.values())))
    refuses(path, models.load_encoder, "damaged")
    refuses(path, models.read_saved, "damaged")


# ---- files that are no checkpoints, or are made by others ----------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def deflated(content: bytes, path: Path) -> bytes:
    """The same archive, compressed."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return path.read_bytes()


def bomb(path: Path) -> bytes:
    """100 MB of zeros in 100 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    return path.read_bytes()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    good, path, canary = tmp_path / "good.pkl", tmp_path / "best.pkl", tmp_path / "executed"
    checkpoint.save(state_of(torch.nn.Linear(20, 30)), good)
    content = good.read_bytes()
    wrong = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "cut by one byte": content[:-1],
        "something before": b"x" + content,
        "text": b"hello, world\n",
        "numbers": b"1 2 3\n4 5 6\n",
        "a pickle": pickle.dumps({"model": 1}),
        "code": pickle.dumps(Malicious(canary)),
        "zeros": bytes(len(content)),
        "compressed": deflated(content, tmp_path / "deflated"),
        "a bomb": bomb(tmp_path / "bomb"),
    }
    for data in wrong.values():
        path.write_bytes(data)
        refuses(path, message="damaged, or no checkpoint")
    torch.save(Malicious(canary), path)
    refuses(path)
    torch.save(Malicious(canary), path, _use_new_zipfile_serialization=False)
    refuses(path)
    assert not canary.exists()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")  # opening it would take forever
    for name in ("nowhere", "link", "fifo"):
        refuses(tmp_path / name, message="there is no checkpoint")
    refuses(tmp_path, message="is a directory")


@pytest.mark.parametrize("content", [3, None, "x", [1, 2], {}, {"model": 3, "optimizer": 3}, {"model": {}, "optimizer": {}}])
def test_contents_that_are_of_no_use(content: Any, tmp_path: Path) -> None:
    """They are whole files, so who uses them refuses them."""
    path, model = tmp_path / "best.pkl", torch.nn.Linear(2, 3)
    checkpoint.save(content, path)
    before = model.weight.clone()
    refuses(path, lambda path: checkpoint.start_from(path, model, torch.optim.Adam(model.parameters())))
    refuses(path, lambda path: checkpoint.load_model(model, checkpoint.read(path), path))
    refuses(path, lambda path: State(path, {}, Command("script"), model=model).resume())
    for read in (lambda path: zoo.load(path, "mCNN"), models.read_saved):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
    assert torch.equal(model.weight, before)


def test_files_without_checksums_are_read_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state, path = state_of(torch.nn.Linear(2, 3)), tmp_path / "best.pkl"
    checkpoint.save(state, path)
    assert same(checkpoint.read(path), state) and capsys.readouterr().err == ""
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    assert same(checkpoint.read(path), state)
    assert capsys.readouterr().err == f"note: {path} has no checksums, so damage to it cannot be noticed\n"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(checkpoint.read(path), state) and "has no checksums" in capsys.readouterr().err


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    before = model.weight.clone()
    for weights, message in (
        (torch.nn.Linear(2, 4).state_dict(), r"weight is \(4, 2\) there and \(3, 2\) here"),
        (torch.nn.LSTM(2, 4).state_dict(), "other names"),
        ({"weight": torch.ones(3, 2, dtype=torch.int), "bias": torch.ones(3)}, "weight is no tensor of weights"),
        ({"weight": "x", "bias": torch.ones(3)}, "weight is no tensor of weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_model(model, weights, path)
    assert torch.equal(model.weight, before)


def test_start_from_a_checkpoint(tmp_path: Path) -> None:
    """Weights and moments are those of the file, the learning rate is the optimiser's own."""
    old, path = torch.nn.Linear(2, 3), tmp_path / "best.pkl"
    state = trained(old)
    checkpoint.save(state, path)
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    checkpoint.start_from(path, model, optimizer)
    assert torch.equal(model.weight, old.weight) and optimizer.param_groups[0]["lr"] == 0.5
    assert same(optimizer.state_dict()["state"], state["optimizer"]["state"])

    moments = {**state["optimizer"], "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(1, 2)}}}
    nan = {**state["model"], "bias": torch.full((3,), torch.nan)}
    for changed, message in (
        ({"optimizer": moments}, "optimizer of another model"),
        ({"optimizer": None}, "optimizer of another model"),
        ({"optimizer": torch.optim.SGD(torch.nn.LSTM(2, 3).parameters(), lr=1).state_dict()}, "optimizer of another model"),
        ({"model": nan}, "not finite"),
    ):
        checkpoint.save(state | changed, path)
        refuses(path, lambda path: checkpoint.start_from(path, model, optimizer), message)
