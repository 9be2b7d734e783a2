"""A proxy in front of an S3 server that does to requests what networks and busy servers do, drawn from a seed.

What happens to a request depends on the seed, on what is asked for, and on how often that was asked before: not on
the order in which threads and processes come, so a run meets the same faults every time.
"""

import hashlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

STALL_SECONDS = (2.0, 5.0)
PATIENCE_SECONDS = 120.0
# "lost": the server does what it was asked, and its answer does not arrive.
READ_FAULTS = ("500", "503", "stall", "reset", "truncated")
WRITE_FAULTS = ("500", "503", "stall", "reset", "lost", "lost", "lost")  # the worst one oftener: writes are few
FAULTS = tuple(dict.fromkeys(READ_FAULTS + WRITE_FAULTS))
CODES = {"500": "InternalError", "503": "SlowDown", "507": "InsufficientStorage"}
HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}  # headers that are for one connection alone


class Asked(NamedTuple):
    """A request, as far as it decides what happens to it."""

    method: str
    path: str
    query: str
    is_create: bool  # a conditional put
    times: int  # how often this was asked, with any query, this time included


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy:
    """Passes requests on to `endpoint` as they are, `Host` included, which the client has signed.

    Args:
        endpoint: the server's URL.
        seed: decides which requests are hit, and by what.
        rate: share of the requests that are hit.
        stall: seconds that a stall takes, from and to.
        chosen: names the fault of a request, or None to leave it to the seed.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        seed: int = 0,
        rate: float = 0.0,
        stall: tuple[float, float] = STALL_SECONDS,
        chosen: Callable[[Asked], str | None] = lambda asked: None,
    ) -> None:
        self.seed, self.rate, self.stall, self.chosen = seed, rate, stall, chosen
        self.requests, self.hits = 0, Counter[str]()
        self._asked = Counter[tuple[str, str]]()
        self._lock = threading.Lock()
        self.server = urlsplit(endpoint)

    def fault_of(self, method: str, target: str, is_create: bool) -> str | None:
        """What is to happen to this request; counted."""
        url = urlsplit(target)
        with self._lock:
            self.requests += 1
            self._asked[method, url.path] += 1
            asked = Asked(method, url.path, url.query, is_create, self._asked[method, url.path])
            fault = self.chosen(asked) or self._drawn(asked)
            if fault is not None:
                self.hits[fault] += 1
            return fault

    def _drawn(self, asked: Asked) -> str | None:
        text = f"{self.seed} {asked.method} {asked.path} {asked.times}"
        draw = random.Random(hashlib.sha256(text.encode()).digest())
        if draw.random() >= self.rate:
            return None
        return draw.choice(READ_FAULTS if asked.method in ("GET", "HEAD") else WRITE_FAULTS)

    def ask(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Answer:
        """The server's answer; each request has a connection of its own, so none is ever a stale one."""
        connection = http.client.HTTPConnection(str(self.server.hostname), self.server.port, timeout=PATIENCE_SECONDS)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())
        finally:
            connection.close()


@contextmanager
def running_proxy(proxy: FaultProxy) -> Iterator[str]:
    """The endpoint of the proxy, which answers as long as the block lasts."""

    class Handler(_Handler):
        faults = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultProxy

    def _serve(self) -> None:
        body = self._body()
        is_create = self.headers.get("If-None-Match") == "*"
        fault = self.faults.fault_of(self.command, self.path, is_create)
        if fault in CODES:
            self._refuse(fault)
        elif fault == "reset":
            self._reset()
        else:
            if fault == "stall":
                time.sleep(random.Random(self.path).uniform(*self.faults.stall))
            headers = [(name, value) for name, value in self.headers.items() if name.lower() not in HOP]
            answer = self.faults.ask(self.command, self.path, headers, body)
            if fault == "lost":
                self._reset()
            else:
                self._answer(answer, is_cut=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def _body(self) -> bytes:
        assert "chunked" not in self.headers.get("Transfer-Encoding", ""), "the client sends lengths"
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, answer: Answer, *, is_cut: bool) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in HOP | {"content-length"}:
                self.send_header(name, value)
        length = next((value for name, value in answer.headers if name.lower() == "content-length"), len(answer.body))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if is_cut else answer.body)
        if is_cut:
            self._reset()

    def _refuse(self, status: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{CODES[status]}</Code><Message>on purpose</Message></Error>".encode()
        self._answer(Answer(int(status), [("Content-Type", "application/xml")], text), is_cut=False)

    def _reset(self) -> None:
        """Close the connection by RST: no more bytes follow, and the client is told so."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the counters tell."""
