"""Random elements of groups, and networks with one in them: the original's values, and what each group is."""

import pytest
import torch
from torch import nn

from common.models import cnn
from common.symmetry.rotations import GROUPS, TransformedLayer, random_element, transform_layer
from tests.reference import Vectors, assert_agrees


@pytest.mark.parametrize("group", ["orthogonal", "Grelu"])
def test_layers_of_the_original(group: str) -> None:
    v = Vectors("modelsym/layer_modifier")
    for kind, layer in (("conv", nn.Conv2d(3, 6, 3, padding=1)), ("linear", nn.Linear(5, 6))):
        layer.load_state_dict(v.under(f"{kind}/param/original_op."))
        matrix = v[f"{kind}/{group}/param/transform.weight"].reshape(6, 6)
        assert_agrees(TransformedLayer(layer, matrix)(v[f"x_{kind}"]), v[f"{kind}/{group}/out"], 1e-4)


@pytest.mark.parametrize("group", ["orthogonal", "Grelu"])
@pytest.mark.parametrize("index", [0, 2, 5])
def test_networks_of_the_original(group: str, index: int) -> None:
    v = Vectors("modelsym/layer_modifier")
    network = cnn.mCNN_k(width=4)
    network.load_state_dict(v.under("net/param/"))
    matrix = v[f"net/{group}_layer{index}/param/transform.weight"].flatten(1)
    transformed = transform_layer(network, index, matrix)
    assert_agrees(transformed(v["net/x"]), v[f"net/{group}_layer{index}/out"], 1e-4)
    trainable = [name for name, parameter in transformed.named_parameters() if parameter.requires_grad]
    assert trainable == v.arrays[f"net/{group}_layer{index}/trainable"].tolist()
    assert all(parameter.requires_grad for parameter in network.parameters())  # it is a copy


def test_elements_are_of_their_groups() -> None:
    chance = torch.Generator().manual_seed(0)
    R = random_element("orthogonal", 50, chance)
    torch.testing.assert_close(R @ R.T, torch.eye(50), atol=1e-5, rtol=0)
    P = random_element("Grelu", 50, chance)
    assert (P >= 0).all() and ((P > 0).sum(0) == 1).all() and ((P > 0).sum(1) == 1).all()
    assert torch.equal(random_element("identity", 5), torch.eye(5))
    again = [random_element(group, 9, torch.Generator().manual_seed(3)) for group in GROUPS for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(again[::2], again[1::2], strict=True))


def test_rotations_are_uniform_and_scales_have_mean_1() -> None:
    """By Haar's measure an entry has mean 0 and variance 1 / n; without the signs of R's diagonal the mean is not 0."""
    chance = torch.Generator().manual_seed(0)
    rotated = torch.stack([random_element("orthogonal", 4, chance) for _ in range(4000)])
    assert rotated.mean(0).abs().max() < 4 * 0.5 / 4000**0.5
    torch.testing.assert_close(rotated.var(0), torch.full((4, 4), 0.25), atol=0.03, rtol=0)
    scales = torch.stack([random_element("Grelu", 10, chance).sum(1) for _ in range(4000)])
    assert abs(scales.mean().item() - 1) < 0.03


def test_relu_commutes_with_its_symmetries_alone() -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=chance)
    for group, commutes in (("Grelu", True), ("identity", True), ("orthogonal", False)):
        A = random_element(group, 8, chance)
        assert torch.allclose((x @ A.T).relu(), x.relu() @ A.T, atol=1e-6) == commutes


def test_what_does_not_fit_is_refused() -> None:
    network = cnn.mCNN_k(width=4)
    with pytest.raises(ValueError, match="layer 1 is a ReLU: take a convolution"):
        transform_layer(network, 1, torch.eye(4))
    with pytest.raises(ValueError, match="layer 99 is not there"):
        transform_layer(network, 99, torch.eye(4))
    with pytest.raises(ValueError, match=r"a matrix of \(4, 4\) does not fit the 8 channels of layer 2"):
        transform_layer(network, 2, torch.eye(4))
    with pytest.raises(ValueError, match="no group 'rotations'"):
        random_element("rotations", 4)


def test_a_layer_is_counted_from_the_front() -> None:
    with pytest.raises(ValueError, match="layer -1 is not there"):
        transform_layer(torch.nn.Sequential(torch.nn.Linear(2, 2)), -1, torch.eye(2))
