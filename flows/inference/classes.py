"""Parse classes as users write them: names, ids, ranges of ids."""

import difflib
import re
import unicodedata
from collections.abc import Sequence

_IDS = re.compile(r"(#?)([0-9]+)(?:-#?([0-9]+))?")


def chosen_classes(texts: Sequence[str], names: Sequence[str], generator: str) -> tuple[int, ...] | None:
    """Return the ids of the given classes, sorted and unique; None for all.

    `#10` is an id, `10` an id or a name: if it could be either, and they are two classes, neither is taken.

    Raises:
        ValueError: there is no such class, a number or a name is ambiguous, or the generator has no classes.
    """
    if not texts:
        return None
    if not names:
        raise ValueError(f"{generator} was trained without classes: leave out --classes")
    ids: set[int] = set()
    for text in texts:
        # A name may hold commas, as ImageNet's do.
        words = [text] if _nfc(text.strip()) in map(_nfc, names) else text.split(",")
        for word in words:
            ids.update(_ids_of(_nfc(word.strip()), [_nfc(name) for name in names]))
    return None if len(ids) == len(names) else tuple(sorted(ids))


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _ids_of(word: str, names: Sequence[str]) -> Sequence[int]:
    named = [class_id for class_id, name in enumerate(names) if name == word]
    if match := _IDS.fullmatch(word):
        first, last = int(match[2]), int(match[3] or match[2])
        if match[1]:
            return _range(word, first, last, len(names))
        if not named:
            numbered = _range(word, first, last, len(names))
            if _are_other_names(numbered, names):
                raise ValueError(_two_readings(word, named, numbered, names))
            return numbered
        numbered = range(first, last + 1)
        if last < len(names) and named != list(numbered):
            raise ValueError(_two_readings(word, named, numbered, names))
    if len(named) > 1:
        marked = " or ".join(f"#{class_id}" for class_id in named)
        raise ValueError(f"--classes {word}: {len(named)} classes have this name; give an id, quoted: {marked}")
    if not named:
        close = difflib.get_close_matches(word, names, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"give a name or an id from #0 to #{len(names) - 1}"
        raise ValueError(f"--classes {word!r} is not a class of the generator; {remedy}")
    return named


def _range(word: str, first: int, last: int, count: int) -> range:
    if last < first:
        raise ValueError(f"--classes {word} ends before it starts: write {last}-{first}")
    if last >= count:
        raise ValueError(f"--classes {word}: class ids are 0 to {count - 1}")
    return range(first, last + 1)


def _are_other_names(ids: range, names: Sequence[str]) -> bool:
    """Return whether the names of other classes are among these numbers."""
    numbers = {str(class_id) for class_id in ids}
    return any(name in numbers and name != str(class_id) for class_id, name in enumerate(names))


def _two_readings(word: str, named: Sequence[int], numbered: range, names: Sequence[str]) -> str:
    """Say what a word could mean, and how to write either."""
    if not named:  # a range over classes whose names are numbers
        return (
            f"--classes {word} could be ids or names, as class {numbered[0]} is called {names[numbered[0]]}: "
            f"write '#{numbered[0]}-{numbered[-1]}' for the ids, or the names one by one"
        )
    ids = f"'#{numbered[0]}'" if len(numbered) == 1 else f"'#{numbered[0]}-{numbered[-1]}'"
    return (
        f"--classes {word} could be the class of this name, id {named[0]}, or the id {word}, called "
        f"{names[numbered[0]]}: write '#{named[0]}' or {ids}"
    )
