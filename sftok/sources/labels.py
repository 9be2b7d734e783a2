"""Classes of images: class names from a file, and the meaning of a source's labels (numbers or names)."""

import re
from collections.abc import Iterable

from sftok.config import DataConfig
from sftok.sources.files import beside
from sftok.sources.listing import RejectedEntryError
from sftok.sources.rules import class_name, distinct, ordered, shared_names

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0)?")  # pandas writes integers beside missing ones as 3.0
MOST_CLASSES = 1_000_000  # larger numbers are no class ids
NO_CLASS = -1  # marks a missing label in Hugging Face's test splits


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
    """Return the class of a label: a number's name if names are known, or else its digits.

    Raises:
        RejectedEntryError: it is not a class.
    """
    if isinstance(label, bytes):
        label = _text(label)
    if isinstance(label, str):
        label = class_name(label.strip())
        if names is not None and label in names:
            if shared := shared_names(names).get(label):
                ids = ", ".join(map(str, shared))
                raise RejectedEntryError(f"its class {label[:80]!r} is the name of classes {ids}: give the number")
            return label
        if _INTEGER.fullmatch(label):
            label = int(label.partition(".")[0])
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is None or label == "" or label == NO_CLASS or label != label:
        return None
    if isinstance(label, str):
        if names is not None:
            raise RejectedEntryError(f"its class {label[:80]!r} is none of the {len(names)} class names")
        return label
    if isinstance(label, bool) or not isinstance(label, int):
        raise RejectedEntryError(f"its label {str(label)[:80]!r} is neither a number nor a name")
    most = MOST_CLASSES if names is None else len(names)
    if not 0 <= label < most:
        raise RejectedEntryError(f"its label {label} is not between 0 and {most - 1}")
    return str(label) if names is None else names[label]


def names_of(found: Iterable[str], uri: str) -> tuple[str, ...] | None:
    """Return class names in the order of their ids: numbers up to the largest, or sorted names; None if there are none.

    Raises:
        ValueError: there are both numbers and names.
    """
    classes = set(found)
    numbers = {name for name in classes if name.isascii() and name.isdigit()}
    if numbers and numbers != classes:
        raise ValueError(
            f"source {uri!r} has numbers ({min(numbers)}) and names ({min(classes - numbers)!r}) as labels: "
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


def _text(label: bytes) -> str:
    try:
        return label.decode()
    except UnicodeDecodeError as error:
        raise RejectedEntryError("its label is not UTF-8") from error
