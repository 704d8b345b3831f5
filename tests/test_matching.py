"""The loss under a matching: the original's numbers; accuracy and Rand index against their definitions, by loops."""

import itertools

import pytest
import torch

from common import matching
from tests.reference import Vectors, assert_agrees

VECTORS = Vectors("swarm/losses")


@pytest.mark.parametrize("case", VECTORS.config["cases"])
@pytest.mark.parametrize("name", matching.LOSSES)
def test_reference(case: str, name: str) -> None:
    v = VECTORS
    z = v[f"{case}/z"].requires_grad_()
    log_p = z.log_softmax(2) if case in v.config["log_softmax"] else z
    labels, mask, present = v[f"{case}/labels"], v[f"{case}/mask"].bool(), v[f"{case}/present"].bool()
    loss = matching.matched_cross_entropy(log_p, labels, mask, name)
    assert_agrees(-loss, v[f"{case}/{name}/value"], 1e-5, "value")
    assert_agrees(loss.mean(), v[f"{case}/{name}/loss"], 1e-5, "loss")
    loss.mean().backward()
    assert_agrees(z.grad, v[f"{case}/{name}/grad_z"], 1e-4, "gradient")

    scores, pairs = matching.class_scores(log_p, labels, mask), v[f"{case}/{name}/matching"]
    if name == "hungarian":
        rows, columns = pairs[:, 0], pairs[:, 1]
        matched = matching.best_matching(scores)
    else:
        rows, columns = pairs.unbind(2)
        matched = matching.greedy_matching(scores)
    expected = torch.empty_like(columns).scatter_(1, rows, columns)
    assert torch.equal(matched[present], expected[present])  # absent clusters are matched arbitrarily


def test_best_matching_is_best() -> None:
    torch.manual_seed(0)
    scores = torch.randn(20, 5, 5)
    permutations = torch.tensor(list(itertools.permutations(range(5))))
    sums = torch.stack([scores[:, torch.arange(5), p].sum(1) for p in permutations], 1)
    columns = matching.best_matching(scores)
    torch.testing.assert_close(scores.gather(2, columns.unsqueeze(2)).sum((1, 2)), sums.amax(1))


def test_loss_ignores_the_names_of_labels_and_whatever_stands_at_padding() -> None:
    torch.manual_seed(0)
    log_p, labels, mask = torch.randn(4, 30, 6).log_softmax(2), torch.randint(0, 6, (4, 30)), torch.rand(4, 30) < 0.8
    loss = matching.matched_cross_entropy(log_p, labels, mask)
    torch.testing.assert_close(matching.matched_cross_entropy(log_p[:, :, torch.randperm(6)], labels, mask), loss)
    for poison in (-torch.inf, torch.nan):
        spoilt = log_p.masked_fill(~mask.unsqueeze(2), poison).requires_grad_()
        again = matching.matched_cross_entropy(spoilt, labels, mask)
        assert torch.equal(again, loss)
        again.sum().backward()
        assert spoilt.grad.isfinite().all()


def test_loss_of_nan_is_nan_and_raises_nothing() -> None:
    log_p = torch.randn(2, 5, 3)
    log_p[0] = torch.nan
    loss = matching.matched_cross_entropy(log_p, torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5).bool())
    assert loss[0].isnan() and loss[1].isfinite()


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_out_of_range(label: int) -> None:
    """An error where an entity is valid; ignored at padding."""
    labels, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5).bool()
    labels[1, 3] = label
    for call in (
        lambda mask: matching.class_scores(torch.zeros(2, 5, 3), labels, mask),
        lambda mask: matching.contingency(labels, torch.zeros_like(labels), mask, 3),
        lambda mask: matching.contingency(torch.zeros_like(labels), labels, mask, 3),
    ):
        with pytest.raises(ValueError, match=rf"label {label} is not in \[0, 3\)"):
            call(mask)
        call(labels == 0)


def test_labels_and_masks_that_do_not_fit() -> None:
    log_p, labels, mask = torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"labels have shape \(1, 5\), the mask \(2, 5\)"):
        matching.class_scores(log_p, labels[:1], mask)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1\), the sets have \(2, 5\)"):
        matching.class_scores(log_p, labels, mask[:, :1])
    with pytest.raises(ValueError, match=r"labels are torch.float32: integers are needed"):
        matching.class_scores(log_p, labels.float(), mask)
    assert torch.equal(matching.class_scores(log_p, labels, mask), matching.class_scores(log_p, labels, mask.bool()))


def test_unknown_matching() -> None:
    with pytest.raises(ValueError, match="'best'"):
        matching.matched_cross_entropy(torch.zeros(1, 2, 2), torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), "best")


def test_accuracy_and_rand_index_by_definition() -> None:
    torch.manual_seed(0)
    labels, predicted, mask = torch.randint(0, 4, (6, 25)), torch.randint(0, 4, (6, 25)), torch.rand(6, 25) < 0.8
    predicted = torch.where(torch.rand(6, 25) < 0.6, (labels + 1) % 4, predicted)
    counts = matching.contingency(predicted, labels, mask, 4)
    for n in range(6):
        true, guess = labels[n, mask[n]].tolist(), predicted[n, mask[n]].tolist()
        for k, j in itertools.product(range(4), repeat=2):
            assert counts[n, k, j] == sum(a == k and b == j for a, b in zip(true, guess, strict=True))
        right = max(sum(p[b] == a for a, b in zip(true, guess, strict=True)) for p in itertools.permutations(range(4)))
        assert matching.matched_accuracy(counts)[n].item() == pytest.approx(right / len(true))
        # adjusted Rand index: over all pairs of points, (together in both - expected) / (largest - expected)
        pairs = list(itertools.combinations(range(len(true)), 2))
        both = sum(true[a] == true[b] and guess[a] == guess[b] for a, b in pairs)
        in_true, in_guess = (sum(labelling[a] == labelling[b] for a, b in pairs) for labelling in (true, guess))
        expected = in_true * in_guess / len(pairs)
        index = (both - expected) / ((in_true + in_guess) / 2 - expected)
        assert matching.adjusted_rand_index(counts)[n].item() == pytest.approx(index)


def test_perfect_and_trivial_labellings() -> None:
    labels, mask = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]]), torch.ones(2, 4).bool()
    counts = matching.contingency((labels + 1) % 3, labels, mask, 3)
    assert matching.matched_accuracy(counts).tolist() == [1, 1]
    assert matching.adjusted_rand_index(counts).tolist() == [1, 1]
