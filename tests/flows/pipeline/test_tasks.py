"""What is tried again, what is not, and how a stage that is done already shows."""

import errno

import aiohttp
import botocore.exceptions
import pytest

from flows.runs.journal import StageFailedError


def task_runs(run: str) -> dict:
    """The task runs of the flow run called `run`, as the server has them."""
    import time

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    with get_client(sync_client=True) as client:
        for _ in range(100):  # task states reach the server as events, a moment later
            found = client.read_task_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[run])))
            if found and all(task_run.state.is_final() for task_run in found):
                break
            time.sleep(0.1)
        return {task_run.name: task_run for task_run in found}


def state_history(task_run_id) -> list[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [state.name for state in client.read_task_run_states(task_run_id)]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (aiohttp.ClientOSError(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), True),
        (OSError(errno.EBUSY, "slow down"), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (OSError(errno.ENOSPC, "disk full"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (FileNotFoundError("gone"), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (ValueError("bad"), False),
        (RuntimeError("bug"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, again):
    from flows.pipeline.tasks import is_infrastructure_error

    assert is_infrastructure_error(error) is again


def test_a_lost_connection_is_tried_again_after_a_pause(run_pipeline, fakes):
    fakes.failures["teacher"] = [ConnectionError("worker lost")]
    record = run_pipeline("lost-connection")
    assert fakes.attempts["teacher"] == 2
    assert fakes.at["teacher"][1] - fakes.at["teacher"][0] > 0.5, "tried again without waiting"
    assert record.stages["teacher"].state == "Completed"
    teacher = task_runs("lost-connection")["teacher"]
    assert teacher.state.name == "Completed"
    assert "AwaitingRetry" in state_history(teacher.id)


def test_a_mistake_is_not_tried_again(run_pipeline, fakes):
    fakes.failures["teacher"] = [ValueError("codebook_size = 0")] * 4
    with pytest.raises(StageFailedError, match="teacher: codebook_size = 0"):
        run_pipeline("mistake")
    assert fakes.attempts["teacher"] == 1
    assert fakes.attempts["warm_up"] == 0
    assert task_runs("mistake")["teacher"].state.name == "Failed"


def test_a_stage_that_is_done_shows_as_cached(run_pipeline, fakes):
    first = run_pipeline("first")
    made = fakes.attempts.copy()
    second = run_pipeline("second")
    assert fakes.attempts == made, "something was made again"
    assert {stage.state for stage in second.stages.values()} == {"Cached"}
    assert [stage.ref for stage in second.stages.values()] == [stage.ref for stage in first.stages.values()]
    shown = {name: task_run.state for name, task_run in task_runs("second").items()}
    assert {state.name for state in shown.values()} == {"Cached"}
    assert len(shown) == 11
    assert all(state.is_completed() for state in shown.values())


def test_the_server_knows_which_stage_needs_which(run_pipeline):
    run_pipeline("graph")
    runs = task_runs("graph")
    names = {task_run.id: name for name, task_run in runs.items()}
    needs = {name: names[needed.id] for name, needed in _inputs(runs["align"]).items()}
    assert needs == {"images": "prepare", "teacher": "teacher", "tokenizer": "warm_up"}


def _inputs(task_run) -> dict:
    return {name: found[0] for name, found in task_run.task_inputs.items() if found}
