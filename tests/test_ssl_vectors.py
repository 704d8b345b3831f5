"""The SSL methods against numbers of the original implementation (tests/data/duet)."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.models.resnet import BLOCKS, BasicBlock, CifarResNet
from common.run.schedule import warmup_cosine
from common.ssl import duet, essl, simclr, views
from common.ssl import transformations as tf
from common.ssl.duet import DUET, content, structured
from common.ssl.essl import ESSL
from common.ssl.simclr import SimCLR
from common.ssl.steps import classification_loss
from common.ssl.views import Draw, Stack
from tests.reference import DATA, Vectors, assert_agrees


def cases(file: str) -> list[str]:
    return [f"case{i}/" for i in range(int(Vectors(f"duet/{file}")["n_cases"]))]


def text(v: Vectors, key: str) -> str:
    return str(v.arrays[key])


def check_metrics(metrics: dict[str, Tensor], v: Vectors, prefix: str, tolerance: float = 1e-5) -> None:
    for name, value in metrics.items():
        assert_agrees(value.reshape(()), v[prefix + name].reshape(()), tolerance, name)


def leaves(v: Vectors, *keys: str) -> list[Tensor]:
    return [v[key].clone().requires_grad_() for key in keys]


# ---- losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("nt_xent"))
def test_nt_xent(case: str) -> None:
    v = Vectors("duet/nt_xent")
    a, b = leaves(v, case + "embedding1", case + "embedding2")
    loss = simclr.nt_xent(a, b, float(v[case + "temperature"]))
    assert_agrees(loss, v[case + "loss"], 1e-5)
    loss.mean().backward()
    assert_agrees(a.grad, v[case + "grad1"], 1e-4)
    assert_agrees(b.grad, v[case + "grad2"], 1e-4)
    if float(v[case + "temperature"]) == pytest.approx(0.1):
        loss, metrics = simclr.simclr_loss(a, b)
        total = {key: metrics.pop(key) for key in list(metrics) if "total" in key}
        check_metrics(metrics, v, case)
        for key, value in total.items():  # the original adds the directions up for five images or fewer
            factor = 1 if len(a) > 5 else 0.5
            assert_agrees(value, v[case + key].reshape(()) * factor, 1e-5, key)


def test_nt_xent_of_an_embedding_that_is_zero() -> None:
    v = Vectors("duet/nt_xent")
    loss = simclr.nt_xent(v["zero_row/embedding1"], v["zero_row/embedding2"], float(v["zero_row/temperature"]))
    assert_agrees(loss, v["zero_row/loss"], 1e-5)


def test_jensen_shannon() -> None:
    v = Vectors("duet/jsd")
    stems = sorted({key.rsplit("/", 1)[0] + "/" if "/" in key else "" for key in v.arrays if key.endswith("js_loss")})
    assert stems
    for stem in stems:
        (logits,) = leaves(v, stem + "logits")
        loss = duet.jensen_shannon(logits, v[stem + "targets"])
        assert_agrees(loss, v[stem + "js_loss"].reshape(()), 1e-5)
        loss.backward()
        assert_agrees(logits.grad, v[stem + "grad_logits"], 1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "vonmises"])
def test_targets(kind: str) -> None:
    v = Vectors("duet/targets")
    target = duet.gaussian if kind == "gaussian" else duet.von_mises
    n_cases = int(v[f"{kind}/n_cases"])
    assert n_cases >= 2
    for i in range(n_cases):
        stem = f"{kind}/case{i}/"
        bins, std = int(v[stem + "size"]), float(v[stem + "std"])
        for name in ("column", "matrix"):
            actual = target(v[f"params_{name}"], bins, std)
            assert_agrees(actual, v[stem + name], 1e-5, f"{stem}{name}")


@pytest.mark.parametrize("case", cases("nt_xent_duet"))
def test_duet_loss(case: str) -> None:
    v = Vectors("duet/nt_xent_duet")
    keys = ("embedding1", "embedding2", "joint1", "joint2")
    e1, e2, j1, j2 = leaves(v, *(case + key for key in keys))
    training = bool(v.arrays[case + "training"])
    target = text(v, case + "target")
    assert float(v[case + "sigma"]) == pytest.approx(duet.SIGMA if target == "ga" else duet.CONCENTRATION)
    loss, metrics = duet.duet_loss(
        e1, e2, j1.squeeze(1), j2.squeeze(1), v[case + "aug1"], v[case + "aug2"],
        target=target, weight=float(v[case + "lambd"]), training=training,
    )  # fmt: skip
    check_metrics(metrics, v, case)
    loss.backward()
    for key, leaf in zip(keys, (e1, e2, j1, j2), strict=True):
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_agrees(grad, v[f"{case}grad_{key}"], 1e-4, key)
    assert (j1.grad is not None) == bool(v.arrays[case + "joint1_has_grad"])


@pytest.mark.parametrize("case", cases("essl_loss"))
def test_essl_loss(case: str) -> None:
    v = Vectors("duet/essl_loss")
    e1, e2, logits = leaves(v, case + "embedding1", case + "embedding2", case + "logits")
    code = text(v, case + "code")
    loss, metrics = essl.essl_loss(e1, e2, logits, v[case + "labels"], code=code, weight=float(v[case + "lambd"]))
    check_metrics(metrics, v, case)
    assert ("essl_top_1_mean" in metrics) == (code in ("ron", "fli", "flv", "gra"))
    loss.backward()
    for key, leaf in (("embedding1", e1), ("embedding2", e2), ("logits", logits)):
        assert_agrees(leaf.grad, v[f"{case}grad_{key}"], 1e-4, key)


def test_classification_loss() -> None:
    v = Vectors("duet/classification")
    stems = sorted({key.split("/")[0] + "/" for key in v.arrays if key.endswith("/logits")}) or [""]
    for stem in stems:
        (logits,) = leaves(v, stem + "logits")
        loss, metrics = classification_loss(logits, v[stem + "labels"])
        check_metrics(metrics, v, stem)
        loss.backward()
        assert_agrees(logits.grad, v[stem + "grad_logits"], 1e-4)


# ---- networks ------------------------------------------------------------------------------------------------------------


def fill(module: nn.Module, seed: int, prefixes: tuple[str, ...] = ("",)) -> None:
    """Weights by the rule of the vectors' description."""
    rs = np.random.RandomState(seed)
    for key, value in module.state_dict().items():
        if not key.startswith(prefixes):
            continue
        if key.endswith("num_batches_tracked"):
            value.zero_()
            continue
        z = rs.standard_normal(tuple(value.shape))
        if key.endswith("running_var"):
            z = 1 + 0.5 * np.abs(z)
        elif key.endswith("running_mean"):
            z = 0.1 * z
        elif z.ndim >= 2:
            z = z * np.sqrt(2 / np.prod(z.shape[1:]))
        elif key.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        value.copy_(torch.from_numpy(z.astype(np.float32)))


