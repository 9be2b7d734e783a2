"""A Prefect automation that marks deployed runs as crashed when their heartbeats stop.

It covers runs with the tag `TAG`, as all deployments have, if the server runs its services. Runs must send a heartbeat
every `BEAT_SECONDS`, which PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 makes them do: `sftok serve` and
infra/deploy/prefect.yaml set it.
"""

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

TAG = "sftok"
AUTOMATION = "sftok-heartbeat"
BEAT = "prefect.flow-run.heartbeat"
BEAT_SECONDS, WITHIN_SECONDS = 30, 120

# Events are named after the name of a state, and some states are ours.
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut", "Cached", "Changed", "Skipped")


def automation(notify_block: SendNotification | None = None) -> AutomationCore:
    """Build the automation: a deployed run whose heartbeats stop is marked as crashed."""
    ends = {f"prefect.flow-run.{name}" for name in ENDS}
    change = ChangeFlowRunState(
        state=StateType.CRASHED,
        name="Crashed",
        message=f"no sign of life for {WITHIN_SECONDS} s: its process is gone",
    )
    return AutomationCore(
        name=AUTOMATION,
        description="Crashes deployed runs whose process is gone. Made by `sftok serve`.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={BEAT},
            expect={BEAT, *ends},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=WITHIN_SECONDS),
        ),
        actions=[change, *([notify_block] if notify_block else [])],
    )


def ensure_automation(block: str | None) -> None:
    """Create or update the automation; with a notification block it also notifies."""
    with get_client(sync_client=True) as client:
        wanted = automation(_notification(client, block) if block else None)
        found = client.read_automations_by_name(AUTOMATION)
        if found:
            client.update_automation(found[0].id, wanted)
        else:
            client.create_automation(wanted)


def _notification(client: SyncPrefectClient, block: str) -> SendNotification:
    kind, _, name = block.partition("/")
    document = client.read_block_document_by_name(name, kind)
    return SendNotification(
        block_document_id=document.id,
        subject="sftok: {{ flow_run.name }} crashed",
        body="run:    {{ flow_run.name }}\nstate:  crashed\nreason: its process gave no sign of life\n"
        "resume: prefect deployment run '{{ flow.name }}/{{ deployment.name }}'",
    )
