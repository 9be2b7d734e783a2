"""Nights of a team's cluster: real servers, a schedule that fires, and everything killed in turn.

PostgreSQL below Prefect, Ray started by `ray start` with a token, an S3 server, `sftok serve`. What is killed is killed
with SIGKILL, at work: each kill is counted once it was seen that the stage was under way.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.prefect_server.temporary import prefect_server
from flows.runs import history
from infra.artifacts.inventory import manifests
from infra.artifacts.manifest import verify as verify_manifest
from infra.store.store import Store
from tests.support.cluster import PASSWORD, RAY_TOKEN, Database, PrefectServer, RayNodes, postgres, raylet
from tests.support.s3_server import Instance, running_instance
from tests.support.serving_process import Serving, until

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(1800)]

RECIPE = "digits_tiny"
VIEWS = [f"affine-{n}" for n in range(1, 8)]
# Encoding is to last long enough to be killed at.
SETTINGS = ("data.num_shards=24", f"encode.variants={['center', *VIEWS]}".replace("'", '"'), "encode.micro_batch=4")
RUN_SECONDS = 300.0


class Team:
    """The servers, and what was done to them."""

    def __init__(self, folder: Path, database: Database, s3: Instance, prefect: PrefectServer, ray: RayNodes) -> None:
        self.folder, self.database, self.s3, self.prefect, self.ray = folder, database, s3, prefect, ray
        self.store = Store("s3://artifacts/nights")
        self.faults: list[str] = []
        arguments = ["--recipe", RECIPE, "--store", self.store.uri, "--workers", "2", "--pipeline-cron", "* * * * *"]
        for setting in SETTINGS:
            arguments += ["--set", setting]
        environment = {**s3.server.environment, **ray.environment, "SFTOK_RAY_ADDRESS": ray.address}
        self.serving = Serving(folder, arguments=arguments, api_url=prefect.url, fakes=False, **environment)

    def records(self) -> list[history.PastRun]:
        return history.records(self.store)

    def last(self) -> history.PastRun:
        return self.records()[-1]

    def why(self) -> str:
        """What the last run and Prefect's last states say."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            states = [run.state.message for run in client.read_flow_runs(limit=3) if run.state]
            logs = [log.message for log in client.read_logs(limit=200)]
        return "\n".join([str(self.last().reason) if self.records() else "no record", *map(str, states), *logs])

    def start_run(self, seed: int) -> Any:
        """As a click in Prefect starts one."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"full-pipeline/{RECIPE}")
            given = {**deployment.parameters["parameters"], "seed": seed}
            return client.create_flow_run_from_deployment(deployment.id, parameters={"parameters": given}).id

    def at(self, stage: str, seed: int) -> None:
        """Wait until a run with this seed is at work on a stage."""

        def is_there() -> bool:
            record = self.last()
            return record.recipe.seed == seed and stage in record.stages and record.stages[stage].state == "Running"

        until(is_there, RUN_SECONDS, self.serving.said)

    def at_encode(self, seed: int) -> None:
        """Wait until a run with this seed has finished a shard of codes, and not all."""
        before = self.shards()
        self.at("encode", seed)
        until(lambda: 1 <= self.shards() - before <= 12, RUN_SECONDS, self.serving.said)

    def shards(self) -> int:
        return sum(name.endswith(".parquet.json") for name in self.store.at("artifacts/codes").list())

    def ends(self, flow_run: Any, state: str) -> None:
        from prefect.client.orchestration import get_client

        def now() -> str:
            with get_client(sync_client=True) as client:
                return str(client.read_flow_run(flow_run).state_name)

        until(lambda: now() == state, RUN_SECONDS, lambda: f"{now()}, not {state}: {self.why()}")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    (tmp_path / "s3").mkdir()
    with postgres() as database, running_instance(tmp_path / "s3") as s3:
        for name, value in s3.server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "client"))
        prefect, ray = (
            PrefectServer(tmp_path / "prefect", database.url),
            RayNodes(tmp_path / "ray", **s3.server.environment),
        )
        prefect.start()
        team = None
        try:
            for _ in range(2):
                ray.add()
            prefect.ready()
            team = Team(tmp_path, database, s3, prefect, ray)
            team.serving.wait()
            with prefect_server(tmp_path, api_url=prefect.url):
                yield team
        finally:
            if team is not None and team.serving.process.poll() is None:
                team.serving.kill()
            ray.kill()
            prefect.kill()


def the_schedule_fires(team: Team) -> None:
    from prefect.client.orchestration import get_client

    until(lambda: team.records() and team.last().state != "Running", 100, team.why)
    assert team.last().state == "Completed", team.why()
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"full-pipeline/{RECIPE}")
        for schedule in deployment.schedules:
            client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    until(lambda: not team.serving.children(), RUN_SECONDS, "a run that the schedule had started did not end")


def the_flow_is_killed(team: Team) -> None:
    crashed = team.start_run(1)
    team.at("align", 1)
    (child,) = team.serving.children()
    child.kill()
    team.ends(crashed, "Crashed")
    again = team.start_run(1)
    team.ends(again, "Completed")
    states = [stage.state for stage in team.last().stages.values()]
    assert states == ["Cached"] * 3 + ["Completed"] * 8


def a_worker_is_killed(team: Team) -> None:
    run = team.start_run(2)
    team.at_encode(2)
    until(team.ray.workers, 30, "no worker was found")[0].kill()
    team.ends(run, "Completed")


def a_machine_is_lost(team: Team) -> None:
    run = team.start_run(3)
    team.at_encode(3)
    raylet(team.ray.nodes[0]).kill()
    team.ends(run, "Completed")
    team.ray.nodes[0].kill()
    team.ray.add()


def prefects_server_is_killed(team: Team) -> None:
    run = team.start_run(4)
    team.at("warm_up", 4)
    team.prefect.kill()
    time.sleep(5)
    team.prefect.start()
    team.prefect.ready()
    team.ends(run, "Completed")


def the_s3_server_is_killed(team: Team) -> None:
    run = team.start_run(5)
    team.at_encode(5)
    team.s3.kill()
    time.sleep(5)
    assert team.s3.start()
    team.ends(run, "Completed")


FAULTS: tuple[Callable[[Team], None], ...] = (
    the_flow_is_killed,
    a_worker_is_killed,
    a_machine_is_lost,
    prefects_server_is_killed,
    the_s3_server_is_killed,
)


def test_every_night_ends_as_it_must(team: Team) -> None:
    the_schedule_fires(team)
    for fault in FAULTS:
        fault(team)
        team.faults.append(fault.__name__)
        sys.stderr.write(f"{fault.__name__}: survived\n")
    records = team.records()
    by_seed = {seed: [one.state for one in records if one.recipe.seed == seed] for seed in range(1, 6)}
    assert by_seed == {1: ["Crashed", "Completed"], **{seed: ["Completed"] for seed in range(2, 6)}}
    lost = [name for name, manifest in made(team).items() if not is_whole(team.store, manifest)]
    total = len(made(team))
    sys.stderr.write(
        f"faults injected {len(FAULTS)}, survived {len(team.faults)}; artifacts {total}, lost {len(lost)}\n"
    )
    assert not lost
    assert total > 6 * 5, "every seed has artifacts of its own"
    no_secret_was_written(team)
    family = psutil.Process(team.serving.process.pid).children(recursive=True)
    assert team.serving.stop() == 0, team.serving.said()
    assert not psutil.wait_procs(family, timeout=30)[1]
    until(lambda: not team.ray.workers(), 30, "an actor outlived its run")


def made(team: Team) -> dict[str, Any]:
    kinds = team.store.at("artifacts").folders()
    return {f"{kind}/{digest}": one for kind in kinds for digest, one in manifests(team.store, kind).items()}


def is_whole(store: Store, manifest: Any) -> bool:
    try:
        verify_manifest(store, manifest)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return False
    return True


def no_secret_was_written(team: Team) -> None:
    """Neither into the store, nor into Prefect's database, nor into any log or file of the client's."""
    secrets = [PASSWORD, RAY_TOKEN, team.s3.server.secret_key]
    for name in team.store.list():
        data = team.store.read(name)
        assert not [secret for secret in secrets if secret.encode() in data], name
    database = team.database.dump()
    assert b"digits_tiny" in database, "runs are in it"
    assert not [secret for secret in secrets if secret.encode() in database]
    for log in [team.serving.log, team.folder / "prefect/log", *team.folder.glob("client/**/*")]:
        if os.path.isfile(log):
            text = Path(log).read_bytes()
            assert not [secret for secret in secrets if secret.encode() in text], log
