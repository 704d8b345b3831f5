"""Stitching: what must hold whatever the numbers are."""

import copy
import doctest
import importlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models import zoo
from common.models.cct import CCT
from common.models.stitchable_resnet import StitchableResNet
from common.symmetry.matrices import permutation_matrix, round_hungarian, round_monotone, round_scores, sinkhorn
from common.symmetry.stitching import reestimate_statistics, restore_statistics, stitch, stitch_points
from common.symmetry.stitching_layers import Birkhoff, Full, Lasso, LowRank, StitchingLayer, Wreath
from common.symmetry.train import make_optimizers, training_step

LAYERS = {
    "full": Full,
    "lowrank": lambda channels: LowRank(channels, 2),
    "lasso": lambda channels: Lasso(channels, 0.01),
    "wreath": Wreath,
    "birkhoff": lambda channels: Birkhoff(channels, 0.1),
}


def mcnn(width: int) -> nn.Module:
    return zoo.make("mCNN", width=width)


def resnet() -> StitchableResNet:
    """A narrow one whose shortcuts have weights."""
    return StitchableResNet((4, 8, 16), (2, 2, 2), padded_shortcut=False)


def transformer() -> CCT:
    """A small one, without chance in training."""
    return CCT(n_layers=3, n_heads=2, mlp_ratio=2, embedding_dim=8, n_conv_layers=2, attention_dropout=0.0)


NETWORKS = {"mcnn": lambda: mcnn(4), "resnet": resnet, "transformer": transformer}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def trained(network: nn.Module) -> nn.Module:
    """With batch statistics, scales and shifts as of a network that has been trained: nothing is at its initial value."""
    for name, tensor in network.state_dict().items():
        if "running_var" in name or (tensor.ndim == 1 and "weight" in name):
            tensor.uniform_(0.5, 2)
        elif tensor.ndim == 1:
            tensor.normal_(0, 0.3)
    return network.eval()


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 32, 32)


def identity(channels: int) -> Birkhoff:
    layer = Birkhoff(channels)
    with torch.no_grad():
        layer.weight_perms.copy_(torch.eye(channels))
    return layer


PARTS = ("matrices", "stitching_layers", "stitching", "train", "measures", "procrustes", "cka", "similarity", "rotations")


@pytest.mark.parametrize("name", PARTS)
def test_examples_in_docstrings(name: str) -> None:
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(f"common.symmetry.{name}"))
    assert results.attempted > 1
    assert results.failed == 0


# ---- matrices ------------------------------------------------------------------------------------------------------------


def test_sinkhorn_is_doubly_stochastic() -> None:
    W = sinkhorn(torch.rand(20, 20) + 0.01, 100)
    assert (W.sum(0) - 1).abs().max() < 1e-6
    assert (W.sum(1) - 1).abs().max() < 1e-6


def test_sinkhorn_of_dead_rows_and_columns() -> None:
    A = torch.rand(6, 6)
    A[2] = A[:, 4] = 0
    W = sinkhorn(A)
    assert W.isfinite().all() and (W[2] == 0).all() and (W[:, 4] == 0).all()


def test_ties_round_to_permutations() -> None:
    for P in (
        round_scores(torch.zeros(7, 1)),
        round_scores(torch.tensor([[1.0], [2.0], [1.0], [2.0]])),
        round_hungarian(torch.ones(7, 7)),
        round_monotone(torch.ones(7, 7), torch.linspace(0, 1, 7)),
    ):
        assert (P.sum(0) == 1).all() and (P.sum(1) == 1).all() and (P.max(1).values == 1).all()


# ---- stitching layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_maps_tokens_and_features_agree(kind: str) -> None:
    layer = LAYERS[kind](6)
    maps = torch.randn(2, 6, 3, 5)
    tokens = maps.flatten(2).mT
    for training, matrix in ((True, layer.matrix()), (False, layer.rounded())):
        layer.train(training)
        expected = torch.einsum("dc,btc->btd", matrix, tokens)
        torch.testing.assert_close(layer(tokens), expected)
        torch.testing.assert_close(layer(maps).flatten(2).mT, expected)
        torch.testing.assert_close(layer(tokens[:, 0]), expected[:, 0])
    assert not layer.rounded().requires_grad


def test_rounding_is_never_stale() -> None:
    layer = Birkhoff(5).eval()
    x = torch.randn(3, 5)
    layer(x)
    P = permutation_matrix(torch.tensor([1, 2, 3, 4, 0]))
    layer.load_state_dict({"weight_perms": P, "weight_scalars": torch.ones(5)})
    assert torch.equal(layer(x), x @ P.T)
    layer.weight_perms.data = torch.eye(5)
    assert torch.equal(layer(x), x)
    layer.rounded().zero_()  # the caller's own
    layer.scalars = False
    layer.rounded().zero_()
    assert torch.equal(layer(x), x)


