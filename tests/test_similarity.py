"""Similarity measures: the original's values, the symmetries they are named for, dead channels, rounding, bad input."""

import itertools
import math
import re

import pytest
import torch
from scipy.spatial import procrustes
from torch import nn

from benchmarks.plain_similarity import plain_ortho_procrustes, plain_wreath_cka, plain_wreath_procrustes
from common.models import zoo
from common.symmetry.cka import Kernels, KernelSums, kernels, unbiased_hsic
from common.symmetry.measures import MEASURES, features_of
from common.symmetry.procrustes import ChannelProducts
from common.symmetry.similarity import (
    layer_similarities,
    linear_cka,
    ortho_cka,
    ortho_procrustes,
    similarity,
    wreath_cka,
    wreath_procrustes,
)
from common.symmetry.stitching import stitch_points
from tests.reference import Vectors, assert_agrees

V = Vectors("modelsym/similarity")
N_VECTORS = 24
PUBLISHED = {
    "wreath_procrustes/full": ("wreath_procrustes", {}),
    "ortho_procrustes/full": ("ortho_procrustes", {}),
    "wreath_cka/max": ("wreath_cka", {}),
    "wreath_cka/max_uncentered": ("wreath_cka", {"centered": False}),
    "wreath_cka/median": ("wreath_cka", {"estimator": "median"}),
    "wreath_cka/median_uncentered": ("wreath_cka", {"estimator": "median", "centered": False}),
    "ortho_cka/centered": ("ortho_cka", {}),
    "ortho_cka/uncentered": ("ortho_cka", {"centered": False}),
}


def features1(part):
    return [V[f"features1/{i}"][part] for i in range(3)]


def features2(part):
    return [V[f"features2/{i}"][part] for i in range(3)]


