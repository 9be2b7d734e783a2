"""Pages of a manifest: the entries of many shards, kept in files beside it so that the manifest itself stays small.

A page is a file of the artifact, named by its content: equal entries give the same file, and the manifest, which holds
the page's SHA-256, vouches for every entry in it.
"""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import overload

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from infra.artifacts.shards import FileEntry
from infra.config import Config
from infra.store.store import Store

FOLDER = "files"
PAGE_ENTRIES = 10_000  # 1.7 MB, read in 0.02 s
READ_AHEAD = 16  # pages

_ENTRIES = TypeAdapter(tuple[FileEntry, ...])


class Page(Config):
    """Reference to a page of a manifest, with sums over its entries."""

    path: str = Field(pattern=rf"^{FOLDER}/[0-9a-f]{{64}}\.json$", description="relative to the artifact's folder")
    size: NonNegativeInt = Field(description="size of the page itself in bytes")
    entries: PositiveInt = Field(description="number of files that it lists")
    bytes: NonNegativeInt = Field(description="total size of the files that it lists")
    rows: NonNegativeInt = Field(description="total rows of the files that it lists")

    @property
    def sha256(self) -> str:
        """Return the hash of the page's bytes, which is part of its name."""
        return self.path.removeprefix(f"{FOLDER}/").removesuffix(".json")


def write_page(folder: Store, entries: Sequence[FileEntry]) -> Page:
    """Write the entries of shards as a page."""
    data = _ENTRIES.dump_json(tuple(entries))
    page = Page(
        path=f"{FOLDER}/{hashlib.sha256(data).hexdigest()}.json",
        size=len(data),
        entries=len(entries),
        bytes=sum(entry.size for entry in entries),
        rows=sum(entry.rows or 0 for entry in entries),
    )
    folder.write(page.path, data)
    return page


def write_pages(folder: Store, entries: Sequence[FileEntry]) -> tuple[Page, ...]:
    """Write entries as pages of at most `PAGE_ENTRIES`."""
    starts = range(0, len(entries), PAGE_ENTRIES)
    return tuple(write_page(folder, entries[start : start + PAGE_ENTRIES]) for start in starts)


def read_page(folder: Store, page: Page) -> tuple[FileEntry, ...]:
    """Read the entries of a page.

    Raises:
        ValueError: the page is missing or does not match the manifest.
    """
    try:
        data = folder.read(page.path)
    except FileNotFoundError as error:
        raise ValueError(f"{folder.uri}/{page.path} is missing; delete the folder and run again") from error
    if hashlib.sha256(data).hexdigest() != page.sha256:
        raise ValueError(f"{folder.uri}/{page.path} does not match its name's hash; delete the folder and run again")
    try:
        entries = _ENTRIES.validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ValueError(f"{folder.uri}/{page.path}: {problem}; delete the folder and run again") from error
    if len(entries) != page.entries:
        counted = f"lists {len(entries)} files, the manifest says {page.entries}"
        raise ValueError(f"{folder.uri}/{page.path} {counted}; delete the folder and run again")
    return entries


class PagedEntries(Sequence[FileEntry]):
    """The entries of all pages as one sequence, with one page in memory, or a few during iteration."""

    def __init__(self, folder: Store, pages: Sequence[Page]) -> None:
        self.folder, self.pages = folder, pages
        self._ends = list(itertools.accumulate(page.entries for page in pages))
        self._held: tuple[int, tuple[FileEntry, ...]] = (-1, ())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> FileEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[FileEntry]: ...
    def __getitem__(self, index: int | slice) -> FileEntry | list[FileEntry]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        number = bisect.bisect_right(self._ends, at)
        if self._held[0] != number:
            self._held = number, read_page(self.folder, self.pages[number])
        return self._held[1][at - self._ends[number]]  # counted from the page's end

    def __iter__(self) -> Iterator[FileEntry]:
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for start in range(0, len(self.pages), READ_AHEAD):
                some = self.pages[start : start + READ_AHEAD]
                for entries in pool.map(lambda page: read_page(self.folder, page), some):
                    yield from entries
