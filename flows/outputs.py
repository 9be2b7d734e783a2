"""Files that a command writes for a person: checked before the work begins, never overwritten."""

import os
from collections.abc import Sequence
from pathlib import Path


def new_files(files: Sequence[Path]) -> None:
    """Create the parent folders of files that are to be written, and refuse to overwrite any.

    Raises:
        ValueError: one of the files exists, or its folder cannot be made.
    """
    for file in files:
        if file.exists():
            raise ValueError(f"{file} exists: name another folder, or remove it")
    for folder in {file.parent for file in files}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made a folder ({error.strerror}): name another one") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written to: name another folder")
