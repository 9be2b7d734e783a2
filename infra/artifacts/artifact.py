"""A published artifact as an object: its manifest is read, and its signature verified, when it is loaded.

The functions of `infra.artifacts.manifest` publish artifacts and find them; `Artifact` is what readers hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from infra.artifacts.manifest import (
    ArtifactPlan,
    ArtifactRef,
    Manifest,
    files_of,
    find,
    folder_of,
    key_of,
    manifest_of,
    ref_of,
    shards_of,
)
from infra.artifacts.shards import FileEntry, split_of
from infra.store.store import Store


@dataclass(frozen=True)
class Artifact:
    """A handle on one published artifact; its files are read only when they are asked for."""

    store: Store
    manifest: Manifest

    @classmethod
    def load(cls, store: Store, ref: ArtifactRef) -> Self:
        """Load the artifact that a reference names.

        Raises:
            ValueError: it is not in this store, or its manifest is damaged or rejected.
        """
        return cls(store, manifest_of(store, ref))

    @classmethod
    def find(cls, store: Store, plan: ArtifactPlan) -> Self | None:
        """Load the artifact that a plan makes; None if it is not finished.

        Raises:
            ValueError: its manifest is damaged or rejected.
        """
        manifest = find(store, plan)
        return None if manifest is None else cls(store, manifest)

    @property
    def ref(self) -> ArtifactRef:
        """The reference by which other artifacts name this one as their input."""
        return ref_of(self.store, self.manifest)

    @property
    def folder(self) -> Store:
        """The artifact's own folder; shards that it shares with an earlier version lie elsewhere."""
        return folder_of(self.store, self.manifest.kind, self.manifest.digest)

    @property
    def uri(self) -> str:
        """The folder's URI."""
        return self.folder.uri

    @property
    def inputs(self) -> Mapping[str, ArtifactRef]:
        """References to the artifacts that it was made of."""
        return self.manifest.inputs

    def __str__(self) -> str:
        return f"{self.manifest.kind}/{self.manifest.digest}"

    def input(self, name: str) -> "Artifact":
        """Load the artifact that this one was made of as `name`.

        Raises:
            ValueError: it is not in this store, or its manifest is damaged or rejected.
        """
        return Artifact.load(self.store, self.inputs[name])

    def files(self) -> Iterator[FileEntry]:
        """Yield the entries of all files; those in pages are read a few pages at a time."""
        return files_of(self.store, self.manifest)

    def shards(self, split: str | None = None) -> Sequence[FileEntry]:
        """Return the entries of all shards, read from pages when they are asked for, or of one split's as a list."""
        if split is None:
            return shards_of(self.store, self.manifest)
        return [entry for entry in self.files() if split_of(entry.path) == split]

    def rows(self, split: str) -> dict[str, int]:
        """Return the number of rows of each shard of a split, by the shard's key in the store."""
        return {self.key(entry): entry.rows or 0 for entry in self.shards(split)}

    def keys(self, split: str) -> list[str]:
        """Return the keys in the store of a split's shards."""
        return list(self.rows(split))

    def key(self, entry: FileEntry) -> str:
        """Return a file's key in the store: below the artifact's own folder, or that of the version it came from."""
        return key_of(self.manifest, entry)

    def read(self, entry: FileEntry) -> bytes:
        """Read a file; its hash is not verified.

        Raises:
            ValueError: the file is missing.
        """
        try:
            return self.store.read(self.key(entry))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.store.uri}/{self.key(entry)} is missing; delete {self.uri} and run again"
            ) from error
