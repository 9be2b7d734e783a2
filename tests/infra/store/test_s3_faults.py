"""Network and server faults of S3, made by a proxy or at the server itself: bytes arrive intact, exactly once."""

import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.errors import TransientError
from infra.store.errors import StoreFullError
from infra.store.store import Store
from tests.conftest import FOREIGN
from tests.support.s3_faults import FAULTS, Asked, FaultProxy, running_proxy
from tests.support.s3_server import Instance, S3Server, running_instance

pytestmark = pytest.mark.s3


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instance]:
    """Start a server that the test may kill, and point the environment at it."""
    with running_instance(tmp_path_factory.mktemp("s3")) as found:
        for name in FOREIGN:
            monkeypatch.delenv(name, raising=False)
        for name, value in found.server.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def test_a_server_that_comes_back_is_waited_for(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.store.s3.FIRST_CONTACT_SECONDS", 0.5)
    store = Store("s3://tests/restarted")
    store.write("before", b"1")
    instance.kill()
    with ThreadPoolExecutor(4) as pool:  # these ask a port at which nobody listens
        made, found = pool.submit(store.create, "marker", b"2"), pool.submit(store.read, "before")
        copy = pool.submit(pickle.loads(pickle.dumps(store)).read, "before")  # as a worker that starts meanwhile
        missing = pool.submit(store.exists, "never")
        time.sleep(1.5)  # longer than for an endpoint that has never answered
        assert not any(one.done() for one in (made, found, copy, missing))
        assert instance.start()
        assert (made.result(), found.result(), copy.result(), missing.result()) == (True, b"1", b"1", False)
    assert store.read("marker") == b"2"


def test_patience_ends_with_what_to_do(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTOK_S3_PATIENCE", "1")
    store = Store("s3://tests/given-up")
    store.write("a", b"1")
    instance.kill()
    said = rf"^s3://tests/given-up/a: {instance.server.endpoint} does not answer \(\w+\) for \d+ s; check the server"
    with pytest.raises(TransientError, match=rf"{said}.* SFTOK_S3_PATIENCE = 1 s$"):
        store.read("a")


def test_every_fault_is_ridden_out(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FaultProxy(s3_env.endpoint, seed=5, rate=0.3, stall=(0.1, 0.2))
    data = bytes(range(256)) * 1000
    with running_proxy(proxy) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = Store("s3://tests/ridden-out")
        for number in range(10):
            key = f"{number:02d}"
            assert store.create(key, data[number:])
            assert not store.create(key, data[number:])
            assert store.read(key) == data[number:]
            store.write(key, data[:number])
            with store.open(key) as file:
                assert file.read() == data[:number]
            assert not store.exists(f"{key}/no")
        assert len(store.list()) == 10
        store.at("a").write("b", b"")
        store.at("a").delete_tree()
        assert len(store.list()) == 10
    assert set(proxy.hits) == set(FAULTS)


def test_a_create_whose_answer_was_lost_is_ours_and_nobody_else_s(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retries in lower layers recognise our own object; another writer's equal bytes are still another's."""
    proxy = FaultProxy(s3_env.endpoint, chosen=lambda asked: "lost" if asked.is_create and asked.times == 1 else None)
    with running_proxy(proxy) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = Store("s3://tests/lost-answers")
        others = [pickle.loads(pickle.dumps(store)) for _ in range(3)]
        for number in range(5):
            key = f"{number}/marker.json"
            assert store.create(key, b"same")
            assert [other.create(key, b"same") for other in others] == [False] * 3
            assert store.read(key) == b"same"
    assert proxy.hits == {"lost": 5}


def test_a_large_object_whose_last_answer_was_lost_is_whole(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    left = ["uploads", "uploadId"]  # the start of the upload in parts, and its end

    def chosen(asked: Asked) -> str | None:
        if asked.method != "POST" or not left or not asked.query.startswith(left[0]):
            return None
        left.pop(0)
        return "lost"

    proxy = FaultProxy(s3_env.endpoint, chosen=chosen)
    data = os.urandom(1 << 20) * 101
    with running_proxy(proxy) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = Store("s3://tests/large")
        store.write("parts", data)
        assert store.size("parts") == len(data)
        assert store.read("parts") == data
    assert proxy.hits == {"lost": 2}


def test_no_space_is_said_at_once(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    is_full = threading.Event()
    proxy = FaultProxy(
        s3_env.endpoint, chosen=lambda asked: "507" if is_full.is_set() and asked.method == "PUT" else None
    )
    with running_proxy(proxy) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = Store("s3://tests/no-space")
        store.write("a", b"1")
        is_full.set()
        asked = proxy.requests
        for call in (store.write, store.create):
            with pytest.raises(StoreFullError, match=r"^s3://tests/no-space/b: no space left .*free some") as caught:
                call("b", b"1")
            assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
        assert proxy.requests == asked + 2, "nobody tries again where a person is needed"
        with pytest.raises(ValueError, match=r"^store s3://tests/no-space: .*InsufficientStorage.*free some"):
            store.check()
        is_full.clear()
        assert store.list() == ["a"]