def make_model(method: str, encoder: CifarResNet, code: str = "", bins: str | int = 0) -> DUET | SimCLR | ESSL:
    if method == "duet" and int(bins):
        return DUET(encoder, ("rot",), 32, n_classes=10, structure="rot", bins=int(bins))
    if method == "essl":
        return ESSL(encoder, ("sca",), 32, n_classes=10, predicted=code)
    return SimCLR(encoder, ("sca",), 32, n_classes=10)


def test_encoders_have_the_published_tensors() -> None:
    published = json.loads((DATA / "duet" / "encoders.json").read_text())["encoders"]
    for name, blocks in BLOCKS.items():
        with torch.device("meta"):
            encoder = CifarResNet((blocks,) * 3)
        expected = published[f"cifar10_{name}"]
        listing = "\n".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in encoder.state_dict().items())
        assert hashlib.sha256(listing.encode()).hexdigest() == expected["listing_sha256"]
        assert sum(p.numel() for p in encoder.parameters()) == expected["parameters"]


def test_models_have_the_published_tensors() -> None:
    published = json.loads((DATA / "duet" / "models.json").read_text())["models"]
    for name, expected in published.items():
        method, _, detail = name.partition("_")
        with torch.device("meta"):
            model = make_model(method, CifarResNet((3, 3, 3)), detail, detail.removeprefix("bins"))
        assert sum(p.numel() for p in model.parameters()) == expected["parameters_total"], name
        outside = [[k, list(v.shape)] for k, v in model.state_dict().items() if not k.startswith("base_network.")]
        entries = [entry for entry in expected["state_dict_entries_outside_encoder"] if not entry[0].startswith("augmentor")]
        assert outside == entries, name


