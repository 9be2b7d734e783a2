"""Rules of the house that no linter has; who may import whom is in pyproject.toml, checked by `make lint`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import LONG

ROOT = Path(__file__).parent.parent
ROOMS = ("flows", "sftok", "generator", "infra")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
MATHS = [
    "sftok/model/transformer",
    "sftok/model/encoder",
    "sftok/model/quantizer",
    "sftok/model/decoder",
    "sftok/model/iterative_decoding",
    "sftok/model/teacher",
    "sftok/model/tokenizer",
]
MATHS += [
    "sftok/losses/proxy",
    "sftok/metrics/functional",
    "sftok/losses/diff_augment",
    "generator/autoregressive",
    "generator/sampling/autoregressive",
]
MATHS += [
    "generator/code_space",
    "generator/key_value_cache",
    "generator/orders",
    "generator/sampling/filters",
    "generator/sampling/sampler",
    "generator/flops",
    "generator/masked",
    "generator/network",
]
MATHS += [
    "generator/sampling/masked",
    "generator/objectives",
    "sftok/metrics/step_agreement",
    "sftok/metrics/frechet",
    "sftok/metrics/scores",
]
MATHS += ["sftok/metrics/resampling", "sftok/model/noise", "sftok/metrics/nearest", "infra/compute/transfer"]
MATHS += ["generator/dropout", "generator/key_value_cache", "infra/compute/splitmix"]
# Loading one of these takes from half a second to several.
HEAVY = {"torch", "prefect", "ray", "pyarrow", "scipy", "sklearn"}


def statements(path: Path, *, on_import: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements of a file; `on_import`: those that run when the module is imported.

    The latter leaves out bodies of functions and what only a type checker reads.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif on_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif on_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            names.add(node.module or "")
    return names


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def import_graph() -> dict[str, set[str]]:
    """Modules that each of ours imports when it is imported: ours by their full name, others by their package.

    The packages around an imported module run, too; they hold nothing, as a test below makes sure.
    """
    ours = {module_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for module, path in ours.items():
        names: set[str] = set()
        for node in statements(path, on_import=True):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            else:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {name if name in ours else str(node.module) for name in inner}
        graph[module] = {name if name in ours else name.partition(".")[0] for name in names}
    return graph


def test_modules_import_each_other_in_no_circle() -> None:
    """In a circle, whether an import works depends on which module was imported first; workers import one at a time."""
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=name_of)
def test_packages_hold_a_docstring_and_nothing_else(path: Path) -> None:
    """Importers name the module that defines a thing: nothing is loaded that was not asked for."""
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, []))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("flows.cli.main", HEAVY | {"pydantic", "numpy"}),
        *((module_of(path), HEAVY) for path in FILES if path.is_relative_to(ROOT / "flows" / "recipes")),
    ],
)
def test_the_command_line_and_recipes_load_nothing_heavy(module: str, heavy: set[str]) -> None:
    """Help is instant, and a recipe is read in the time that pydantic takes."""
    graph = import_graph()
    chains = {module: [module]}
    waiting = [module]
    while waiting:
        importer = waiting.pop()
        for name in graph.get(importer, set()) - set(chains):
            chains[name] = [*chains[importer], name]
            waiting.append(name)
    assert not [" imports ".join(chains[name]) for name in heavy & set(chains)]


@pytest.mark.parametrize("name", MATHS)
def test_maths_files_know_nothing_of_files_logs_and_machines(name: str) -> None:
    allowed = {
        "abc",
        "math",
        "torch",
        "typing",
        "collections",
        "dataclasses",
        "functools",
        "itertools",
        "einops",
        "numpy",
        "scipy",
    }
    maths = {f"{other.replace('/', '.')}" for other in MATHS}
    for module in imports(ROOT / f"{name}.py"):
        assert module.split(".")[0] in allowed or module in maths or module.endswith(".config"), f"{name}: {module}"


@pytest.mark.parametrize("path", [p for p in FILES if "cli" not in p.parts], ids=name_of)
def test_nothing_prints_outside_the_command_line(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.slow
def test_every_module_imports_alone() -> None:
    """A module that works only after another one was imported is a trap for workers, which import one at a time."""
    names = [module_of(path) for path in FILES]
    script = (
        "import importlib, os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        importlib.import_module(name); os._exit(0)\n"
        "    assert os.waitpid(pid, 0)[1] == 0, name\n"
    )
    # Third-party packages are imported once before the forks: only the order of our own modules is at stake.
    preload = "import torch, numpy, pyarrow.parquet, pydantic, fsspec, sklearn.svm, jinja2\n"
    done = subprocess.run([sys.executable, "-c", preload + script, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_module_hides_a_standard_or_installed_one() -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert not tops & set(sys.stdlib_module_names)


def test_files_that_begin_first_are_there() -> None:
    assert [name for name in LONG if not (ROOT / "tests" / name).exists()] == []
