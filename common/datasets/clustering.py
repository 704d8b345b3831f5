"""Clustering tasks: sets of points in the plane, drawn from random mixtures of Gaussians.

Per task (Vollgraf 2019, arXiv 1906.09400, section 4.1): 3 to 10 clusters and 100 to 1000 entities, both uniform; equal
mixture weights; means from N(0, I); covariances from an inverse Wishart distribution with 4 degrees of freedom and scale
0.05 I. All tasks are drawn at once, and are concatenated in one tensor, on the device where they are used.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor

from common.graphs import padded_length

N_CLUSTERS = (3, 10)
N_ENTITIES = (100, 1000)
DEGREES_OF_FREEDOM = 4
SCALE = 0.05
N_LABELS = N_CLUSTERS[1]
K_MEANS_STARTS = 4  # of which the one with the smallest distances counts


@dataclass(frozen=True)
class ClusteringTasks:
    """T tasks with P points in all. Task t is points[starts[t] : starts[t] + sizes[t]]."""

    points: Tensor  # (P, 2) float32
    labels: Tensor  # (P) int64, below n_clusters of the task
    starts: Tensor  # (T) int64
    sizes: Tensor  # (T) int64, on the CPU: shapes are made of it
    n_clusters: Tensor  # (T) int64
    means: Tensor  # (T, 10, 2) float64
    factors: Tensor  # (T, 10, 2, 2) float64, lower triangular; covariance = factor factor^T

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> ClusteringTasks:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return ClusteringTasks(**{name: t if name == "sizes" else t.to(device) for name, t in moved.items()})


def make_tasks(n_tasks: int, seed: int) -> ClusteringTasks:
    """Draw tasks on the CPU from `seed`. Raises ValueError for less than one task."""
    if n_tasks < 1:
        raise ValueError(f"{n_tasks} tasks: at least one is needed")
    gen = torch.Generator().manual_seed(seed)
    n_clusters = torch.randint(N_CLUSTERS[0], N_CLUSTERS[1] + 1, (n_tasks,), generator=gen)
    sizes = torch.randint(N_ENTITIES[0], N_ENTITIES[1] + 1, (n_tasks,), generator=gen)
    means = torch.randn(n_tasks, N_LABELS, 2, generator=gen, dtype=torch.float64)
    # a Wishart matrix is the sum of outer products of normal vectors, one for each degree of freedom
    normals = torch.randn(n_tasks, N_LABELS, 2, DEGREES_OF_FREEDOM, generator=gen, dtype=torch.float64)
    factors = torch.linalg.cholesky(SCALE * torch.linalg.inv(normals @ normals.mT))

    task = torch.repeat_interleave(torch.arange(n_tasks), sizes)
    largest = n_clusters.index_select(0, task)
    labels = (torch.rand(len(task), generator=gen) * largest).long()
    labels = torch.minimum(labels, largest.sub_(1))  # the product may round up to n_clusters
    noise0, noise1 = torch.randn(len(task), 2, generator=gen).unbind(1)
    cluster = task.mul_(N_LABELS).add_(labels)
    mixture = torch.cat([means, factors.flatten(2)], 2).flatten(0, 1).float()  # (n_tasks 10, 6)
    mean0, mean1, lower00, _, lower10, lower11 = mixture.index_select(0, cluster).unbind(1)
    points = torch.stack([mean0 + lower00 * noise0, mean1 + lower10 * noise0 + lower11 * noise1], 1)
    return ClusteringTasks(points, labels, sizes.cumsum(0) - sizes, sizes, n_clusters, means, factors)


def describe() -> dict[str, Any]:
    """The distribution of tasks, as plain values. A coordinate has this mean and deviation over the points of all tasks."""
    variance = 1 + SCALE / (DEGREES_OF_FREEDOM - 3)  # of the means, and the mean of the inverse Wishart distribution
    sizes = {"n_points": list(N_ENTITIES), "n_clusters": list(N_CLUSTERS)}
    return {"name": "clustering", "n_dim": 2, "n_labels": N_LABELS, **sizes, "mean": 0.0, "deviation": math.sqrt(variance)}


def typical_deviation() -> float:
    """Root mean square, over tasks, of the deviation of a coordinate within a task."""
    low, high = N_CLUSTERS
    of_means = sum(1 - 1 / k for k in range(low, high + 1)) / (high - low + 1)  # K equally heavy means from N(0, 1)
    return math.sqrt(of_means + SCALE / (DEGREES_OF_FREEDOM - 3))


def training_sets(n: int) -> list[NDArray[np.float64]]:
    """The points of n tasks, each (E, 2), always the same ones: what a user's points are compared with."""
    tasks = make_tasks(n, 0)
    return [points.double().numpy() for points in tasks.points.split(tasks.sizes.tolist())]


