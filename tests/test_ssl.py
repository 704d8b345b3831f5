"""Properties of the SSL parts: what views are drawn, losses at their limits, read-outs, probes."""

import math
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.datasets import images as image_sets
from common.models.resnet import CifarResNet
from common.ssl import duet, essl, evaluation, views
from common.ssl import transformations as tf
from common.ssl.duet import DUET
from common.ssl.essl import ESSL
from common.ssl.simclr import SimCLR, nt_xent
from common.ssl.steps import as_floats, classification_loss
from common.ssl.views import Stack
from tests.small_images import smooth

METHODS = {
    "duet": (DUET, {"bins": 4, "structure": "rot"}),
    "simclr": (SimCLR, {}),
    "essl": (ESSL, {"predicted": "rot"}),
    "essl of classes": (ESSL, {"predicted": "ron"}),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(method: str, **changed: object) -> DUET | SimCLR | ESSL:
    """A small model of grey images in three classes."""
    kind, options = METHODS[method]
    return kind(CifarResNet((1, 1, 1), in_channels=1, width=1), ("sca", "rot"), 16, n_classes=3, **options | changed)


# ---- views ---------------------------------------------------------------------------------------------------------------


def test_crops_are_drawn_as_by_torchvision() -> None:
    crops = views.draw_crops(20_000, 32, generator())
    x0, y0, x1, y1 = crops.unbind(1)
    assert crops.min() >= 0 and crops.max() <= 31
    image_sets._torchvision_datasets()  # makes torchvision importable beside a CPU build
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(1, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]).float()
    top, left, height, width = theirs.unbind(1)
    own = {"height": y1 - y0 + 1, "width": x1 - x0 + 1, "left": x0, "top": y0, "area": (y1 - y0 + 1) * (x1 - x0 + 1)}
    other = {"height": height, "width": width, "left": left, "top": top, "area": height * width}
    for name, values in own.items():
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):  # whole pixels: compare distribution functions, not quantiles
            level = torch.quantile(other[name], share)
            difference = (values <= level).float().mean() - (other[name] <= level).float().mean()
            assert abs(difference) < 4 * math.sqrt(0.25 / 6000 + 0.25 / 20_000), (name, share)


def test_every_image_has_parameters_of_its_own() -> None:
    stack = Stack(["sca", "rot", "ron", "fli", "flv", "blu", "gra", "jit"], 16)
    drawn = stack.draw(4000, 20, generator())
    for code, parameter in ((code, stack.parameter(code, drawn)[:, 0]) for code in views.PARAMETRISED):
        assert parameter.min() >= -0.3 and parameter.max() <= 1
        assert len(parameter.unique()) > (100 if code in ("rot", *views.COLOURS) else 1), code
    for code, share in {"fli": 0.5, "flv": 0.5, "blu": 0.5, "gra": 0.2}.items():
        changed = (stack.parameter(code, drawn) > 0.5).float().mean()
        assert abs(changed - share) < 0.04, code
    for code in views.COLOURS:
        assert abs((stack.parameter(code, drawn) == 0.5).float().mean() - 0.2) < 0.03
    assert abs(stack.parameter("rot", drawn).mean() - 0.5) < 0.02
    assert abs(stack.parameter("rot", drawn).std() - 1 / math.sqrt(12)) < 0.01


@pytest.mark.parametrize("codes", ["sca rot", "rot ron fli", "jit sca blu gra", "ccr", "res", "", "rot rot"])
@pytest.mark.parametrize("side", [16, 18])
def test_views(codes: str, side: int) -> None:
    """Of the right size, around 0, each image's own, and the same wherever the batch is cut."""
    pixels = torch.rand(6, 3, side, side, generator=generator(1))
    stack = Stack(codes.split(), 16)
    drawn = stack.draw(6, side, generator())
    view = stack(pixels, drawn)
    assert view.shape == (6, 3, 16, 16) and view.min() >= -0.5 - 1e-6 and view.max() <= 0.5 + 1e-6
    parts = torch.cat([stack(pixels[rows], drawn[rows]) for rows in (slice(0, 2), slice(2, 6))])
    torch.testing.assert_close(view, parts, rtol=0, atol=1e-6)
    again = stack.draw(6, side, generator())
    assert all(torch.equal(a, b) for a, b in zip(drawn.values, again.values, strict=True))


