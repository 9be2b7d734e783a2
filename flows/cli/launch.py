"""How a command runs a flow: on the Prefect server that there is, or on a temporary one, under the progress bars."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flows.cli.console import log_lines_above
from flows.prefect_server.temporary import prefect_server
from flows.runs.journal import RunRecord, StageFailedError
from flows.runs.progress import on_stderr
from infra.settings import Settings
from infra.store.store import Store


class FlowRun(NamedTuple):
    """A flow that is about to run."""

    title: str
    """the first line that is shown."""
    name: str
    """of the limit that runs of its sort share on a store."""
    store: Store
    call: Callable[[], RunRecord]
    """imports the flow and calls it: Prefect must be imported after its settings are made."""
    workers: int = 0
    gpus_per_worker: float = 0.0
    ranks: int = 1


def run_flow(run: FlowRun, settings: Settings, *, verbose: bool) -> tuple[RunRecord, str | None]:
    """The record of a run, and what stopped it; runs that died on the store are marked first.

    Raises:
        ServerError: the Prefect server does not start, or does not answer.
    """
    with on_stderr() as display, log_lines_above(display):
        display.line(run.title)
        try:
            with prefect_server(settings.home, api_url=settings.prefect_api_url, verbose=verbose) as server:
                server.wait()
                from flows.service import liveness

                liveness.mark([run.store])
                display.line(f"watch it at {server.url.removesuffix('/api')} while it lasts")
                with _alone(run, settings):
                    return run.call(), None
        except StageFailedError as error:
            return error.record, f"stage {error.stage} failed: {error.reason}"


@contextlib.contextmanager
def _alone(run: FlowRun, settings: Settings) -> Iterator[None]:
    """Wait for other runs of the name on this store, and for GPUs, where a server that lasts knows of them.

    Not on a temporary server: it is gone after a kill, and the slot that was held would stay taken in its database.
    """
    if not settings.prefect_api_url:
        yield
        return
    from flows.service import concurrency

    gpus = concurrency.gpus_of(workers=run.workers, gpus_per_worker=run.gpus_per_worker, ranks=run.ranks)
    with concurrency.held(run.name, run.store, overlap="wait", gpus=gpus):
        yield
