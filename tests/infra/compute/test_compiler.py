"""Compilers are looked for where torch and Triton look, and compiled code is cached."""

import os
from pathlib import Path

import pytest
import torch

from infra.compute.compiler import CACHES, check_compiler, keep_compiled

CUDA = torch.device("cuda")  # only its name is looked at


def program(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the only one of programs, with Python's headers beside it."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("infra.compute.compiler.sysconfig.get_path", lambda _: str(tmp_path))
    return tmp_path


def test_cuda_needs_a_c_compiler_and_pythons_headers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^compile = True on CUDA needs a C compiler, .* install gcc, or set compile"):
        check_compiler(CUDA)
    program(path, "clang")
    check_compiler(CUDA)
    monkeypatch.setenv("CC", "mycc")
    with pytest.raises(ValueError, match=r"^CC = mycc is not a program.* unset or correct it$"):
        check_compiler(CUDA)
    program(path, "mycc")
    check_compiler(CUDA)
    (path / "Python.h").unlink()
    with pytest.raises(ValueError, match=r"^compile = True on CUDA needs Python's headers.* install python3-dev, or"):
        check_compiler(CUDA)


def test_what_is_compiled_lies_in_the_home_unless_the_user_names_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("SFTOK_HOME", str(tmp_path))
    monkeypatch.setenv(CACHES[0], default_cache_dir())  # as importing torch's compiler leaves it
    monkeypatch.setenv(CACHES[1], "/named/by/the/user")
    keep_compiled()
    keep_compiled()
    folder = Path(os.environ[CACHES[0]])
    assert folder.name == "inductor"
    assert folder.parent.parent == tmp_path / "compiled"
    assert os.environ[CACHES[1]] == "/named/by/the/user"


@pytest.mark.parametrize("name", ["a b", "it's"])
def test_a_home_that_torch_cannot_hand_to_its_compiler_is_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against `g++: fatal error: input file '/Users/First' is the same as output file`."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for variable in CACHES:
        monkeypatch.setenv(variable, default_cache_dir())
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path / name))
    keep_compiled()
    assert {os.environ[variable] for variable in CACHES} == {default_cache_dir()}
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "höme"))
    keep_compiled()
    assert all("höme" in os.environ[variable] for variable in CACHES)
