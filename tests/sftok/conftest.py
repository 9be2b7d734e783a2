"""Fixtures of the image scores: one Inception of random weights in a file, since 95 MB are written once only."""

from pathlib import Path

import pytest

from tests.support.random_inception import RandomInception, write


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> RandomInception:
    """A seeded Inception in the published layout, and its file."""
    return write(Path(tmp_path_factory.mktemp("inception")))
