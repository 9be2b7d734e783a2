"""Describe what made an artifact: versions, source revision and the command, without secrets."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from infra.redaction import redact

PACKAGES = ("torch", "numpy", "pyarrow", "ray", "prefect")
PROJECT = "sftok-pipeline"
GIT_SECONDS = 10.0


def versions() -> dict[str, str]:
    """Return versions of Python, this project and the packages that affect results, as far as they are installed."""
    installed = {"python": platform.python_version()}
    for label, package in [("project", PROJECT), *((name, name) for name in PACKAGES)]:
        try:
            installed[label] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@cache
def git_revision() -> str | None:
    """Return the commit of this project's own source, with "-dirty" if it was changed; None outside its repository."""
    source = Path(__file__).resolve()
    # A virtual environment inside somebody else's repository has a revision too, but does not track this file.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def command() -> str:
    """Return this process's command line, without secrets."""
    return redact(sys.argv)


def _git(folder: Path, *arguments: str) -> str | None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            env=clean,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
