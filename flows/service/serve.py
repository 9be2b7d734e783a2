"""Run `sftok serve`: a server with all its services, the deployments, and a process that executes them."""

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flows.prefect_server.permanent import permanent_server
from flows.prefect_server.temporary import LOOPBACK
from flows.recipes.files import load_recipe
from flows.requests.checks import check_home, check_ranks, check_request, check_weights
from flows.service.parameters import ServeOptions
from flows.service.schedules import PlannedDeployment, check_cron, plan
from infra.settings import Settings
from infra.store.store import Store

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def check_options(options: ServeOptions, *, contact: bool) -> None:
    """Refuse what no scheduled run could do; with `contact` also try store, data, servers and notifications' block.

    Raises:
        ValueError: one line that names the option or the setting, and the remedy.
    """
    for option in ("pipeline_cron", "check_cron", "report_cron"):
        check_cron(f"--{option.replace('_', '-')}", getattr(options, option), options.timezone)
    settings = Settings()
    check_home(settings.home)
    names = []
    for name in options.recipes:
        recipe = load_recipe(name, overrides=options.overrides, seed=options.seed)
        names.append(recipe.name)
        check_weights(recipe)
        check_ranks(recipe, options.ranks)
        if contact:
            check_request(options.arguments(name))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--recipe: two of them are called {twice[0]}; give one of them another name in its file")


def deployment_of(planned: PlannedDeployment, options: ServeOptions) -> "RunnerDeployment":
    """Make Prefect's deployment: at most one run of it at a time; the next one waits, or is cancelled."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.prefect_server.heartbeat import TAG

    wait = options.overlap == "wait"
    made = planned.flow.to_deployment(
        planned.name,
        schedules=[Cron(planned.cron, timezone=options.timezone)] if planned.cron else [],
        paused=False,
        parameters={"parameters": planned.parameters.as_json()},
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1,
            collision_strategy=ConcurrencyLimitStrategy.ENQUEUE if wait else ConcurrencyLimitStrategy.CANCEL_NEW,
        ),
        tags=[TAG],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # it is a coroutine in async code only
    return made


def as_json(planned: Sequence[PlannedDeployment], options: ServeOptions) -> dict[str, Any]:
    """Return what would be registered, as plain values."""
    from flows.prefect_server.heartbeat import AUTOMATION, WITHIN_SECONDS

    settings = Settings()
    shown = [
        {
            "deployment": one.full_name,
            "cron": one.cron,
            "timezone": options.timezone if one.cron else None,
            "parameters": one.parameters.as_json(),
            "overlap": options.overlap,
            "command": one.parameters.command(),
        }
        for one in planned
    ]
    return {
        "server": settings.prefect_api_url or f"http://{LOOPBACK}:{options.port}/api",
        "starts_server": settings.prefect_api_url is None,
        "deployments": shown,
        "automation": {"name": AUTOMATION, "within_seconds": WITHIN_SECONDS},
        "gpus": options.gpus,
        "notify": settings.notify,
    }


def serve(options: ServeOptions, *, say: Callable[[str], None], verbose: bool = False) -> None:
    """Serve until a signal ends it: then runs under way are cancelled, schedules paused, and the server stopped.

    Raises:
        ValueError: the port is taken, or the notifications' block is not there.
        ServerError: the server does not start.
    """
    settings = Settings()
    with permanent_server(
        settings.home, port=options.port, api_url=settings.prefect_api_url, verbose=verbose
    ) as server:
        server.wait()
        from flows.prefect_server import heartbeat
        from flows.service import concurrency, liveness, notify

        if settings.notify:
            notify.check_block(settings.notify)
        heartbeat.ensure_automation(settings.notify)
        if options.gpus:
            concurrency.set_gpus(options.gpus)
        planned = plan(options)
        deployments = [deployment_of(one, options) for one in planned]
        marked = liveness.mark([Store.usual(options.store)])
        for name in sorted({*marked.records, *marked.flow_runs}):
            say(f"run {name} had crashed; what it has done is found by the next one")
        lines = [
            f"{one.full_name}: {one.cron or 'on demand'}{f' ({options.timezone})' * bool(one.cron)}" for one in planned
        ]
        lines.append(f"serving at {server.url.removesuffix('/api')}; elsewhere: export PREFECT_API_URL={server.url}")
        asyncio.run(_execute(deployments, ready=lambda: say("\n".join(lines))))


async def _execute(deployments: Sequence["RunnerDeployment"], *, ready: Callable[[], None]) -> None:
    """Register the deployments and execute their runs, each in a process of its own, until SIGTERM or SIGINT.

    Prefect's own handler leaves the runs under way to chance: here they are cancelled, and end before this returns.
    """
    from prefect.runner import Runner

    class Stoppable(Runner):
        def handle_sigterm(self, *_: Any, **__: Any) -> None:
            loop.call_soon_threadsafe(stopping.set)

    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    runner = Stoppable(pause_on_shutdown=True)
    for deployment in deployments:
        await runner.aadd_deployment(deployment)
    ready()
    running = asyncio.create_task(runner.start())
    signalled = asyncio.create_task(stopping.wait())
    signal.signal(signal.SIGINT, runner.handle_sigterm)
    await asyncio.wait({running, signalled}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        await runner.astop()
    signalled.cancel()
    await running
