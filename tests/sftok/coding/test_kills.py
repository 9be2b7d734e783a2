"""Kills of encoding workers, while a shard is open or before a group is marked: the undisturbed run's bytes."""

import functools
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from infra.artifacts.manifest import Manifest
from infra.artifacts.shards import FileEntry
from infra.compute.workers import map_shards
from infra.store.store import Store
from sftok.coding.encode import CodeShard, EncodeJob, ShardEncoder, encode
from sftok.coding.groups import GroupEncoder
from tests.sftok.coding.test_encode import (
    HERE,
    TWO,
    assert_whole,
    copied,
    hashes,
    home,
    job_of,
    ray,
    reference,
    rows_of,
)
from tests.sftok.coding.test_groups import SIZE, assert_groups

__all__ = ["copied", "home", "ray", "reference"]  # fixtures

KILLS_A_SHARD = 2  # a worker that dies four times with one shard is given up


class DoomedEncoder(ShardEncoder):
    """Dies by kill -9 at a moment of a shard that the seed draws, as long as there are deaths left."""

    def __init__(self, job: EncodeJob, folder: str, kills: int, seed: int) -> None:
        super().__init__(job)
        self.folder, self.kills, self.seed = Path(folder), kills, seed
        self.inner, self.encoder = self.encoder, self._batch  # type: ignore[assignment]
        self.open, self.batches, self.moment = "", 0, -1
        Store.create = self._create(Store.create)  # type: ignore[method-assign]

    def __call__(self, images: FileEntry) -> CodeShard:
        """Encode a shard, or die on the way."""
        deaths = self._log().count(images.path)
        draw = random.Random(f"{self.seed} {images.path} {deaths}")
        # Before one of the first batches, or (0) after the data and before the sidecar that makes them count.
        self.moment = draw.randrange(0, 4) if deaths < KILLS_A_SHARD else -1
        self.open, self.batches = images.path, 0
        return super().__call__(images)

    def _batch(self, *arguments: object) -> torch.Tensor:
        self.batches += 1
        if self.batches == self.moment:
            self._die()
        return self.inner(*arguments)  # type: ignore[arg-type]

    def _create(self, create):  # type: ignore[no-untyped-def]
        def doomed(store: Store, key: str, data: bytes) -> bool:
            if self.moment == 0 and key == f"{self.open}.json":
                self._die()
            return create(store, key, data)

        return doomed

    def _die(self) -> None:
        """Take one of the deaths that are left, note the shard that is open, and go."""
        for number in range(self.kills):
            try:
                os.close(os.open(self.folder / f"death-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            with (self.folder / "log").open("a") as log:
                log.write(f"{self.open}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def _log(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []


def survive(store: Store, images: Manifest, folder: Path, kills: int, seed: int) -> tuple[dict[str, str], list[str]]:
    """Hashes of the shards after `kills` deaths of two workers, and the shards that were open at each."""
    folder.mkdir()
    shards = [entry for entry in images.files if entry.path != "rejects.parquet"]
    make = functools.partial(DoomedEncoder, job_of(store, images), str(folder), kills, seed)
    done = map_shards(make, shards, options=TWO)
    return hashes([shard.file for shard in done]), (folder / "log").read_text().splitlines()


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("kills", "rounds"), [(5, 1), pytest.param(10, 10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_random_kills_lose_nothing(kills, rounds, copied, reference, tmp_path, record_property) -> None:
    survived, lost = 0, 0
    for seed in range(rounds):
        store, images = copied(f"store-{seed}")
        made, deaths = survive(store, images, tmp_path / f"deaths-{seed}", kills, seed)
        assert made == reference
        assert len(deaths) == kills
        assert set(deaths) <= set(reference), "a kill while no shard was open"
        again = encode(job_of(store, images), images, options=HERE)
        assert_whole(store, images, again)
        survived, lost = survived + len(deaths), lost + rows_of(images) - again.counts["rows"]
    record_property("kills survived", survived)
    print(f"kills survived: {survived}, rows lost: {lost}")  # noqa: T201
    assert lost == 0


class DyingEncoder(GroupEncoder):
    """Dies by kill -9 before a group is marked, once for each group."""

    def __init__(self, job: EncodeJob, folder: str) -> None:
        super().__init__(job)
        self.folder = Path(folder)
        Store.create = self._create(Store.create)  # type: ignore[method-assign]

    def _create(self, create):  # type: ignore[no-untyped-def]
        def dying(store: Store, key: str, data: bytes) -> bool:
            mark = self.folder / key.replace("/", "-")
            if key.startswith("groups/") and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return create(store, key, data)

        return dying


@pytest.mark.usefixtures("ray")
def test_kill_9_before_a_group_is_marked_changes_nothing(copied, reference, tmp_path, monkeypatch) -> None:
    store, images = copied()
    (tmp_path / "deaths").mkdir()
    dying = functools.partial(DyingEncoder, folder=str(tmp_path / "deaths"))
    monkeypatch.setattr("sftok.coding.encode.GroupEncoder", dying)
    made = encode(job_of(store, images), images, options=TWO, group=SIZE)
    assert len(list((tmp_path / "deaths").iterdir())) == 3
    assert_groups(store, images, made, reference)
    monkeypatch.undo()
    assert encode(job_of(store, images), images, options=HERE, group=SIZE) == made
