"""Clustering tasks: their distribution, not only their shapes; batches; and the oracle against Bayes' rule by hand."""

import math

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from common.datasets import clustering
from common.datasets.clustering import ClusteringTasks, make_tasks


@pytest.fixture(scope="module")
def tasks() -> ClusteringTasks:
    return make_tasks(4000, seed=1)


def test_counts_are_uniform(tasks: ClusteringTasks) -> None:
    clusters = tasks.n_clusters.bincount()
    assert len(clusters) == 11 and clusters[:3].sum() == 0
    assert ((clusters[3:] - 500).abs() < 5 * math.sqrt(500 * 7 / 8)).all()  # 5 deviations of a binomial
    assert tasks.sizes.min() == 100 and tasks.sizes.max() == 1000
    # mean and deviation of the uniform distribution on 100..1000
    assert tasks.sizes.double().mean().item() == pytest.approx(550, abs=5 * 260 / math.sqrt(4000))
    assert tasks.sizes.double().std().item() == pytest.approx(math.sqrt((901**2 - 1) / 12), rel=0.03)


def test_weights_are_equal_and_labels_in_range(tasks: ClusteringTasks) -> None:
    owner = torch.repeat_interleave(torch.arange(4000), tasks.sizes)
    assert (tasks.labels >= 0).all() and (tasks.labels < tasks.n_clusters[owner]).all()
    for number in (3, 10):
        counts = tasks.labels[tasks.n_clusters[owner] == number].bincount().double()
        expected = counts.sum() / number
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_means_are_standard_normal(tasks: ClusteringTasks) -> None:
    means = tasks.means.flatten(0, 1)
    assert means.mean(0).abs().max() < 5 / math.sqrt(40_000)
    torch.testing.assert_close(means.T.cov(), torch.eye(2).double(), rtol=0, atol=0.04)
    assert (means.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.01)


def test_covariances_are_inverse_wishart(tasks: ClusteringTasks) -> None:
    """E[Sigma] = 0.05 I / (4 - 2 - 1), E[Sigma^-1] = 4 I / 0.05, and the determinant is a ratio of two chi squares."""
    covariances = (tasks.factors @ tasks.factors.mT).flatten(0, 1)
    torch.testing.assert_close(covariances.mean(0), 0.05 * torch.eye(2).double(), rtol=0, atol=0.01)  # heavy tails
    precision = torch.linalg.inv(covariances).mean(0)
    torch.testing.assert_close(precision, 80 * torch.eye(2).double(), rtol=0, atol=1.5)
    # det Sigma^-1 = det(20 W) with det W ~ chi2(4) chi2(3): its mean is 400 * 4 * 3
    assert (1 / covariances.det()).mean().item() == pytest.approx(400 * 12, rel=0.03)
    assert covariances.det().sqrt().median().item() == pytest.approx(0.019, abs=0.0005)  # as in the original's tasks


def test_points_have_the_moments_of_their_mixture(tasks: ClusteringTasks) -> None:
    assert tasks.points.mean(0).abs().max() < 0.03
    torch.testing.assert_close(tasks.points.std(0), torch.tensor([1.02, 1.02]), rtol=0, atol=0.02)
    owner = torch.repeat_interleave(torch.arange(4000), tasks.sizes)
    offsets = tasks.points.double() - tasks.means[owner, tasks.labels]
    whitened = torch.linalg.solve_triangular(tasks.factors[owner, tasks.labels], offsets.unsqueeze(2), upper=False).squeeze(2)
    torch.testing.assert_close(whitened.T.cov(), torch.eye(2).double(), rtol=0, atol=0.005)
    assert whitened.mean(0).abs().max() < 0.005
    # both coordinates of the noise are used: the covariances are not diagonal
    correlation = tasks.factors[..., 1, 0] / (tasks.factors @ tasks.factors.mT)[..., 1, 1].sqrt()
    assert correlation.abs().mean() > 0.3


def test_order_of_points_says_nothing(tasks: ClusteringTasks) -> None:
    same = (tasks.labels[1:] == tasks.labels[:-1]).double().mean().item()
    assert same == pytest.approx((1 / tasks.n_clusters.double()).mul(tasks.sizes).sum().item() / len(tasks.labels), abs=0.003)


def test_seed_decides() -> None:
    a, b, c = make_tasks(20, 0), make_tasks(20, 0), make_tasks(20, 1)
    assert torch.equal(a.points, b.points) and torch.equal(a.labels, b.labels)
    assert a.points.shape != c.points.shape or not torch.equal(a.points, c.points)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_tasks(20, 0)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone


def test_batches(tasks: ClusteringTasks) -> None:
    training, validation = clustering.split(4000)
    assert len(training) == 3600 and len(validation) == 400
    batches = clustering.batches_by_size(tasks, training, 50)
    assert sorted(torch.cat(batches).tolist()) == training.tolist()
    padding = entities = 0
    for indices in batches[::10]:
        x, labels, mask = clustering.padded_batch(tasks, indices)
        assert x.shape == (*mask.shape, 2) and torch.equal(mask.sum(1), tasks.sizes[indices])
        assert (x[~mask] == 0).all() and (labels[~mask] == 0).all()
        n = len(indices) // 2
        start, size = tasks.starts[indices[n]], tasks.sizes[indices[n]]
        assert torch.equal(x[n, :size], tasks.points[start : start + size])
        assert torch.equal(labels[n, :size], tasks.labels[start : start + size])
        padding, entities = padding + (~mask).sum().item(), entities + mask.numel()
    assert padding / entities < 0.1


def test_oracle_is_bayes_rule() -> None:
    tasks = make_tasks(5, 3)
    indices = torch.tensor([4, 1])
    x, labels, mask = clustering.padded_batch(tasks, indices)
    log_p = clustering.log_posterior(tasks, indices, x)
    torch.testing.assert_close(log_p.exp().sum(2), torch.ones_like(log_p[:, :, 0]))
    for n, task in enumerate(indices.tolist()):
        K = int(tasks.n_clusters[task])
        covariances = tasks.factors[task, :K] @ tasks.factors[task, :K].mT
        density = torch.distributions.MultivariateNormal(tasks.means[task, :K], covariances)
        expected = density.log_prob(x[n].double().unsqueeze(1)).log_softmax(1)
        torch.testing.assert_close(log_p[n, :, :K], expected, rtol=1e-6, atol=1e-6)
        assert (log_p[n, :, K:] < -9000).all()


def test_k_means_is_as_good_as_scikit_learns(tasks: ClusteringTasks) -> None:
    """On 60 tasks, whose mean differs by some hundredths between good starts and bad ones."""
    own, other = [], []
    for task in range(60):
        labels = clustering.k_means(tasks, task, seed=0)
        points = tasks.points[tasks.starts[task] :][: tasks.sizes[task]]
        true = tasks.labels[tasks.starts[task] :][: tasks.sizes[task]]
        assert labels.shape == true.shape and labels.max() < tasks.n_clusters[task]
        own.append(adjusted_rand_score(true, labels))
        other.append(
            adjusted_rand_score(true, KMeans(int(tasks.n_clusters[task]), n_init=4, random_state=0).fit_predict(points))
        )
    assert sum(own) / 60 == pytest.approx(sum(other) / 60, abs=0.015)
    assert torch.equal(clustering.k_means(tasks, 59, seed=0), labels)


def test_too_few_tasks() -> None:
    with pytest.raises(ValueError, match="0 tasks"):
        make_tasks(0, 0)
