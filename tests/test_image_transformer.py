"""The image transformer: against the original's vectors, causality, sampling value by value, images of other shapes."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from common.models.image_transformer import ImageTransformer, IncrementalImages, cross_entropy, location_features
from common.models.swarm import IncrementalSwarm, SwarmLayer
from swarm_transformer import accumulate_gradients, gradient_norm
from tests.reference import Vectors, assert_agrees, names
from tests.small_images import ImageSet, real


def model_of(vectors: Vectors) -> ImageTransformer:
    c = vectors.config
    model = ImageTransformer(
        shape=(c["C"], c["H"], c["W"]),
        n_hidden=c["n_hidden"],
        n_layers=c["n_layers"],
        n_iter=c["n_iter"],
        non_lin=c["non_lin"],
        n_classes=c["K"],
        learn_loc=c["learn_loc"],
    )
    model.load_state_dict(vectors.under("param/"))
    return model


def classes_of(vectors: Vectors) -> torch.Tensor | None:
    return vectors["Y"] if vectors.config["K"] else None


def incremental_logits(model: ImageTransformer, images: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    values = images.permute(0, 2, 3, 1).flatten(1).int()
    steps = IncrementalImages(model, len(images), classes)
    logits = [steps.logits(values[:, e - 1] if e else None) for e in range(values.shape[1])]
    return torch.stack(logits, 1).view(len(images), *images.shape[2:], images.shape[1], 256)


# ---- the original's vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("transformer_*"))
def test_reference(name: str) -> None:
    v = Vectors(name)
    model = model_of(v)
    assert list(model.state_dict()) == [*v.under("param/")]  # also their order: optimizer states count parameters
    logits = model(v["X"], classes_of(v))
    loss = cross_entropy(logits, v["X"]).mean()
    assert_agrees(logits.movedim(-1, 1), v["logits"], 1e-5)
    assert_agrees(loss, v["loss"], 1e-5)
    loss.backward()
    expected = v.under("grad/")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in expected)
        if parameter.grad is not None:
            assert_agrees(parameter.grad, expected[name], 1e-4, name)


@pytest.mark.parametrize("size", ["28x28x64", "32x32x64", "6x10x16", "3x3x4"])
def test_location_features(size: str) -> None:
    height, width, n_features = map(int, size.split("x"))
    expected = Vectors("swarm/location_features")[f"2d/{size}"]
    torch.testing.assert_close(location_features(height, width, n_features), expected, rtol=0, atol=5e-5)


def test_location_features_of_high_images_are_those_of_wide_ones_turned() -> None:
    wide, high = location_features(6, 10, 16), location_features(10, 6, 16)
    swapped = wide.unflatten(0, (4, 2, 2)).flip(2).flatten(0, 2)  # sines and cosines of columns and of rows change places
    torch.testing.assert_close(high, swapped.mT)


def test_sampling_reference() -> None:
    """The original's images, value by value, from the same noise."""
    v = Vectors("swarm/sampling")
    model, expected, noise = model_of(v), v["X"], v["noise"].float()
    N, C, H, W = expected.shape
    values = torch.zeros(N, H * W * C, dtype=torch.long)
    steps = IncrementalImages(model, N, v["Y"])
    for e, (row, column, channel) in enumerate(itertools.product(range(H), range(W), range(C))):
        logits = steps.logits(values[:, e - 1] if e else None)
        values[:, e] = (logits + noise[:, :, row, column, channel]).argmax(1)
    assert torch.equal(values.view(N, H, W, C).permute(0, 3, 1, 2), expected)
    logits = model(expected, v["Y"])
    assert_agrees(logits.movedim(-1, 1), v["logits"], 1e-5)
    assert_agrees(cross_entropy(logits, expected).mean(), v["loss"], 1e-5)


def test_training_steps_reference() -> None:
    """Batches of two micro-batches each; the original throws the fifth micro-batch of a pass away."""
    v = Vectors("swarm/train_steps_transformer")
    model = model_of(v)
    optimizer = torch.optim.Adam(model.parameters(), lr=v.config["lr"])
    losses, norms = v["losses"].tolist(), v["norms"].tolist()
    for epoch, first in itertools.product(range(2), (0, 2)):
        micro = [ImageSet(v[f"X/{j}"], v[f"Y/{j}"], ()) for j in (first, first + 1)]
        batch = ImageSet(torch.cat([m.images for m in micro]), torch.cat([m.labels for m in micro]), ())
        at = 5 * epoch + first
        assert accumulate_gradients(model, batch, "fp32", 3) == pytest.approx(sum(losses[at : at + 2]) / 2, rel=1e-4)
        assert gradient_norm(model) == pytest.approx(norms[at + 1], rel=1e-4)
        optimizer.step()


