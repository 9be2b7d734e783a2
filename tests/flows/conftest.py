"""One Prefect server for all tests of flows; each test gets the environment that points at it, and gives it back."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.prefect_server.temporary import Server, prefect_server, start_server
from tests.support.fake_stages import FakeStages


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, give_database: Callable[[Path], Path]) -> Path:
    """The servers' home, with a database; its name is no part of a URL."""
    return give_database(tmp_path_factory.mktemp("home ?#%41"))


@pytest.fixture(scope="session")
def running_server(home: Path) -> Iterator[Server]:
    """The server of this process's tests."""
    server = start_server(home)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def prefect_api(running_server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a Prefect API that this process talks to."""
    monkeypatch.setenv("PREFECT_HOME", str(home / "client"))
    with prefect_server(home, api_url=running_server.url) as server:
        yield server.url


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    """Stages that write a line instead of training, and can be told to fail."""
    fakes = FakeStages()
    monkeypatch.setattr("flows.make.run_stage", fakes)
    return fakes


@pytest.fixture
def run_pipeline(prefect_api: str, fakes: FakeStages, tmp_path: Path) -> Callable[..., "RunRecord"]:  # noqa: F821
    """Run the flow on the fakes, into a store of the test's own."""
    from flows.pipeline.full import full_pipeline
    from flows.recipes.files import load_recipe
    from flows.runs.run_request import RunRequest

    def run(name: str, *overrides: str) -> "RunRecord":  # noqa: F821
        recipe = load_recipe("digits", overrides=overrides)
        return full_pipeline(RunRequest(recipe=recipe, store=str(tmp_path / "store"), source="sklearn:digits"), name)

    return run