def test_residual_block() -> None:
    v = Vectors("duet/basic_block")
    tried = 0
    for i in range(int(v["n_cases"])):
        case = f"case{i}/"
        if text(v, case + "option") == "A":
            continue  # zeros instead of a convolution: used by no model
        tried += 1
        block = BasicBlock(int(v[case + "in_planes"]), int(v[case + "planes"]), int(v[case + "stride"]))
        block.load_state_dict(v.under(case + "param/"))
        (x,) = leaves(v, case + "x")
        assert_agrees(block.eval()(x), v[case + "y_eval"], 1e-5)
        y = block.train()(x)
        assert_agrees(y, v[case + "y_train"], 1e-5)
        y.backward(v[case + "grad_y"])
        assert_agrees(x.grad, v[case + "grad_x"], 1e-4)
        for name, parameter in block.named_parameters():
            assert_agrees(parameter.grad, v[f"{case}grad/{name}"], 1e-4, name)
        for name, value in v.under(case + "after/").items():
            assert_agrees(block.state_dict()[name].float(), value.float(), 1e-5, name)
    assert tried


@pytest.mark.parametrize("case", cases("encoder"))
def test_encoder(case: str) -> None:
    v = Vectors("duet/encoder")
    blocks = (3, 3, 3) if text(v, case + "name") == "cifar10_resnet20" else (1, 1, 1)
    encoder = CifarResNet(blocks, in_channels=int(v[case + "channels"]))
    fill(encoder, int(v[case + "seed"]))
    assert_agrees(encoder.conv1.weight.flatten()[:8], v[case + "first_conv_corner"].flatten(), 1e-6)
    with torch.no_grad():
        assert_agrees(encoder.eval()(v[case + "x"]), v[case + "y_eval"].flatten(1), 1e-4)
        assert_agrees(encoder.train()(v[case + "x"]), v[case + "y_train"].flatten(1), 1e-3)
    for name, value in v.under(case + "after/").items():
        assert_agrees(encoder.state_dict()[name].float(), value.float(), 1e-5, name)


