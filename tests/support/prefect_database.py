"""A database of Prefect's servers with its migrations done, which take 10 s: once for all processes of the tests."""

import fcntl
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from flows.prefect_server.temporary import start_server


class MigratedDatabase(NamedTuple):
    """A folder with a migrated database, and the process ids of the servers that made it."""

    folder: Path
    pids: list[int]

    @property
    def name(self) -> str:
        return f"prefect-{importlib.metadata.version('prefect')}.db"

    def copy(self, home: Path) -> Path:
        """Give a new home of servers the database."""
        folder = home / "prefect"
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("prefect-*.db*"):
            shutil.copy(file, folder)
        return folder / self.name


def migrated_database(shared: Path) -> MigratedDatabase:
    """Return the database in a folder that all processes share; the first caller makes it.

    It is made as it is hardest: by two servers at once, on a home whose name is no part of a URL, where a killed one
    has left half a database.
    """
    home, pids = shared / "migrated ?#%41", shared / "migrated.json"
    folder = home / "prefect"
    with (shared / "migrated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not pids.exists():
            folder.mkdir(parents=True)
            (folder / f"prefect-{importlib.metadata.version('prefect')}.new").write_bytes(b"half a database")
            both = start_server(home), start_server(home)
            try:
                for server in both:
                    server.wait()
            finally:
                for server in both:
                    server.stop()
            pids.write_text(json.dumps([server.pid for server in both]))
    return MigratedDatabase(folder, json.loads(pids.read_text()))
