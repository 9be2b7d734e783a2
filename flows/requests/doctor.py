"""Tries everything a run stands on, one thing after the other, and says what to do about what does not work."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from pydantic import Field

from flows.prefect_server.environment import check_environment
from flows.prefect_server.temporary import ServerError, prefect_server
from flows.requests.checks import check_home
from flows.requests.precisions import HALF
from flows.runs.journal import one_line
from infra.compute.cluster import check_reachable, session
from infra.config import Config
from infra.settings import Settings
from infra.store.store import Store

PACKAGES = ("torch", "prefect", "fastapi", "sqlalchemy", "ray", "pyarrow", "s3fs", "pydantic")
# Newer ones install without complaint and break Prefect's server: read requests answer 422, schedules never fire.
BELOW = {"fastapi": (0, 151), "sqlalchemy": (2, 1)}
REINSTALL = "reinstall with the pinned versions: pip install -c constraints.txt -e ."


class Check(Config):
    """The result of one check."""

    name: str
    ok: bool
    detail: str = Field(description="what was found")
    remedy: str = Field("", description="what to do where it does not work")
    seconds: float = 0.0


class Trouble(Exception):  # noqa: N818
    """Something that does not work, and its remedy."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


def examine(store: str | None = None) -> Iterator[Check]:
    """Yield every check as soon as it is done; one that fails does not keep the next from being tried."""
    yield _tried("python", _python)
    yield _tried("packages", _packages)
    yield _tried("devices", _devices)
    yield _tried("precisions", _precisions)
    try:
        settings = Settings()
    except ValueError as error:
        yield Check(name="settings", ok=False, detail=one_line(error), remedy="correct that environment variable")
        return
    yield _tried("home", lambda: _home(settings))
    yield _tried("store", lambda: _store(store))
    yield _tried("prefect", lambda: _prefect(settings))
    yield _tried("ray", lambda: _ray(settings))


def _tried(name: str, look: Callable[[], str]) -> Check:
    began = time.monotonic()
    remedy = ""
    try:
        ok, detail = True, look()
    except Trouble as trouble:
        ok, detail, remedy = False, trouble.detail, trouble.remedy
    except ValueError as error:  # our own name the remedy themselves
        detail, _, remedy = one_line(error).partition("; ")
        ok, remedy = False, remedy or "see left"
    except Exception as error:  # the doctor's very purpose: whatever breaks is a finding
        ok, detail, remedy = False, one_line(error), REINSTALL
    return Check(name=name, ok=ok, detail=detail, remedy=remedy, seconds=round(time.monotonic() - began, 2))


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _packages() -> str:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise Trouble(f"{name} is not installed", REINSTALL) from None
    for name, limit in BELOW.items():
        if tuple(int(part) for part in found[name].split(".")[:2]) >= limit:
            below = ".".join(map(str, limit))
            raise Trouble(f"{name} {found[name]}: Prefect's server does not work with {below} and later", REINSTALL)
    return ", ".join(f"{name} {found[name]}" for name in PACKAGES)


def _devices() -> str:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{cores} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free"
    return f"{found}, {', '.join(gpus) or 'no GPU: everything runs on the CPU'}"


def _precisions() -> str:
    """Measure what half precision is worth here; that it is slow is no fault."""
    from infra.compute.device import cpu_features, default_device
    from infra.compute.precision import precision_ratio, slow_because

    if (device := default_device()) == "cuda":
        slow = filter(None, (slow_because(each, device) for each in HALF))
        return "; ".join(f"{reason}: fp32 is faster" for reason in slow) or f"{' and '.join(HALF)} are faster than fp32"
    ratios = {each: precision_ratio(each) for each in HALF}
    told = ", ".join(f"{each} {ratio:.2g}" for each, ratio in ratios.items())
    slower = [each for each, ratio in ratios.items() if ratio < 1]
    advice = f": fp32 is faster than {' and '.join(slower)}" if slower else ""
    return f"products beside fp32, times as fast, on this CPU ({cpu_features()}): {told}{advice}"


def _home(settings: Settings) -> str:
    check_home(settings.home)
    return str(settings.home)


def _store(uri: str | None) -> str:
    store = Store.usual(uri)
    store.check()
    return f"{store.uri}: written, read, deleted"


def _prefect(settings: Settings) -> str:
    """Start the server that a run would use, and read every kind of object: a health check alone sees too little."""
    check_home(settings.home)
    check_environment(settings.prefect_api_url)
    with prefect_server(settings.home, api_url=settings.prefect_api_url) as server:
        from prefect.client.orchestration import get_client
        from prefect.exceptions import PrefectHTTPStatusError

        try:
            server.wait(timeout=180 if server.pid else 10)
            with get_client(sync_client=True) as client:
                for read in (client.read_flows, client.read_flow_runs, client.read_task_runs, client.read_artifacts):
                    read(limit=1)
        except ServerError as error:
            remedy = REINSTALL if server.pid else "start that server, or unset PREFECT_API_URL for a temporary one"
            raise Trouble(str(error), remedy) from error
        except PrefectHTTPStatusError as error:
            raise Trouble(f"{server.url} answers {error.response.status_code} to reads", REINSTALL) from error
    kind = "temporary server started, read, stopped" if server.pid else f"{server.url} read"
    return f"{kind} (Prefect {version('prefect')})"


def _ray(settings: Settings) -> str:
    check_reachable(settings.ray_address)
    from infra.compute.workers import WorkerOptions, map_shards

    with session(settings.ray_address, 1):
        answers = map_shards(_doubler, [1, 2, 3], options=WorkerOptions(workers=1))
    if answers != [2, 4, 6]:
        raise Trouble(f"a worker answered {answers} where [2, 4, 6] is right", REINSTALL)
    where = f"cluster {settings.ray_address}: worked" if settings.ray_address else "local: started, worked, stopped"
    return f"{where} (Ray {version('ray')})"


def _doubler() -> Callable[[int], int]:
    return _double


def _double(number: int) -> int:
    return 2 * number
