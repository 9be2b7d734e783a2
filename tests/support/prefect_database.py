"""A database of Prefect's servers with its migrations done, which take 12 s: once for all processes of the tests."""

import fcntl
import shutil
from pathlib import Path

from flows.prefect_server.temporary import start_server


def copy_prefect_database(shared: Path, home: Path) -> None:
    """Give a new home of servers a migrated database, which the first caller makes in a folder that all share."""
    first = shared / "migrated home"
    with (shared / "migrated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not first.exists():
            server = start_server(shared / "migrating")
            try:
                server.wait()
            finally:
                server.stop()
            (shared / "migrating").rename(first)
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (first / "prefect").glob("prefect-*.db*"):
        shutil.copy(file, folder)
