"""Commands with arguments that nobody meant: an exit code and one line, whatever they are; never a traceback."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flows.cli.main import app, main
from infra.store.store import Store
from tests.support.weights_cli import a_tokenizer, published

LONGEST = 400  # characters of an error
STARTED = 77  # exit code of what would have begun
# What a message says only if an error was not meant for a user.
INTERNAL = re.compile(
    r"Traceback|[Pp]ydantic|ValidationError|NoneType|has no attribute|KeyError|TypeError|object at 0x"
    r"|\bself\.|<class |model_fields|np\.str_"
)
ODD = [
    "", " ", "-", "--", "-1", "0", "1", "2", "7", "1.5", "1e400", "nan", "inf", "-inf", "9" * 30, "1,2", "0-3", "3-1",
    "#1", "a" * 300, "é", "e\u0301", "日本", "\udce9", "a\nb", "\t", "'", '"', "\\", "%s", "{", "{a", "{0..3}.tar", "[",
    "[1]", "*", "?", "a=b", "data.val_fraction=0.5", "data.val_fraction=2", "data.nope=1", "nope=1", "seed=x", "=",
    "data.", ".=1", "compute.device=tpu", "None", "null", "true", "none", "all", "digits", "small64", "digits_tiny",
    "nope", "../..", "/nope/nope", "/dev/null", "~nobody/x", ".", "s3://", "s3://B/x", "s3://u:p@bucket/x", "file://",
    "file://host/x", "http://x/y", "gs://b/p", "sklearn:digits", "sklearn:iris", "folder:", "parquet:.",
    "webdataset:/nope", "images/", "images/ffff", "codes/0000", "tokenizer/", "tokenizer/zz", "generator/1f2e",
    "nope/1f2e", "center", "flip", "affine-0", "ten_crop", "bf16", "20261125-014226-digits-dc1e", "pytorch_model.bin",
    "word " * 200,
]  # fmt: skip
NUMBERS = ["0", "1", "2", "8", "0.5"]
PLAUSIBLE = {
    "recipe": ["digits", "digits_tiny", "small64", "imagenet256_sftok_b"],
    "set": [
        "data.val_fraction=0.5", "seed=1", "data.labels=none", "align.training.steps=0", "augment.rotate=6",
        "compute.device=cpu", "evaluate.steps=[1,2]", "evaluate.steps=[]", "data.image_size=33", "data.image_size=16",
        "tokenizer.num_latent_tokens=0", "data.num_shards=2", "align.training.micro_batch=7", "generator.width=17",
    ],
    "variants": ["center", "flip", "center,flip", "affine-1", "ten_crop"],
    "classes": ["0", "0-1", "#1", "a"],
    "kind": ["sftok", "teacher", "tokenizer", "images"],
    "precision": ["auto", "fp32", "bf16"],
    "device": ["auto", "cpu", "cuda"],
}  # fmt: skip
# Left out: what examines the machine or starts servers.
ALL: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS = {name: command for name, command in ALL.items() if name not in ("doctor", "serve")}


class Place:
    """A store with a tokenizer and a folder with files of several kinds, in an environment that leads nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        tokenizer = published(self.store, a_tokenizer())
        pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "one.png"):
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / name)
        (folder / "text.toml").write_text("x = [")
        (folder / "text.csv").write_text("path,label\nimages/a/1.png,0\n")
        (folder / "half.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
        files = [str(path) for path in (folder, folder / "images", *folder.glob("*.*"), folder / "images" / "one.png")]
        refs = [str(tokenizer), tokenizer.digest[:6], tokenizer.uri]
        self.words = [*ODD, *files, *refs]
        images = [str(folder / "images"), str(folder / "text.csv"), "sklearn:digits", str(folder / "images" / "a")]
        self.plausible = PLAUSIBLE | {
            "data": images,
            "images": [str(folder / "images" / "one.png"), str(folder / "text.csv")],
            "store": [str(self.store.path), str(folder / "other")],
            "config": [str(folder / "text.toml")],
            "file": [str(folder / "half.safetensors"), str(folder / "images")],
            **{name: refs for name in ("tokenizer", "generator", "codes", "ref", "before", "after", "teacher")},
            **{name: [str(folder / "out"), str(folder / "images")] for name in ("out", "folder", "grid", "npz")},
        }

    def word(self, name: str, number: int) -> str:
        """The value that a number picks for a parameter: two in three are of the right kind."""
        words = self.plausible.get(name.removesuffix("_"), NUMBERS) if number % 3 else self.words
        return words[number // 3 % len(words)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fuzz")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "SFTOK_", "AWS_"))}
    clean |= {
        "SFTOK_HOME": str(folder / "home"),
        "SFTOK_STORE": str(folder / "store"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with mock.patch.dict(os.environ, clean, clear=True), contextlib.chdir(folder):
        yield Place(folder)


@st.composite
def command_lines(draw: st.DrawFn) -> list[Any]:
    """A command, some of its options, and for each value the parameter with a number that picks one of the words."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words: list[Any] = [name]
    for parameter in COMMANDS[name].params:
        is_argument = parameter.param_type_name == "argument"
        if not (is_argument or parameter.required or draw(st.integers(0, 3)) == 0):
            continue
        if not is_argument:
            words.append(draw(st.sampled_from(list(parameter.opts) + list(parameter.secondary_opts))))
        if is_argument or not getattr(parameter, "is_flag", False):
            words += [(parameter.name, draw(st.integers(0, 10**6))) for _ in range(max(parameter.nargs, 1))]
    if draw(st.integers(0, 20)) == 0:
        words.append(("", draw(st.integers(0, 10**6))))
    return words


def told(place: Place, words: list[Any]) -> tuple[int, str, list[str]]:
    """Run a command line in this process, up to where its work would begin: exit code, last error, and the words."""
    arguments = [place.word(*word) if isinstance(word, tuple) else word for word in words]
    if arguments[0] == "run" and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    out, err = io.StringIO(), io.StringIO()
    started = SystemExit(STARTED)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("flows.cli.launch.launch", side_effect=started),
        pytest.raises(SystemExit) as ended,
    ):
        main(arguments)
    code = ended.value.code
    assert isinstance(code, int)
    return code, err.getvalue(), arguments


def check(place: Place, words: list[Any]) -> None:
    code, err, arguments = told(place, words)
    errors = [line for line in err.splitlines() if line.startswith("sftok: ")]
    assert code in (0, 1, 2, 3, STARTED), arguments
    assert "Traceback" not in err, (arguments, err)
    if code in (0, STARTED):
        return
    assert len(errors) == 1, (arguments, err)
    assert len(errors[0].removeprefix("sftok: ")) <= LONGEST, (arguments, errors[0])
    assert not INTERNAL.search(errors[0]), (arguments, errors[0])


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(words=command_lines())
@settings(SETTINGS, max_examples=60)
def test_commands_with_odd_arguments_end_in_one_line(place: Place, words: list[Any]) -> None:
    check(place, words)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(words=command_lines())
@settings(SETTINGS, max_examples=2000)
def test_two_thousand_command_lines(place: Place, words: list[Any]) -> None:
    check(place, words)
