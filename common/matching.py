"""Clustering metrics that ignore the names of labels: cross entropy, accuracy, adjusted Rand index.

Predictions are compared with the truth under a one-to-one matching of true clusters to predicted labels (Vollgraf 2019, arXiv
1906.09400, section 4.1).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.masks import as_mask

LOSSES = ("hungarian", "greedy")


def class_scores(log_probs: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Score of each matching of a cluster to a label: log_probs (N, E, K), labels (N, E), mask (N, E) -> (N, K, K).

    Entry [n, k, j] is the sum of the log-probabilities of label j over the entities of cluster k, divided by the number of
    entities of set n. Padding is ignored. Raises ValueError if shapes differ, or labels are no integers in [0, K).
    """
    K = log_probs.shape[2]
    mask = as_mask(log_probs, mask)
    check_labels(labels, mask, K)
    in_cluster = (labels.unsqueeze(2) == torch.arange(K, device=labels.device)) & mask.unsqueeze(2)  # (N, E, K)
    weights = in_cluster / mask.sum(1).clamp(min=1)[:, None, None]
    return weights.to(log_probs.dtype).mT @ torch.where(mask.unsqueeze(2), log_probs, 0)


def check_labels(labels: Tensor, mask: Tensor, n_labels: int) -> None:
    """Raise ValueError unless labels (N, E) are integers in [0, n_labels) where the mask (N, E) is True.

    Values are looked at on a CPU only: on a GPU, the host would wait.
    """
    if labels.shape != mask.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the mask {tuple(mask.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels are {labels.dtype}: integers are needed")
    if labels.device.type == "cpu":
        wrong = labels[((labels < 0) | (labels >= n_labels)) & mask]
        if len(wrong):
            raise ValueError(f"label {wrong[0].item()} is not in [0, {n_labels})")


def best_matching(scores: Tensor) -> Tensor:
    """The one-to-one matching with the largest sum (Hungarian method): scores (N, K, K) -> column of each row (N, K).

    All sets go to the CPU in one transfer. A set with scores that are not finite gets the identity: its loss is not finite
    under any matching.
    """
    matrices = scores.detach().double().cpu().numpy()
    columns = np.tile(np.arange(matrices.shape[1]), (len(matrices), 1))
    for n, matrix in enumerate(matrices):
        if np.isfinite(matrix).all():
            columns[n] = linear_sum_assignment(matrix, maximize=True)[1]
    return torch.from_numpy(columns).to(scores.device, non_blocking=True)


def greedy_matching(scores: Tensor) -> Tensor:
    """Take the largest entry, strike out its row and column, and so on: scores (N, K, K) -> column of each row (N, K).

    As published until July 2019. Rows of absent clusters are zero, larger than any mean log-probability: they are matched
    first and may take the columns that suit the others, so with few clusters this is far from the best matching.
    """
    remaining = scores.detach().clone()
    N, K, _ = remaining.shape
    sets = torch.arange(N, device=remaining.device)
    columns = torch.zeros(N, K, dtype=torch.long, device=remaining.device)
    for _ in range(K):
        largest = remaining.flatten(1).argmax(1)
        row, column = largest // K, largest % K
        columns[sets, row] = column
        remaining[sets, row] = -torch.inf
        remaining[sets, :, column] = -torch.inf
    return columns


def matched_cross_entropy(log_probs: Tensor, labels: Tensor, mask: Tensor, matching: str = "hungarian") -> Tensor:
    """Cross entropy of each set, in nats per entity, under the matching: (N, E, K), (N, E), (N, E) -> (N).

    Raises ValueError for an unknown matching, and as `class_scores` does.
    """
    if matching not in LOSSES:
        raise ValueError(f"unknown matching {matching!r}: choose from {', '.join(LOSSES)}")
    scores = class_scores(log_probs, labels, mask)
    columns = best_matching(scores) if matching == "hungarian" else greedy_matching(scores)
    return -scores.gather(2, columns.unsqueeze(2)).sum((1, 2))


def contingency(predicted: Tensor, labels: Tensor, mask: Tensor, n_labels: int) -> Tensor:
    """Count the entities of each pair of true cluster and predicted label: (N, E) three times -> (N, K, K), float64.

    Raises ValueError if shapes differ, or labels are no integers in [0, n_labels).
    """
    mask = as_mask(predicted.unsqueeze(2), mask)
    for integers in (predicted, labels):
        check_labels(integers, mask, n_labels)
    pairs = torch.where(mask, labels.long() * n_labels + predicted, n_labels**2)  # padding is counted in a bin of its own
    counts = torch.zeros(len(pairs), n_labels**2 + 1, dtype=torch.float64, device=pairs.device)
    counts.scatter_add_(1, pairs, torch.ones_like(pairs, dtype=torch.float64))
    return counts[:, :-1].unflatten(1, (n_labels, n_labels))


def matched_accuracy(counts: Tensor) -> Tensor:
    """Accuracy under the best matching: contingency (N, K, K) -> (N)."""
    correct = counts.gather(2, best_matching(counts).unsqueeze(2)).sum((1, 2))
    return correct / counts.sum((1, 2)).clamp(min=1)


def adjusted_rand_index(counts: Tensor) -> Tensor:
    """Agreement in pairs of entities, 0 for a random labelling and 1 for a perfect one: contingency (N, K, K) -> (N).

    Hubert and Arabie 1985, Comparing partitions, eq. 5. It is 1 if both partitions are trivial (everything in one cluster,
    for example).
    """

    def n_pairs(n: Tensor) -> Tensor:
        return n * (n - 1) / 2

    in_both = n_pairs(counts).sum((1, 2))
    in_rows, in_columns = n_pairs(counts.sum(2)).sum(1), n_pairs(counts.sum(1)).sum(1)
    expected = in_rows * in_columns / n_pairs(counts.sum((1, 2))).clamp(min=1)
    largest = (in_rows + in_columns) / 2
    return torch.where(largest == expected, 1.0, (in_both - expected) / (largest - expected))
