"""`sftok train-generator`: a generator of codes that are in the store already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.requests import checks
from flows.requests.generator import check_generator_request
from generator.artifacts import load_generator
from generator.config import SampleConfig
from infra.artifacts.manifest import ArtifactRef, folder_of
from infra.compute.rank_count import RankCount
from infra.settings import Settings
from infra.store.store import Store
from tests.support.small_codes import TINY, TOKENIZER, codes, names
from tests.support.small_dataset import Made


@pytest.fixture
def ref(store: Store, tmp_path: Path) -> ArtifactRef:
    return codes(Made(store, tmp_path), names(TOKENIZER, TOKENIZER, TOKENIZER))


def check(store: Store, ref: object, *overrides: str, recipe: str = "digits", ranks: int = 1) -> ArtifactRef:
    request = check_generator_request(
        recipe, codes=str(ref), store=store.uri, overrides=overrides, ranks=RankCount(ranks, ranks), seed=3
    )
    assert request.recipe.seed == 3
    return request.given["encode"]


def test_codes_are_found_by_the_beginning_of_their_digest(store: Store, ref: ArtifactRef) -> None:
    assert check(store, ref.digest[:6], "threads=1", "generator.width=16", "generator.heads=2") == ref


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        (["data.image_size=32"], {}, "--set data.image_size=32: the codes are there already; only generator, train_"),
        (["train_generator.stepz=3"], {}, "train_generator.stepz"),
        ([], {"recipe": "digit"}, "unknown recipe 'digit', did you mean"),
        ([], {"ranks": 3}, "cannot be shared by --ranks 3"),
        (["generator.heads=3"], {}, "heads"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(
    store: Store, ref: ArtifactRef, overrides: list[str], changes: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=r"^.*$") as caught:
        check(store, ref, *overrides, **changes)
    assert said in str(caught.value)


def test_codes_that_are_not_there_are_refused(store: Store, ref: ArtifactRef) -> None:
    with pytest.raises(ValueError, match="codes/ffff"):
        check(store, "codes/ffff")
    with pytest.raises(ValueError, match=r"generator/aaaa"):
        check(store, "generator/aaaa")


def test_a_missing_compiler_is_said_before_anything_starts(
    store: Store, ref: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: object) -> None:
        raise ValueError("compile = True needs a C++ compiler")

    monkeypatch.setattr("infra.compute.compiler.check_compiler", missing)
    checks.check_compilers(SampleConfig().on("cpu").compile, device="cpu", settings=Settings())
    with pytest.raises(ValueError, match="needs a C"):
        check(store, ref, "train_generator.compile=true")


@pytest.mark.slow
def test_the_command_trains_and_finds(home: Path, store: Store, ref: ArtifactRef, tmp_path: Path) -> None:
    """In processes of their own, with a temporary server."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_", "SFTOK_"))}
    environment = {**clean, "SFTOK_HOME": str(home), "SFTOK_STORE": store.uri, "OMP_NUM_THREADS": "1"}
    settings = [argument for override in TINY for argument in ("--set", override)]

    def sftok(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "sftok"), "train-generator", "--codes", str(ref), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    first = sftok(*settings, "--json")
    assert first.returncode == 0, first.stderr[-3000:]
    shown = json.loads(first.stdout)
    assert (shown["state"], shown["codes"]) == ("Completed", str(ref))
    assert {"val_nll", "frequency_nll", "val_nll/3"} <= shown["metrics"].keys()
    model, info = load_generator(folder_of(store, *shown["generator"].split("/")))
    assert (model.config.width, info.tokenizer) == (16, TOKENIZER)
    again = sftok(*settings)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.startswith(f"{shown['generator']}  trained before")
    other = sftok(*settings, "--seed", "5", "--json")
    assert json.loads(other.stdout)["generator"] != shown["generator"]
    refused = sftok("--set", "encode.micro_batch=3")
    assert refused.returncode == 2
    assert refused.stderr.startswith("sftok: --set encode.micro_batch=3: the codes are there already")
