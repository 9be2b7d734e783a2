"""Export a run as OpenLineage events, one per stage that ended, with its inputs and outputs.

OpenLineage is a JSON format that data catalogues read (openlineage.io, spec 2-0-2). Datasets are the store's artifacts:
their namespace is the store, their name kind/digest, which stays the same in copies.
"""

import uuid
from datetime import datetime, timedelta

from pydantic import JsonValue

from flows.runs.history import PastRun, records
from infra.artifacts.manifest import ArtifactRef, Manifest, manifest_of
from infra.store.store import Store

SPEC = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
FACETS = "https://openlineage.io/spec/facets/1-0-0"
PRODUCER = "urn:sftok-pipeline"
NAMESPACE = uuid.UUID("6f1d4c5e-2f0b-5d0e-9d4e-5c6d7e8f9a0b")  # of our run ids: the same run has the same id
ENDED = {"Completed": "COMPLETE", "Cached": "COMPLETE", "Failed": "FAIL", "Cancelled": "ABORT", "Crashed": "FAIL"}


def events(run: str, *, store: str | None) -> list[dict[str, JsonValue]]:
    """Return the events of a run, in the order of its stages.

    Raises:
        ValueError: there is no such run, or its record or a manifest is damaged.
    """
    place = Store.usual(store)
    (record,) = records(place, [run])
    parent = _run_id(record.run)
    listed: list[dict[str, JsonValue]] = []
    at = datetime.fromisoformat(record.started_at)
    for name, stage in record.stages.items():
        at += timedelta(seconds=stage.seconds)
        if stage.state not in ENDED:
            continue
        manifest = manifest_of(place, stage.ref) if stage.ref else None
        listed.append(
            {
                "eventType": ENDED[stage.state],
                "eventTime": at.isoformat(),
                "producer": PRODUCER,
                "schemaURL": SPEC,
                "run": {"runId": _run_id(record.run, name), "facets": {"parent": _parent(record, parent, place)}},
                "job": {"namespace": place.uri, "name": f"{record.recipe.name}.{name}", "facets": {}},
                "inputs": [_dataset(place, ref) for ref in (manifest.inputs.values() if manifest else ())],
                "outputs": [_output(place, stage.ref, manifest)] if stage.ref and manifest else [],
            }
        )
    return listed


def _run_id(*parts: str) -> str:
    return str(uuid.uuid5(NAMESPACE, "/".join(parts)))


def _parent(record: PastRun, run_id: str, store: Store) -> JsonValue:
    return {
        "_producer": PRODUCER,
        "_schemaURL": f"{FACETS}/ParentRunFacet.json",
        "run": {"runId": run_id},
        "job": {"namespace": store.uri, "name": record.recipe.name},
    }


def _dataset(store: Store, ref: ArtifactRef) -> dict[str, JsonValue]:
    return {"namespace": store.uri, "name": str(ref), "facets": {"version": _version(ref.content_id)}}


def _output(store: Store, ref: ArtifactRef, manifest: Manifest) -> JsonValue:
    rows = [entry.rows for entry in manifest.files if entry.rows is not None] + [page.rows for page in manifest.pages]
    size: dict[str, JsonValue] = {
        "_producer": PRODUCER,
        "_schemaURL": f"{FACETS}/OutputStatisticsOutputDatasetFacet.json",
        "size": manifest.num_bytes,
        "fileCount": manifest.num_files,
        **({"rowCount": sum(rows)} if rows else {}),
    }
    return {**_dataset(store, ref), "outputFacets": {"outputStatistics": size}}


def _version(version: str) -> JsonValue:
    return {
        "_producer": PRODUCER,
        "_schemaURL": f"{FACETS}/DatasetVersionDatasetFacet.json",
        "datasetVersion": version,
    }