def test_quarter_turns_are_rotations() -> None:
    pixels = torch.rand(4, 1, 9, 9)
    turned = tf.quarter_turns(pixels, torch.arange(4))
    torch.testing.assert_close(turned, tf.rotate(pixels, 90.0 * torch.arange(4)), rtol=0, atol=1e-5)
    assert torch.equal(pixels[0], turned[0])  # and the images themselves are left alone


def test_turning_a_hue_all_the_way_round() -> None:
    pixels = torch.rand(5, 3, 4, 4)
    torch.testing.assert_close(tf.turn_hue(pixels, torch.ones(5, 1, 1, 1)), pixels, rtol=0, atol=1e-5)
    third = tf.turn_hue(pixels, torch.full((5, 1, 1, 1), 1 / 3))  # red becomes green
    torch.testing.assert_close(third, pixels.roll(1, 1), rtol=0, atol=1e-5)


def test_a_parameter_that_a_stack_does_not_have() -> None:
    stack = Stack(["sca"], 16)
    with pytest.raises(KeyError):
        stack.parameter("rot", stack.draw(2, 16, generator()))
    with pytest.raises(ValueError, match="no transformation 'turn'"):
        Stack(["turn"], 16)


@pytest.mark.parametrize("code", views.PARAMETRISED)
def test_sweeps_go_through_the_range(code: str) -> None:
    swept = views.sweep(code, torch.rand(3, 3, 18, 18), 16, 9)
    parameters = [parameter for parameter, _ in swept]
    assert parameters == sorted(parameters) and len(swept) == {"ron": 4, "fli": 2, "flv": 2, "blu": 2, "gra": 2}.get(code, 9)
    assert all(view.shape == (3, 3, 16, 16) for _, view in swept)
    assert not torch.equal(swept[0][1], swept[-1][1]) or code == "rot"  # -180 and 180 degrees are one


def test_a_sweep_turns_as_a_stack_does() -> None:
    pixels = torch.rand(3, 3, 18, 18)
    parameter, view = views.sweep("rot", pixels, 16, 9)[2]
    assert parameter == pytest.approx(0.25) == float(views.normalised("rot", torch.tensor([-90.0]), 16))
    torch.testing.assert_close(view, views.clean_view(tf.rotate(pixels, torch.full((3,), -90.0)), 16))
    parameter, view = views.sweep("sca", pixels, 16, 9)[0]  # the whole
    torch.testing.assert_close(view, tf.resize(pixels, 16) - 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_tests_have_one_clean_view(method: str) -> None:
    model = make(method)
    data = smooth(6).images
    arguments = data, torch.zeros(6).long(), torch.arange(6), generator()
    batch = model.make_batch(*arguments, training=False)
    clean = views.clean_view(data.float() / 255, 16)
    assert torch.equal(batch.views[0], clean) and not torch.allclose(batch.views[1], clean, atol=0.1)
    if method == "essl":  # the centre, turned by an angle alone
        inner = views.clean_view(data.float() / 255, 8)
        turned = tf.rotate(inner + 0.5, 180 * batch.task_labels[:, 0]) - 0.5
        torch.testing.assert_close(batch.views[2], turned, rtol=0, atol=1e-5)
    batch = model.make_batch(*arguments[:3], generator(), training=True)
    assert not torch.allclose(batch.views[0], clean, atol=0.1)


# ---- targets and losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [duet.gaussian, duet.von_mises])
@pytest.mark.parametrize("width", [0.001, 0.2, 60.0])
def test_targets_are_distributions(target: Callable[..., Tensor], width: float) -> None:
    made = target(torch.linspace(-0.1, 1.1, 25), 8, width)
    assert made.shape == (25, 8) and made.isfinite().all() and made.min() >= 0
    torch.testing.assert_close(made.sum(-1), torch.ones(25))


def test_the_circle_closes() -> None:
    made = duet.von_mises(torch.tensor([0.0, 1.0, 0.25]), 8)
    torch.testing.assert_close(made[0], made[1])
    torch.testing.assert_close(made[0].roll(2), made[2], rtol=0.01, atol=1e-3)
    parameters = torch.arange(0, 1, 0.03)
    error = (evaluation.circular_mean(duet.von_mises(parameters, 8)) - parameters + 0.5) % 1 - 0.5
    assert error.abs().max() < 0.01  # what is read off a perfect marginal


def test_divergence_at_its_limits() -> None:
    """Empty bins and large gaps of logits, where logarithms of probabilities end in NaN."""
    logits = torch.tensor([[200.0, 0, 0, -200], [0, 0, 0, 0]], requires_grad=True)
    target = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0]])
    loss = duet.jensen_shannon(logits, target)
    assert loss.item() == pytest.approx((math.log(2) + divergence([0.25] * 4, [1, 0, 0, 0])) / 2, abs=1e-6)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert duet.jensen_shannon(torch.log(target + 1e-30), target).item() == pytest.approx(0, abs=1e-6)


