"""Notify of failures by the Prefect block that SFTOK_NOTIFY names, from hooks of the deployed flows.

The block holds its own secrets; the text holds none. A notification that cannot be sent is a line in the log: it never
changes how a run ends.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from pydantic import ValidationError

from flows.results.gate import GateFailedError
from flows.runs.journal import StageFailedError, one_line
from flows.runs.run_request import RunRequest
from flows.service.parameters import (
    BenchmarkParameters,
    CheckDataParameters,
    Parameters,
    PipelineParameters,
    RetokenizeParameters,
)
from infra.redaction import HIDDEN, USER_INFO
from infra.settings import Settings

MODELS: Mapping[str, type[Parameters]] = {
    "full-pipeline": PipelineParameters,
    "retokenize": RetokenizeParameters,
    "check-data": CheckDataParameters,
    "benchmark-report": BenchmarkParameters,
}
SECRET_NAMES = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY|AUTH_STRING")
SHORTEST = 6  # characters of a secret; shorter ones would be found in every word

log = logging.getLogger(__name__)


class Message(NamedTuple):
    """A notification: what failed, why, and the command that resumes it."""

    run: str
    state: str
    stage: str
    reason: str
    command: str

    @property
    def subject(self) -> str:
        """The subject, one line."""
        return without_secrets(f"sftok: {self.run} {self.state}")

    @property
    def body(self) -> str:
        """The text, a line for each field."""
        return without_secrets(
            f"run:    {self.run}\nstate:  {self.state}\nstage:  {self.stage}\nreason: {self.reason}\n"
            f"resume: {self.command}"
        )


def send(message: Message) -> bool:
    """Send a message to the block, if one is named; return whether it was sent."""
    slug = Settings().notify
    if slug is None:
        return False
    try:
        _block(slug).notify(message.body, message.subject)
    except Exception as error:
        log.warning("%s could not be told that %s: %s", slug, message.subject, without_secrets(one_line(error)))
        return False
    return True


def check_block(slug: str) -> None:
    """Refuse a block that is not there.

    Raises:
        ValueError: naming it and the remedy.
    """
    try:
        _block(slug)
    except Exception as error:
        raise ValueError(
            f"SFTOK_NOTIFY = {slug}: {one_line(error)}; make that block in Prefect (Blocks, +), or unset it"
        ) from error


def _block(slug: str) -> Any:
    from prefect.blocks import notifications  # noqa: F401  the types have to be known before one is loaded
    from prefect.blocks.core import Block

    block = Block.load(slug)
    if not hasattr(block, "notify"):
        raise ValueError(f"a block of the type {slug.partition('/')[0]} cannot send notifications")
    return block


def failed(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: a run has failed for good."""
    error = _exception(state)
    stage, reason = "run", one_line(error) if error else state.message or "it did not say why"
    if isinstance(error, StageFailedError):
        stage, reason = error.stage, error.reason
    elif isinstance(error, GateFailedError):
        stage, reason = "gate", str(error)
    send(Message(flow_run.name, "failed", stage, reason, command_of(flow.name, flow_run.parameters)))


def crashed(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: a run's process was lost."""
    reason = state.message or "its process is gone"
    send(Message(flow_run.name, "crashed", "run", reason, command_of(flow.name, flow_run.parameters)))


def command_of(flow: str, parameters: Mapping[str, Any]) -> str:
    """Return the command that resumes a flow run."""
    given, model = parameters.get("parameters"), MODELS.get(flow)
    try:
        if "request" in parameters:  # of a run that was started by hand
            return RunRequest.model_validate(parameters["request"]).command(str(parameters["run"]))
        if model is not None and given is not None:
            return (given if isinstance(given, model) else model.model_validate(given)).command()
    except ValidationError:  # of another version
        if model is not None and given is not None:
            return f"prefect deployment run {flow}/NAME"
    return "start the run again: what is done is found"


def without_secrets(text: str) -> str:
    """Remove credentials in URIs and the values of the environment's secrets from a text."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_NAMES.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text)


def _exception(state: State[Any]) -> BaseException | None:
    """Return the exception that a state stands for, while it is in this process."""
    data = getattr(state.data, "result", state.data)
    return data if isinstance(data, BaseException) else None
