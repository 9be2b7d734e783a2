"""Patterns of file names: `train-{000..999}.tar`, `*.tar`, `part-?.parquet`, on disk and on S3.

What exists under a name always wins over the pattern that the name may also be.
"""

import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from infra.store.location import parse_location
from infra.store.types import FileInfo
from sftok.sources.files import Files, open_files
from sftok.sources.listing import POSSIBLE
from sftok.sources.rules import shown

_WILD = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
MOST_NAMES = 1_000_000  # of one pattern


def is_pattern(uri: str) -> bool:
    """Return whether a name has characters of patterns; a file may be called so, too."""
    return "{" in uri or _WILD.search(uri) is not None


def find_files(uri: str) -> tuple[str, list[FileInfo]]:
    """List the files that a name or pattern stands for, and return the folder that their keys are relative to.

    Raises:
        ValueError: a name does not exist, or nothing matches.
    """
    files, rest = _literal_part(parse_location(uri, "source", POSSIBLE).uri)
    listing = functools.cache(functools.partial(_listing, files))
    if rest in listing(""):
        return files.uri, [listing("")[rest]]
    if "**" in rest:
        raise ValueError(f"source {uri!r}: ** is not read: name the folder, which is read at any depth")
    wanted, found, missing = expand(rest, uri), dict[str, FileInfo](), list[str]()
    for name in wanted:
        matched = {item.key: item for item in _matching(files, "", name.split("/"), listing)}
        if not matched:
            missing.append(name)
        found |= matched
    if missing:
        is_wild = _WILD.search(missing[0])
        problem = f"matches no file in {files.uri}" if is_wild else "does not exist"
        count = f" ({len(missing)} of {len(wanted)} files)" if len(wanted) > 1 or not is_wild else ""
        raise ValueError(f"source {uri!r}: {shown(missing[0])} {problem}{count}: correct the name")
    return files.uri, list(found.values())


def expand(pattern: str, uri: str = "") -> list[str]:
    """Expand {00..12} and {a,b} in a pattern to all names, as a shell does.

    Args:
        pattern: the pattern, or the part of it that names no existing folder.
        uri: the whole pattern, for messages.

    Raises:
        ValueError: braces hold neither a range nor a list, or there are too many names.
    """
    parts: list[Sequence[str]] = []
    for position, text in enumerate(_BRACES.split(pattern)):
        if position % 2 == 0:
            parts.append([text])
        elif match := _RANGE.fullmatch(text):
            width, numbers = len(match[1]), range(int(match[1]), int(match[2]) + 1)
            if len(numbers) > MOST_NAMES:
                count = len(numbers)
                raise ValueError(f"source {uri or pattern!r}: {{{text}}} stands for {count} files; give a narrower one")
            parts.append([f"{number:0{width}d}" for number in numbers])
        else:
            parts.append(text.split(",") if "," in text else [])
        if not parts[-1]:
            raise ValueError(
                f"source {uri or pattern!r}: {{{text}}} is no range such as {{00000..00009}} or list {{a,b}}"
            )
    return ["".join(name) for name in itertools.product(*parts)]


def _literal_part(place: str) -> tuple[Files, str]:
    """Open the folder that a pattern begins with, and return the rest; an existing folder may be named like one."""
    *folders, _ = parts = place.split("/")
    depth = 3 if place.startswith("s3://") else 1  # s3:, an empty part and the bucket; or what is before the root's /
    while depth < len(folders) and (not is_pattern(parts[depth]) or open_files("/".join(parts[: depth + 1])).exists()):
        depth += 1
    return open_files("/".join(parts[:depth]) or "/"), "/".join(parts[depth:])


def _listing(files: Files, folder: str) -> dict[str, FileInfo]:
    try:
        return {item.name: item for item in sorted(files.scan(folder))}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _matching(
    files: Files, folder: str, parts: Sequence[str], listing: Callable[[str], dict[str, FileInfo]]
) -> Iterator[FileInfo]:
    """Yield the files below a folder that match the parts of a pattern; of a matching folder, all that is in it."""
    items, (first, *rest) = listing(folder), parts
    if _WILD.search(first):
        found = [item for name, item in items.items() if fnmatch.fnmatchcase(name, first) and _is_shown(name, first)]
    else:
        found = [items[first]] if first in items else []
    for item in found:
        if not item.is_folder:
            yield from () if rest else (item,)
        elif rest:
            yield from _matching(files, item.key, rest, listing)
        else:
            yield from files.walk(item.key)


def _is_shown(name: str, pattern: str) -> bool:
    return not name.startswith(".") or pattern.startswith(".")
