"""One local Ray for all tests of this folder: starting one takes longer than most of them."""

from __future__ import annotations

import pytest

from tests.on_ray.local import local_ray


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A cluster of four logical CPUs in the tests' own home, cache and store."""
    with local_ray(tmp_path_factory.mktemp("ray")):
        yield
