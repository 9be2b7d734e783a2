"""Give classes their ids: the normal form of their names, their order, and equal names told apart."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from sftok.sources.rules import shown

_NUMBERED = re.compile(r"(.*) \(#([0-9]+)\)'*", re.DOTALL)


def class_name(name: str) -> str:
    """Normalise a class name to NFC: file systems and editors write the same letters in two ways."""
    return unicodedata.normalize("NFC", name)


def unicode_remarks(names: Iterable[str]) -> tuple[str, ...]:
    """Tell of class names, as they are written, that are not in NFC."""
    other = sorted(name for name in set(names) if class_name(name) != name)
    if not other:
        return ()
    count = f"{len(other):,} class names, such as" if len(other) > 1 else "the class name"
    are = "are" if len(other) > 1 else "is"
    return (f"{count} {shown(class_name(other[0]))} {are} written in decomposed Unicode: taken for the composed form",)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class names in the order of their ids: numbers by value if all are, else as text."""
    found = set(names)
    if all(name.isascii() and name.isdigit() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of class ids, those of equal ones told apart: crane, crane (#517).

    ImageNet has two classes called crane, and two called maillot.
    """
    taken, result = set(names), list[str]()
    seen: set[str] = set()
    for class_id, name in enumerate(names):
        chosen = name
        if name in seen:
            chosen = f"{name} (#{class_id})"
            while chosen in taken:
                chosen += "'"
            taken.add(chosen)
        seen.add(name)
        result.append(chosen)
    return tuple(result)


@functools.lru_cache(maxsize=8)
def shared_names(names: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
    """Return the names that several classes have, as `distinct` has told them apart, with the ids of these classes."""
    found: dict[str, list[int]] = {}
    for class_id, name in enumerate(names):
        if (match := _NUMBERED.fullmatch(name)) and int(match[2]) == class_id and match[1] in names:
            found.setdefault(match[1], [names.index(match[1])]).append(class_id)
    return {name: tuple(ids) for name, ids in found.items()}
