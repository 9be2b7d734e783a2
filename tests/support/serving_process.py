"""`sftok serve` on fake stages, in a process of its own; its runs, too: `sitecustomize` reaches Prefect's children.

FAKE_WAIT=stage:file lets the first run that comes to the stage touch the file and sleep.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support import ROOT

FAKES = """
import os, sys
if {"prefect.engine", "prefect.flow_engine"} & set(sys.orig_argv) or "execute" in sys.orig_argv:
    from pathlib import Path
    from flows import make
    from tests.support.fake_stages import FakeStages
    make.run_stage = fakes = FakeStages()
    stage, _, file = os.environ.get("FAKE_WAIT", "").partition(":")
    if stage and not Path(file).exists():
        fakes.waits[stage] = Path(file)
"""
MAIN = "from flows.cli.main import main; main()"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def until(what: Callable[[], Any], patience: float, why: str | Callable[[], object]) -> Any:
    """Wait until something is true; what it is."""
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, why() if callable(why) else why
        time.sleep(0.25)
    return found


def command_of(process: psutil.Process) -> str:
    """Its command line; none of one that has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Serving:
    """One `sftok serve`, and what it says."""

    def __init__(
        self,
        folder: Path,
        *,
        arguments: Sequence[str] = (),
        api_url: str = "",
        fakes: bool = True,
        **environment: str,
    ) -> None:
        self.port = free_port()
        self.url = api_url or f"http://127.0.0.1:{self.port}/api"
        self.store = folder / "store"
        self.log = folder / f"serve-{self.port}.log"
        (folder / "site").mkdir(exist_ok=True)
        (folder / "site" / "sitecustomize.py").write_text(FAKES)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "SFTOK_"))}
        clean |= {
            "PYTHONPATH": os.pathsep.join([*([str(folder / "site")] if fakes else []), str(ROOT)]),
            "SFTOK_HOME": str(folder / "home"),
            "PREFECT_HOME": str(folder / "client"),
            "OMP_NUM_THREADS": "1",
        }
        if api_url:
            clean["PREFECT_API_URL"] = api_url
        command = [sys.executable, "-c", MAIN, "serve", "--store", str(self.store), "--workers", "0"]
        command += ["--port", str(self.port), "--check-cron", "off", "--report-cron", "off", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env={**clean, **environment}, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, patience: float = 120) -> "Serving":
        """Return when the deployments are served."""
        until(lambda: "serving at" in self.said() or self.process.poll() is not None, patience, self.said)
        assert self.process.poll() is None, self.said()
        return self

    def said(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        """The processes of runs under way."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in family if "prefect.engine" in command_of(one)]

    def stop(self) -> int:
        """End it as a service manager does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """End it and its runs without a word, as a power loss does."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for one in family:
            one.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait(10)
