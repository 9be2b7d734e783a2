"""Who may import whom, and what no room may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"flows": {"sftok", "generator", "infra"}, "sftok": {"infra"}, "generator": {"infra"}, "infra": set()}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
MATHS = [
    "sftok/model/transformer",
    "sftok/model/encoder",
    "sftok/model/quantizer",
    "sftok/model/decoder",
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
    "generator/orders",
    "generator/sampling/filters",
    "generator/flops",
    "generator/masked",
]
MATHS += [
    "generator/sampling/masked",
    "generator/objectives",
    "sftok/metrics/step_agreement",
    "sftok/metrics/frechet",
    "sftok/metrics/scores",
]
MATHS += ["sftok/metrics/resampling", "sftok/model/noise", "sftok/metrics/nearest", "infra/compute/transfer"]
ONLY_IN = {"prefect": "flows/", "ray": "infra/compute/cluster.py", "typer": "flows/cli/"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops & set(ROOMS) <= ROOMS[room] | {room}
    for package, home in ONLY_IN.items():
        assert package not in tops or name_of(path).startswith(home), f"{package} belongs into {home}"


@pytest.mark.parametrize("name", MATHS)
def test_maths_files_know_nothing_of_files_logs_and_machines(name: str) -> None:
    allowed = {
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


def test_every_module_imports_alone() -> None:
    """A module that works only after another one was imported is a trap for workers, which import one at a time."""
    names = [name_of(p).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for p in FILES]
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