def divergence(p: list[float], q: list[float]) -> float:
    """From the formula, term by term."""
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(0.5 * x * math.log(x / m) for side in (p, q) for x, m in zip(side, mean, strict=True) if x > 0)


def test_nt_xent_by_loops() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    rows = F.normalize(torch.cat([a, b]), dim=1)
    for i, loss in enumerate(nt_xent(a, b, 0.3)):
        expected = 0.0
        for own, other in ((i, i + 5), (i + 5, i)):
            terms = [float(torch.exp(rows[own] @ rows[k] / 0.3)) for k in range(10) if k != own]
            expected -= math.log(float(torch.exp(rows[own] @ rows[other] / 0.3)) / sum(terms))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_in_double_precision() -> None:
    target = duet.von_mises(torch.rand(3), 4).double()
    assert torch.autograd.gradcheck(lambda x: duet.jensen_shannon(x, target), torch.randn(3, 4).double().requires_grad_())
    pair = [torch.randn(4, 5).double().requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(nt_xent, pair)


def test_no_gradient_of_the_classifier_reaches_the_encoder() -> None:
    view = torch.rand(6, 1, 8, 8)
    for model, n_views in ((make("duet"), 2), (make("simclr"), 2), (make("essl"), 3)):
        classification_loss(model([view] * n_views)["class_logits"], torch.arange(6) % 3)[0].backward()
        assert all(p.grad is None for p in model.base_network.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [4, 8])
def test_baselines_are_of_the_metrics_that_are_logged(method: str, n: int) -> None:
    """The same names in the same order; an encoder that says nothing has NT-Xent at chance."""
    model = make(method)
    batch = model.make_batch(smooth(n).images, torch.arange(n) % 3, torch.arange(n), generator(), training=True)
    out = {name: rows * 0 for name, rows in model(batch.views).items()}
    metrics, chance = model.loss(out, batch, training=True)[1], model.baselines(n)
    assert list(metrics) == list(chance)
    nce = "model_loss_mean" if method == "simclr" else "model_nce_loss_mean"
    assert metrics[nce].item() == pytest.approx(chance[nce], rel=1e-6)
    assert chance["track_head_top_1_mean"] == pytest.approx(100 / 3) and chance["total_loss"] is None


# ---- wrong use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("duet", {"bins": 0}, "8 features do not divide into 0 bins"),
        ("duet", {"bins": 3}, "8 features do not divide into 3 bins"),
        ("duet", {"structure": None}, "None has no parameter to structure by: choose from sca rot"),
        ("duet", {"structure": "jit"}, "jit has no parameter to structure by: choose from sca rot"),
        ("duet", {"structure": "fli"}, "fli is not one of the transformations sca rot"),
        ("duet", {"target": "gauss"}, "no target 'gauss': choose from ga vm"),
        ("essl", {"predicted": "blu"}, "blu is nothing that ESSL can predict: choose from ron fli flv gra rot"),
    ],
)
def test_methods_refuse_what_they_cannot_learn(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(method, **options)
    with pytest.raises(TypeError):  # what makes DUET or ESSL of SimCLR has no default
        {"duet": DUET, "essl": ESSL}[method](CifarResNet((1, 1, 1), width=1), ("rot",), 16, n_classes=3)


def test_a_task_of_an_unknown_code() -> None:
    with pytest.raises(ValueError, match="sca is nothing that ESSL can predict: choose from ron"):
        essl.make_task("sca", torch.rand(2, 3, 4, 4), torch.zeros(2))


def test_losses_refuse_what_they_do_not_know() -> None:
    embedding, matrix, parameter = torch.randn(6, 5), torch.randn(6, 4, 3), torch.rand(6, 1)
    with pytest.raises(ValueError, match="there is no target 'x'"):
        duet.duet_loss(embedding, embedding, matrix, matrix, parameter, parameter, target="x", weight=1.0)
    for code, labels, message in (
        ("xxx", torch.zeros(6), "xxx is nothing that ESSL can predict"),
        ("fli", torch.full((6,), 2), "from 2 to 2: they should be in [0, 2)"),
        ("fli", torch.full((6,), -100), "from -100 to -100"),
        ("fli", torch.zeros(6), "torch.float32: integers are needed"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            essl.essl_loss(embedding, embedding, torch.randn(6, 2), labels, code=code, weight=1.0)
    with pytest.raises(ValueError, match="1 values for 2 images"):
        essl.make_task("bri", torch.rand(2, 3, 4, 4), torch.zeros(1))


def test_losses_refuse_shapes_that_would_be_broadcast() -> None:
    embedding, matrix, parameter = torch.randn(6, 5), torch.randn(6, 4, 3), torch.rand(6, 1)
    options = {"target": "vm", "weight": 1.0}
    for wrong in (
        (embedding, embedding, matrix[:, None], matrix[:, None], parameter, parameter),
        (embedding, embedding, matrix, matrix, parameter[:, 0], parameter[:, 0]),
        (embedding, embedding, matrix, matrix[:, :2], parameter, parameter),
        (embedding[:3], embedding[:3], matrix, matrix, parameter, parameter),
    ):
        shapes = "|".join(re.escape(str(tuple(tensor.shape))) for tensor in wrong[2:])
        with pytest.raises(ValueError, match=f"({shapes}).*({shapes}).*should be \\(B, G, C\\) and \\(B, 1\\)"):
            duet.duet_loss(*wrong, **options)
    for code, predictions, labels in (
        ("rot", torch.randn(6, 1), torch.randn(6)),
        ("rot", torch.randn(6, 2), torch.randn(6, 2)),
        ("ron", torch.randn(24, 4), torch.zeros(24, 1).long()),
        ("fli", torch.randn(12, 4), torch.zeros(12).long()),
    ):
        shapes = f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} of '{code}'"
        with pytest.raises(ValueError, match=re.escape(shapes)):
            essl.essl_loss(embedding, embedding, predictions, labels, code=code, weight=1.0)


# ---- read-outs -----------------------------------------------------------------------------------------------------------


class Angles(nn.Module):
    """An 'encoder' that knows how bright the left half of an image is against the right: what a rotation changes."""

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        dx = (x[..., 4:] - x[..., :4]).mean((1, 2, 3))
        dy = (x[..., :4, :] - x[..., 4:, :]).mean((1, 2, 3))
        parameter = (torch.atan2(dy, dx) / (2 * math.pi) + 0.5) % 1
        return duet.von_mises(parameter, self.bins).log().repeat_interleave(2, 1)  # (B, 2 bins)


def test_rotations_are_read_off_a_representation() -> None:
    ramp = torch.linspace(60, 200, 8).to(torch.uint8).expand(40, 1, 8, 8).contiguous()
    errors = evaluation.rotation_errors(Angles(8), ramp, ramp, 8, 8, seed=0)
    assert errors["marginal"]["mean"] < 6 and errors["regression"]["mean"] < 6
    constant = evaluation.rotation_errors(Angles(8), ramp * 0, ramp * 0, 8, 8, seed=0)
    assert 60 < constant["marginal"]["mean"] < 120
    parameters, learned = evaluation.marginals_by_parameter(Angles(8), ramp, 8, "rot", 8, n=17)
    ridge = evaluation.circular_mean(learned)
    distance = (ridge - torch.tensor(parameters) + 0.5) % 1 - 0.5
    assert distance.abs().max() < 0.03


def test_angle_errors_go_the_short_way() -> None:
    error = evaluation.angle_error(torch.tensor([179.0, -90, 10]), torch.tensor([-179.0, 90, 0]))
    assert error["mean"] == pytest.approx((2 + 180 + 10) / 3) and error["median"] == pytest.approx(10)


def test_probes() -> None:
    """Two clouds: a line between them, and neighbours, tell them apart; with labels at random nothing does."""
    gen = generator()
    labels = torch.arange(400) % 2
    z = torch.randn(400, 6, generator=gen) + 3.0 * labels[:, None]
    halves = z[:200], labels[:200], z[200:], labels[200:], 2
    probe = evaluation.linear_probe(*halves, seed=0)
    assert probe["top_1"] > 99 and probe["penalty"] in evaluation.PENALTIES
    assert evaluation.nearest_neighbours(*halves)["top_1"] > 85
    shuffled = labels[torch.randperm(400, generator=gen)]
    halves = z[:200], shuffled[:200], z[200:], shuffled[200:], 2
    assert 35 < evaluation.linear_probe(*halves, seed=0)["top_1"] < 65
    assert 35 < evaluation.nearest_neighbours(*halves)["top_1"] < 65


def test_raw_pixels_are_the_centre_of_the_image() -> None:
    images = smooth(3, (2, 10, 10)).images
    z = evaluation.represent(evaluation.raw_pixels(8), images, 8)
    assert torch.equal(z, (as_floats(images)[:, :, 1:9, 1:9] - 0.5).flatten(1))
    enlarged = smooth(3, (1, 32, 32)).images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # no more pixels than before
    z = evaluation.represent(evaluation.raw_pixels(64), enlarged, 64)
    torch.testing.assert_close(z, (as_floats(smooth(3, (1, 32, 32)).images) - 0.5).flatten(1))


def test_encoding_moves_no_statistics() -> None:
    encoder = CifarResNet((1, 1, 1), in_channels=1, width=1).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    evaluation.represent(encoder, smooth(20).images, 28)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.slow
def test_duet_learns_the_structure_and_simclr_does_not() -> None:
    """Bars of random brightness and place: after some steps DUET's group marginal tells how they were turned."""
    gen = generator()
    bars = torch.zeros(256, 1, 12, 12)
    for image in bars:
        image[0, 3:9, random.Random(int(torch.randint(10**6, (1,), generator=gen))).randint(6, 8) :] = 0.5
    bars = ((bars + 0.4 * torch.rand(256, 1, 1, 1, generator=gen) * (bars > 0)) * 255).to(torch.uint8)
    errors = {}
    for name, method, options in (
        ("duet", DUET, {"bins": 8, "structure": "rot", "target": "vm", "weight": 100.0}),
        ("simclr", SimCLR, {}),
    ):
        torch.manual_seed(0)
        model = method(CifarResNet((1, 1, 1), in_channels=1, width=4), ("rot",), 12, n_classes=2, **options)
        optimizer = torch.optim.AdamW(model.parameters(), 0.003, betas=(0.9, 0.95))
        for step in range(60):
            indices = torch.randperm(256, generator=gen)[:64]
            batch = model.make_batch(bars, torch.zeros(256).long(), indices, generator(step), training=True)
            loss, _ = model.loss(model(batch.views), batch, training=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[name] = evaluation.rotation_errors(model.base_network, bars, bars, 12, 8, seed=0)["marginal"]["mean"]
        assert duet.group_marginal(evaluation.represent(model.base_network, bars, 12), 8).shape == (256, 8)
    assert errors["duet"] < 30, errors
    assert errors["simclr"] > 60, errors


def test_resized_images_are_those_of_pillow() -> None:
    from PIL import Image

    data = smooth(4, (3, 32, 32))
    for side in (36, 16):
        resized = image_sets.resize(data, side).images
        theirs = [
            np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BILINEAR))
            for image in data.images
        ]
        difference = resized.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(theirs).astype(int)
        assert np.abs(difference).max() <= 1
