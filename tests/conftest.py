"""Fixtures of all rooms: stores, an S3 server, and torch's global state put back after each test."""

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.compute.threads import limit_spinning
from infra.store.store import Store
from tests.support.prefect_database import MigratedDatabase, migrated_database
from tests.support.s3_server import S3Server, running_server

# Before any test loads torch: its threads share the cores with those of the other processes of pytest-xdist.
limit_spinning()
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))

# Files that take a minute or more are begun first, so that no process is left alone with one at the end.
LONG = (
    "flows/pipeline/test_whole_run.py",
    "sftok/model/test_golden.py",
    "sftok/training/test_data_parallel.py",
    "flows/evaluation/test_scores.py",
    "sftok/training/test_stages.py",
)
FOREIGN = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SECURITY_TOKEN")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first; else the order stays."""
    rank = {f"tests/{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    """Random state, threads and default dtype are global in torch: no test may hand them on to the next."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of the tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def random_inception(shared_folder: Path) -> "RandomInception":  # noqa: F821
    """A seeded Inception in the published layout, and its file."""
    from tests.support.random_inception import shared_inception  # here, since it loads torch

    return shared_inception(shared_folder)


@pytest.fixture(scope="session")
def database(shared_folder: Path) -> MigratedDatabase:
    """A database of Prefect's servers; most tests are not about its migrations."""
    return migrated_database(shared_folder)


@pytest.fixture(scope="session")
def give_database(database: MigratedDatabase) -> Callable[[Path], Path]:
    """Gives a new SFTOK_HOME the database of Prefect's servers."""

    def give(home: Path) -> Path:
        database.copy(home)
        return home

    return give


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store on disk."""
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with the buckets `artifacts` and `tests`; it changes nothing of this process."""
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The environment that leads to the server."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_store(s3_env: S3Server) -> Store:
    """An empty store on the server."""
    return Store(f"s3://tests/{uuid.uuid4().hex}")
