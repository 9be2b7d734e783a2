"""What is in infra/deploy: it names what exists, in versions that are installed, and Prefect's own command takes it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.prefect_server.temporary import prefect_server
from flows.recipes.files import load_recipe
from infra.store.store import Store
from tests.flows.service.test_schedules import whole_server
from tests.support import ROOT
from tests.support.serving_process import FAKES

__all__ = ["whole_server"]

FOLDER = ROOT / "infra" / "deploy"
YAML = sorted(FOLDER.rglob("*.yaml"))
TEXTS = sorted(path for path in FOLDER.rglob("*") if path.is_file())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
DEPLOYMENTS = yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container of Kubernetes' pods, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from inner if key == "containers" else containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_one_or_more_documents(path: Path) -> None:
    assert all(isinstance(one, dict) for one in documents(path))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_machine_and_no_secret_is_named(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"/(home|Users|work)/(?!sftok\b)|localhost:5000|\.internal\b|AKIA[0-9A-Z]{16}", text)
    for name, value in re.findall(r"(\w*(?:PASSWORD|SECRET|TOKEN)\w*)\s*[:=][ \t]*(\S*)", text):
        assert value in ("", '""', "token") or value.startswith("$"), name


@pytest.mark.parametrize("one", DEPLOYMENTS, ids=lambda one: f"{one['entrypoint']}/{one['name']}")
def test_deployments_name_flows_recipes_and_fields_that_exist(one: dict[str, Any]) -> None:
    import importlib

    module, _, name = one["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    given = flow.validate_parameters(one["parameters"])["parameters"]
    recipe = getattr(given, "recipe", None) or getattr(getattr(given, "retokenize", None), "recipe", None)
    if recipe is not None:
        load_recipe(recipe)
    started = getattr(given, "deployment", None)
    names = {f"{importlib.import_module('flows.service.deployments').retokenize.name}/{d['name']}" for d in DEPLOYMENTS}
    assert started is None or started in names
    assert one["tags"] == ["sftok"], "the heartbeat automation watches runs with this tag"


def test_versions_are_those_that_are_pinned() -> None:
    assert yaml.safe_load((FOLDER / "prefect.yaml").read_text())["prefect-version"] == PINS["prefect"]
    for name, path in (("raycluster", ["spec"]), ("rayjob", ["spec", "rayClusterSpec"])):
        (found,) = documents(FOLDER / "kuberay" / f"{name}.yaml")
        for key in path:
            found = found[key]
        assert found["rayVersion"] == PINS["ray"]


def test_the_image_copies_what_the_package_is_made_of() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"constraints.txt", "pyproject.toml", "flows", "sftok", "generator", "infra"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER 10001", text, re.MULTILINE), "runs as root"
    assert "-c constraints.txt" in text
    allowed = (FOLDER / "Dockerfile.dockerignore").read_text()
    assert all(f"!{name}" in allowed for name in copied if "/" not in name)


def test_pods_run_as_nobody_in_particular_and_say_what_they_need() -> None:
    found = [
        one for path in YAML if path.parent.name in ("kubernetes", "kuberay") for one in containers(documents(path))
    ]
    assert len(found) >= 8
    for one in found:
        assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"requests", "limits"} <= set(one["resources"]), one["name"]


def test_compose_asks_for_no_secret_that_the_example_lacks() -> None:
    wanted = set(re.findall(r"(?<!\$)\$\{(\w+)", (FOLDER / "compose.yaml").read_text()))
    assert wanted == set(re.findall(r"^(\w+)=", (FOLDER / "env.example").read_text(), re.MULTILINE))


def test_kubernetes_refers_only_to_what_is_there() -> None:
    (kustomization,) = documents(FOLDER / "kubernetes" / "kustomization.yaml")
    made = {
        (one["kind"], one["metadata"]["name"])
        for name in [*kustomization["resources"], "secrets.example.yaml"]
        for one in documents(FOLDER / "kubernetes" / name)
    }
    for path in YAML:
        text = path.read_text()
        for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef"), ("Secret", "secretKeyRef")):
            for name in re.findall(rf"{key}: {{name: ([\w-]+)", text):
                assert (kind, name) in made, f"{path.name}: {name}"


def test_only_the_collector_deletes_artifacts() -> None:
    roles = {
        role: json.loads((FOLDER / "s3" / f"{role}.json").read_text()) for role in ("reader", "writer", "collector")
    }

    def resources(role: str, action: str) -> list[str]:
        found = [one["Resource"] for one in roles[role]["Statement"] if action in one["Action"]]
        return [name for one in found for name in ([one] if isinstance(one, str) else one)]

    assert resources("reader", "s3:PutObject") == resources("reader", "s3:DeleteObject") == []
    assert resources("collector", "s3:DeleteObject") == ["arn:aws:s3:::artifacts/sftok/*"]
    assert all(name.count("*") and not name.endswith("sftok/*") for name in resources("writer", "s3:DeleteObject"))
    assert all("*" not in action for role in roles.values() for one in role["Statement"] for action in one["Action"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prefects_own_command_deploys_all_of_them_and_a_worker_runs_one(
    whole_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**clean, "PREFECT_HOME": str(tmp_path / "client"), "PREFECT_API_URL": whole_server}

    def prefect(*arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    prefect("work-pool", "create", "sftok", "--type", "process")
    for _ in range(2):  # the worker does it whenever it starts
        prefect("deploy", "--all", "--prefect-file", str(FOLDER / "prefect.yaml"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "client"))
    with prefect_server(tmp_path, api_url=whole_server):
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            found = {(one.entrypoint, one.name): one for one in client.read_deployments()}
    assert set(found) == {(one["entrypoint"], one["name"]) for one in DEPLOYMENTS}
    for one in DEPLOYMENTS:
        made = found[one["entrypoint"], one["name"]]
        assert made.parameters == one["parameters"]
        assert [s.schedule.cron for s in made.schedules] == [s["cron"] for s in one["schedules"]]
        assert made.work_pool_name == "sftok"
        assert made.job_variables["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        assert made.concurrency_options.collision_strategy == "ENQUEUE"
        assert made.parameter_openapi_schema["definitions"], "no form"
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "client"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAKES)
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "SFTOK_STORE": str(tmp_path / "store"),
        "SFTOK_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "sftok"]
    with (
        (tmp_path / "worker.log").open("wb") as log,
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log) as worker,
        prefect_server(tmp_path, api_url=whole_server),
    ):
        try:
            from prefect.deployments import run_deployment

            given = {"parameters": {"recipe": "digits", "workers": 0}}
            done = run_deployment("full-pipeline/digits", parameters=given, timeout=180, poll_interval=1)
            assert done.state.name == "Completed", (tmp_path / "worker.log").read_text()[-3000:]
        finally:
            worker.terminate()
    (name,) = Store(tmp_path / "store").at("runs").folders()
    assert name == done.name
