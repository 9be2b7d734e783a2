"""What users' machines bring: variables, disks, locales and terminals of any kind end in one line, not a traceback."""

import http.server
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.cli.exits import one_line_termination
from tests.flows.cli.test_cli import environment, sftok, start, wait_for

__all__ = ["environment", "sftok"]


def refused(sftok, *arguments) -> str:
    """What a command says that ends at once, in a single line."""
    code, out, err = sftok(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err


# --- variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SFTOK_STORE", "ftp://user:secret@host", "SFTOK_STORE = ftp://...: neither a local path"),
        ("SFTOK_S3_PATIENCE", "long", "SFTOK_S3_PATIENCE = long: input should be a valid number"),
        ("SFTOK_RAY_MAX_GPUS", "-1", "SFTOK_RAY_MAX_GPUS = -1: input should be greater than or equal to 0"),
        ("RAY_ADDRESS", "http://127.0.0.1:8265", "is a dashboard's address; give the head's, as HOST:6379 or ray://"),
        ("SFTOK_RAY_ADDRESS", "head", "SFTOK_RAY_ADDRESS = head is no address; write host:port"),
        ("RAY_ADDRESS", "ray://user:secret@127.0.0.1:9", "RAY_ADDRESS = ray://***@127.0.0.1:9 cannot be reached ("),
        ("PREFECT_API_URL", "host", "PREFECT_API_URL = host: not an http(s) URL"),
        ("PREFECT_API_URL", "http://user:secret@127.0.0.1:9", "PREFECT_API_URL = http://***@127.0.0.1:9: "),
        ("PREFECT_LOGGING_LEVEL", "bogus", "PREFECT_LOGGING_LEVEL = bogus: input should be 'DEBUG', 'INFO'"),
        ("PREFECT_SERVER_API_PORT", "high", "PREFECT_SERVER_API_PORT = high: input should be a valid integer"),
        (
            "PREFECT_CLIENT_CUSTOM_HEADERS",
            "none",
            'PREFECT_CLIENT_CUSTOM_HEADERS = none: error parsing value for field "',
        ),
        (
            "SSL_CERT_FILE",
            "/no/such.pem",
            "SSL_CERT_FILE = /no/such.pem: No such file or directory; name a file of PEM",
        ),
        ("SSL_CERT_FILE", __file__, "holds no certificates; name a file of PEM certificates, or unset it"),
    ],
)
def test_variable_is_named_with_its_value_and_the_remedy(sftok, environment, tmp_path, variable, value, said):
    environment[variable] = value
    err = refused(sftok, "run", "digits", "--workers", "0")
    assert said in err
    assert "; " in err or "should be" in err
    assert "secret" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "ALL_PROXY",
            "socks5://user:secret@host:1",
            "ALL_PROXY = socks5://***@host:1: Prefect's client reads it for any",
        ),
        (
            "http_proxy",
            "user:secret@:::",
            "http_proxy = ***@:::: Prefect's client reads it for any server, and cannot; wri",
        ),
        (
            "NO_PROXY",
            "localhost,[::1]",
            "NO_PROXY = localhost,[::1]: Prefect's client reads it for any server, and cannot",
        ),
    ],
)
def test_proxies_are_named_where_the_server_is_not_our_own(sftok, environment, variable, value, said):
    environment |= {variable: value, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    err = refused(sftok, "run", "digits", "--workers", "0")
    assert said in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "AWS_ENDPOINT_URL = localhost:9000: S3's client refuses it"),
        (
            "AWS_ENDPOINT_URL_S3",
            "http://user:secret@host:x",
            "AWS_ENDPOINT_URL_S3 = http://***@host:x: S3's client ref",
        ),
        ("AWS_PROFILE", "nope", "AWS_PROFILE = nope: S3's client refuses it (ProfileNotFound); name a profile"),
        (
            "AWS_DEFAULT_REGION",
            "a b",
            "AWS_DEFAULT_REGION = a b: S3's client refuses it (InvalidRegionError); name a region",
        ),
        (
            "AWS_CA_BUNDLE",
            "/no/such.pem",
            "AWS_CA_BUNDLE = /no/such.pem: No such file or directory; name a file of PEM",
        ),
        ("AWS_CA_BUNDLE", __file__, "holds no certificates; name a file of PEM certificates, or unset it"),
        ("AWS_CONFIG_FILE", "/", "AWS_CONFIG_FILE = /: Is a directory; name a file that can be read, or unset it"),
        ("AWS_SHARED_CREDENTIALS_FILE", __file__, "S3's client refuses it (ConfigParseError); correct that file"),
        ("HTTPS_PROXY", "socks5://127.0.0.1:9", "HTTPS_PROXY = socks5://127.0.0.1:9: S3's client has no such proxies"),
        (
            "https_proxy",
            "user:secret@:::",
            "https_proxy = ***@:::: S3's client has no such proxies; write http://host:",
        ),
    ],
)
def test_variable_of_s3_is_named_before_any_call(sftok, environment, variable, value, said):
    for name in [name for name in environment if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        del environment[name]
    environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", variable: value}
    err = refused(sftok, "ls", "--store", "s3://bucket/prefix")
    assert said in err
    assert "secret" not in err


def test_proxy_that_does_not_answer_is_named(sftok, environment):
    environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_ENDPOINT_URL": "http://nowhere.test"}
    environment |= {"SFTOK_S3_PATIENCE": "0", "HTTP_PROXY": "http://user:secret@127.0.0.1:9", "NO_PROXY": ""}
    code, _, err = sftok("ls", "--store", "s3://bucket/prefix")
    assert (code, err.count("\n")) == (1, 1)
    assert "http://nowhere.test does not answer through the proxy HTTP_PROXY = http://***@127.0.0.1:9 (" in err


# --- disks and servers -----------------------------------------------------------------------------------------------


def test_home_without_space_is_refused(sftok, environment, tmp_path):
    """A limit of file sizes stands for a full disk: the same call fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        err = refused(sftok, "run", "digits", "--workers", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"SFTOK_HOME = {environment['SFTOK_HOME']}: file too large; name a folder" in err
    assert not list(tmp_path.iterdir())


@contextmanager
def failing_server() -> Iterator[str]:
    """The URL of a Prefect API that is healthy and fails, as one on a full disk."""

    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_server_that_fails_is_one_line(sftok, environment, fakes):
    with failing_server() as environment["PREFECT_API_URL"]:
        code, _, err = sftok("run", "digits", "--workers", "0")
    assert code == 1
    assert err.splitlines()[-1].startswith("sftok: the Prefect server failed: Server error '500 Internal Server Error'")
    assert "Traceback" not in err


# --- streams, folders, locales ---------------------------------------------------------------------------------------


def shell(environment, command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of a shell in which `sftok` is this one; its exit code is that of the first of a pipe."""
    function = 'sftok() { "$PYTHON" -c "from flows.cli.main import main; main()" "$@"; }'
    return subprocess.run(
        ["bash", "-c", f"{function}; {command}; exit ${{PIPESTATUS[0]}}"],
        env={**environment, "PYTHON": sys.executable},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("sftok recipes > /dev/full", 1, "sftok: standard output: No space left on device\n"),
        ("sftok recipes digits --toml | true", 141, ""),
        ("sftok recipes >&- 2>&- <&-", 0, ""),
        ("sftok recipe 2>/dev/full", 2, ""),
        ("PYTHONIOENCODING=ascii sftok recipes | grep -c digits", 0, ""),
        (
            "rmdir $PWD; sftok ls --store there",
            2,
            "sftok: the current folder has been deleted; change to one that exists\n",
        ),
    ],
)
def test_streams_and_folders_that_are_gone(environment, tmp_path, command, code, said):
    (tmp_path / "here").mkdir()
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    done = shell(environment, command, tmp_path / "here")
    assert (done.returncode, done.stderr) == (code, said)


