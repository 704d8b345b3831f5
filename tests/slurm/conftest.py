"""One SLURM for all tests that need it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Project


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def submitting(cluster: Cluster, tmp_path: Path) -> Callable[..., Project]:
    """Makes a project with some lines, which submits to the cluster."""
    return lambda *lines: Project(tmp_path, cluster.environment, *lines)


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., Project]:
    """Makes a project with some lines on a machine without SLURM."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return lambda *lines: Project(tmp_path, environment | {"OMP_NUM_THREADS": "1"}, *lines)
