"""Doubly stochastic matrices: Sinkhorn's projection, and rounding to permutations.

The symmetries of a ReLU layer are the permutations of its channels times positive scales (Godfrey et al. 2022, arXiv
2205.14258, section 3). Permutations are the corners of the Birkhoff polytope, the set of doubly stochastic matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.matching import best_matching


def sinkhorn(A: Tensor, iters: int = 16) -> Tensor:
    """Divide rows, then columns, by their sums, `iters` times: entries >= 0 (n, n) -> nearly doubly stochastic (n, n).

    Sinkhorn and Knopp 1967. Columns come last and sum to 1; rows do in the limit. A row or column of zeros, which has no sum to
    divide by, stays zero, as published (the result is then not doubly stochastic).

    >>> sinkhorn(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    tensor([[0.3333, 0.6667],
            [0.6667, 0.3333]])
    >>> sinkhorn(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[1., 1.],
            [0., 0.]])
    """
    for _ in range(iters):
        for axis in (1, 0):
            sums = A.sum(axis, keepdim=True)
            A = A / torch.where(sums == 0, 1, sums)
    return A


def softsort(s: Tensor, tau: float = 1.0, *, normalized: bool = True, rational: bool = False) -> Tensor:
    """A matrix whose product with the scores s sorts them, softly, from large to small: (n, 1) -> (n, n).

    Row i is the softmax of -|i-th largest score - s[j]| / t with t = tau / n (`normalized`) or tau (Prillo and Eisenschlos
    2020, arXiv 2006.16038); with `rational`, 1 / (1 + distance / t) over the row's sum takes the place of the softmax.

    >>> softsort(torch.tensor([[1.0], [3.0], [2.0]]), tau=0.1).round(decimals=4)
    tensor([[0., 1., 0.],
            [0., 0., 1.],
            [1., 0., 0.]])
    """
    t = tau / len(s) if normalized else tau
    distances = (s.sort(0, descending=True).values - s.mT).abs() / t  # (n, n)
    if not rational:
        return (-distances).softmax(1)
    closeness = 1 / (1 + distances)
    return closeness / closeness.sum(1, keepdim=True)


def permutation_matrix(columns: Tensor) -> Tensor:
    """The matrix with a 1 at columns[i] in each row i: (n) -> (n, n), float32.

    >>> permutation_matrix(torch.tensor([1, 0]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    return torch.eye(len(columns), device=columns.device)[columns]


def round_hungarian(W: Tensor) -> Tensor:
    """The permutation matrix that selects the largest sum of entries of W: (n, n) -> (n, n).

    >>> round_hungarian(torch.tensor([[0.6, 0.4], [0.9, 0.1]]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    return permutation_matrix(best_matching(W.detach()[None])[0])


def round_monotone(W: Tensor, increasing: Tensor) -> Tensor:
    """The permutation that orders an increasing vector (n) in [0, 1] as W (n, n) does: faster than the best one.

    The original draws the vector at random. A permutation matrix is returned unchanged.

    >>> round_monotone(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), torch.tensor([0.2, 0.7]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    order = (W.detach() @ (len(W) * increasing)).argsort(stable=True)  # row of each column
    return permutation_matrix(order).T.contiguous()


def round_scores(s: Tensor) -> Tensor:
    """The permutation matrix that sorts the scores from large to small: (n, 1) -> (n, n).

    The limit of softsort as tau goes to 0. Equal scores keep their order, so the result is always a permutation. (The original
    takes the largest entry of each row of the soft matrix, and so one column twice for equal scores.)

    >>> round_scores(torch.tensor([[2.0], [5.0], [2.0]]))
    tensor([[0., 1., 0.],
            [1., 0., 0.],
            [0., 0., 1.]])
    """
    return permutation_matrix(s.detach().flatten().argsort(descending=True, stable=True))


def concave_penalty(W: Tensor, alpha: float, power: float = 0.0) -> Tensor:
    """-alpha |W|_F n^power: (n, n) -> scalar. Least, among doubly stochastic matrices, at permutations, where |W|_F^2 = n.

    Published results have power 0. With -0.5 a permutation costs -alpha at any width; the authors' code also tries 1.

    >>> concave_penalty(torch.eye(4), alpha=0.1)
    tensor(-0.2000)
    >>> concave_penalty(torch.eye(4), alpha=0.1, power=-0.5)
    tensor(-0.1000)
    """
    return -alpha * len(W) ** power * torch.linalg.matrix_norm(W)


def marginal_penalty(W: Tensor, beta: float) -> Tensor:
    """beta (|column sums - 1| + |row sums - 1|) / sqrt(n): (n, n) -> scalar; the authors' alternative to Sinkhorn's sweeps.

    >>> marginal_penalty(2 * torch.eye(4), beta=0.1)
    tensor(0.2000)
    """
    return beta * len(W) ** -0.5 * ((W.sum(0) - 1).norm() + (W.sum(1) - 1).norm())


def projected_gradient(w: Tensor, gradient: Tensor, project: Callable[[Tensor], Tensor], eps: float = 1e-3) -> Tensor:
    """The part of a gradient that the projection leaves, at nearly the gradient's length.

    h = (w - project(w - eps g)) / eps, scaled to |g| h / (eps + |h|). All of one shape. The gradient must not be scaled (as for
    half precision): the direction depends on its length.

    >>> projected_gradient(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 4.0]), lambda w: w.clamp(min=0))
    tensor([0.0000, 4.9988])
    """
    h = (w - project(w - eps * gradient)) / eps
    return gradient.norm() * h / (eps + h.norm())
