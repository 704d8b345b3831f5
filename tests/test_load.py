"""common.load and common.export: every model of the suite comes back from its file, and what is no such file is refused."""

import argparse
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import amortised_clustering
import amortised_mog
import common
import routing_networks
import swarm_transformer
import train_ssl
import train_zoo
from common import checkpoint, trained
from common.checkpoint import CheckpointError
from common.datasets import multitask
from common.datasets.classification import load_splits
from common.errors import InputError
from common.models import routed, zoo
from common.models.resnet import CifarResNet
from common.models.sets import MODEL_TYPES
from common.ssl import evaluation
from common.ssl.models import load_encoder, load_for_images
from common.ssl.simclr import SimCLR
from common.zoo import training as zoo_training
from tests.small_images import smooth, write_mnist

ROOT = Path(__file__).parent.parent
ROUTED = {
    "in_channels": 1, "sizes": [[32, 4], [4, 3]], "n_tasks": 3, "n_modules": 3, "n_agents": 2, "exploration": 0.1,
    "collaboration": 0.3,
}  # fmt: skip
SMALL_SETS = {"n_in": 2, "n_out": 10, "n_hidden": 12, "n_heads": 2, "n_ind_points": 3, "n_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: ("make_set_model", {"kind": kind, **SMALL_SETS}) for kind in MODEL_TYPES},
    "POMA": ("make_set_model", {"kind": "Swarm", **SMALL_SETS, "pooling": "POMA", "n_layers": 1}),
    "images": ("ImageTransformer", {"shape": [1, 8, 6], "n_hidden": 8, "n_layers": 2, "n_iter": 2}),
    "colours by class": ("ImageTransformer", {"shape": [3, 4, 4], "n_hidden": 8, "n_classes": 3, "learn_loc": True}),
    "mixture": ("MixtureNetwork", {"n_dim": 3, "n_clust": 2, "n_hidden": 8, "dropout": 0.1}),
    "attention": ("MixtureNetwork", {"n_dim": 1, "n_clust": 4, "n_hidden": 12, "pooling": "POMA", "attention": True}),
    "encoder": ("CifarResNet", {"blocks": [1, 1, 1], "in_channels": 3, "width": 2}),
    **{
        model: ("make_routed", {"model": model, "decision": decision, **ROUTED})
        for model, decision in zip(routed.MODELS, ("WPL", "WPL", "ActorCritic", "SARSA", "GumbelSoftmax", "WPL"), strict=True)
    },
    "RELAX": ("make_routed", {"model": "dispatched", "decision": "RELAX", **ROUTED}),
}
PREFIX = {"CifarResNet": trained.ENCODER}


def make(name: str) -> nn.Module:
    """A model with weights and buffers that no constructor makes."""
    constructor, arguments = MODELS[name]
    torch.manual_seed(1)
    model = trained.CONSTRUCTORS[constructor](**arguments)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor + 1 if not tensor.is_floating_point() else torch.randn_like(tensor).abs() / 4)
    return model


def content(name: str) -> dict[str, Any]:
    """A checkpoint of it, with what else a best.pkl has."""
    constructor, arguments = MODELS[name]
    weights = {PREFIX.get(constructor, "") + key: value for key, value in make(name).state_dict().items()}
    data = {"name": "cifar10", "image_size": 32, "center_crop": False} if constructor == "CifarResNet" else {}
    description = {"constructor": constructor, "arguments": arguments, "data": data}
    return {"model": weights, "optimizer": {"state": {}}, "name": "a", "best_val_loss": 1.5, "description": description}


def save(path: Path, name: str = "mixture", **changes: Any) -> Path:
    checkpoint.save(content(name) | changes, path)
    return path


def changed(name: str = "mixture", **changes: Any) -> dict[str, Any]:
    return {"description": content(name)["description"] | changes}


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    assert type(a) is type(b) and str(a) == str(b)
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]


# ---- what is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back(name: str, tmp_path: Path) -> None:
    model, path = make(name), save(tmp_path / "best.pkl", name)
    rng = torch.get_rng_state()
    with torch.device("meta"):  # whatever the user's default is
        loaded = common.load(path)
    assert torch.equal(torch.get_rng_state(), rng)  # nothing was drawn
    assert_same_model(loaded, model)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert not any(module.training for module in loaded.modules())
    json.dumps(content(name)["description"])  # plain values
    out = common.export(path, tmp_path / "small.pkl")
    assert_same_model(common.load(out), model)
    assert checkpoint.read(out).keys() - {"encoder", "options"} == {"model", "description", "name", "best_val_loss"}


