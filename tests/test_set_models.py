"""The models of the clustering experiment: the original's numbers and counts, and what padding and order must not change."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain_sets import PlainLSTM, PlainSetTransformer
from common.matching import matched_cross_entropy
from common.models.sets import (
    MODEL_TYPES,
    AttentionBlock,
    InducedSetAttentionBlock,
    MultiheadAttention,
    SetLinear,
    SetStack,
    make_set_model,
    masked_mean,
)
from common.models.swarm import POOLINGS, SwarmLayer
from tests.reference import DATA, Vectors, assert_agrees, names


def model_of(v: Vectors) -> torch.nn.Module:
    options = {k: v.config[k] for k in ("n_hidden", "n_layers", "n_iter", "non_lin", "n_heads", "n_ind_points", "dropout")}
    model = make_set_model(v.config["type"], v.config["n_in"], v.config["n_out"], **options)
    model.load_state_dict(v.under("param/"))  # strict: the original's checkpoints load
    return model


@pytest.mark.parametrize("name", names("model_*"))
def test_reference(name: str) -> None:
    v = Vectors(name)
    model, mask, x = model_of(v), v["mask"].bool(), v["x"].requires_grad_()
    unmasked = torch.ones_like(mask)
    lstm = v.config["type"].startswith("LSTM")
    # the original's LSTMs read padding as points: `logits_alone` has each set by itself, the gradients have it as data
    expected = v["logits_alone"] if lstm else v["logits"]
    assert_agrees(model(x, mask)[mask], expected[mask], 1e-5, "logits")
    assert_agrees(model(x, unmasked), v["logits_nomask"], 1e-5, "logits without a mask")
    model(x, unmasked if lstm else mask).mul(mask.unsqueeze(2)).square().sum().backward()
    for key, parameter in [*model.named_parameters(), ("x", x)]:
        assert_agrees(parameter.grad, v[f"grad/{key}"], 1e-4, key)


def test_attention_reference() -> None:
    v = Vectors("swarm/attention")
    d, heads, x, y = v.config["d"], v.config["n_heads"], v["x"], v["y"]
    mask_x, mask_y = v["mask_x"].bool(), v["mask_y"].bool()
    mab = AttentionBlock(d, heads)
    mab.load_state_dict(v.under("param/mab."))
    isab = InducedSetAttentionBlock(d, heads, v["param/isab.inducing_points"].shape[0])
    isab.load_state_dict(v.under("param/isab."))
    assert_agrees(mab(x, y), v["mab"], 1e-5, "mab")
    assert_agrees(mab(x, y, mask_y)[mask_x], v["mab_masked"][mask_x], 1e-5, "mab_masked")
    assert_agrees(isab(x, torch.ones_like(mask_x)), v["isab"], 1e-5, "isab")
    assert_agrees(isab(x, mask_x)[mask_x], v["isab_masked"][mask_x], 1e-5, "isab_masked")


def test_masked_mean_reference() -> None:
    v = Vectors("swarm/masked_mean")
    x, mask = v["x"].requires_grad_(), v["mask"].bool()
    for suffix, valid in (("", None), ("_masked", mask)):
        mean = masked_mean(x, valid)
        assert_agrees(mean.view(v[f"mean{suffix}"].shape), v[f"mean{suffix}"], 1e-5)
        assert_agrees(torch.autograd.grad(mean.square().sum(), x)[0], v[f"grad{suffix}/x"], 1e-4)


def test_parameter_counts() -> None:
    """The published sizes, from the options as they are written there."""
    counts = json.loads((DATA / "swarm" / "counts.json").read_text())["amortised_clustering"]
    for line, count in counts.items():
        kind, *words = line.split()
        options = dict(word.split("=") for word in words if "=" in word)
        model = make_set_model(kind, 2, 10, **{name: int(value) for name, value in options.items()})
        assert sum(p.numel() for p in model.parameters()) == count["trainable"], line


def test_training_steps_reference() -> None:
    v = Vectors("swarm/train_steps")
    model, x, mask, labels = model_of(v), v["x"], v["mask"].bool(), v["labels"]
    optimizer = torch.optim.Adam(model.parameters(), lr=v.config["lr"])
    losses = []
    for _ in range(v.config["steps"]):
        loss = matched_cross_entropy(model(x, mask).log_softmax(2), labels, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert_agrees(torch.stack(losses), v["losses"], 1e-4, "losses")
    # logits_after are log-probabilities or logits, as the loss takes them: compare what both say
    assert_agrees(F.log_softmax(model(x, mask), 2)[mask], F.log_softmax(v["logits_after"], 2)[mask], 1e-4, "logits")


def small(kind: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return make_set_model(kind, 2, 5, n_hidden=16, n_layers=2, **options)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("prefix", [True, False])
def test_padding_changes_no_valid_output(kind: str, prefix: bool) -> None:
    model, x = small(kind), torch.randn(4, 12, 2)
    mask = torch.arange(12) < torch.tensor([12, 7, 3, 1])[:, None]
    if not prefix:
        mask = mask[:, torch.randperm(12)]
    y = model(x, mask)
    noisy = torch.where(mask.unsqueeze(2), x, 1e3 * torch.randn(4, 12, 2))
    torch.testing.assert_close(model(noisy, mask)[mask], y[mask])
    for n in range(4):
        alone = x[n, mask[n]].unsqueeze(0)
        torch.testing.assert_close(model(alone, torch.ones(alone.shape[:2]).bool())[0], y[n, mask[n]])


@pytest.mark.parametrize("kind", ["Swarm", "SetLinear", "SetLinearMax", "SetTransformer", "LSTMS"])
def test_permutation_equivariance(kind: str) -> None:
    model, x, mask, perm = small(kind), torch.randn(3, 9, 2), torch.rand(3, 9) < 0.7, torch.randperm(9)
    torch.testing.assert_close(model(x[:, perm], mask[:, perm])[mask[:, perm]], model(x, mask)[:, perm][mask[:, perm]])


def test_lstm_is_not_equivariant() -> None:
    model, x = small("LSTM"), torch.randn(3, 9, 2)
    assert (model(x.flip(1)) - model(x).flip(1)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_sets_without_entities_are_finite(kind: str) -> None:
    model = small(kind)
    y = model(torch.randn(2, 5, 2), torch.tensor([[True] * 5, [False] * 5]))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["Swarm", "SetTransformer", "LSTM"])
def test_dropout_acts_in_training_alone(kind: str) -> None:
    model, x, mask = small(kind, dropout=0.5), torch.randn(3, 9, 2), torch.ones(3, 9).bool()
    assert not torch.equal(model(x, mask), model(x, mask))
    model.eval()
    assert torch.equal(model(x, mask), model(x, mask))
    assert model.state_dict().keys() == small(kind).state_dict().keys()


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_bfloat16_autocast_runs(kind: str) -> None:
    model, x, mask = small(kind), torch.randn(3, 9, 2), torch.ones(3, 9).bool()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, mask)
    y.float().square().sum().backward()
    assert (y.float() - model(x, mask)).abs().max() < 0.2


LAYERS = {
    **{f"SwarmLayer {pooling}": lambda pooling=pooling: SwarmLayer(8, 3, 9, 2, pooling=pooling) for pooling in POOLINGS},
    "SwarmLayer formula": lambda: SwarmLayer(8, 3, 9, 2, fast=False),
    "SetLinear": lambda: SetLinear(8, 3),
    "SetLinearMax": lambda: SetLinear(8, 3, maximum=True),
    "InducedSetAttentionBlock": lambda: InducedSetAttentionBlock(8, 2, 4),
    "AttentionBlock": lambda: AttentionBlock(8, 2),
    "SetStack": lambda: SetStack(torch.nn.Linear(8, 4), SetLinear(4, 3)),
    "SetLSTM": lambda: make_set_model("LSTM", 8, 3, n_hidden=4),
}


def call(layer: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """An AttentionBlock attends from some queries to the set."""
    return layer(torch.ones(3, 2, 8), x, mask) if isinstance(layer, AttentionBlock) else layer(x, mask)


@pytest.mark.parametrize("name", LAYERS)
def test_masks_are_optional_and_of_any_type(name: str) -> None:
    torch.manual_seed(0)
    layer, x, mask = LAYERS[name](), torch.randn(3, 9, 8), torch.rand(3, 9) < 0.6
    expected = call(layer, x, mask)
    for other in (mask.float(), mask.double(), mask.bfloat16(), mask.to(torch.uint8), mask.long()):
        assert torch.equal(call(layer, x, other), expected)
    torch.testing.assert_close(call(layer, x, None), call(layer, x, torch.ones(3, 9).bool()))
    assert not torch.equal(call(layer, x, None), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_masks_that_do_not_fit(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(3, 9, 8)
    for shape in ((3, 8), (9, 3), (3,), (9,), (3, 9, 1), (1, 9)):
        with pytest.raises(ValueError, match=re.escape(f"mask has shape {shape}, the sets have (3, 9)")):
            call(layer, x, torch.ones(shape).bool())
    for value in (0.5, -torch.inf, torch.nan, 2):  # -inf: a mask that is meant to be added to the scores
        mask = torch.ones(3, 9)
        mask[1, 4] = value
        with pytest.raises(ValueError, match=f"mask has value {float(value)}"):
            call(layer, x, mask)


def test_an_lstm_takes_its_channels_alone() -> None:
    for channels in (1, 3):
        with pytest.raises(ValueError, match=f"of shape \\(2, 5, {channels}\\): the LSTM takes real numbers \\(N, E, 2\\)"):
            make_set_model("LSTM", 2, 4, n_hidden=6)(torch.randn(2, 5, channels))


def test_wrong_options() -> None:
    for wrong in ({"n_iter": 0}, {"dropout": 1.0}, {"non_lin": "x"}):
        with pytest.raises(ValueError, match=r"positive|unknown"):
            small("SetLinear", **wrong)
    with pytest.raises(ValueError, match="16 channels do not split into 3 heads"):
        small("SetTransformer", n_heads=3)
    with pytest.raises(ValueError, match="unknown model type 'Sworm'"):
        small("Sworm")


@pytest.mark.parametrize(("kind", "n_hidden"), [("SetTransformer", 64), ("SetTransformer", 32), ("LSTM", 16)])
def test_equals_plain_formulation(kind: str, n_hidden: int) -> None:
    """In double precision, with and without projections of all entities; the LSTM in batches without padding alone."""
    torch.manual_seed(0)
    model = make_set_model(kind, 2, 5, n_hidden=n_hidden)
    plain = (PlainLSTM if kind == "LSTM" else PlainSetTransformer)(2, 5, n_hidden)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases, too
    plain.load_state_dict(model.state_dict())
    model, plain, x = model.double(), plain.double(), torch.randn(4, 70, 2, dtype=torch.float64)
    mask = torch.rand(4, 70) < (1 if kind == "LSTM" else 0.7)
    for each in (model, plain):
        each(x, mask)[mask].square().sum().backward()
    torch.testing.assert_close(model(x, mask)[mask], plain(x, mask)[mask])
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(3, 40), (40, 3), (40, 40), (3, 3)])
def test_attention_with_few_queries_or_keys(n_queries: int, n_keys: int) -> None:
    """It is torch's attention of the projections, also for a set without entities."""
    torch.manual_seed(0)
    attention, x, y = MultiheadAttention(32, 4), torch.randn(3, n_queries, 32), torch.randn(3, n_keys, 32)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mask = torch.rand(3, n_keys) < 0.6
    mask[2] = False
    for valid in (mask, None):
        q, k, v = (
            linear(z).unflatten(2, (4, 8)).transpose(1, 2)
            for linear, z in ((attention.project_queries, x), (attention.project_keys, y), (attention.project_values, y))
        )
        heads = F.scaled_dot_product_attention(q, k, v, None if valid is None else valid[:, None, None])
        torch.testing.assert_close(attention(x, y, valid), attention.concatenation(heads.transpose(1, 2).flatten(2)))
