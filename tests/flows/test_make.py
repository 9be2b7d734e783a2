"""`make`: what is there is found; what is not is made, resumed after a kill, and published complete or not at all."""

from collections.abc import Callable

import pytest

from flows.make import find_or_publish, make
from flows.recipes.files import load_recipe
from flows.stage import Result, Stage, StageJob, Work
from infra.artifacts.artifact import Artifact
from infra.artifacts.manifest import MANIFEST, ArtifactPlan, Manifest
from infra.artifacts.shards import FileEntry, put, shard_name, write_shard
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from infra.training.checkpoint import CHECKPOINTS, Checkpoints

PLAN = ArtifactPlan(kind="things", version=1, config={})


class Steps:
    """A stage's call: four steps with a checkpoint of each, killed where it is told to."""

    def __init__(self, kill_at: int | None = None, error: BaseException | None = None) -> None:
        self.kill_at, self.error = kill_at, error or KeyboardInterrupt()
        self.done: list[int] = []

    def __call__(self, work: Work) -> Result:
        checkpoints = Checkpoints(work.out.at(CHECKPOINTS))
        last = checkpoints.load_into({})
        for step in range(last.step + 1 if last else 0, 4):
            if step == self.kill_at:
                raise self.error
            checkpoints.save(step, {}, {})
            checkpoints.wait()
            self.done.append(step)
            work.progress(step + 1, 4, {})
        return Result([put(work.out, "steps.txt", b"0123")], {"steps": 4}, {"loss": 0.5})


def stage_of(call: Callable[[Work], Result], **changes: object) -> Stage:
    return Stage("train", "things", 1, lambda job: {"seed": job.recipe.seed}, call)._replace(**changes)


@pytest.fixture
def job(store: Store) -> StageJob:
    return StageJob(load_recipe("digits"), store, "sklearn:digits", WorkerOptions())


def test_what_is_there_is_found_and_not_made_again(job: StageJob) -> None:
    first = Steps()
    made, state = make(stage_of(first), job, {})
    assert (state, first.done) == ("Completed", [0, 1, 2, 3])
    assert made.manifest.counts == {"steps": 4}
    assert made.manifest.metrics == {"loss": 0.5}
    assert not made.folder.list(CHECKPOINTS), "nothing will resume a stage that is done"
    second = Steps()
    assert make(stage_of(second), job, {}) == (made, "Cached")
    assert second.done == []


def test_another_plan_is_another_artifact(job: StageJob) -> None:
    made, _ = make(stage_of(Steps()), job, {})
    other = job._replace(recipe=job.recipe.model_copy(update={"seed": 7}))
    steps = Steps()
    assert make(stage_of(steps), other, {})[0].ref != made.ref
    assert make(stage_of(steps), job, {"things": made.ref})[0].input("things") == made
    assert steps.done == [0, 1, 2, 3] * 2


def test_what_was_interrupted_is_resumed(job: StageJob) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stage_of(Steps(kill_at=2)), job, {})
    assert not [name for name in job.store.list() if name.endswith(MANIFEST)]
    rest = Steps()
    made, state = make(stage_of(rest), job, {})
    assert (state, rest.done) == ("Completed", [2, 3])
    assert not made.folder.list(CHECKPOINTS)


def test_shards_that_are_done_are_kept(job: StageJob) -> None:
    """An interrupted stage of shards makes only those that are missing."""
    names = [shard_name("train", i, 3) for i in range(3)]

    def shards(count: int) -> Callable[[Work], Result]:
        def call(work: Work) -> Result:
            files = [write_shard(work.out, name, name.encode(), 1) for name in names[:count]]
            if count < 3:
                raise ConnectionError("worker lost")
            return Result(files, {}, {})

        return call

    with pytest.raises(ConnectionError):
        make(stage_of(shards(2)), job, {})
    before = {path: path.stat().st_mtime_ns for path in job.store.path.rglob("*.parquet")}
    assert len(before) == 2
    made, _ = make(stage_of(shards(3)), job, {})
    assert [entry.path for entry in made.shards("train")] == names
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("error", [ValueError("bad"), ConnectionError("lost"), KeyboardInterrupt()])
def test_what_fails_is_not_published(job: StageJob, error: BaseException) -> None:
    with pytest.raises(type(error)):
        make(stage_of(Steps(kill_at=0, error=error)), job, {})
    assert job.store.list() == []


def test_files_that_were_not_written_are_not_published(store: Store) -> None:
    missing = FileEntry(path="x.txt", size=1, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"not written: x\.txt"):
        find_or_publish(store, PLAN, lambda _: Result([missing], {}, {}))
    assert Artifact.find(store, PLAN) is None


def test_what_is_made_or_found_is_accepted_or_refused(job: StageJob) -> None:
    asked: list[str] = []

    def accept(_: StageJob, manifest: Manifest) -> None:
        asked.append(manifest.digest)
        if len(asked) > 2:
            raise ValueError("made under other conditions")

    stage = stage_of(Steps(), accept=accept)
    made, _ = make(stage, job, {})
    assert asked == [made.manifest.digest], "what was made just now may not be what the job must have either"
    assert make(stage, job, {})[1] == "Cached"
    with pytest.raises(ValueError, match="other conditions"):
        make(stage, job, {})
    assert asked == [made.manifest.digest] * 3


def test_trained_stages_note_their_device(job: StageJob) -> None:
    made, _ = make(stage_of(Steps(), is_trained=True), job, {})
    (facts,) = made.manifest.made_on
    assert facts["kind"].startswith("cpu ")
    other = job._replace(recipe=job.recipe.model_copy(update={"seed": 2}))
    assert make(stage_of(Steps()), other, {})[0].manifest.made_on == ()


def test_an_input_is_loaded_once(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the manifest and its signature being read at every question to an input."""
    first, _ = make(stage_of(Steps()), job, {})
    read, manifests = Store.read, []

    def counting(store: Store, key: str) -> bytes:
        manifests.extend([store.uri] if key.endswith(MANIFEST) else [])
        return read(store, key)

    def call(work: Work) -> Result:
        manifests.clear()
        for _ in range(3):
            assert work.input("things") == first
            assert work.input("things").rows("train") == {}
        assert manifests == [first.uri]
        assert work.ref("things") == first.ref
        return Result([], {}, {})

    monkeypatch.setattr(Store, "read", counting)
    assert make(stage_of(call), job, {"things": first.ref})[1] == "Completed"
