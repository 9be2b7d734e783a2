"""Shards that another version of a dataset made already: found by what they are made of, without any listing.

`{root}/shards/{key}.json` names a finished shard. Its key is a hash of the shard it was made of and of everything else
that decides its bytes, so a new version of a dataset looks up the shards that it has in common with all earlier ones,
and lists them in its manifest as files of the folders that they lie in (`FileEntry.source`). Deleting an artifact
therefore takes shards from those made after it: what is gone is made again by the next run, never missed silently.
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
    """Where a finished shard is."""

    artifact: str = Field(description="folder of the artifact that has the file, as a key of the store")
    file: FileEntry

    @property
    def key(self) -> str:
        """The file as a key of the store."""
        return f"{self.artifact}/{self.file.path}"


@dataclass(frozen=True)
class Reuse:
    """The shards that one artifact may take from others, and leaves to them."""

    root: Store
    artifact: str
    """folder of the artifact that is being made, as a key of `root`."""
    identity: str
    """hash of all that decides a shard's bytes besides the shard it is made of."""

    def find(self, origin: FileEntry) -> FileEntry | None:
        """The entry of the shard that another artifact made of `origin`, if its file is still there."""
        record = self._read(origin)
        if record is None or record.artifact == self.artifact or not self._is_there(record):
            return None
        return record.file.model_copy(update={"source": record.key})

    def offer(self, origin: FileEntry, file: FileEntry) -> None:
        """Let others find a finished shard of this artifact; what is found already stays, unless its file is gone."""
        record = ShardRecord(artifact=self.artifact, file=file)
        key, data = self._key(origin), record.model_dump_json().encode()
        if self.root.create(key, data):
            return
        theirs = self._read(origin)
        if theirs is None or not self._is_there(theirs):
            self.root.write(key, data)

    def _key(self, origin: FileEntry) -> str:
        text = json.dumps([self.identity, origin.path, origin.sha256])
        return f"{FOLDER}/{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _read(self, origin: FileEntry) -> ShardRecord | None:
        """The record, None where there is none that can be read: it is a hint, and is made anew."""
        try:
            return ShardRecord.model_validate_json(self.root.read(self._key(origin)))
        except (FileNotFoundError, ValidationError):
            return None

    def _is_there(self, record: ShardRecord) -> bool:
        return size_of(self.root, record.key) == record.file.size