def test_scales_can_be_switched_off() -> None:
    for layer in (Birkhoff(4), Wreath(4)):
        with torch.no_grad():
            layer.weight_scalars.fill_(3.0)
        on = layer(torch.ones(1, 4))
        layer.scalars = False
        off = layer(torch.ones(1, 4))
        off.sum().backward()
        assert layer.weight_scalars.grad is None and (on > 2 * off).all()


# ---- stitched models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_stitched_to_itself_by_the_identity(name: str) -> None:
    network, x = trained(NETWORKS[name]()), images()
    points = stitch_points(network)
    assert len(points) == {"mcnn": 4, "resnet": 13, "transformer": 2 + 3}[name]
    for point in points:
        stitched = stitch(network, network, point.index, identity(point.channels)).eval()
        torch.testing.assert_close(stitched(x), network(x), rtol=1e-6, atol=1e-6)  # layouts differ, and so sums' order
        expected = copy.deepcopy(network).train()(x)
        torch.testing.assert_close(stitched.train()(x), expected)


def permuted_and_scaled(network: nn.Sequential, conv: int, following: int, order: Tensor, scales: Tensor) -> nn.Sequential:
    """A copy that computes the same, with channel i of a layer being channel order[i] of the network's times its scale."""
    network = copy.deepcopy(network)
    state = network.state_dict()
    for name in ("weight", "bias"):
        state[f"{conv + 1}.{name}"].mul_(scales)  # batch norm
    for name in (f"{conv}.weight", *(f"{conv + 1}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))):
        state[name].copy_(state[name][order].clone())
    weight = state[f"{following}.weight"]
    weight.copy_((weight / scales[:, None, None])[:, order].clone())
    return network


@pytest.mark.parametrize("kind", ["birkhoff", "wreath"])
@pytest.mark.parametrize(("index", "conv", "following"), [(3, 0, 3), (6, 3, 7), (10, 7, 11)])
def test_a_network_stitched_to_a_permuted_and_rescaled_copy(kind: str, index: int, conv: int, following: int) -> None:
    network, x = trained(mcnn(4)), images()
    assert isinstance(network, nn.Sequential)
    channels = network[conv].out_channels
    order, scales = torch.randperm(channels), torch.rand(channels) + 0.5
    copied = permuted_and_scaled(network, conv, following, order, scales)
    torch.testing.assert_close(copied(x), network(x), rtol=1e-4, atol=1e-5)
    layer: StitchingLayer
    if kind == "birkhoff":
        layer = Birkhoff(channels)
        state = {"weight_perms": permutation_matrix(order), "weight_scalars": scales}
    else:
        layer = Wreath(channels, tau=1e-3)
        scores = torch.empty(channels)
        scores[order] = torch.arange(channels, 0, -1.0)
        state = {"weight_perms": scores[:, None], "weight_scalars": scales.log()}
    layer.load_state_dict(state)
    stitched = stitch(network, copied, index, layer)
    for training in (False, True):
        expected = copy.deepcopy(network).train(training)(x)
        torch.testing.assert_close(stitched.train(training)(x), expected, rtol=1e-4, atol=1e-4)
    stitched = stitch(network, copied, index, identity(channels)).eval()
    assert (stitched(x) - network(x)).abs().max() > 0.01  # without the symmetry it is another function


@pytest.mark.parametrize("index", [3, 6, 10, 14])
def test_halves_of_a_sequence(index: int) -> None:
    model1, model2, x = trained(mcnn(4)), trained(mcnn(4)), images()
    layer = Full(dict(zip((3, 6, 10, 14), (4, 8, 16, 32)))[index])
    stitched = stitch(model1, model2, index, layer).eval()
    expected = model2[index:](layer(model1[:index](x)))  # index 3 is the third of the sequence: the root counts
    assert torch.equal(stitched(x), expected)
    assert not torch.allclose(stitched(x), model1(x)) and not torch.allclose(stitched(x), model2(x))


def test_the_skip_path_goes_past_a_layer_inside_a_block() -> None:
    model1, model2 = (trained(resnet()) for _ in range(2))
    x = images()
    point = next(p for p in stitch_points(model1) if p.name == "block_seq.2.r1")  # the first block of the second stage
    assert point.inside_block
    layer = Full(point.channels)
    stitched = stitch(model1, model2, point.index, layer).eval()
    before = model1.block_seq[:2](model1.r1(model1.bn1(model1.conv1(x))))
    front, back = model1.block_seq[2], model2.block_seq[2]
    y = layer(front.r1(front.bn1(front.conv1(before))))
    y = F.relu(back.bn2(back.conv2(y)) + back.shortcut(before))
    expected = model2.linear(model2.block_seq[3:](y).mean((2, 3)))
    assert torch.equal(stitched(x), expected)


def test_what_is_registered_early_and_called_late_is_behind() -> None:
    model1, model2, x = trained(transformer()), trained(transformer()), images()
    point = next(p for p in stitch_points(model1) if p.name == "classifier.blocks.transformer_block_1")
    assert point.shape == (64, 8) and point.channels == 8
    layer = Full(8)
    stitched = stitch(model1, model2, point.index, layer).eval()
    front, back = model1.classifier, model2.classifier
    tokens = model1.tokenizer(x) + front.positional_emb
    tokens = back.norm(back.blocks[2](layer(front.blocks[1](front.blocks[0](tokens)))))
    expected = back.fc((back.attention_pool(tokens).softmax(1) * tokens).sum(1))
    assert torch.equal(stitched(x), expected)


def test_a_network_of_other_images() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    example = torch.zeros(1, 1, 8, 8)
    assert [point.shape for point in stitch_points(network, example)] == [(4, 6, 6)]
    assert stitch(network, network, 2, Full(4), example)(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_looking_for_stitch_points_leaves_the_network_as_it_was() -> None:
    network = mcnn(4).train()
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    stitch_points(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network[0].training and not network[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 4 is no stitch point: choose from 3 6 10 14"):
        stitch(mcnn(4), mcnn(4), 4, Full(4))
    with pytest.raises(ValueError, match="a stitching layer of 4 channels does not fit the 8 of layer 6"):
        stitch(mcnn(4), mcnn(4), 6, Full(4))
    with pytest.raises(ValueError, match=r"differ in 0.weight \(\(4, 3, 3, 3\), \(5, 3, 3, 3\)\), .* and 18 more"):
        stitch(mcnn(4), mcnn(5), 3, Full(4))
    with pytest.raises(ValueError, match="a rank of 5 is not possible between 4 channels"):
        LowRank(4, 5)
    with pytest.raises(ValueError, match="no matrix and scales"):
        make_optimizers(Full(4), 0.1, alternating=True)
    stitched = stitch(mcnn(4), mcnn(4), 3, Full(4))
    with pytest.raises(ValueError, match="no projection"):
        training_step(stitched, images(), torch.arange(6), make_optimizers(stitched.stitching_layer, 0.1)[0], hook_eps=0.1)


def test_the_state_holds_the_layer_once_and_comes_back() -> None:
    model1, model2, x = trained(mcnn(4)), trained(mcnn(4)), images()
    stitched = stitch(model1, model2, 6, Birkhoff(8)).eval()
    state = stitched.state_dict()
    assert {key for key in state if "perms" in key or "scalars" in key} == {
        "network.5.1.weight_perms",
        "network.5.1.weight_scalars",
    }
    assert len(state) == len(model1.state_dict()) + 2
    other = stitch(model2, model1, 6, Birkhoff(8)).eval()
    other.load_state_dict(state)
    assert torch.equal(other(x), stitched(x))
    assert torch.equal(copy.deepcopy(stitched)(x), stitched(x))


# ---- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_only_the_stitching_layer_learns(kind: str) -> None:
    model1, model2 = trained(mcnn(4)), trained(mcnn(4))
    before = [copy.deepcopy(model.state_dict()) for model in (model1, model2)]
    stitched = stitch(model1, model2, 6, LAYERS[kind](8)).train()
    frozen = [(n, p, p.detach().clone()) for n, p in stitched.named_parameters() if not n.startswith("network.5.1.")]
    assert len(frozen) == len(list(model1.parameters()))
    layer = copy.deepcopy(stitched.stitching_layer.state_dict())
    (optimizer,) = make_optimizers(stitched.stitching_layer, 0.1)
    for _ in range(3):
        training_step(stitched, images(), torch.arange(6), optimizer)
    for model, state in zip((model1, model2), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, parameter, value in frozen:
        assert torch.equal(parameter, value) and parameter.grad is None and not parameter.requires_grad, name
    assert all(not torch.equal(value, layer[key]) for key, value in stitched.stitching_layer.state_dict().items())
    assert not torch.equal(stitched.network[1].running_mean, model1[1].running_mean)  # as published
    assert not torch.equal(stitched.network[12].running_mean, model2[12].running_mean)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_kept_of_the_front(name: str) -> None:
    model1, model2 = trained(NETWORKS[name]()), trained(NETWORKS[name]())
    for point in stitch_points(model1):
        stitched = stitch(model1, model2, point.index, Full(point.channels)).train()
        seen: list[Tensor] = []
        stitched.stitching_layer.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        assert stitched(images()).requires_grad
        assert seen[0].grad_fn is None and not seen[0].requires_grad


def test_training_lowers_the_loss_and_keeps_birkhoff_in_its_polytope() -> None:
    torch.manual_seed(1)
    network, x = trained(mcnn(4)), images(30)
    labels = copy.deepcopy(network).train()(x).argmax(1)
    stitched = stitch(network, network, 6, Birkhoff(8, alpha=0.01)).train()
    (optimizer,) = make_optimizers(stitched.stitching_layer, 0.1)
    losses = [training_step(stitched, x, labels, optimizer).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    W = stitched.stitching_layer.matrix() / stitched.stitching_layer.weight_scalars
    assert W.min() >= 0 and (W.sum(0) - 1).abs().max() < 1e-5 and (W.sum(1) - 1).abs().max() < 0.05
    assert stitched.stitching_layer.weight_scalars.min() >= 0


def test_a_step_in_bfloat16() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        stitched = stitch(trained(mcnn(4)), trained(mcnn(4)), 6, Birkhoff(8)).train()
        (optimizer,) = make_optimizers(stitched.stitching_layer, 0.1)
        losses.append(
            [training_step(stitched, images(), torch.arange(6), optimizer, precision=precision).item() for _ in range(2)]
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


# ---- batch statistics ----------------------------------------------------------------------------------------------------


def test_reestimating_statistics_leaves_all_modes_as_they_were() -> None:
    """Also if it fails, and in a network whose modules are not all of one mode, as that of saved models when it is stitched."""
    stitched = stitch(mcnn(4).eval(), mcnn(4).eval(), 6, Birkhoff(8))
    modes = [module.training for module in stitched.modules()]
    assert set(modes) == {False, True}
    reestimate_statistics(stitched, [images()])
    assert [module.training for module in stitched.modules()] == modes
    with pytest.raises(RuntimeError):
        reestimate_statistics(stitched, [images()[:, :2]])
    assert [module.training for module in stitched.modules()] == modes


def test_statistics_are_those_of_the_rounded_layer_and_can_be_put_back() -> None:
    model1, model2 = trained(mcnn(4)), trained(mcnn(4))
    stitched = stitch(model1, model2, 6, Birkhoff(8)).eval()
    kept = copy.deepcopy(stitched.state_dict())
    batches = [images(8) for _ in range(3)]
    before = reestimate_statistics(stitched, batches)
    assert not stitched.training and not stitched.stitching_layer.training
    fixed = Full(8)
    with torch.no_grad():
        fixed.weight.copy_(stitched.stitching_layer.rounded()[:, :, None, None])
    slow = stitch(model1, model2, 6, fixed).train()
    for x in batches:
        slow(x)
    for key in ("1.running_mean", "8.running_mean", "12.running_var", "12.num_batches_tracked"):
        torch.testing.assert_close(stitched.network.state_dict()[key], slow.network.state_dict()[key])
        assert not torch.equal(stitched.network.state_dict()[key], kept[f"network.{key}"])
    restore_statistics(stitched, before)
    assert all(torch.equal(value, kept[key]) for key, value in stitched.state_dict().items())


def test_a_hundred_batches_are_as_good_as_all() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    example = torch.zeros(1, 3, 8, 8)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(300)]
    statistics = []
    for part in (batches, batches[-100:]):
        stitched = stitch(network, network, 2, Birkhoff(4), example)
        stitched.stitching_layer.load_state_dict(identity(4).state_dict())
        reestimate_statistics(stitched, part)
        statistics.append(stitched.network[2])
    torch.testing.assert_close(statistics[0].running_mean, statistics[1].running_mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(statistics[0].running_var, statistics[1].running_var, rtol=1e-3, atol=0)


def test_a_step_with_channels_last_is_the_same() -> None:
    model1, model2, x = trained(mcnn(4)), trained(mcnn(4)), images()
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        stitched = stitch(model1, model2, 10, Birkhoff(16)).to(memory_format=layout).train()
        training_step(stitched, x.to(memory_format=layout), torch.arange(6), make_optimizers(stitched.stitching_layer, 0.1)[0])
        weights.append(stitched.stitching_layer.matrix())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
