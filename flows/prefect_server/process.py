"""A Prefect server's own process, which lives as long as the process that started it.

It is started as a plain file by `flows.prefect_server.temporary`, in the folder of its database, and imports nothing of
ours.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path


def _serve(listener: int, parent: int) -> None:
    _exit_with_parent(parent)
    home = Path(os.environ["PREFECT_HOME"])
    if _migrate(home):
        # Prefect keeps the first database it opens; execv keeps pid, socket and death signal.
        os.execv(sys.executable, [sys.executable, "-P", __file__, str(listener), str(parent)])
    os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = _url(database_of(home))
    os.environ["PREFECT_SERVER_DATABASE_MIGRATE_ON_START"] = "false"
    os.environ["PREFECT_SERVER_REGISTER_BLOCKS_ON_START"] = "false"

    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(final=True), fd=listener, log_level="warning", access_log=False, timeout_graceful_shutdown=1)


def _exit_with_parent(parent: int) -> None:
    """Make this process end with the run's process, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            sys.exit(1)
    else:
        threading.Thread(target=_exit_after_parent, args=[parent], daemon=True).start()


def _exit_after_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def database_of(home: Path) -> Path:
    """Return the database file of this Prefect version; if it exists, its migrations are complete."""
    from importlib.metadata import version

    return home / f"prefect-{version('prefect')}.db"


def _url(database: Path) -> str:
    """Return the URL of a file in the current folder: SQLAlchemy takes no path that holds a question mark."""
    return f"sqlite+aiosqlite:///{database.name}"


def _migrate(home: Path) -> bool:
    """Create the database under a temporary name, one process at a time; return whether this process did."""
    database = database_of(home)
    with (home / "database.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system if we are killed
        if database.exists():
            return False
        new = database.with_suffix(".new")
        for leftover in home.glob(f"{new.name}*"):
            leftover.unlink()
        os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = _url(new)

        import asyncio
        import sqlite3

        asyncio.run(_create_database())
        with contextlib.closing(sqlite3.connect(new)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        new.rename(database)
        return True


async def _create_database() -> None:
    from prefect.server.database import provide_database_interface
    from prefect.server.models.block_registration import run_block_auto_registration

    database = provide_database_interface()
    await database.create_db()
    async with await database.session() as session:  # not safe for two servers at once either
        await run_block_auto_registration(session=session)
        await session.commit()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
