"""Stitching against numbers of the original implementation (tests/data/modelsym)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models import zoo
from common.run.schedule import halving
from common.symmetry import matrices
from common.symmetry.stitching import StitchedModel, reestimate_statistics, restore_statistics, stitch
from common.symmetry.stitching_layers import Birkhoff, Full, Lasso, LowRank, StitchingLayer, Wreath
from common.symmetry.train import make_optimizers, training_step
from tests.reference import Vectors, assert_agrees

TOLERANCE = 1e-4


def check_gradients(layer: StitchingLayer, v: Vectors, prefix: str, tolerance: float = TOLERANCE) -> None:
    expected = {name: grad for name, grad in v.under(prefix).items() if name != "bias"}
    assert expected
    for name, grad in expected.items():
        assert_agrees(layer.get_parameter(name).grad, grad, tolerance, prefix + name)


def load(layer: StitchingLayer, parameters: dict[str, Tensor]) -> StitchingLayer:
    layer.load_state_dict({name: value for name, value in parameters.items() if not name.endswith("bias")})
    return layer


def biased(y: Tensor, bias: Tensor) -> Tensor:
    """The vectors' layers have a bias, with which nothing is ever stitched."""
    return y + (bias[:, None, None] if y.ndim == 4 else bias)


# ---- matrices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in Vectors("modelsym/sinkhorn").arrays}))
def test_sinkhorn(case: str) -> None:
    v = Vectors("modelsym/sinkhorn")
    A = v[f"{case}/A"]
    before = A.clone()
    assert_agrees(matrices.sinkhorn(A, int(v[f"{case}/iters"])), v[f"{case}/out"], TOLERANCE)
    assert torch.equal(A, before)


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("unit", ["normalized", "raw"])
@pytest.mark.parametrize("form", ["", "_experimental"])
def test_softsort(tau: float, unit: str, form: str) -> None:
    v = Vectors("modelsym/softsort")
    s = v["s"].clone().requires_grad_()
    out = matrices.softsort(s, tau, normalized=unit == "normalized", rational=form != "")
    assert_agrees(out, v[f"tau{tau}_{unit}{form}/out"], TOLERANCE)
    (out * v["weight_out"]).sum().backward()
    assert_agrees(s.grad, v[f"tau{tau}_{unit}{form}/grad_s"], TOLERANCE)


def test_softsort_of_a_tie() -> None:
    v = Vectors("modelsym/softsort")
    assert_agrees(matrices.softsort(v["tie/s"]), v["tie/out"], TOLERANCE)


@pytest.mark.parametrize("variant", ["default", "rms", "experimental", "nosink", "nosink_rms"])
def test_concave_penalty(variant: str) -> None:
    v = Vectors("modelsym/birkhoff")
    alpha, beta = float(v["reg/alpha"]), float(v["reg/beta"])
    key = "project/in_weight_perms" if "nosink" in variant else "param/weight_perms"
    W = v[key].clone().requires_grad_()
    power = {"rms": -0.5, "nosink_rms": -0.5, "experimental": 1.0}.get(variant, 0.0)
    penalty = matrices.concave_penalty(W, alpha, power)
    if "nosink" in variant:
        penalty = penalty + matrices.marginal_penalty(W, beta)
    assert_agrees(penalty, v[f"reg/{variant}"], TOLERANCE)
    penalty.backward()
    assert_agrees(W.grad, v[f"reg/{variant}/grad/weight_perms"], TOLERANCE)


def test_rounding() -> None:
    v = Vectors("modelsym/birkhoff")
    assert torch.equal(matrices.round_hungarian(v["param/weight_perms"]), v["P_hungarian"])
    assert torch.equal(matrices.round_monotone(v["param/weight_perms"], v["monotone/vector"]), v["monotone/P"])
    w = Vectors("modelsym/wreath")
    assert torch.equal(matrices.round_scores(w["param/weight_perms"]), w["P"])


# ---- stitching layers ----------------------------------------------------------------------------------------------------


