"""Limit which runs overlap, by Prefect's global concurrency limits.

- `sftok-RECIPE-STORE` (STORE: eight digits of a hash), 1 slot: a run holds it, so that of two runs of one recipe on one
  store the second waits, or is cancelled.
- `sftok-gpus`, as many slots as there are GPUs: a run holds as many as it asks for, so that runs of different recipes
  share them. Without GPUs nobody asks for it.

Both are made when the first run asks for them and are never changed afterwards, so that what a person sets in Prefect
stays: `prefect gcl update sftok-gpus --limit 64`. They are held by leases of a minute that are renewed while the run
lives: a run that was killed lets go about 70 s later, if the server runs its services (`sftok serve`, `prefect server
start`). A lease that cannot be renewed because the server is away does not end the run: two runs at once waste
work, and of two writers of one artifact one wins.

A deployment has a limit of its own beside these, of one run (`flows.service.deployments`). It keeps runs that wait from
occupying a process; direct runs ignore it, hence the limits here.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.service.parameters import Overlap
from infra.store.store import Store

GPUS = "sftok-gpus"
LEASE_SECONDS = 60.0
LOCKED = 423  # the server's answer while all slots are taken

log = logging.getLogger(__name__)


class OverlapError(RuntimeError):
    """Another run is under way, and this one was told not to wait for it."""


def name_of(recipe: str, store: Store) -> str:
    """Return the name of the limit that runs of a recipe on a store share."""
    word = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe)  # Prefect's names have no slashes
    return f"sftok-{word}-{hashlib.sha256(store.uri.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def held(recipe: str, store: Store, *, overlap: Overlap, gpus: int = 0) -> Iterator[None]:
    """Hold a run's limits during the block, as soon as they are free.

    Raises:
        OverlapError: another run of the recipe on the store is under way and `overlap` is "cancel".
        ValueError: more GPUs are asked for than there are.
    """
    if gpus:
        slots = _make(GPUS, max(gpus, local_gpus()))
        if gpus > slots:
            raise ValueError(
                f"the run asks for {gpus} GPUs, and the limit {GPUS} is {slots}: lower workers, gpus_per_worker or "
                f"ranks, or raise it: prefect gcl update {GPUS} --limit {gpus}"
            )
    with contextlib.ExitStack() as stack:
        name = name_of(recipe, store)
        _make(name, 1)
        _enter(stack, name, 1, tries=0 if overlap == "cancel" else None)
        if gpus:  # always after the other one: nobody waits for a run while holding GPUs
            _enter(stack, GPUS, gpus, tries=None)
        yield


def local_gpus() -> int:
    """Count the GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def set_gpus(slots: int) -> None:
    """Set how many GPUs runs share, because a person said so."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(GPUS, slots)


def _enter(stack: contextlib.ExitStack, name: str, occupy: int, *, tries: int | None) -> None:
    slots = concurrency(
        name,
        occupy=occupy,
        strict=True,
        max_retries=tries,
        lease_duration=LEASE_SECONDS,
        raise_on_lease_renewal_failure=False,
    )
    try:
        stack.enter_context(slots)
    except ConcurrencySlotAcquisitionError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == LOCKED:
            raise OverlapError(f"the limit {name} is taken by another run, and overlap is cancel") from error
        raise


def _make(name: str, slots: int) -> int:
    """Make a limit if it is missing, and return its slots."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(name).limit
        except ObjectNotFound:
            pass
        try:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        except (ObjectAlreadyExists, httpx.HTTPStatusError) as error:  # another run was faster
            log.debug("limit %s: %s", name, error)
        return client.read_global_concurrency_limit_by_name(name).limit
