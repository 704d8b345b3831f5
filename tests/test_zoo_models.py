"""Architectures of the zoo against the original: keys, counts, outputs, gradients, statistics; saved models; stitch points."""

import doctest
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from common.models import cct, zoo
from common.symmetry.stitching import StitchPoint, stitch_points
from tests.reference import DATA, Vectors, assert_agrees

KNOWN = json.loads((DATA / "modelsym" / "models.json").read_text())


@pytest.fixture(scope="module")
def small() -> Vectors:
    return Vectors("modelsym/models_small")


def relus(model: nn.Module) -> list[StitchPoint]:
    """The stitch points at ReLUs; transformers have others."""
    return [point for point in stitch_points(model) if isinstance(model.get_submodule(point.name), nn.ReLU)]


@pytest.mark.parametrize("arch", zoo.ARCHITECTURES)
def test_every_architecture_has_the_originals_parameters_keys_and_relus(arch: str) -> None:
    with torch.device("meta"):
        model = zoo.make(arch)
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    known = KNOWN[arch]
    assert sum(p.numel() for p in model.parameters()) == known["parameters"]
    if "state_dict" in known:
        assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == known["state_dict"]
    if "relu_layers" in known:
        points = relus(model)
        found = [(point.index, point.name, list(point.shape)) for point in points]
        assert found == [(layer["index"], layer["name"], layer["shape"]) for layer in known["relu_layers"]]
        inside = [point.index for point in points if point.inside_block]
        # every second ReLU after that of the stem
        assert inside == ([point.index for point in points][1::2] if arch.startswith("resnet") else [])


@pytest.mark.parametrize("arch", zoo.CNNS)
def test_cnns_compute_what_the_original_does(arch: str, small: Vectors) -> None:
    model = zoo.make(arch, width=int(small["c"]))
    model.load_state_dict(small.under(f"{arch}/param/"))
    x, y = small["x"], small["y"]
    assert_agrees(model.eval()(x), small[f"{arch}/out_eval"], 1e-4)
    out = model.train()(x)
    assert_agrees(out, small[f"{arch}/out_train"], 1e-4)
    loss = F.cross_entropy(out, y)
    assert_agrees(loss, small[f"{arch}/loss_train"], 1e-4)
    loss.backward()
    for name, expected in small.under(f"{arch}/grad/").items():
        assert_agrees(model.get_parameter(name).grad, expected, 1e-4, name)
    assert (f"{arch}/grad/0.weight" in small) == (arch in ("mCNN", "mCNN_k"))
    after = small.under(f"{arch}/after_train/")
    assert after.keys() == dict(model.named_buffers()).keys()
    for name, expected in after.items():
        assert_agrees(model.get_buffer(name).float(), expected.float(), 1e-4, name)


def test_relu_outputs_of_mcnn(small: Vectors) -> None:
    model = zoo.make("mCNN", width=4)
    model.load_state_dict(small.under("mCNN/param/"))
    outputs = []
    for point in relus(model):
        model.get_submodule(point.name).register_forward_hook(lambda _, __, out: outputs.append(out.clone()))
    model.eval()(small["x"][:2])
    for k, output in enumerate(outputs):
        assert_agrees(output, small[f"mCNN/relu/{k}"], 1e-4, f"ReLU {k}")
    assert len(outputs) == 4


@pytest.mark.parametrize("which", ["a", "b"])
def test_resnet20_computes_what_the_original_does(which: str) -> None:
    vectors = Vectors(f"modelsym/resnet20_{which}")
    model = zoo.make("resnet20")
    model.load_state_dict(vectors.under("param/"))
    outputs = []
    for point in relus(model):
        model.get_submodule(point.name).register_forward_hook(lambda _, __, out: outputs.append(out[:1].clone()))
    assert_agrees(model.eval()(vectors["x"]), vectors["out_eval"], 1e-4)
    assert_agrees(torch.stack([out.mean() for out in outputs]), vectors["relu_mean"], 1e-4)
    assert_agrees(torch.stack([out.std(correction=0) for out in outputs]), vectors["relu_std"], 1e-4)
    assert [list(out.shape[1:]) for out in outputs] == vectors["relu_shapes"].tolist()
    assert_agrees(outputs[-1], vectors["relu_last"], 1e-4)
    assert_agrees(model.train()(vectors["x"]), vectors["out_train"], 1e-4)
    for name, expected in vectors.under("after_train/").items():
        assert_agrees(model.get_buffer(name).float(), expected.float(), 1e-4, name)