@pytest.mark.parametrize("name", ["model_duet", "model_duet_ga", "model_simclr", "model_essl_ron", "model_essl_rot"])
def test_whole_models(name: str) -> None:
    v = Vectors(f"duet/{name}")
    method, code = name.split("_")[1], text(v, "code")
    model = make_model(method, CifarResNet((1, 1, 1)), code, int(v["bins"]) if method == "duet" else 0)
    fill(model, int(v["fill_seed"]))
    for phase in ("eval", "train"):
        training = phase == "train"
        model.train(training).zero_grad()
        z1, z2, *z3 = (model.base_network(v[name]) for name in ("x1", "x2", *(["x_essl"] if method == "essl" else [])))
        out = model.outputs(z1, z2, *z3)
        embeddings = out["embedding1"], out["embedding2"]
        if method == "duet":
            matrix1, matrix2 = structured(z1, model.bins), structured(z2, model.bins)
            assert_agrees(matrix1, v[f"{phase}/joint_logits1"].squeeze(1), 1e-4)
            assert_agrees(matrix2, v[f"{phase}/joint_logits2"].squeeze(1), 1e-4)
            loss, metrics = duet.duet_loss(
                *embeddings, matrix1, matrix2, v["aug1"], v["aug2"],
                target=text(v, "target"), weight=float(v["lambd"]), training=training,
            )  # fmt: skip
        elif method == "simclr":
            loss, metrics = simclr.simclr_loss(*embeddings)
        else:
            predicted = out["essl_logits"]
            assert_agrees(predicted, v[f"{phase}/essl_logits"], 1e-4)
            loss, metrics = essl.essl_loss(*embeddings, predicted, v["essl_labels"], code=code, weight=float(v["lambd"]))
        tracked, track = classification_loss(out["class_logits"], v["labels"])
        assert_agrees(out["embedding1"], v[f"{phase}/nce_logits1"], 1e-4)
        assert_agrees(out["embedding2"], v[f"{phase}/nce_logits2"], 1e-4)
        assert_agrees(z1, v[f"{phase}/representations1"], 1e-4)
        assert_agrees(out["class_logits"], v[f"{phase}/linear_classifier"], 1e-4)
        check_metrics(metrics, v, f"{phase}/loss/", 1e-4)
        check_metrics(track, v, f"{phase}/track/", 1e-4)
        assert_agrees(loss + tracked, v[f"{phase}/total"], 1e-4)
    (loss + tracked).backward()
    before_batch_norm = {"head.0.bias", "head.3.bias", "head.6.bias"}
    before_batch_norm |= {"base_network.final_bn.1.bias"} if method == "simclr" else set()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if key in before_batch_norm:
            assert parameter.grad.norm() < 1e-6  # truly 0
        else:
            assert_agrees(parameter.grad.norm(), v[f"train/gradnorm/{key}"], 2e-3, key)
    for key, grad in v.under("train/grad/").items():
        assert_agrees(model.get_parameter(key).grad, grad, 1e-2 if "conv1" in key else 1e-4, key)


def test_duet_layer() -> None:
    v = Vectors("duet/duet_layer")
    tried = 0
    for case in sorted({key.split("/")[0] for key in v.arrays if "/" in key}):
        if text(v, f"{case}/pooler") != "sum" or int(v[f"{case}/num_groups"]) != 1 or int(v[f"{case}/bins"]) == 0:
            continue  # what no model uses
        z, bins = v[f"{case}/z"], int(v[f"{case}/bins"])
        assert_agrees(structured(z, bins), v[f"{case}/joint"].squeeze(1), 1e-6)
        assert_agrees(content(z, bins), v[f"{case}/content"], 1e-5)
        tried += 1
    assert tried


# ---- views ---------------------------------------------------------------------------------------------------------------


def test_transformations() -> None:
    v = Vectors("duet/aug_images")
    images, size = v["images"], int(v["output_size"])

    def mask(name: str) -> Tensor:
        return v[f"{name}/applied"] > 0

    corners = v["sca/src"]
    boxes = torch.cat([corners[:, 0], corners[:, 2]], 1)
    assert_agrees(tf.crop_and_resize(images, boxes, size), v["sca/y"], 1e-5)
    assert_agrees(tf.rotate(images, v["rot/degrees"]), v["rot/y"], 2e-5)
    assert_agrees(tf.flip(images, mask("fli"), 3), v["fli/y"], 0)
    assert_agrees(tf.flip(images, mask("flv"), 2), v["flv/y"], 0)
    assert_agrees(tf.blur(images, v["blu/sigma"].nan_to_num(0)), v["blu/y"], 1e-5)
    assert_agrees(tf.to_grey(images, mask("gra")), v["gra/y"], 1e-5)
    assert_agrees(tf.resize(images, size), v["resize/y"], 1e-5)
    assert_agrees(tf.centre_crop(images, size), v["center_crop/y"], 0)
    assert_agrees(tf.quarter_turns(images, (v["ron/degrees"] / 90).long()), v["ron/y"], 0)
    assert_agrees(views.clean_view(images, 20), v["normalize/y"], 1e-6)
    for name in ("jit0", "jit1"):
        identity = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
        factors = torch.stack([v[f"{name}/{key}"].nan_to_num(neutral) for key, neutral in identity.items()], 1)
        assert_agrees(tf.jitter(images, factors, v[f"{name}/order"].tolist()), v[f"{name}/y"], 1e-5)


