"""Set aside a database of the servers that cannot be read, so that a new one is made instead of a traceback."""

import contextlib
import fcntl
import itertools
import logging
import sqlite3
from pathlib import Path

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: a table is not there
QUICK_BYTES = 2**24  # a file up to this size is checked page by page, in some 20 ms

log = logging.getLogger(__name__)


def set_damaged_aside(database: Path) -> None:
    """Rename a database that is empty, cut off or none at all, and warn with both names; a sound one is only opened."""
    if damage_of(database) is None:
        return
    with database.with_name("database.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (damage := damage_of(database)) is None:  # another process was faster
            return
        names = (database.with_name(f"{database.name}.damaged-{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                database.with_name(database.name + suffix).rename(aside.with_name(aside.name + suffix))
    log.warning("%s is damaged (%s): it is kept as %s, and a new one is made", database, damage, aside.name)


def damage_of(database: Path) -> str | None:
    """Return what is wrong with a database of Prefect's; None if nothing is, or if there is none."""
    if not database.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
            if database.stat().st_size <= QUICK_BYTES:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    return str(found).partition("\n")[0]
            version = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return None if version else "without tables"
    except sqlite3.DatabaseError as error:
        is_damage = database.is_dir() or error.sqlite_errorcode & 0xFF in DAMAGED
        return str(error) if is_damage else None  # busy, forbidden, no space: the file is none the worse for it
