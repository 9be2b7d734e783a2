"""Rules that all kinds of sources follow: names of splits, hidden files, and messages.

The page `docs/reference/sources.md` states them as a table.
"""

import re
from collections.abc import Iterable, Mapping

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?=$|[-_.0-9])")

HIDDEN_FILE, HIDDEN_FOLDER = "a hidden file", "a hidden folder"
SYSTEM_FILE, SYSTEM_FOLDER = "a file of the operating system", "a folder of thumbnails or of the operating system"
SPARK_FOLDER = "a folder that Spark keeps for itself"
STRAY_FILE = "a file beside the images"
OTHER_SPLIT = "neither train nor val"
# Reasons of entries that are left out by rule: they are in the ledger, but say nothing about the source's quality.
LEFT_OUT = frozenset({HIDDEN_FILE, HIDDEN_FOLDER, SYSTEM_FILE, SYSTEM_FOLDER, SPARK_FOLDER, STRAY_FILE, OTHER_SPLIT})
_SYSTEM_FILES = frozenset({"Thumbs.db", "desktop.ini"})
_SYSTEM_FOLDERS = {"System Volume Information": SYSTEM_FOLDER} | dict.fromkeys(
    ("@eaDir", "@Recycle", "@__thumb", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"), SYSTEM_FOLDER
)
_SYSTEM_FOLDERS |= dict.fromkeys(("_temporary", "_delta_log", "_spark_metadata"), SPARK_FOLDER)


# --- splits


def split_word(name: str) -> str | None:
    """Return the word of SPLIT_NAMES that a folder's name, or a cell of an index, is; None if it is none."""
    word = name.strip().lower().removeprefix("partial-")  # the Hugging Face hub's folder of a shortened conversion
    return word if word in SPLIT_NAMES else None


def split_word_in(path: str) -> tuple[str | None, str]:
    """Return the split's word that a folder of a path is, or else one in the file's name, as in `train-0001.tar`.

    Also returns the folder that holds the split's folder or file.
    """
    *folders, name = path.split("/")
    for depth, folder in enumerate(folders):
        if word := split_word(folder):
            return word, "/".join(folders[:depth])
    match = _SPLIT_IN_NAME.search(name.lower())
    return match[1] if match else None, "/".join(folders)


def splits_by_word(words: Iterable[str | None], uri: str, what: str) -> dict[str | None, str | None]:
    """Map the words of a source to the splits that are read; what has a word that is not in the map is not read.

    None, for what names no split, is read only where there is no train split. The split is None where a hash of the
    image ids holds images out.

    Args:
        words: all that occur, None for what names no split.
        uri: of the source, for messages.
        what: of the source bears the words: folders, files or rows.

    Raises:
        ValueError: there is a val split and no train split.
    """
    present = set(words)
    named: dict[str, list[str]] = {}
    for word in sorted(filter(None, present)):
        named.setdefault(SPLIT_NAMES[word], []).append(word)
    if "train" not in named:
        if "val" in named:
            raise ValueError(
                f"source {uri!r} has {named['val'][0]} {what} but no train {what}: add them, or rename these"
            )
        return {None: None} if None in present else dict.fromkeys(present)
    by_hash = "val" not in named
    return {word: None if by_hash else split for split in ("train", "val") for word in named.get(split, ())}


def check_one_name_each(names: Mapping[str, str | None], uri: str, what: str) -> None:
    """Refuse folders or files of two names for one split: they may be two splits to whoever made them.

    Args:
        names: the word of each name, as `split_word` found it.
        uri: of the source, for the message.
        what: of the source bears the names.

    Raises:
        ValueError: there are two names for train, or two for val.
    """
    first: dict[str, str] = {}
    for name, word in sorted(names.items()):
        split = SPLIT_NAMES.get(word or "", "test")
        if split != "test" and first.setdefault(split, name) != name:
            raise ValueError(
                f"source {uri!r} has {what} named {first[split]} and {name}, which are one split: merge or rename them"
            )


# --- hidden files


def reason_to_leave_out(name: str, *, is_folder: bool = False) -> str | None:
    """Return the reason by which a file or folder of this name is never read; None if it is."""
    if name.startswith(".") and name not in (".", ".."):
        return HIDDEN_FOLDER if is_folder else HIDDEN_FILE
    if is_folder:
        return _SYSTEM_FOLDERS.get(name)
    return SYSTEM_FILE if name in _SYSTEM_FILES else None


def left_out_part(path: str) -> tuple[str, str] | None:
    """Return the part of a path that is left out, a folder's ending with /, and the reason; None if none is."""
    *folders, name = path.split("/")
    for depth, folder in enumerate(folders, 1):
        if reason := reason_to_leave_out(folder, is_folder=True):
            return "/".join(folders[:depth]) + "/", reason
    reason = reason_to_leave_out(name)
    return (path, reason) if reason else None


# --- messages


def shown(value: object, most: int = 80) -> str:
    """Quote a value of a source for a message; of a long one the beginning and the length."""
    text = str(value)
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text):,} characters)"


def listed(names: Iterable[object], most: int = 160) -> str:
    """List names of columns or classes for a message, as many as fit; each is cut after 40 characters."""
    texts = [text if len(text) <= 40 else f"{text[:37]}..." for text in map(str, names)]
    for count in range(len(texts), 0, -1):
        line = ", ".join(texts[:count])
        if len(line) <= most:
            return line + (f" and {len(texts) - count} more" if count < len(texts) else "")
    return "none"
