"""Reuse shards from other versions of a dataset, looked up by content hash without any listing.

`{root}/shards/{key}.json` names a finished shard. Its key is a hash of the shard it was made from and of everything
else that decides its bytes, so a new version of a dataset finds the shards that it shares with earlier ones, and lists
them in its manifest as files in those versions' folders (`FileEntry.source`). Deleting an artifact therefore removes
shards from later versions: the next run makes them again; they are never missed silently.
"""

import hashlib
import json
from dataclasses import dataclass

from pydantic import Field, ValidationError

from infra.artifacts.manifest import size_of
from infra.artifacts.shards import FileEntry
from infra.config import Config
from infra.store.store import Store

FOLDER = "shards"


class ShardRecord(Config):
    """Location of a finished shard."""

    artifact: str = Field(description="folder of the artifact that holds the file, as a key of the store")
    file: FileEntry

    @property
    def key(self) -> str:
        """Return the file's key in the store."""
        return f"{self.artifact}/{self.file.path}"


@dataclass(frozen=True)
class Reuse:
    """Index of reusable shards, as one artifact in the making sees it."""

    root: Store
    artifact: str
    """folder of the artifact that is being made, as a key of `root`."""
    identity: str
    """hash of everything that decides a shard's bytes besides the shard it is made from."""

    def find(self, origin: FileEntry) -> FileEntry | None:
        """Find the shard that another artifact made from `origin`; None unless its file still exists."""
        record = self._read(origin)
        if record is None or record.artifact == self.artifact or not self._is_there(record):
            return None
        return record.file.model_copy(update={"source": record.key})

    def offer(self, origin: FileEntry, file: FileEntry) -> None:
        """Register a finished shard of this artifact for reuse; an earlier record stays unless its file is gone."""
        record = ShardRecord(artifact=self.artifact, file=file)
        key, data = self._key(origin), record.model_dump_json().encode()
        if self.root.create(key, data):
            return
        existing = self._read(origin)
        if existing is None or not self._is_there(existing):
            self.root.write(key, data)

    def _key(self, origin: FileEntry) -> str:
        text = json.dumps([self.identity, origin.path, origin.sha256])
        return f"{FOLDER}/{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _read(self, origin: FileEntry) -> ShardRecord | None:
        """Read the record; None if it is missing or damaged, since records are hints that can be rewritten."""
        try:
            return ShardRecord.model_validate_json(self.root.read(self._key(origin)))
        except (FileNotFoundError, ValidationError):
            return None

    def _is_there(self, record: ShardRecord) -> bool:
        return size_of(self.root, record.key) == record.file.size