@pytest.mark.parametrize("arch", ["cwCNN", "resnet20", "cct_2_3x2_32"])
def test_a_member_of_a_zoo_is_known_by_its_weights(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = zoo.make(arch, 3, 2 if arch in zoo.CNNS else None)
    checkpoint.save(model.state_dict(), tmp_path / "0.pt")
    assert_same_model(common.load(tmp_path / "0.pt"), model)
    assert_same_model(common.load(common.export(tmp_path / "0.pt", tmp_path / "small.pkl")), model)


def test_a_member_of_a_zoo_is_what_its_record_says(tmp_path: Path) -> None:
    """Two architectures differ in their activations alone."""
    path, model = tmp_path / "7.pt", zoo.make("mCNN_k_sigmoid", width=2)
    checkpoint.save(model.state_dict(), path)
    refuses(path, "of mCNN_k or mCNN_k_sigmoid, whose weights look the same")
    (tmp_path / "7.json").write_text('{"options": {"arch": "mCNN_k_sigmoid", "dataset": "mnist"}}')
    assert_same_model(common.load(path), model)
    assert checkpoint.read(common.export(path, tmp_path / "a"))["description"]["data"] == {"name": "mnist"}
    (tmp_path / "7.json").write_text('{"options": {"arch": "mCNN", "dataset": "mnist"}}')
    refuses(path, "does not fit its description")
    (tmp_path / "7.json").write_text('{"options": {"arch": "__import__"}}')
    refuses(path, "7.json is of another version")


def test_an_encoder_comes_without_its_heads(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = SimCLR(CifarResNet((1, 1, 1), width=2), ("sca",), 8, n_classes=3)
    options = {"dataset": "cifar10", "image_size": 8, "center_crop": True, "save_dir": "home"}
    old = {"model": model.state_dict(), "encoder": model.base_network.options, "options": options, "steps": 5}
    checkpoint.save(old, tmp_path / "old.pt")  # of before descriptions
    assert_same_model(common.load(tmp_path / "old.pt"), model.base_network)
    out = common.export(tmp_path / "old.pt", tmp_path / "small.pt")
    assert out.stat().st_size < (tmp_path / "old.pt").stat().st_size / 10 and b"home" not in out.read_bytes()
    assert_same_model(load_encoder(out), model.base_network)  # as train_ssl.py --linear-probe reads it
    assert load_for_images(out, None)[1] == {"dataset": "cifar10", "image_size": 8, "center_crop": True}


def test_directories_of_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save(run / "last.pkl", "attention")
    assert_same_model(common.load(run), make("attention"))  # scripts without a best.pkl report the model of the last epoch
    save(run / "best.pkl", "mixture")
    assert_same_model(common.load(str(run)), make("mixture"))
    run.rename(tmp_path / "run.part")
    refuses(run, "the run has not finished, ")
    assert_same_model(common.load(tmp_path / "run.part"), make("mixture"))
    for name in ("0.pt", "1.pt"):
        checkpoint.save(zoo.make("mCNN", width=1).state_dict(), tmp_path / name)
    refuses(tmp_path, "no directory of a run with one model: it has 0.pt, 1.pt: name one")


def test_a_description_can_be_given(tmp_path: Path) -> None:
    """For files of before."""
    path, description = save(tmp_path / "best.pkl"), content("mixture")["description"]
    old = {key: value for key, value in content("mixture").items() if key != "description"}
    checkpoint.save(old, path)
    refuses(path, "does not say what its model is made of")
    assert_same_model(common.load(path, description), make("mixture"))
    assert_same_model(common.load(common.export(path, tmp_path / "new.pkl", description)), make("mixture"))


def test_the_layout_and_type_of_weights_do_not_matter(tmp_path: Path) -> None:
    weights = {
        key: value.double() if value.is_floating_point() else value for key, value in content("encoder")["model"].items()
    }
    loaded = common.load(save(tmp_path / "a", "encoder", model=weights))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_run_is_described_as_any_other() -> None:
    for script, line in ((amortised_clustering, "-type LSTM"), (amortised_mog, ""), (swarm_transformer, "-data CIFAR10 -cond")):
        plain, fused = (script.get_parser().parse_args([*line.split(), *more]) for more in ([], ["-compile"]))
        assert script.describe(plain) == script.describe(fused)


def test_export_replaces_nothing(tmp_path: Path) -> None:
    path, there = save(tmp_path / "best.pkl"), tmp_path / "there"
    there.write_text("mine")
    for out in (there, path):
        before = out.read_bytes()
        with pytest.raises(InputError, match="is there: remove it, or name another file"):
            common.export(path, out)
        assert out.read_bytes() == before
    with pytest.raises(CheckpointError):
        common.export(there, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_training_does_not_start_from_weights_alone(tmp_path: Path) -> None:
    out, model = common.export(save(tmp_path / "best.pkl"), tmp_path / "small.pkl"), make("mixture")
    with pytest.raises(CheckpointError, match="has weights alone"):
        checkpoint.start_from(out, model, torch.optim.Adam(model.parameters()))


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, common; assert not {'torch', 'numpy'} & sys.modules.keys(); from common import load"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- what is refused -----------------------------------------------------------------------------------------------------


def refuses(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        common.load(path)
    text = str(error.value)
    assert message in text and str(path.parent) in text and "\n" not in text and len(text) < 1500


ARGUMENTS = content("mixture")["description"]["arguments"]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "is no checkpoint of this suite: it holds no model"),
    "empty model": ({"model": {}}, "is no checkpoint of this suite: it holds no model"),
    "no tensors": ({"model": {"a": 3}}, "is no checkpoint of this suite: it holds no model"),
    "a text": ({"description": "MixtureNetwork"}, "does not say what its model is made of"),
    "unknown": (changed(constructor="os.system"), "a model by os.system, not one of make_set_model, "),
    "unhashable": (changed(constructor=["MixtureNetwork"]), "not one of make_set_model, "),
    "no arguments": (changed(arguments=None), "not one of make_set_model, "),
    "another version": (changed(arguments=ARGUMENTS | {"n_wings": 2}), "unexpected keyword argument 'n_wings'"),
    "missing": (changed(arguments={}), "MixtureNetwork makes no model of its arguments"),
    "no sense": (changed(arguments=ARGUMENTS | {"n_clust": 0}), "sizes must be positive"),
    "other type": (changed(arguments=ARGUMENTS | {"n_hidden": "8\n8"}), "MixtureNetwork makes no model of its arguments"),
    "too large": (changed(arguments=ARGUMENTS | {"n_hidden": 10**16}), "MixtureNetwork makes no model of its arguments"),
    "keys": (changed(arguments=ARGUMENTS | {"attention": True, "n_hidden": 8}), "it lacks pma.seed_vectors"),
    "shapes": (changed(arguments=ARGUMENTS | {"n_clust": 3}), "does not fit its description, of MixtureNetwork: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    refuses(save(tmp_path / "best.pkl", **changes), message)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    weights = content("mixture")["model"]
    next(iter(weights.values()))[0] = math.nan
    refuses(save(tmp_path / "best.pkl", model=weights), "has weights that are not finite")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    refuses(path, "there is no checkpoint")
    for foreign in (b"", b"x,y\n1,2\n", b"\x89PNG\r\n" * 50):
        path.write_bytes(foreign)
        refuses(path, "is damaged, or no checkpoint of this suite")
    for state in ([1], 3, {}, {"a": 1}, torch.ones(3), {"weight": torch.ones(3)}):
        checkpoint.save(state, path)
        refuses(path, "of no architecture" if isinstance(state, dict) and "weight" in state else "it holds no model")


def test_damage_is_noticed(tmp_path: Path) -> None:
    path, chance = save(tmp_path / "best.pkl", "encoder"), random.Random(0)
    honest, model = path.read_bytes(), common.load(path)
    for length in (0, 10, len(honest) // 2, len(honest) - 1):
        path.write_bytes(honest[:length])
        refuses(path, "is damaged, or no checkpoint of this suite")
    refused = 0
    for bit in chance.sample(range(8 * len(honest)), 60):
        damaged = bytearray(honest)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = common.load(path)
        except CheckpointError:
            refused += 1
        else:  # padding, or what is noted twice
            assert_same_model(loaded, model)
    assert refused > 15


# ---- docs/api.md ---------------------------------------------------------------------------------------------------------


def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small models, which are not trained, at the places that it names."""
    monkeypatch.chdir(tmp_path)
    mixture = {"n_dim": 2, "n_clust": 4, "n_hidden": 8}
    routing = {**ROUTED, "model": "routed-all-fc", "decision": "WPL", "n_tasks": 6}
    about = {"mean": [0.1], "deviation": [0.3]}
    for place, constructor, arguments, data in (
        ("amortised_clustering/NAME/best.pkl", "make_set_model", {"kind": "Swarm", **SMALL_SETS}, {}),
        ("swarm_transformer/NAME/best.pkl", "ImageTransformer", {"shape": [1, 28, 28], "n_hidden": 4, "n_iter": 1}, {}),
        ("amortised_mog/NAME/best.pkl", "MixtureNetwork", mixture, {}),
        ("train_ssl/NAME/encoder_cifar10_duet_rot_eq-rot_target-ga_final.pt", *MODELS["encoder"], {}),
        ("routing_networks/NAME/last.pkl", "make_routed", routing, about),
        ("../old/best.pkl", "MixtureNetwork", mixture | {"n_hidden": 64}, None),
    ):
        path = Path("results", place)
        path.parent.mkdir(parents=True)
        weights = trained.CONSTRUCTORS[constructor](**arguments).state_dict()
        weights = {PREFIX.get(constructor, "") + key: value for key, value in weights.items()}
        description = {"constructor": constructor, "arguments": arguments, "data": data} if data is not None else {}
        checkpoint.save({"model": weights, "description": description}, path)
    Path("results/zoo/cifar10-mCNN").mkdir(parents=True)
    checkpoint.save(zoo.make("mCNN", width=2).state_dict(), Path("results/zoo/cifar10-mCNN/0.pt"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S)
    assert len(blocks) == 8
    for block in blocks:
        exec(block, {})


# ---- runs: what is loaded has the figures of the report, to the last bit -------------------------------------------------


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 training and 100 test images of one channel."""
    return str(write_mnist(tmp_path_factory.mktemp("grey"), smooth(200), smooth(100, seed=1)))


@pytest.fixture
def in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory; scripts draw no pictures there."""
    monkeypatch.chdir(tmp_path)
    for script in (amortised_clustering, amortised_mog, swarm_transformer, routing_networks):
        monkeypatch.setattr(script, "draw", lambda *_: None)
    return tmp_path


def run(script: Any, line: str) -> tuple[Path, argparse.Namespace, dict[str, Any]]:
    """The directory of the run, its options and its report."""
    assert script.main(line.split()) == 0
    (path,) = Path("results", script.__name__).iterdir()
    args, result = (json.loads((path / name).read_text()) for name in ("args.json", "result.json"))
    return path, argparse.Namespace(**args), result


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_clustering(kind: str, in_place: Path) -> None:
    line = f"-type {kind} -n_hidden 12 -n_layers 2 -n_iter 2 -tasks 20 -bs 6 -max_epochs 2 -no_cuda"
    path, args, result = run(amortised_clustering, line)
    data = amortised_clustering.make_data(args.tasks, args.bs, args.seed, torch.device("cpu"))
    for file in (path, common.export(path, "small.pkl")):
        measured = amortised_clustering.validate(common.load(file), data.tasks, data.validation, "fp32")
        assert amortised_clustering.means(measured) == result["model"]
    assert checkpoint.read(path / "last.pkl")["description"] == amortised_clustering.describe(args)


@pytest.mark.slow
def test_mixture(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS_PER_EPOCH": 3, "VALIDATION_BATCHES": 2, "TEST_BATCHES": 2}.items():
        monkeypatch.setattr(amortised_mog, name, value)
    path, args, result = run(amortised_mog, "-n_hidden 12 -n_iter 2 -bs 3 -n_dim 3 -pma -dropout 0.1 -max_epochs 2 -no_cuda")
    batches = [amortised_mog.batch_of(args, amortised_mog.TEST, index) for index in range(2)]
    with torch.no_grad():
        values = torch.cat([amortised_mog.likelihood(args, common.load(path), batch) for batch in batches])
    assert values.mean().item() == result["log_likelihood"]["model"]


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "-cond -learn_loc true -n_layers 2"])
def test_images(more: str, in_place: Path, grey: str) -> None:
    line = f"-data MNIST -n_hidden 8 -n_iter 2 -bs 50 -max_epochs 1 -no_cuda -data_dir {grey} {more}"
    path, args, result = run(swarm_transformer, line)
    data = swarm_transformer.load_data("MNIST", grey, args.seed, torch.device("cpu"))
    values = swarm_transformer.evaluate(common.load(path), data.test, "fp32", args.bs)
    assert values.mean().item() == result["test"]["nats"]
    assert checkpoint.read(path / "best.pkl")["description"]["data"]["classes"] == list("0123456789")


@pytest.mark.slow
def test_encoder(in_place: Path, grey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_ssl, "draw_curves", lambda *_: None)
    monkeypatch.setattr(train_ssl.pictures, "plot_views", lambda *_: None)
    monkeypatch.setattr(train_ssl.pictures, "draw_marginals", lambda *_: None)
    line = "--dataset mnist --encoder cifar10_resnet20 --encoder-width 1 --image-size 8 --batch-size 16 --epochs 1 --tx rot"
    path, args, result = run(train_ssl, f"{line} --equi-tx rot --device cpu --dataset-root {grey}")
    data = train_ssl.load_data(args, torch.device("cpu"))
    (saved,) = path.glob("*.pt")
    for file in (path, saved, path / "last.pkl", common.export(path, "small.pt")):
        splits = evaluation.represent_splits(common.load(file), data.training, data.test, args.image_size)
        assert evaluation.nearest_neighbours(*splits, 10) == result["knn"]
        errors = evaluation.rotation_errors(common.load(file), data.training.images, data.test.images, 8, 0, args.seed)
        assert errors == result["rotation_error_degrees"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mCNN", "resnet20", "cct_2"])
def test_member_of_a_zoo(arch: str, in_place: Path, grey: str) -> None:
    arch = next(name for name in zoo.ARCHITECTURES if name.startswith(arch))
    line = f"--arch {arch} --dataset mnist --data-dir {grey} --subset 40 --epochs 1 --batch-size 16 --device cpu --out zoo"
    assert train_zoo.main(line.split()) == 0
    data = load_splits("MNIST", grey, torch.device("cpu"), seed=0, subset=40)
    measured = zoo_training.evaluate(common.load("zoo/0.pt"), data.test, data.preprocessing)
    assert measured == json.loads(Path("zoo/0.json").read_text())["test"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["routed-all-fc --decision GumbelSoftmax --exploration-end 0.5", "dispatched", "soft-mixture"]
)
def test_routed_network(model: str, in_place: Path, grey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multitask, "PER_TASK", {"train": 18, "test": 9})
    line = f"--model {model} --data MNIST-MTL --epochs 2 --batch-size 64 --width 4 --device cpu --data-dir {grey}"
    path, args, result = run(routing_networks, line)
    data = routing_networks.Data(args, torch.device("cpu"))
    loaded = SimpleNamespace(model=common.load(path), check_signal=lambda: None)
    measured = routing_networks.evaluate(args, data, loaded)
    assert measured.pop("maps") == result["maps"] and measured == result["test"]
    about = checkpoint.read(path / "last.pkl")["description"]["data"]
    assert torch.equal(torch.tensor(about["mean"]).view_as(data.mean), data.mean)


@pytest.mark.slow
def test_a_run_of_before_resumes(in_place: Path) -> None:
    """Its last.pkl has no description; the one that follows has."""
    line = "-type SetLinear -n_hidden 4 -tasks 20 -bs 6 -max_epochs 2 -no_cuda"
    path, _, result = run(amortised_clustering, line)
    part = path.rename(path.with_name(path.name + ".part"))
    (part / "result.json").unlink()
    for name in ("last.pkl", "best.pkl"):
        state = checkpoint.read(part / name)
        del state["description"]
        checkpoint.save(state, part / name)
    _, _, again = run(amortised_clustering, f"{line} -resume auto")
    assert again["model"] == result["model"]