def check_layer(layer: StitchingLayer, v: Vectors, case: str, style: str, bias: Tensor) -> None:
    x = v[f"x_{style}"].clone().requires_grad_()
    y = biased(layer.train()(x), bias)
    assert_agrees(y, v[f"{case}/out_train"], TOLERANCE)
    layer.zero_grad()
    (y * v[f"weight_out_{style}"]).sum().backward()
    assert_agrees(x.grad, v[f"{case}/grad_x"], TOLERANCE)
    check_gradients(layer, v, f"{case}/grad/")
    assert_agrees(biased(layer.eval()(x), bias), v[f"{case}/out_eval"], TOLERANCE)


@pytest.mark.parametrize("style", ["conv", "linear"])
@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("scalars", [True, False])
def test_wreath(style: str, tau: float, scalars: bool) -> None:
    v = Vectors("modelsym/wreath")
    layer = load(Wreath(6, tau, scalars=scalars), v.under("param/"))
    check_layer(layer, v, f"{style}_tau{tau}" + ("" if scalars else "_noscalars"), style, v["param/bias"])
    if not scalars:
        assert layer.get_parameter("weight_scalars").grad is None


@pytest.mark.parametrize("style", ["conv", "linear"])
@pytest.mark.parametrize("scalars", [True, False])
def test_birkhoff(style: str, scalars: bool) -> None:
    v = Vectors("modelsym/birkhoff")
    layer = load(Birkhoff(7, scalars=scalars), v.under("param/"))
    check_layer(layer, v, style + ("" if scalars else "_noscalars"), style, v["param/bias"])
    if not scalars:
        assert layer.get_parameter("weight_scalars").grad is None


@pytest.mark.parametrize("sweeps", ["project", "project_nosink"])
def test_projection(sweeps: str) -> None:
    v = Vectors("modelsym/birkhoff")
    layer = load(Birkhoff(7, iters=16 if sweeps == "project" else 0), v.under("project/in_"))
    layer.project()
    assert_agrees(layer.weight_perms, v[f"{sweeps}/weight_perms"], TOLERANCE)
    assert_agrees(layer.weight_scalars, v[f"{sweeps}/weight_scalars"], TOLERANCE)


@pytest.mark.parametrize(("eps", "tolerance"), [(0.001, 1e-3), (0.05, 1e-4)])
def test_projected_gradients(eps: float, tolerance: float) -> None:
    v = Vectors("modelsym/birkhoff")
    layer = load(Birkhoff(7), v.under("param/"))
    with torch.no_grad():
        layer.weight_scalars.copy_(v["pgd/weight_scalars"])
    layer.weight_perms.grad, layer.weight_scalars.grad = v["pgd/g_perms"].clone(), v["pgd/g_scalars"].clone()
    layer.project_gradients(eps)
    assert_agrees(layer.weight_perms.grad, v[f"pgd/eps{eps}/birkhoff"], tolerance)
    assert_agrees(layer.weight_scalars.grad, v[f"pgd/eps{eps}/relu"], tolerance)

    layer.zero_grad()
    (layer(v["x_linear"]) * v["weight_out_linear"]).sum().backward()
    layer.project_gradients(eps)
    check_gradients(layer, v, f"pgd/eps{eps}/linear_grad/", tolerance)


def test_lasso() -> None:
    v = Vectors("modelsym/lasso_lowrank")
    layer = load(Lasso(6, float(v["lasso/multiplier"])), v.under("lasso/param/"))
    bias = v["lasso/param/l.bias"]
    y = layer(v["x_conv"])
    assert_agrees(y, v["lasso/conv/out_train"], TOLERANCE)  # without a bias
    assert_agrees(biased(layer(v["x_linear"]), bias), v["lasso/linear/out_train"], TOLERANCE)
    assert_agrees(layer.penalty(), v["lasso/reg"], TOLERANCE)
    ((y * v["weight_out_conv"]).sum() + layer.penalty()).backward()
    check_gradients(layer, v, "lasso/conv/grad/")
    layer.eval()
    assert_agrees(biased(layer(v["x_linear"]), bias), v["lasso/linear/out_eval"], TOLERANCE)
    for threshold in (0.0001, 0.001):
        layer.threshold = threshold
        case = f"lasso/conv/threshold{threshold}"
        assert_agrees(layer(v["x_conv"]), v[f"{case}/out_eval"], TOLERANCE)
        assert torch.equal(layer.rounded(), v[f"lasso/threshold{threshold}/P"])
    assert layer.sparsity() == pytest.approx(float(v["lasso/threshold0.001/sparsity"]))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank(rank: int) -> None:
    v = Vectors("modelsym/lasso_lowrank")
    layer = load(LowRank(6, rank), v.under(f"lowrank{rank}/conv/param/"))
    y = layer(v["x_conv"])
    assert_agrees(y, v[f"lowrank{rank}/conv/out"], TOLERANCE)
    (y * v["weight_out_conv"]).sum().backward()
    check_gradients(layer, v, f"lowrank{rank}/conv/grad/")
    y = biased(layer(v["x_linear"]), v["lowrank/param/l2.bias"])
    assert_agrees(y, v[f"lowrank{rank}/linear/out"], TOLERANCE)