def test_parameters() -> None:
    v = Vectors("duet/aug_params")

    def check(code: str, values: Tensor, key: str, size: int = 32) -> None:
        assert_agrees(views.normalised(code, values, size)[:, None], v[key], 1e-6, code)

    for i in range(int(v["sca/n_cases"])):
        corners = v[f"sca/case{i}/src"]
        boxes = torch.cat([corners[:, 0], corners[:, 2]], 1)
        check("sca", boxes, f"sca/case{i}/param", int(v[f"sca/case{i}/output_size"]))
    check("rot", v["rot/degrees"], "rot/param")
    check("ron", (v["ron/degrees"] / 90).long(), "ron/param")
    for code in ("fli", "flv", "gra"):
        check(code, v[f"{code}/applied"] > 0, f"{code}/param")
    check("blu", v["blu/applied"] * 0.7, "blu/param")
    applied = v["jit/mask"] > 0
    factors = views.UNCHANGED.repeat(len(applied), 1)
    factors[applied] = torch.stack([v[f"jit/{name}"] for name in ("brightness", "contrast", "saturation", "hue")], 1)
    for code in views.COLOURS:
        check(code, factors, f"{code}/param")
    i = 0
    while f"eval{i}/x" in v:  # the clean view
        size = int(v[f"eval{i}/output_size"])
        assert_agrees(views.clean_view(v[f"eval{i}/x"], size), v[f"eval{i}/y"], 1e-6)
        n = len(v[f"eval{i}/x"])
        assert_agrees(Stack(["ccr"], size).parameter("sca", Draw((torch.zeros(n),), ())), v[f"eval{i}/param/sca"], 1e-6)
        i += 1
    assert i


def test_stacks() -> None:
    """The order of operations, and the strengths, for the lists of codes in the reference (two are mended: see docs/ssl.md)."""
    names = {
        "RandomResizedCrop": "sca", "RandomRotation": "rot", "RandomRotation90": "ron", "RandomHorizontalFlip": "fli",
        "RandomVerticalFlip": "flv", "RandomGaussianBlur": "blu", "RandomGrayscale": "gra", "ColorJitter": "jit",
        "Resize": "res", "CenterCrop": "ccr",
    }  # fmt: skip
    for codes, expected in json.loads((DATA / "duet" / "stacks.json").read_text()).items():
        stack = Stack(codes.split(), 32)
        operations = [names[name] for name in expected["train"] if name != "Normalize"]
        if codes == "hue sca bri con sat":
            operations = ["jit", "sca"]  # the colours stand where the first of them is
        if codes == "bri jit con":
            operations = ["jit", "ccr"]
        assert stack.operations == operations, codes
        if "jit" not in codes:
            assert_agrees(stack.strengths, torch.tensor(list(expected["strength"].values())), 1e-6)
        else:
            assert torch.equal(stack.strengths, views.STRENGTHS)  # jit is the full jitter


def test_essl_tasks() -> None:
    v = Vectors("duet/essl_transforms")
    for code in ("ron", "fli", "flv", "gra"):
        made, labels = essl.make_task(code, v["images"], torch.zeros(3))
        assert_agrees(made, v[f"{code}/images"], 1e-5)
        assert torch.equal(labels, v[f"{code}/labels"])
    for code in essl.VALUE_CODES:
        labels = v[f"{code}/labels"]
        values = v["rot/degrees"] if code == "rot" else labels[:, 0]
        made, made_labels = essl.make_task(code, v["continuous_images"], values)
        assert_agrees(made, v[f"{code}/images"], 2e-5, code)
        assert_agrees(made_labels, labels, 1e-6, code)


# ---- schedule ------------------------------------------------------------------------------------------------------------


def test_schedule() -> None:
    v = Vectors("duet/scheduler")
    stems = sorted({key.rsplit("/", 1)[0] + "/" for key in v.arrays if key.endswith("/multipliers")}) or [""]
    for stem in stems:
        total, warmup = int(v[stem + "T_max"]), int(v[stem + "warmup"])
        for epoch, expected in enumerate(v.arrays[stem + "multipliers"]):
            assert warmup_cosine(epoch, warmup, total) == pytest.approx(float(expected), abs=1e-12), (stem, epoch)
