"""Run a request's flow from the command line: on the Prefect server that is named, or on a temporary one."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.cli.console import log_lines_above
from flows.cli.exits import MAX_ERROR, one_line, raise_if_stopped, server_failures
from flows.prefect_server.temporary import prefect_server
from flows.runs.journal import RunRecord, StageFailedError, new_run_id
from flows.runs.progress import on_stderr
from flows.runs.run_request import RunRequest
from infra.settings import Settings
from infra.store.store import Store

if TYPE_CHECKING:
    from prefect import Flow

MAX_COMMAND = 250  # characters of a command at the end of an error


def launch(request: RunRequest, *, verbose: bool) -> tuple[RunRecord, str | None]:
    """Run a request under the progress bars; return its record, and what stopped it with the command that resumes it.

    Runs that died on the store are marked first.
    """
    settings, run = Settings(), new_run_id(request.recipe.name)
    with server_failures(), on_stderr() as display, log_lines_above(display):
        display.line(_title(request, run))
        try:
            with prefect_server(settings.home, api_url=settings.prefect_api_url, verbose=verbose) as server:
                server.wait()
                from flows.service import liveness

                liveness.mark([Store(request.store)])
                display.line(f"watch it at {server.url.removesuffix('/api')} while it lasts")
                with _alone(request, settings):
                    return _flow_of(request)(request, run), None
        except StageFailedError as error:
            raise_if_stopped(error)
            command = request.command(run)
            resume_with = command if len(command) <= MAX_COMMAND else request.rerun_command(run)
            resume = f"; once that is mended, resume with: {resume_with}"
            stopped = one_line(f"stage {error.stage} failed: {error.reason}", MAX_ERROR - len(resume))
            return error.record, stopped + resume


def _flow_of(request: RunRequest) -> "Flow[[RunRequest, str], RunRecord]":
    """Return the flow that runs a request; Prefect must be imported after its settings are made."""
    if request.ablation is not None:
        from flows.ablation.flow import ablation

        return ablation
    from flows.pipeline.full import BY_LAST_STAGE

    return BY_LAST_STAGE[request.last]


def _title(request: RunRequest, run: str) -> str:
    made_of = "".join(f", {ref}" for ref in request.given.values() if str(ref) != request.source)
    plan = request.ablation
    arms = f", {len(plan.arms)} arms, seeds {', '.join(map(str, plan.seeds))}" if plan else ""
    what = f"recipe {request.recipe.name}{made_of}{arms} on {request.source}"
    return f"run {run}: {what}, {request.device}, store {request.store}"


@contextlib.contextmanager
def _alone(request: RunRequest, settings: Settings) -> Iterator[None]:
    """Wait for other runs of the sort on this store, and for GPUs, where a server that lasts knows of them.

    Not on a temporary server: it is gone after a kill, and the slot that was held would stay taken in its database.
    """
    if not settings.prefect_api_url:
        yield
        return
    from flows.service import concurrency

    with concurrency.held(request.limit, Store(request.store), overlap="wait", gpus=request.gpus):
        yield