def test_parameter_counts() -> None:
    """The published models'."""
    for shape, n_hidden, n_classes, learned, total in (
        ((1, 28, 28), 256, 10, 986_880, 1_187_584),
        ((1, 28, 28), 256, None, 984_320, 1_185_024),
        ((3, 32, 32), 512, 10, 3_547_904, 4_072_192),
        ((3, 32, 32), 512, None, 3_542_784, 4_067_072),
    ):
        model = ImageTransformer(shape=shape, n_hidden=n_hidden, n_classes=n_classes)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learned
        assert sum(p.numel() for p in model.parameters()) == total


# ---- causality, and what follows from it ---------------------------------------------------------------------------------

CASES = list(itertools.product((1, 3), (1, 3), (None, 10)))  # channels, layers, classes


def make(channels: int, n_layers: int, n_classes: int | None, height: int = 7, width: int = 6) -> ImageTransformer:
    torch.manual_seed(0)
    model = ImageTransformer(
        shape=(channels, height, width), n_hidden=12, n_layers=n_layers, n_iter=4, n_classes=n_classes, non_lin="elu"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def images_and_classes(n: int, channels: int, n_classes: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    gen = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, channels, 7, 6), generator=gen)
    return images, None if n_classes is None else torch.arange(n) % n_classes