# ---- stitched models -----------------------------------------------------------------------------------------------------


def make_layer(kind: str, channels: int) -> StitchingLayer:
    match kind:
        case "full":
            return Full(channels)
        case "lowrank":
            return LowRank(channels, 2)
        case "lasso":
            return Lasso(channels, 0.05)
        case "wreath":
            return Wreath(channels)
        case _:
            return Birkhoff(channels, alpha=0.1)


def check_stitched(stitched: StitchedModel, v: Vectors, case: str, x: Tensor, y: Tensor) -> None:
    load(stitched.stitching_layer, v.under(f"{case}/param/stitches.A."))
    with torch.no_grad():
        assert_agrees(stitched.eval()(x), v[f"{case}/out_eval"], TOLERANCE)
    out = stitched.train()(x)
    assert_agrees(out, v[f"{case}/out_train"], TOLERANCE)
    loss = F.cross_entropy(out, y) + stitched.stitching_layer.penalty()
    assert_agrees(loss, v[f"{case}/loss_train"], TOLERANCE)
    loss.backward()
    check_gradients(stitched.stitching_layer, v, f"{case}/grad/stitches.A.")
    for key, value in v.under(f"{case}/after_train/").items():
        assert_agrees(stitched.network.state_dict()[key].float(), value.float(), TOLERANCE, key)


def two_mcnns(v: Vectors) -> list[nn.Module]:
    models = [zoo.make("mCNN", width=4), zoo.make("mCNN", width=4)]
    for model, name in zip(models, ("model1", "model2"), strict=True):
        model.load_state_dict(v.under(f"{name}/param/"))
    return models


@pytest.mark.parametrize("kind", ["full", "birkhoff", "lowrank", "lasso", "wreath"])
@pytest.mark.parametrize("layer", [3, 10])
def test_stitched_mcnn(kind: str, layer: int) -> None:
    v = Vectors("modelsym/stitched_mcnn")
    stitched = stitch(*two_mcnns(v), layer, make_layer(kind, {3: 4, 10: 16}[layer]))
    check_stitched(stitched, v, f"{kind}_at{layer}", v["x"], v["y"])


@pytest.mark.parametrize("kind", ["full", "birkhoff"])
@pytest.mark.parametrize("layer", [19, 40])
def test_stitched_resnet20(kind: str, layer: int) -> None:
    v = Vectors("modelsym/stitched_resnet20")
    models = [zoo.make("resnet20"), zoo.make("resnet20")]
    for model, name in zip(models, "ab", strict=True):
        parameters = Vectors(f"modelsym/resnet20_{name}").under("param/")
        model.load_state_dict({key: value.float() for key, value in parameters.items()})
    stitched = stitch(*models, layer, make_layer(kind, {19: 16, 40: 32}[layer]))
    assert stitched.point.name == str(v.arrays[f"at{layer}/module_name"])
    assert stitched.point.inside_block == (layer == 40)
    check_stitched(stitched, v, f"{kind}_at{layer}", v["x"], torch.arange(len(v["x"])))


# ---- training ------------------------------------------------------------------------------------------------------------