def small_cct(vectors: Vectors) -> cct.CCT:
    config = vectors.config
    return cct.CCT(
        n_layers=config["num_layers"],
        n_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        embedding_dim=config["embedding_dim"],
        img_size=config["img_size"],
    )


def test_cct_computes_what_the_original_does() -> None:
    vectors = Vectors("modelsym/cct")
    model = small_cct(vectors)
    model.load_state_dict(vectors.under("param/"))
    model.eval()
    after = {}
    for name, block in model.classifier.blocks.named_children():
        block.register_forward_hook(lambda _, __, out, name=name: after.update({name: out}))
    assert_agrees(model.tokenizer(vectors["x"]), vectors["tokens"], 1e-4)
    assert_agrees(model(vectors["x"]), vectors["out_eval"], 1e-4)
    assert after.keys() == vectors.under("after/").keys()
    for name, expected in vectors.under("after/").items():
        assert_agrees(after[name], expected, 1e-4, name)


def test_cct_can_be_stitched_behind_a_block_and_loads_plain_keys() -> None:
    vectors = Vectors("modelsym/cct")
    model = small_cct(vectors)
    own = vectors.under("param/")
    plain = {key.replace("transformer_block_", ""): value for key, value in own.items()}
    assert plain.keys() != own.keys()
    model.load_state_dict(cct.stitchable_keys(plain))
    model.eval()
    blocks = model.classifier.blocks
    blocks.transformer_block_0 = torch.nn.Sequential(blocks.transformer_block_0, torch.nn.Identity())
    assert_agrees(model(vectors["x"]), vectors["out_eval"], 1e-4)


def test_cct_drops_out_in_training_alone() -> None:
    torch.manual_seed(0)
    model = cct.CCT(n_layers=1, n_heads=2, mlp_ratio=1, embedding_dim=8, img_size=8)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


# ---- saved models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mCNN", "cwCNN_k", "resnet20", "cct_2_3x2_32"])
def test_saved_models_load_with_their_width_and_classes(arch: str, tmp_path: Path) -> None:
    model = zoo.make(arch, 7, 5 if arch in zoo.CNNS else None).eval()
    torch.save(model.state_dict(), tmp_path / "0.pt")
    loaded = zoo.load(tmp_path / "0.pt", arch)
    x = torch.randn(2, 3, 32, 32)
    assert not loaded.training and torch.equal(loaded(x), model(x))


def test_a_plain_transformer_loads(tmp_path: Path) -> None:
    model = zoo.make("cct_2_3x2_32").eval()
    torch.save({k.replace("transformer_block_", ""): v for k, v in model.state_dict().items()}, tmp_path / "0.pt")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(zoo.load(tmp_path / "0.pt", "cct_2_3x2_32")(x), model(x))


def test_what_is_no_saved_model_of_the_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.pt"

    def message(arch: str) -> str:
        with pytest.raises(InputError) as error:
            zoo.load(path, arch)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    assert "there is no checkpoint" in message("mCNN")
    path.write_bytes(b"no model")
    assert "damaged" in message("mCNN")
    torch.save([1, 2], path)
    assert "no state dict" in message("mCNN")
    torch.save(zoo.make("mCNN", width=2).state_dict(), path)
    assert "is no mCNN_k: it lacks 0.bias, 2.weight, 2.bias and 4 more and also has 1.weight, 1.bias," in message("mCNN_k")
    assert "is no cwCNN: 3.weight is (4, 2, 3, 3) there, not (2, 2, 3, 3)" in message("cwCNN")
    assert "is no resnet20: it lacks" in message("resnet20")


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(zoo) == (0, 1)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="no architecture 'lenet'"):
        zoo.make("lenet")
    with pytest.raises(ValueError, match="resnet20 has no width"):
        zoo.make("resnet20", width=3)
