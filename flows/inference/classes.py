"""Parse classes as users write them: ids, ranges of ids, names."""

import difflib
import re
from collections.abc import Sequence

_IDS = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def chosen_classes(texts: Sequence[str], names: Sequence[str], generator: str) -> tuple[int, ...] | None:
    """Return the ids of the given classes, sorted and unique; None for all. A number is an id, whatever the names are.

    Raises:
        ValueError: there is no such class, a name is ambiguous, or the generator has no classes.
    """
    if not texts:
        return None
    if not names:
        raise ValueError(f"{generator} was trained without classes: leave out --classes")
    ids: set[int] = set()
    for text in texts:
        # A name may hold commas, as ImageNet's do.
        words = [text] if text in names and not _IDS.fullmatch(text) else text.split(",")
        for word in words:
            ids.update(_ids_of(word.strip(), names))
    return None if len(ids) == len(names) else tuple(sorted(ids))


def _ids_of(word: str, names: Sequence[str]) -> Sequence[int]:
    if match := _IDS.fullmatch(word):
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"--classes {word} ends before it starts: write {last}-{first}")
        if last >= len(names):
            raise ValueError(f"--classes {word}: class ids are 0 to {len(names) - 1}")
        return range(first, last + 1)
    ids = [class_id for class_id, name in enumerate(names) if name == word]
    if len(ids) > 1:
        raise ValueError(f"--classes {word}: classes {', '.join(map(str, ids))} have this name; give an id")
    if not ids:
        close = difflib.get_close_matches(word, names, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"give a name or an id from 0 to {len(names) - 1}"
        raise ValueError(f"--classes {word!r} is not a class of the generator; {remedy}")
    return ids