class Run:
    """One of the vectors' runs, from its initial state, on their batches."""

    def __init__(self, name: str, kind: str, start: str):
        self.v, self.name = Vectors("modelsym/train"), name
        self.stitching_layer = load(make_layer(kind, 8), self.v.under(f"{start}/param/stitches.A."))
        self.stitched = stitch(*two_mcnns(self.v), int(self.v["stitch_idx"]), self.stitching_layer)
        self.batches = [(self.v[f"train/x/{i}"], self.v[f"train/y/{i}"]) for i in range(3)]

    def validate(self, epoch: int) -> None:
        """Compare the layer, the last batch norm and the validation with the vectors'."""
        snapshot = self.v.under(f"{self.name}/epoch{epoch}/")
        state = self.stitched.network.state_dict()
        for key in ("running_mean", "running_var"):
            assert_agrees(state[f"12.{key}"], snapshot.pop(f"bn_{key}"), 1e-3, key)
        assert snapshot.keys() == self.stitching_layer.state_dict().keys()
        for key, value in snapshot.items():
            assert_agrees(self.stitching_layer.state_dict()[key], value, 1e-3, f"epoch {epoch}: {key}")
        losses, accuracies = [], []
        self.stitched.eval()
        for i in range(2):
            x, y = self.v[f"val/x/{i}"], self.v[f"val/y/{i}"]
            with torch.no_grad():
                logits = self.stitched(x)
            losses.append(F.cross_entropy(logits, y))
            accuracies.append(100 * (logits.argmax(1) == y).float().mean())
        metrics = self.v.under(f"{self.name}/metrics/")
        assert_agrees(torch.stack(losses).mean(), metrics["val_loss"][epoch - 1], 1e-3, f"epoch {epoch}: loss")
        assert_agrees(torch.stack(accuracies).mean(), metrics["val_acc"][epoch - 1], 1e-4, f"epoch {epoch}: accuracy")

    def check_first_loss(self, loss: Tensor, epoch: int) -> None:
        assert_agrees(loss, self.v[f"{self.name}/metrics/train_loss"][epoch - 1], 1e-3, f"epoch {epoch}: first loss")


@pytest.mark.parametrize("kind", ["full", "lowrank", "lasso", "wreath"])
def test_training(kind: str) -> None:
    run = Run(kind, kind, start=kind)
    full_rate = 0.02 if kind == "wreath" else 0.05
    (optimizer,) = make_optimizers(run.stitching_layer, full_rate)
    for epoch in (1, 2, 3, 4):
        for group in optimizer.param_groups:
            group["lr"] = full_rate * halving(epoch - 1, 4)
        run.stitched.train()
        losses = [training_step(run.stitched, x, y, optimizer) for x, y in run.batches]
        run.check_first_loss(losses[0], epoch)
        run.validate(epoch)


def test_training_of_birkhoff_in_two_halves() -> None:
    run = Run("birkhoff_warmup", "birkhoff", start="birkhoff")
    best = -1.0, run.stitched.state_dict()
    for name, scalars in (("birkhoff_warmup", False), ("birkhoff_second", True)):
        run.name, run.stitching_layer.scalars = name, scalars
        run.stitched.load_state_dict(best[1])
        (optimizer,) = make_optimizers(run.stitching_layer, 0.05)
        for epoch in (1, 2):
            run.stitched.train()
            for x, y in run.batches:
                training_step(run.stitched, x, y, optimizer)
            before = reestimate_statistics(run.stitched, (x for x, _ in run.batches))
            run.validate(epoch)
            restore_statistics(run.stitched, before)
            accuracy = float(run.v[f"{name}/metrics/val_acc"][epoch - 1])
            if accuracy > best[0]:
                best = accuracy, {key: value.clone() for key, value in run.stitched.state_dict().items()}


def test_training_of_birkhoff_in_alternation() -> None:
    run = Run("alternating", "birkhoff", start="alternating")
    optimizers = make_optimizers(run.stitching_layer, 0.1, alternating=True)
    choice = iter(run.v["alternating/choice"].tolist())
    for epoch in (1, 2):
        run.stitched.train()
        losses = [training_step(run.stitched, x, y, optimizers[next(choice)]) for x, y in run.batches]
        run.check_first_loss(losses[0], epoch)
        run.validate(epoch)


def test_training_of_birkhoff_with_projected_gradients() -> None:
    run = Run("pgd_hook", "birkhoff", start="alternating")
    (optimizer,) = make_optimizers(run.stitching_layer, 0.1)
    run.stitched.train()
    losses = [training_step(run.stitched, x, y, optimizer, hook_eps=0.05) for x, y in run.batches]
    run.check_first_loss(losses[0], 1)
    run.validate(1)