def test_names_are_read_as_utf8_in_any_locale(environment, tmp_path):
    """LC_ALL=C without Python's own remedies stands for a locale such as Latin-1, which may not be installed here."""
    (tmp_path / "katze ü").touch()
    script = (
        "import os; from flows.cli.console import speak_utf8; speak_utf8(); print(ascii(os.listdir(os.environ['AT'])))"
    )
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "AT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['katze \\xfc']\n"


def test_nohup_is_kept():
    """Guards against a handler that ends a run of `nohup sftok run` with its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_line_termination():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- kills -----------------------------------------------------------------------------------------------------------


def run(environment, *arguments) -> tuple[dict, str]:
    """Run a command on fake stages to its good end: its JSON and what it says."""
    with start(environment, *arguments, "--json") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out), err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("train_generator", ["train-generator", "--set", "train_generator.steps=7", "--seed", "3", "--codes"]),
        ("warm_up", ["ablation", "digits_ablation", "--workers", "0", "--seeds", "0"]),
    ],
)
def test_killed_command_goes_on_by_what_the_next_run_says(environment, tmp_path, stage, arguments):
    whole, killed = ["run", "digits", "--workers", "0"], tmp_path / "killed"
    if arguments[-1] == "--codes":
        made, _ = run(environment, *whole)
        arguments = [*arguments, f"codes/{made['stages']['encode']['digest']}"]
    with start(environment, *arguments, FAKE_WAIT=f"{stage}:{killed}") as process:
        wait_for(killed, process)
        process.kill()
    _, err = run(environment, *whole)
    name, command = re.search(
        r"^WARNING \S+ run (\S+) has crashed: .*; resume with: sftok (.*)$", err, re.MULTILINE
    ).groups()
    assert f"flow run {name} has crashed: " in err, "in Prefect it would run for ever"
    resumed, _ = run(environment, *shlex.split(command))
    assert "Completed" in {one["state"] for one in resumed["stages"].values()}
    again, _ = run(environment, *arguments)
    states = {one["state"] for one in again["stages"].values()} if "stages" in again else {again["state"]}
    assert states == {"Cached"}, "the command that was offered did something else"


@pytest.mark.slow
def test_damaged_database_is_set_aside(environment, tmp_path):
    home = tmp_path / "home"
    (database,) = (Path(environment["SFTOK_HOME"]) / "prefect").glob("prefect-*.db")
    (home / "prefect").mkdir(parents=True)
    damaged = home / "prefect" / database.name
    damaged.write_bytes(database.read_bytes()[:100_000])
    _, err = run({**environment, "SFTOK_HOME": str(home)}, "run", "digits", "--workers", "0")
    (said,) = [line for line in err.splitlines() if line.startswith("WARNING")]
    aside = damaged.with_name(f"{damaged.name}.damaged-1")
    assert said.endswith(
        f"{damaged} is damaged (database disk image is malformed): it is kept as {aside.name}, and a new one is made"
    )
    assert aside.stat().st_size == 100_000
    assert damaged.exists()
