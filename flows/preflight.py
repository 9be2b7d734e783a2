"""What is checked before a run starts any server or writes anything: a ValueError here is one line for the user."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flows.recipe_files import load_recipe
from flows.recipes import Recipe
from flows.server import health
from infra.settings import Settings
from infra.store import Store

CONNECT_SECONDS = 5.0


class Request(NamedTuple):
    """A run that can begin."""

    recipe: Recipe
    store: Store
    source: str
    workers: int
    settings: Settings


def check_request(
    recipe: str,
    *,
    data: str | None,
    store: str | None,
    overrides: Sequence[str],
    workers: int | None,
    seed: int | None,
) -> Request:
    """Turn what the user asked for into a request, the store last: checking it writes to it."""
    from sftok.sources import list_source

    settings = Settings()
    chosen = load_recipe(recipe, overrides=overrides, seed=seed)
    source = data or chosen.source
    if not source:
        raise ValueError(f"recipe {chosen.name} has no images of its own: give a folder of them with --data")
    list_source(source)
    check_home(settings.home)
    if settings.prefect_api_url and (trouble := health(settings.prefect_api_url)) is not None:
        raise ValueError(f"PREFECT_API_URL = {settings.prefect_api_url}: {trouble}; start that server, or unset it")
    check_ray(settings.ray_address)
    place = Store(store or settings.store)
    place.check()
    return Request(chosen, place, source, min(2, os.cpu_count() or 1) if workers is None else workers, settings)


def check_home(home: Path) -> None:
    """Refuse a home that cannot be written to."""
    folder = home.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"SFTOK_HOME = {home}: {error.strerror}; name a folder that can be written to") from None
    if not writable:
        raise ValueError(f"SFTOK_HOME = {home}: permission denied; name a folder that can be written to")


def check_ray(address: str | None) -> None:
    """Refuse a Ray address that nobody listens at; `auto` and `local` are Ray's to find."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"Ray address {address}: {reason}; start that cluster, or unset it for a local one") from None
