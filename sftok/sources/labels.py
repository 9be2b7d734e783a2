"""Classes of images: class names from a file, and the meaning of a source's labels (numbers or names)."""

import collections
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

from sftok.config import DataConfig
from sftok.sources.class_ids import class_name, distinct, ordered, shared_names
from sftok.sources.files import beside
from sftok.sources.listing import Entries, Entry, RejectedEntryError, batches_of
from sftok.sources.rules import LEFT_OUT, shown

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0)?")  # pandas writes integers beside missing ones as 3.0
LONGEST_NAME = 500  # characters
MOST_CLASSES = 1_000_000  # larger numbers are no class ids
NO_CLASS = -1  # marks a missing label in Hugging Face's test splits
LABEL_PROBLEMS = ("its label", "its class", "its .json", "no label")  # how reasons begin that data.labels = none ends


def stated_names(config: DataConfig) -> tuple[str, ...] | None:
    """Read the class names of `config.class_names_file`; None if there is none.

    Raises:
        ValueError: it does not exist, is not text, or a line is empty.
    """
    path = config.class_names_file
    if not path or config.labels == "none":
        return None
    files, name = beside(path)
    try:
        text = files.read(name).decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.class_names_file = {path!r} is no text file that can be read ({type(error).__name__}): "
            "give a file with one class name per line"
        ) from error
    names = tuple(class_name(line.strip()) for line in text.rstrip().split("\n"))
    if "" in names:
        line = names.index("") + 1
        raise ValueError(f"data.class_names_file = {path!r}: line {line} is empty; give each class one line")
    return distinct(names)


def class_of(label: object, names: tuple[str, ...] | None) -> str | None:
    """Return the class of a label, as it is written: a number's name if names are known, or else its digits.

    Raises:
        RejectedEntryError: it is not a class.
    """
    if isinstance(label, bytes):
        label = _text(label)
    if isinstance(label, str):
        label = label.strip()
        if names is not None and (normal := class_name(label)) in names:
            if shared := shared_names(names).get(normal):
                ids = ", ".join(map(str, shared))
                raise RejectedEntryError(f"its class {shown(normal)} is the name of classes {ids}: give the number")
            return label
        if _INTEGER.fullmatch(label):
            label = int(label.partition(".")[0])
    if isinstance(label, bool) or _is_whole(label):
        label = int(label)  # type: ignore[call-overload]
    if label is None or label == "" or label == NO_CLASS or label != label:
        return None
    if isinstance(label, str):
        if names is not None:
            raise RejectedEntryError(f"its class {shown(label)} is none of the {len(names)} class names")
        if len(label) > LONGEST_NAME:
            raise RejectedEntryError(f"its label {shown(label)} is too long for the name of a class")
        return label
    if not isinstance(label, int):
        raise RejectedEntryError(f"its label {shown(label)} is neither a number nor a name")
    most = MOST_CLASSES if names is None else len(names)
    if not 0 <= label < most:
        raise RejectedEntryError(f"its label {label} is not between 0 and {most - 1}")
    return str(label) if names is None else names[label]


def _is_whole(label: object) -> bool:
    if isinstance(label, Decimal):
        return label == label.to_integral_value()
    return isinstance(label, float) and label.is_integer()


def names_of(written: Iterable[str], uri: str) -> tuple[str, ...] | None:
    """Return class names in the order of their ids: numbers up to the largest, or sorted names; None if there are none.

    Raises:
        ValueError: there are both numbers and names.
    """
    classes = set(map(class_name, written))
    numbers = {name for name in classes if name.isascii() and name.isdigit()}
    if numbers and numbers != classes:
        raise ValueError(
            f"source {uri!r} has numbers ({min(numbers)}) and names ({shown(min(classes - numbers))}) as labels: "
            "use one of both, or state the names in data.class_names_file"
        )
    if numbers:
        return tuple(map(str, range(max(map(int, numbers)) + 1)))
    return ordered(classes) or None


def are_numbers(names: tuple[str, ...] | None) -> bool:
    """Return whether the names are the numbers up to the largest, not all of which need to occur."""
    return bool(names) and names == tuple(map(str, range(len(names or ()))))


def no_labels(uri: str, seen: str) -> ValueError:
    """Make the error for a source without labels where labels are required."""
    return ValueError(
        f"source {uri!r} has no labels ({seen}): add them, or set data.labels = none to go without classes"
    )


def nothing_labelled(uri: str, entries: Sequence[Entry]) -> ValueError:
    """Make the error for a source none of whose entries has a usable label: how many there are, why not, an example."""
    counts, first = collections.Counter[bool](), dict[bool, Entry]()  # of the rejected, and of those without a label
    for batch in batches_of(entries):
        held = batch.read()
        problems = held.column("problem")
        is_counted = pc.invert(pc.is_in(problems, pa.array(sorted(LEFT_OUT), problems.type)))
        for is_rejected, chosen in ((True, pc.is_valid(problems)), (False, pc.is_null(problems))):
            found = Entries(held.table.filter(pc.and_(is_counted, chosen)))
            counts[is_rejected] += len(found)
            for entry in found[:1]:
                first.setdefault(is_rejected, entry)
    entry = first.get(True) or first.get(False) or Entry("", 0, problem="it holds nothing")
    seen = f"{counts[True]:,} of {counts.total():,} entries are rejected, " if counts[True] else ""
    seen += f"such as {shown(entry.image_id)}" + (f": {entry.problem[:200]}" if entry.problem else "")
    if not counts[False] and not (entry.problem or "").startswith(LABEL_PROBLEMS):
        return ValueError(f"source {uri!r} has no usable image ({seen}): mend what is rejected, or add images")
    return no_labels(uri, seen if counts[True] else f"none of its {counts.total():,} entries has one, {seen}")


def _text(label: bytes) -> str:
    try:
        return label.decode()
    except UnicodeDecodeError as error:
        raise RejectedEntryError("its label is not UTF-8") from error