@pytest.mark.parametrize(("channels", "n_layers", "n_classes"), CASES)
def test_causal(channels: int, n_layers: int, n_classes: int | None) -> None:
    """Changing a value changes no logits at or before it, to the last bit, and it does change some after it."""
    model = make(channels, n_layers, n_classes)
    images, classes = images_and_classes(2, channels, n_classes)
    before = model(images, classes).flatten(1, 3)
    E = before.shape[1]
    for k in (0, 1, E // 3, E // 2, E - 2):
        changed = images.permute(0, 2, 3, 1).flatten(1).clone()
        changed[:, k] = (changed[:, k] + 100) % 256
        after = model(changed.view(2, 7, 6, channels).permute(0, 3, 1, 2), classes).flatten(1, 3)
        assert torch.equal(after[:, : k + 1], before[:, : k + 1])
        assert not torch.equal(after[:, k + 1], before[:, k + 1])


@pytest.mark.parametrize(("channels", "n_layers", "n_classes"), CASES)
def test_incremental_is_the_full_forward(channels: int, n_layers: int, n_classes: int | None) -> None:
    model = make(channels, n_layers, n_classes)
    images, classes = images_and_classes(3, channels, n_classes)
    torch.testing.assert_close(incremental_logits(model, images, classes), model(images, classes), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_incremental_on_real_images(n_layers: int) -> None:
    """784 running sums later, still the same; and causal."""
    images = real("FashionMNIST", "test").images[:2]
    torch.manual_seed(0)
    model = ImageTransformer(shape=(1, 28, 28), n_hidden=32, n_layers=n_layers, n_iter=5)
    full = model(images)
    torch.testing.assert_close(incremental_logits(model, images, None), full, rtol=0, atol=1e-4)
    changed = images.clone()
    changed[:, :, 14, 3] += 100
    assert torch.equal(model(changed).flatten(1, 3)[:, : 14 * 28 + 4], full.flatten(1, 3)[:, : 14 * 28 + 4])


def test_samples_have_the_models_distribution() -> None:
    """Images of two values in a row: each pair as often as its probability says (chi-squared, seeded)."""
    torch.manual_seed(0)
    model = ImageTransformer(shape=(1, 1, 2), n_hidden=8, n_iter=2)
    with torch.no_grad():  # only values 0, 1 and 2 are likely
        model.cells[0].ffwd.bias[3:] = -100
        for parameter in (model.input_embedding.weight, model.cells[0].ffwd.weight):
            parameter *= 10
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_p = -2 * cross_entropy(model(pairs.view(9, 1, 1, 2)), pairs.view(9, 1, 1, 2))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    n = 20_000
    drawn = model.sample(n, generator=torch.Generator().manual_seed(0)).view(n, 2).long()
    counts = torch.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9)
    expected = n * log_p.exp()
    assert ((counts - expected) ** 2 / expected).sum() < 26  # 8 degrees of freedom: p = 0.001


def test_samples_follow_the_generator_and_leave_the_global_one_alone() -> None:
    model = make(1, 1, None)
    state = torch.get_rng_state()
    first, again, other = (model.sample(2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (2, 1, 7, 6) and first.dtype == torch.uint8


def test_completion_keeps_what_is_given_and_goes_on_from_it() -> None:
    model = make(3, 1, 10)
    with torch.no_grad():
        model.cells[0].ffwd.weight *= 20  # what came before matters
    images, classes = images_and_classes(4, 3, 10)
    images = images.to(torch.uint8)

    def complete(given: torch.Tensor) -> torch.Tensor:
        return model.sample(4, classes, given=given, n_rows=3, generator=torch.Generator().manual_seed(0))

    completed = complete(images)
    assert torch.equal(completed[:, :, :3], images[:, :, :3]) and not torch.equal(completed[:, :, 3:], images[:, :, 3:])
    below = images.clone()
    below[:, :, 3:] = 0
    assert torch.equal(complete(below), completed)  # the rest of the images is not looked at
    other = images.clone()
    other[:, :, 2] = 255 - other[:, :, 2]
    assert not torch.equal(complete(other)[:, :, 3:], completed[:, :, 3:])


def test_sampling_is_in_float32_whatever_is_around_it() -> None:
    model = make(1, 1, None)
    expected = model.sample(2, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.sample(2, generator=torch.Generator().manual_seed(0)), expected)


@pytest.mark.parametrize(
    ("shape", "n_rows", "message"),
    [
        (None, 3, "n_rows 3: images have 7 rows, and `given` has to"),
        ((2, 1, 7, 6), 8, "n_rows 8: images have 7 rows"),
        ((2, 1, 7, 6), -1, "n_rows -1"),
        ((3, 1, 7, 6), 3, r"given has shape \(3, 1, 7, 6\): 2 images of \(1, 7, 6\) are drawn"),
        ((1, 1, 7, 6), 3, "given has shape"),
        ((2, 3, 7, 6), 3, "given has shape"),
        ((2, 1, 3, 6), 3, "given has shape"),
    ],
)
def test_completions_of_what_does_not_fit(shape: tuple[int, ...] | None, n_rows: int, message: str) -> None:
    given = None if shape is None else torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        make(1, 1, None).sample(2, given=given, n_rows=n_rows)


# ---- details -------------------------------------------------------------------------------------------------------------


def test_a_new_model_is_near_chance_and_its_loss_is_in_nats() -> None:
    images, _ = images_and_classes(4, 1, None)
    torch.manual_seed(0)
    loss = cross_entropy(ImageTransformer(shape=(1, 7, 6), n_hidden=16)(images), images)
    assert loss.shape == (4,) and (loss - math.log(256)).abs().max() < 0.1


def test_learned_locations_and_classes_get_gradients_fixed_ones_do_not() -> None:
    images, classes = images_and_classes(2, 1, 10)
    for learn_loc in (False, True):
        model = ImageTransformer(shape=(1, 7, 6), n_hidden=8, n_classes=10, learn_loc=learn_loc)
        cross_entropy(model(images, classes), images).mean().backward()
        assert (model.location_features.grad is not None) == learn_loc
        assert model.cond_embedding.weight.grad[:2].abs().sum() > 0 == model.cond_embedding.weight.grad[2:].abs().sum()


def test_wrong_calls_are_told() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        ImageTransformer(shape=(1, 7, 6), n_hidden=6)
    with pytest.raises(ValueError, match="positive"):
        ImageTransformer(shape=(1, 0, 6), n_hidden=8)
    images, classes = images_and_classes(2, 1, 10)
    with pytest.raises(ValueError, match="takes no classes"):
        make(1, 1, None)(images, classes)
    with pytest.raises(ValueError, match=r"a class for each of 2 images, \(2,\): classes: none given"):
        make(1, 1, 10)(images)
    with pytest.raises(ValueError, match=r"a class for each of 2 images, \(2,\): classes: shape \(1,\)"):
        make(1, 1, 10)(images, classes[:1])
    with pytest.raises(ValueError, match="the model is for"):
        make(3, 1, None)(images)
    with pytest.raises(ValueError, match="only CAUSAL"):
        IncrementalSwarm(SwarmLayer(2, 3, 4, 2, pooling="MEAN"), 1)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda images: images / 255, r"images are torch.float32: integers 0..255 are needed, .* for images in 0..1"),
        (lambda images: images.half(), "images are torch.float16"),
        (lambda images: images > 127, "images are torch.bool"),
        (lambda images: images - 1, r"images have values -1..2\d\d: 0..255 are needed"),
        (lambda images: images + 10, r"images have values 10..26\d"),
    ],
)
def test_images_that_are_no_integers_from_0_to_255(convert: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    images, _ = images_and_classes(2, 1, None)
    images[0, 0, 0, :2] = torch.tensor([0, 254])
    model = make(1, 1, None)
    logits = model(images)
    for call in (model, lambda wrong: cross_entropy(logits, wrong), lambda wrong: model.sample(2, given=wrong, n_rows=1)):
        with pytest.raises(ValueError, match=message):
            call(convert(images))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(images.to(dtype)), logits)


def test_bf16_is_close() -> None:
    model = make(1, 2, None)
    images, _ = images_and_classes(2, 1, None)
    with torch.autocast("cpu", torch.bfloat16):
        low = cross_entropy(model(images), images).mean()
    low.backward()
    assert low.item() == pytest.approx(cross_entropy(model(images), images).mean().item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
