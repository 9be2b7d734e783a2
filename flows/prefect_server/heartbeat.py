"""Prefect's own watch over deployed runs: one that gave a sign of life and then none is crashed.

A run is watched if it has the tag `TAG`, as all deployments have, and the server runs its services. It has to give a
sign of life every `BEAT_SECONDS`, as runs do that are started with PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30: `sftok serve`
and infra/deploy/prefect.yaml see to that.
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

# Events are named after the state's name, and ours have names of their own.
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut", "Cached", "Changed", "Skipped")


def automation(notify_block: SendNotification | None = None) -> AutomationCore:
    """Prefect's own watch: a deployed run that gave a sign of life and then none is crashed."""
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
    """Make the automation, or bring it up to date; with a block it also tells of what it did."""
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