def split(n_tasks: int) -> tuple[Tensor, Tensor]:
    """Indices of the training tasks, and of the validation tasks: the last 10 %, at least one."""
    n_validation = max(1, n_tasks // 10)
    return torch.arange(n_tasks - n_validation), torch.arange(n_tasks - n_validation, n_tasks)


def batches_by_size(tasks: ClusteringTasks, indices: Tensor, batch_size: int) -> list[Tensor]:
    """Split indices of tasks into batches of similar size: 7 % of a batch is padding, in random order it would be 45 %."""
    by_size = indices[tasks.sizes[indices].argsort(stable=True)]
    return list(by_size.split(batch_size))


def padded_batch(tasks: ClusteringTasks, indices: Tensor, *, graphed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Collect tasks, padded to the largest: points (N, E, 2) and labels (N, E), zero at padding, and the mask (N, E).

    With `graphed`, for a model that runs as CUDA graphs, they are padded to `graphs.padded_length` of that.
    """
    device, sizes = tasks.points.device, tasks.sizes[indices]
    E = int(sizes.max())
    offsets = torch.arange(padded_length(E, device) if graphed else E, device=device)
    mask = offsets < sizes.to(device, non_blocking=True)[:, None]
    entity = torch.where(mask, tasks.starts[indices.to(device, non_blocking=True)][:, None] + offsets, 0)
    return tasks.points[entity] * mask.unsqueeze(2), tasks.labels[entity] * mask, mask


def log_posterior(tasks: ClusteringTasks, indices: Tensor, points: Tensor) -> Tensor:
    """The oracle: log-probability of each cluster given a point, under the true mixture. (N, E, 2) -> (N, E, 10), float64.

    Clusters that a task does not have get -10,000 rather than minus infinity, which would turn into NaN in averages.
    """
    indices = indices.to(points.device)
    means, factors = tasks.means[indices], tasks.factors[indices]  # (N, 10, 2), (N, 10, 2, 2)
    offsets = points.double().unsqueeze(1) - means.unsqueeze(2)  # (N, 10, E, 2)
    whitened = torch.linalg.solve_triangular(factors, offsets.mT, upper=False)  # (N, 10, 2, E)
    log_density = -0.5 * whitened.square().sum(2) - factors.diagonal(dim1=2, dim2=3).log().sum(2, keepdim=True)  # (N, 10, E)
    absent = torch.arange(N_LABELS, device=points.device) >= tasks.n_clusters[indices][:, None]
    return log_density.masked_fill(absent.unsqueeze(2), -1e4).log_softmax(1).mT


def k_means(tasks: ClusteringTasks, task: int, seed: int) -> Tensor:
    """Labels (E) of a task by k-means, which is told the number of clusters: what one would use without a network.

    Tasks are on the CPU. Seeded: a task gets the same labels whichever other tasks are clustered.
    """
    points = tasks.points[tasks.starts[task] :][: tasks.sizes[task]].double().numpy()
    rng, starts = np.random.default_rng((seed, task)), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a cluster has become empty: other starts have none
        for _ in range(K_MEANS_STARTS):
            centres, labels = kmeans2(points, int(tasks.n_clusters[task]), minit="++", rng=rng)
            starts.append((((points - centres[labels]) ** 2).sum(), labels))
    return torch.from_numpy(min(starts, key=lambda start: start[0])[1]).long()