def random_features(*shape, seed=0, relu=True):
    """Some of what images have in common, and something of their own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(99))
    x = common + torch.randn(shape, generator=generator)
    return x.relu() if relu else x


def rotation(channels, seed=0):
    return torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed))).Q


def permuted_and_scaled(x, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(x.shape[1], generator=generator) * 4 + 0.2
    permutation = torch.randperm(x.shape[1], generator=generator)
    return (x * scales.view(-1, *(1,) * (x.ndim - 2)))[:, permutation]


def rotated(x, seed=0):
    return torch.einsum("dc,nc...->nd...", rotation(x.shape[1], seed), x)


# ---- the original's values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [N_VECTORS, 7], ids=["all images at once", "blocks of 7 images"])
@pytest.mark.parametrize("key", PUBLISHED)
def test_all_pairs_of_layers_have_the_originals_values(key, block):
    measure, options = PUBLISHED[key]
    found = layer_similarities(measure, features1, features2, N_VECTORS, block=block, **options)
    torch.testing.assert_close(found.published, V[key].double(), atol=1e-5, rtol=0)
    assert (found.dead1.tolist(), found.dead2.tolist()) == ([0, 0, 1], [0, 0, 2])


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", ["max", "median", "ortho"])
def test_kernels_are_the_originals(kind, layer):
    sums = Kernels("ortho_cka" if kind == "ortho" else "wreath_cka", N_VECTORS)
    x = V[f"features1/{layer}"]
    sums.add_moments([x], [])
    (normalised,) = sums.normalised([x], [])
    published, _ = kernels(normalised, normalised, "max" if kind == "ortho" else kind, sums.scalings[0].n_dead)
    assert_agrees(published.fill_diagonal_(0), V[f"kernel/{kind}/{layer}"], 1e-4)


@pytest.mark.parametrize("measure", ["wreath_procrustes", "wreath_cka"])
def test_channels_may_stand_on_another_axis(measure):
    x, y = (V[f"features{k}/0"].movedim(1, 2) for k in (1, 2))
    assert similarity(measure, x, y, channel_axis=2) == pytest.approx(V[f"channel_axis2/{measure}"].item(), abs=1e-5)


@pytest.mark.parametrize("measure", ["wreath_procrustes", "ortho_procrustes", "wreath_cka", "ortho_cka"])
def test_a_layer_and_its_permuted_and_scaled_self_have_the_originals_values(measure):
    assert similarity(measure, V["symmetry/features"], V["features1/1"]) == pytest.approx(
        V[f"symmetry/{measure}"].item(), abs=1e-5 if measure == "ortho_procrustes" else 1e-3
    )


@pytest.mark.parametrize(("shape1", "shape2"), [((30, 5, 8, 8), (30, 3, 4, 4)), ((30, 3, 2, 2), (30, 4, 6, 6))])
def test_the_plain_formulation_agrees_for_any_width_and_resolution(shape1, shape2):
    x, y = random_features(*shape1), random_features(*shape2, seed=1)
    assert wreath_procrustes(x, y) == pytest.approx(plain_wreath_procrustes(x, y), abs=1e-6)
    assert ortho_procrustes(x, y) == pytest.approx(plain_ortho_procrustes(x, y), abs=1e-6)
    assert wreath_cka(x, y) == pytest.approx(plain_wreath_cka(x, y), abs=1e-5)


def test_maps_may_be_enlarged_by_different_factors_along_height_and_width():
    x, y = random_features(20, 3, 6, 2), random_features(20, 3, 3, 4, seed=1)
    a, b = x.repeat_interleave(2, 3), y.repeat_interleave(2, 2)
    for measure in ("wreath_procrustes", "ortho_procrustes"):
        assert similarity(measure, x, y) == pytest.approx(similarity(measure, a, b), abs=1e-6)


# ---- symmetries ----------------------------------------------------------------------------------------------------------

INVARIANT = {  # to permutations with scales, to rotations
    "wreath_procrustes": (True, False),
    "wreath_cka": (True, False),
    "ortho_procrustes": (False, True),
    "ortho_cka": (True, False),  # as published: channels are scaled one by one
    "linear_cka": (False, True),
}


@pytest.mark.parametrize("shape", [(40, 6, 4, 4), (40, 6, 5), (40, 6)], ids=["maps", "sequences", "vectors"])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_unchanged_by_its_own_symmetry_alone(measure, shape):
    x, y = random_features(*shape, relu=False), random_features(*shape, seed=1)
    value = similarity(measure, x, y)
    for invariant, changed in zip(INVARIANT[measure], (permuted_and_scaled(x), rotated(x)), strict=True):
        of_changed, with_itself = similarity(measure, changed, y), similarity(measure, changed, x)
        if invariant:
            assert of_changed == pytest.approx(value, abs=1e-5)
            assert with_itself == pytest.approx(1, abs=1e-3)  # Procrustes: the root of what is nearly 0
        else:
            assert abs(of_changed - value) > 1e-3
            assert with_itself < 0.99
    permutation = torch.randperm(6, generator=torch.Generator().manual_seed(3))  # which is a rotation, too
    assert similarity(measure, x[:, permutation], y) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_symmetric_and_less_than_one_between_unrelated_layers(measure):
    x, y = random_features(40, 6, 4, 4), random_features(40, 4, 2, 2, seed=1)
    assert similarity(measure, x, y) == pytest.approx(similarity(measure, y, x), abs=1e-6)
    assert similarity(measure, x, y) < 0.95


@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_is_one_with_itself_and_rounding_makes_no_nan(measure):
    for seed in range(20):
        x = random_features(20, 8, 4, 4, seed=seed)
        y = x * (1 + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        assert similarity(measure, x, y) == pytest.approx(1, abs=1e-3)


def test_hsic_of_independent_kernels_scatters_around_zero():
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(200):
        x, y = torch.randn(2, 12, 3, generator=generator)
        values.append(unbiased_hsic(x @ x.T, y @ y.T))
    error = torch.tensor(values).std() / math.sqrt(len(values))
    assert abs(sum(values) / len(values)) < 3 * error  # the biased estimate is above 0 by 20 errors
    assert error < 0.1


def test_hsic_is_the_mean_over_all_quadruples_of_different_images():
    generator = torch.Generator().manual_seed(0)
    K, L = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    K, L = K + K.T, L + L.T
    terms = [
        K[i, j] * L[i, j] + K[i, j] * L[q, r] - 2 * K[i, j] * L[i, q] for i, j, q, r in itertools.permutations(range(6), 4)
    ]
    assert unbiased_hsic(K, L) == pytest.approx(sum(terms).item() / len(terms), rel=1e-10)


# ---- dead channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["max", "median"])
@pytest.mark.parametrize("measure", MEASURES)
def test_live_only_is_the_value_without_dead_channels(measure, estimator):
    x, y = random_features(40, 7, 4, 4, relu=False), random_features(40, 6, 4, 4, seed=1, relu=False)
    x[:, [2, 5]], y[:, 3] = 0, 0
    live = [0, 1, 3, 4, 6], [0, 1, 2, 4, 5]
    found = layer_similarities(measure, lambda part: [x[part]], lambda part: [y[part]], 40, estimator=estimator, block=16)
    assert (found.dead1.tolist(), found.dead2.tolist()) == ([2], [1])
    without = similarity(measure, x[:, live[0]], y[:, live[1]], estimator=estimator)
    assert found.live.item() == pytest.approx(without, abs=1e-6)
    assert found.published.item() == pytest.approx(similarity(measure, x, y, estimator=estimator), abs=1e-6)
    counts_them = measure == "wreath_procrustes" or (measure, estimator) == ("wreath_cka", "median")
    assert (abs(found.published - found.live) > 1e-3) == (counts_them or measure == "wreath_cka")


def test_dead_channels_alone_make_layers_look_alike_in_the_published_value():
    x, y = random_features(40, 8, 4, 4), random_features(40, 8, 4, 4, seed=1)
    before = wreath_procrustes(x, y)
    x[:, 4:], y[:, 4:] = 0, 0
    assert wreath_procrustes(x, y) > before + 0.1
    assert wreath_procrustes(x, y, live_only=True) == pytest.approx(wreath_procrustes(x[:, :4], y[:, :4]), abs=1e-9)


@pytest.mark.parametrize("value", [0.1, 0.7071, 3.3, 1234.5678])  # a saturated sigmoid, say
def test_a_constant_channel_is_dead_where_channels_are_centred(value):
    x, y = random_features(40, 5, 4, 4), random_features(40, 5, 4, 4, seed=1)
    x[:, 2] = value
    arguments = lambda part: [x[part]], lambda part: [y[part]], 40
    assert layer_similarities("wreath_cka", *arguments, block=7).dead1.tolist() == [1]
    assert layer_similarities("wreath_cka", *arguments, centered=False).dead1.tolist() == [0]
    assert layer_similarities("wreath_procrustes", *arguments).dead1.tolist() == [0]
    others = [0, 1, 3, 4]
    assert wreath_cka(x, y, live_only=True) == pytest.approx(wreath_cka(x[:, others], y), abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_that_is_dead_altogether_has_no_value_and_leaves_the_others_theirs(measure):
    x, y = random_features(20, 3, 4, 4), random_features(20, 3, 4, 4, seed=1)
    dead = torch.zeros(20, 3, 4, 4)
    found = layer_similarities(measure, lambda part: [x[part], dead[part]], lambda part: [y[part]], 20)
    assert found.live[1].isnan().all()
    assert found.published[0].item() == pytest.approx(similarity(measure, x, y), abs=1e-6)
    assert found.dead1.tolist() == [0, 3]
    with pytest.raises(ValueError, match=r"nothing to compare.*3 of 3, 0 of 3"):
        similarity(measure, dead, y, live_only=True)


# ---- rounding, memory, what is left alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_single_precision_features_have_the_values_of_double_precision(measure, offset):
    x, y = (random_features(300, 3, 16, 16, seed=seed) + offset for seed in (0, 1))
    assert similarity(measure, x, y) == pytest.approx(similarity(measure, x.double(), y.double()), abs=2e-5)


@pytest.mark.parametrize("measure", ["wreath_procrustes", "ortho_procrustes"])
def test_sums_over_batches_are_of_double_precision(measure):
    x, y = random_features(8, 3, 4, 4), random_features(8, 3, 4, 4, seed=1)
    sums = ChannelProducts()
    for _ in range(300):
        sums.add([x], [y])
    assert sums.similarities(measure).published.item() == pytest.approx(similarity(measure, x, y), abs=1e-10)


@pytest.mark.parametrize("measure", MEASURES)
def test_features_are_left_as_they_are_and_may_lie_channels_last(measure):
    x, y = random_features(20, 5, 4, 4), random_features(20, 5, 2, 2, seed=1)
    before = x.clone()
    value = similarity(measure, x, y)
    torch.testing.assert_close(x, before, atol=0, rtol=0)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert similarity(measure, channels_last, y) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_half_precision_features_are_computed_with_in_single_precision(measure):
    x, y = random_features(20, 5, 4, 4).bfloat16(), random_features(20, 5, 4, 4, seed=1).bfloat16()
    assert similarity(measure, x, y) == pytest.approx(similarity(measure, x.float(), y.float()), abs=1e-9)


def test_no_more_than_three_blocks_of_images_are_held(monkeypatch):
    """And no kernel: of 300 images in blocks of 10, no sum has N^2 entries."""
    x = random_features(300, 2)
    made = []
    add = KernelSums.add
    monkeypatch.setattr(KernelSums, "add", lambda self, *args: (add(self, *args), made.append((self, args[2])))[0])
    asked = []

    def features(part):
        asked.append(part.stop - part.start)
        return [x[part]]

    layer_similarities("wreath_cka", features, features, 300, block=10)
    assert max(asked) == 10
    assert max(tiles[0].numel() for _, tiles in made) == 100
    assert max(value.numel() for sums, _ in made for value in vars(sums).values() if torch.is_tensor(value)) == 2 * 300


# ---- networks ------------------------------------------------------------------------------------------------------------


def test_features_of_layers_by_name_and_the_model_is_left_without_hooks():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()).eval()
    images = random_features(5, 3, 8, 8)
    pooled, activation = features_of(net, images, ["2", "1"])
    torch.testing.assert_close(activation, net[0](images).relu())
    torch.testing.assert_close(pooled, net(images).view_as(pooled))
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError):
        features_of(net, random_features(5, 2, 8, 8), ["1"])
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("measure", MEASURES)
def test_all_pairs_of_layers_of_two_networks(measure):
    torch.manual_seed(0)
    networks = [zoo.make("mCNN", width=4).eval() for _ in range(2)]
    layers = [point.name for point in stitch_points(networks[0])]
    images = torch.randn(24, 3, 32, 32)
    of = [lambda part, net=net: features_of(net, images[part], layers) for net in networks]
    found = layer_similarities(measure, *of, 24, block=10)
    whole = [features(slice(0, 24)) for features in of]
    for i, j in [(0, 0), (1, 3), (3, 1)]:  # of different width and resolution
        assert found.published[i, j].item() == pytest.approx(similarity(measure, whole[0][i], whole[1][j]), abs=1e-5)
    with_itself = layer_similarities(measure, of[0], of[0], 24, block=10).published
    torch.testing.assert_close(with_itself.diagonal(), torch.ones(4).double(), atol=1e-3, rtol=0)


# ---- established libraries -----------------------------------------------------------------------------------------------


def test_ortho_procrustes_agrees_with_scipy():
    x, y = random_features(30, 6, 4, 4), random_features(30, 6, 4, 4, seed=1)
    x, y = (z - z.mean((0, 2, 3), keepdim=True) for z in (x, y))  # scipy's is centred
    a, b = (z.movedim(1, -1).flatten(0, 2).double().numpy() for z in (x, y))
    nuclear = math.sqrt(1 - procrustes(a, b)[2])
    assert ortho_procrustes(x, y) == pytest.approx(1 - math.sqrt((1 - nuclear) / 2), abs=1e-6)


def test_linear_cka_and_hsic_agree_with_pytorch_cka():
    cka = pytest.importorskip("cka")
    x, y = random_features(30, 6, 4, 4), random_features(30, 4, 4, 4, seed=1)
    flat = x.flatten(1).double(), y.flatten(1).double()
    assert linear_cka(x, y) == pytest.approx(cka.cka_from_features(*flat).item(), abs=1e-6)
    K, L = (z @ z.T for z in flat)
    assert unbiased_hsic(K, L) == pytest.approx(cka.hsic(K[None], L[None])[0].item(), rel=1e-9)
    # ortho_cka is linear CKA of centred channels of unit norm
    unit = [z - z.mean((0, 2, 3), keepdim=True) for z in (x, y)]
    unit = [(z / torch.linalg.vector_norm(z, dim=(0, 2, 3), keepdim=True)).flatten(1).double() for z in unit]
    assert ortho_cka(x, y) == pytest.approx(cka.cka_from_features(*unit).item(), abs=1e-6)


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_features_that_are_not_finite_are_refused_with_their_layer(measure, value):
    x, y = random_features(20, 3, 4, 4), random_features(20, 3, 4, 4, seed=1)
    y[7, 1, 2, 3] = value
    expected = f"network 2, layer 1 (from 0): 1 of {4 * 48} features are {value:g}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        layer_similarities(measure, lambda part: [x[part]], lambda part: [x[part], y[part]], 20, block=4)


@pytest.mark.parametrize("measure", MEASURES)
def test_different_numbers_of_images_are_refused(measure):
    x = random_features(20, 3, 4, 4)
    with pytest.raises(ValueError, match="different numbers of images: 20, 12"):
        similarity(measure, x, x[:12])
    with pytest.raises(ValueError, match="different numbers of images: 12, 20"):
        layer_similarities(measure, lambda part: [x[part]], lambda part: [x[part][:12]], 20)


@pytest.mark.parametrize("measure", ["wreath_cka", "ortho_cka", "linear_cka"])
@pytest.mark.parametrize("centered", [True, False])
def test_features_without_variation_are_refused_by_cka(measure, centered):
    x = random_features(20, 3, 4, 4)
    with pytest.raises(ValueError, match="nothing to compare"):
        similarity(measure, torch.full((20, 3, 4, 4), 0.3), x, centered=centered)


def test_other_bad_input_is_refused_with_its_value():
    x = random_features(20, 3, 4, 4)
    with pytest.raises(ValueError, match="no measure 'wreath': choose from wreath_procrustes, "):
        similarity("wreath", x, x)
    with pytest.raises(ValueError, match="no estimator 'mean': choose from max, median"):
        wreath_cka(x, x, estimator="mean")
    with pytest.raises(ValueError, match="images to compare, not 0"):
        wreath_procrustes(x[:0], x[:0])
    with pytest.raises(ValueError, match="4 images or more, not 3"):
        wreath_cka(x[:3], x[:3])
    with pytest.raises(ValueError, match="4 images or more, not 3"):
        unbiased_hsic(torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match=re.escape("not (4, 4) and (5, 5)")):
        unbiased_hsic(torch.ones(4, 4), torch.ones(5, 5))
    with pytest.raises(ValueError, match="maps of 4x4 and 6x6"):
        wreath_procrustes(x, random_features(20, 3, 6, 6))
    with pytest.raises(ValueError, match=re.escape("shape (20, 3, 4, 4, 1)")):
        wreath_cka(x[..., None], x)


def test_large_blocks_of_images_are_summed_exactly() -> None:
    """A layer with itself is 1 to 1e-4, though the root takes the root of every rounding error; also in two precisions."""
    x = torch.rand(400, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    for of in (wreath_procrustes, ortho_procrustes):
        assert of(x, x) > 1 - 1e-4
    assert wreath_procrustes(x[:8].double(), x[:8]) > 1 - 1e-4


@pytest.mark.parametrize("channel_axis", [0, 4, -4, -5])
def test_an_axis_without_channels_is_refused(channel_axis: int) -> None:
    x = torch.rand(5, 3, 4, 4)
    with pytest.raises(ValueError, match=f"channel_axis is {channel_axis}: features of shape"):
        wreath_procrustes(x, x, channel_axis=channel_axis)


def test_a_block_holds_an_image_at_least() -> None:
    with pytest.raises(ValueError, match="block is 0: at least 1 image"):
        layer_similarities("wreath_cka", lambda part: [], lambda part: [], 5, block=0)
