"""Describe where a result came from: versions, machine, source revision and the command, without secrets."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "numpy", "pyarrow", "ray", "prefect")
PROJECT = "sftok-pipeline"
GIT_SECONDS = 10.0

HIDDEN = "***"
SECRET_WORDS = {"secret", "token", "password", "passwd", "pwd", "passphrase", "credential", "credentials", "signature"}
SECRET_WORDS |= {"apikey", "accesskey", "auth", "authorization", "key"}
ASSIGNED = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9._-]*)(?P<is>\s*[=:]\s*)(?!//)(?P<value>[^\s&;,]+)")
USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@")
WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")


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
def _hardware() -> dict[str, str]:
    import psutil

    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "gpus": ", ".join(gpu_names()) or "none",
    }


def hardware() -> dict[str, str]:
    """Return this machine's CPU model, usable cores, memory in GiB and GPU names."""
    return dict(_hardware())


@cache
def git_revision() -> str | None:
    """Return the commit of this project's own source, with "-dirty" if it was changed; None outside its repository."""
    source = Path(__file__).resolve()
    # A virtual environment inside somebody else's repository has a revision too, but does not track this file.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def redact(arguments: Sequence[str]) -> str:
    """Format a command line with *** for the values of secret-like names and for credentials in URIs."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        kept.append(HIDDEN if is_value and not argument.startswith("-") else _redacted(argument))
        is_value = argument.startswith("-") and "=" not in argument and _is_secret(argument)
    if kept:
        kept[0] = Path(kept[0]).name
    return shlex.join(kept)


def command() -> str:
    """Return this process's command line, without secrets."""
    return redact(sys.argv)


def _redacted(text: str) -> str:
    def hide(match: re.Match[str]) -> str:
        return f"{match['name']}{match['is']}{HIDDEN}" if _is_secret(match["name"]) else match.group()

    return ASSIGNED.sub(hide, USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text))


def _is_secret(name: str) -> bool:
    """Tell whether a word in the name marks a secret: "hub.token" and "apiToken" do, "num_tokens" does not."""
    return any(word.lower() in SECRET_WORDS for word in WORD.findall(name))


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


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs from the driver's files; asking CUDA would occupy memory on the cards.

    If the driver has no such files, torch is asked, but only if it is already loaded: importing it takes seconds.
    """
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        names += [found[1].strip()] if found else []
    torch = sys.modules.get("torch")
    if names or torch is None:
        return names
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
