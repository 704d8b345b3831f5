"""Judge a labelling of points up to a renaming of the labels: cross entropy, accuracy, adjusted Rand index.

Cluster labels have no names of their own, so predictions are compared with the truth under a one-to-one matching of true
clusters to predicted labels (Vollgraf 2019, arXiv 1906.09400, section 4.1).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

LOSSES = ("hungarian", "greedy")


def class_scores(log_probs: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """M[k, j]: what each set gains by calling its cluster k label j; the matrix that is to be matched.

    The sum of the log-probabilities of label j over the entities of cluster k, divided by the number of entities of the
    set. log_probs (N, E, K), labels (N, E), mask (N, E) -> (N, K, K). Whatever stands at padding is not looked at.
    """
    K = log_probs.shape[2]
    of_class = (labels.unsqueeze(2) == torch.arange(K, device=labels.device)) & mask.unsqueeze(2)  # (N, E, K)
    share = of_class / mask.sum(1).clamp(min=1)[:, None, None]
    return share.to(log_probs.dtype).mT @ torch.where(mask.unsqueeze(2), log_probs, 0)


def best_matching(scores: Tensor) -> Tensor:
    """The one-to-one matching with the largest sum: M (N, K, K) -> column of each row (N, K). Exact (Hungarian method).

    All sets go to the CPU in one transfer. A set whose scores are not finite gets the identity: its loss is not finite
    under any matching.
    """
    matrices = scores.detach().double().cpu().numpy()
    columns = np.tile(np.arange(matrices.shape[1]), (len(matrices), 1))
    for n, matrix in enumerate(matrices):
        if np.isfinite(matrix).all():
            columns[n] = linear_sum_assignment(matrix, maximize=True)[1]
    return torch.from_numpy(columns).to(scores.device)


def greedy_matching(scores: Tensor) -> Tensor:
    """Take the largest entry, strike out its row and column, and so on: M (N, K, K) -> column of each row (N, K).

    As published until July 2019. Rows of absent clusters are zero, larger than any mean log-probability: they are served
    first and may take the columns that the others want, so with few clusters this is far from the best matching.
    """
    left = scores.detach().clone()
    N, K, _ = left.shape
    sets = torch.arange(N, device=left.device)
    columns = torch.zeros(N, K, dtype=torch.long, device=left.device)
    for _ in range(K):
        largest = left.flatten(1).argmax(1)
        row, column = largest // K, largest % K
        columns[sets, row] = column
        left[sets, row] = -torch.inf
        left[sets, :, column] = -torch.inf
    return columns


def matched_cross_entropy(log_probs: Tensor, labels: Tensor, mask: Tensor, matching: str = "hungarian") -> Tensor:
    """Cross entropy of each set, in nats per entity, under the matching: (N, E, K), (N, E), (N, E) -> (N).

    Raises ValueError for an unknown matching.
    """
    if matching not in LOSSES:
        raise ValueError(f"unknown matching {matching!r}: choose from {', '.join(LOSSES)}")
    scores = class_scores(log_probs, labels, mask)
    columns = best_matching(scores) if matching == "hungarian" else greedy_matching(scores)
    return -scores.gather(2, columns.unsqueeze(2)).sum((1, 2))


def contingency(predicted: Tensor, labels: Tensor, mask: Tensor, n_labels: int) -> Tensor:
    """Count the entities of each (true cluster, predicted label): (N, E) three times -> (N, K, K), float64."""
    pairs = torch.where(mask, labels * n_labels + predicted, n_labels**2)  # padding is counted in a bin of its own
    counts = torch.zeros(len(pairs), n_labels**2 + 1, dtype=torch.float64, device=pairs.device)
    counts.scatter_add_(1, pairs, torch.ones_like(pairs, dtype=torch.float64))
    return counts[:, :-1].unflatten(1, (n_labels, n_labels))


def matched_accuracy(counts: Tensor) -> Tensor:
    """Share of entities that are right under the matching with most of them right: contingency (N, K, K) -> (N)."""
    right = counts.gather(2, best_matching(counts).unsqueeze(2)).sum((1, 2))
    return right / counts.sum((1, 2)).clamp(min=1)


def adjusted_rand_index(counts: Tensor) -> Tensor:
    """Agreement in pairs of entities, 0 for a random labelling and 1 for a perfect one: contingency (N, K, K) -> (N).

    Hubert and Arabie 1985, Comparing partitions, eq. 5. Two partitions without any choice (everything in one cluster in
    both, say) agree perfectly.
    """

    def pairs(n: Tensor) -> Tensor:
        return n * (n - 1) / 2

    both = pairs(counts).sum((1, 2))
    in_rows, in_columns = pairs(counts.sum(2)).sum(1), pairs(counts.sum(1)).sum(1)
    expected = in_rows * in_columns / pairs(counts.sum((1, 2))).clamp(min=1)
    largest = (in_rows + in_columns) / 2
    return torch.where(largest == expected, 1.0, (both - expected) / (largest - expected))
