"""The command line as a contract: exit codes, one line of error, one JSON object, nothing left behind."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pydantic
import pytest

from flows.cli.main import main
from flows.recipes.files import load_recipe, to_toml
from flows.recipes.registry import RECIPES
from flows.runs.journal import read_record
from infra.store.store import Store

STAGES = ["prepare", "teacher", "warm_up", "align", "fine_tune", "encode"]
STAGES += ["train_generator", "sample", "train_second_generator", "evaluate", "report"]


@pytest.fixture
def environment(home, tmp_path) -> dict[str, str]:
    """What a fresh shell would have, with a home whose database is there already."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_", "SFTOK_"))}
    return {**clean, "SFTOK_HOME": str(home), "SFTOK_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def sftok(monkeypatch, environment, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        for name in list(os.environ):
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def start(environment, *arguments, stderr=subprocess.PIPE, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.fake_cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    return subprocess.Popen(command, env={**environment, **more}, start_new_session=True, **pipes)


def read_terminal(master: int) -> str:
    """All that was written to a terminal, without its control sequences."""
    written = b""
    with contextlib.suppress(OSError):  # what the end of a terminal looks like
        while piece := os.read(master, 4096):
            written += piece
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def wait_for(file: Path, run: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not file.exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "the stage did not begin"
        time.sleep(0.05)


# --- help, recipes ---------------------------------------------------------------------------------------------------


def test_help_is_instant_and_loads_nothing_heavy():
    """Guards against an import that creeps into the command line's module."""
    script = "import sys; from flows.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "heavy = {'prefect', 'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "recipes",
        "show",
        "doctor",
        "import-weights",
        "export-weights",
        "reconstruct",
        "verify",
        "diff",
        "sample",
        "weights",
        "rerun",
        "serve",
        "files",
        "ls",
        "cp",
        "gc",
        "pin",
        "unpin",
        "openlineage",
        "report",
        "statistics",
        "ablation",
    ],
)
def test_help_shows_examples(sftok, command):
    code, out, _ = sftok(command, "--help")
    assert code == 0
    assert f"  sftok {command}" in out.partition("Examples:")[2]


def test_recipes_are_listed(sftok):
    code, out, _ = sftok("recipes")
    assert code == 0
    assert all(name in out for name in RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_printed_toml_is_the_recipe(name, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(RECIPES[name]()))
    assert load_recipe(str(file)) == RECIPES[name]()


def test_toml_explains_its_fields(sftok):
    code, out, _ = sftok("recipes", "digits", "--toml")
    assert code == 0
    assert "# one-dimensional tokens per image\nnum_latent_tokens = 16" in out


def test_overrides_are_typed():
    changes = ["teacher.training.steps=5", "sample.cfg_scale=1.5", 'encode.variants=["center"]', "name=mine"]
    recipe = load_recipe("digits", overrides=changes, seed=3)
    assert (recipe.teacher.training.steps, recipe.sample.cfg_scale) == (5, 1.5)
    assert (recipe.encode.variants, recipe.name, recipe.seed) == (("center",), "mine", 3)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digitz"], "unknown recipe 'digitz', did you mean digits?"),
        (["missing.toml"], "recipe file missing.toml does not exist"),
        (["digits", "--set", "teacher.training.stepz=3"], "teacher.training.stepz: unknown field, did you mean steps?"),
        (["digits", "--set", "techer.training.steps=3"], "techer: unknown field, did you mean teacher?"),
        (["digits", "--set", "sample.top_p=2"], "sample.top_p = 2: input should be less than or equal to 1"),
        (["digits", "--set", "sample.top_p"], "write section.field=value"),
        (["digits", "--set", "seed.x=1"], "seed is a value, not a section"),
        (["digits", "--set", "data.image_size=33"], "data.image_size = 33 does not divide"),
        (["digits", "--seed", "-1"], "--seed"),
        (["digits", "--workers", "many"], "--workers"),
        (["digits", "--sead", "1"], "--sead"),
        (["digits", "--data", "no/such/folder"], "no/such/folder"),
        (["digits", "--store", "s3://x"], "s3://x"),
        (["digits", "--store", "ftp://host/x"], "ftp://"),
        ([], "recipe"),
    ],
)
def test_refusal_is_one_line_and_writes_nothing(sftok, tmp_path, home, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in home.rglob("*") if "client" not in path.parts)
    code, out, err = sftok("run", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())
    assert sorted(path for path in home.rglob("*") if "client" not in path.parts) == before


class Stopped(pydantic.BaseModel):
    """A signal comes while pydantic serializes it."""

    by: signal.Signals

    @pydantic.model_serializer(mode="plain")
    def _serialize(self) -> dict[str, str]:
        os.kill(os.getpid(), self.by)
        time.sleep(1)
        return {}


def fail_as_while_importing(by: signal.Signals) -> None:
    """What a signal becomes while pydantic builds a class."""
    try:
        Stopped(by=by).model_dump_json()
    except ValueError as error:
        raise TypeError("cannot build it") from error


@pytest.mark.parametrize(
    "work",
    [
        lambda by: Stopped(by=by).model_dump(),
        lambda by: Stopped(by=by).model_dump_json(),
        fail_as_while_importing,
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_of_which_pydantic_makes_an_error_ends_as_any_other(sftok, monkeypatch, number, code, work):
    monkeypatch.setattr("flows.requests.checks.check_request", lambda *_, **__: work(number))
    ended, _, err = sftok("run", "digits")
    assert (ended, err.count("\n")) == (code, 1)
    assert err.endswith("ed; the same command resumes from here\n")


def test_an_exception_that_is_only_named_is_no_signal(sftok):
    for arguments in (["KeyboardInterrupt"], ["digits", "--set", "seed=KeyboardInterrupt"]):
        code, _, err = sftok("run", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "KeyboardInterrupt" in err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PREFECT_API_URL", "http://127.0.0.1:9/api", "PREFECT_API_URL = http://127.0.0.1:9/api"),
        ("RAY_ADDRESS", "127.0.0.1:9", "RAY_ADDRESS = 127.0.0.1:9 cannot be reached (Connection refused)"),
        ("SFTOK_HOME", "/proc/nobody", "SFTOK_HOME = /proc/nobody"),
    ],
)
def test_service_that_is_not_there_is_named(sftok, environment, tmp_path, variable, value, said):
    environment[variable] = value
    code, out, err = sftok("run", "digits")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not list(tmp_path.iterdir())


def test_store_that_cannot_be_written_is_refused(sftok, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = sftok("run", "digits", "--store", tmp_path / "file" / "store")
    assert (code, err.count("\n")) == (2, 1)
    assert str(tmp_path / "file") in err


# --- runs ------------------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_show_explains_it(environment, running_server, sftok):
    master, terminal = pty.openpty()
    arguments = ["run", "digits", "--json", "--workers", "0"]
    with start(environment, *arguments, stderr=terminal, PREFECT_API_URL=running_server.url, TERM="xterm") as run:
        os.close(terminal)
        err = read_terminal(master)
        out = run.stdout.read()
    os.close(master)
    assert run.returncode == 0, err
    result = json.loads(out)
    assert set(result) == {"run", "recipe", "stages", "metrics", "report", "findings"}
    assert (result["recipe"], list(result["stages"])) == ("digits", STAGES)
    assert set(result["stages"]["teacher"]) == {"state", "digest", "uri", "seconds"}
    assert result["metrics"] == {"accuracy": 0.93, "psnr_of_a_copy": "Infinity"}
    assert Path(result["report"]).exists()
    assert "━━━" in err, "no bars on a terminal"
    assert "prefect" not in err.lower(), "Prefect is to be quiet"

    code, out, _ = sftok("show", result["stages"]["teacher"]["digest"][:8], "--json")
    shown = json.loads(out)
    assert (code, shown["uri"]) == (0, result["stages"]["teacher"]["uri"])
    assert shown["lineage"]["inputs"]["images"]["ref"] == f"images/{result['stages']['prepare']['digest']}"
    code, out, _ = sftok("show", result["stages"]["report"]["uri"])
    assert code == 0
    assert f"tokenizer: tokenizer/{result['stages']['fine_tune']['digest']} (fine_tune)" in out
    code, out, _ = sftok("show", result["run"], "--json")
    assert (code, json.loads(out)) == (0, {"state": "Completed", **result})
    code, out, _ = sftok("show", result["run"])
    assert code == 0
    assert f"report: {result['report']}" in out
    assert "Completed, begun 20" in out
    assert "what to look at first:\n  serious: 31 % of the samples repeat the codes" in out
    assert "\n    try: train on more images\n" in out
    code, _, err = sftok("show", "teacher/ffff")
    assert (code, err.count("\n")) == (2, 1)


def test_failed_stage_is_one_line(sftok, environment, running_server, fakes, tmp_path):
    fakes.failures["align"] = [ValueError("nothing\nto align")]
    environment["PREFECT_API_URL"] = running_server.url
    code, out, err = sftok("run", "digits", "--json", "--workers", "0")
    assert code == 1
    record = read_record(Store(tmp_path / "store"), json.loads(out)["run"])
    command = record.request.command(record.run)
    assert command.startswith(
        f"sftok run digits --data sklearn:digits --store {tmp_path / 'store'} --workers 0 --gpus-"
    )
    assert err.splitlines()[-1] == (
        f"sftok: stage align failed: nothing to align; once that is mended, resume with: {command}"
    )
    assert "Traceback" not in err
    assert json.loads(out)["stages"]["align"]["state"] == "Failed"


def test_long_reasons_and_requests_still_end_with_a_whole_command(sftok, environment, running_server, fakes, tmp_path):
    fakes.failures["align"] = [ValueError(f"nothing to align in {'x' * 500}, {'a b ' * 500}")]
    environment["PREFECT_API_URL"] = running_server.url
    settings = [
        f"{stage}.training.{size}={k}"
        for stage in ("teacher", "warm_up", "align")
        for k, size in ((4, "steps"), (16, "batch_size"))
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    code, out, err = sftok("run", "digits", "--json", "--workers", "0", *sets)
    last = err.splitlines()[-1]
    assert code == 1
    assert "stage align failed: nothing to align in xx" in last
    assert last.endswith(f"resume with: sftok rerun {json.loads(out)['run']} --store {tmp_path / 'store'}")
    assert len(last.removeprefix("sftok: ")) == 400


def test_rerun_does_what_the_record_says(sftok, environment, running_server, fakes):
    environment["PREFECT_API_URL"] = running_server.url
    code, out, _ = sftok("run", "digits", "--set", "sample.per_class=3", "--seed", "7", "--workers", "0", "--json")
    assert code == 0
    first = json.loads(out)
    code, out, _ = sftok("rerun", first["run"], "--json")
    again = json.loads(out)
    assert code == 0
    assert again["run"] != first["run"]
    assert {name: stage["digest"] for name, stage in again["stages"].items()} == {
        name: stage["digest"] for name, stage in first["stages"].items()
    }
    assert {stage["state"] for stage in again["stages"].values()} == {"Cached"}
    assert set(fakes.attempts.values()) == {1}
    code, _, err = sftok("rerun", "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no run 'none'" in err


def test_stopped_runs_leave_no_process_and_the_next_goes_on(environment, tmp_path):
    """kill -9 in one stage, then Ctrl-C in the next, both on temporary servers of their own, which need no proxies."""
    environment |= {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": ":::", "NO_PROXY": "localhost,[::1]"}
    killed = tmp_path / "killed"
    with start(environment, "run", "digits", "--workers", "0", FAKE_WAIT=f"teacher:{killed}") as run:
        wait_for(killed, run)
        family = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    assert family, "there should have been a server"
    assert not psutil.wait_procs(family, timeout=5)[1]

    interrupted = tmp_path / "interrupted"
    with start(environment, "run", "digits", "--workers", "0", FAKE_WAIT=f"warm_up:{interrupted}") as run:
        wait_for(interrupted, run)
        family = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)  # what a terminal does
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.splitlines()[-1] == "sftok: interrupted; the same command resumes from here"
    assert "prepare: Cached in" in err
    assert "teacher: 2/2 loss=0.25\n" in err, "no plain lines of progress in a pipe"
    assert "Traceback" not in err
    assert "prefect" not in err.lower(), "Prefect is to be quiet"
    assert family
    assert not psutil.wait_procs(family, timeout=5)[1]

    first, second = (json.loads(file.read_text()) for file in sorted((tmp_path / "store").glob("runs/*/run.json")))
    assert first["state"] == "Crashed", "nobody was left to write it down, and the next run did"
    assert second["state"] == "Cancelled"
    assert {name: stage["state"] for name, stage in second["stages"].items()} == {
        "prepare": "Cached",
        "teacher": "Completed",
        "warm_up": "Cancelled",
    }
