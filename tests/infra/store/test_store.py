import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import TransientError
from infra.settings import Settings
from infra.store.store import Store
from tests.support.s3_server import S3Server

LOCAL = "store"
S3 = pytest.param("s3_store", marks=pytest.mark.s3)
WRITERS = 16


@pytest.fixture(params=[LOCAL, S3])
def place(request: pytest.FixtureRequest) -> Store:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Store)
    return found


class TestBothKinds:
    def test_round_trip_of_bytes_and_files(self, place: Store, tmp_path: Path) -> None:
        source, copy = tmp_path / "source", tmp_path / "copy"
        source.write_bytes(b"from a file")
        place.write("a/b.bin", b"one")
        place.write("a/b.bin", b"two")
        place.put_file("c.bin", source)
        place.get_file("c.bin", copy)
        assert (place.read("a/b.bin"), place.size("a/b.bin")) == (b"two", 3)
        assert copy.read_bytes() == b"from a file"

    def test_list_is_sorted_recursive_and_holds_files_only(self, place: Store) -> None:
        for key in ("b/2", "a", "b/1", "b/c/3", "bb"):
            place.write(key, b"")
        assert place.list() == ["a", "b/1", "b/2", "b/c/3", "bb"]
        assert place.list("b/") == ["b/1", "b/2", "b/c/3"]
        assert place.list("b/c/") == ["b/c/3"]
        assert place.list("no") == []
        assert place.at("b").list() == ["1", "2", "c/3"]
        assert place.folders() == ["b"]
        assert place.at("no").folders() == []

    def test_a_listing_tells_sizes_and_versions(self, place: Store) -> None:
        place.write("a/b", b"1")
        place.write("c", b"22")
        place.write("ab/c", b"")
        began = time.time() - 60
        found = {info.key: info for info in place.list_info()}
        assert {key: info.size for key, info in found.items()} == {"a/b": 1, "ab/c": 0, "c": 2}
        assert all(began < info.modified < began + 120 and info.version for info in found.values())
        assert [info.key for info in place.list_info("a/")] == ["a/b"]
        assert sorted(info.key for info in place.scan()) == ["a/", "ab/", "c"]
        assert [(info.key, info.name) for info in place.at("a").scan()] == [("b", "b")]
        assert list(place.at("c").scan()) == []
        place.write("c", b"33")
        (changed,) = place.list_info("c")
        assert changed.version != found["c"].version

    def test_a_file_is_found_beside_others(self, place: Store) -> None:
        place.write("a b/c.bin", b"1")
        for uri in (f"{place.uri}/a b/c.bin", f"{place.uri}/a b/c.bin/"):
            folder, name = Store.beside(uri)
            assert (folder.uri, name, folder.read(name)) == (f"{place.uri}/a b", "c.bin", b"1")

    def test_ranges_are_read_as_far_as_they_go(self, place: Store) -> None:
        place.write("a", b"0123456789")
        read = place._backend.read_range
        ranges = [read(f"{place._prefix}a", *ends) for ends in ((0, 3), (7, 10), (8, 20), (4, 4))]
        assert ranges == [b"012", b"789", b"89", b""]

    def test_folder_is_not_a_file(self, place: Store) -> None:
        place.write("a/b", b"")
        assert place.exists("a/b")
        assert not place.exists("a")
        assert not place.exists("c")

    @pytest.mark.parametrize("method", ["read", "size", "open"])
    def test_missing_file_is_named(self, place: Store, method: str) -> None:
        with pytest.raises(FileNotFoundError, match=f"{place.uri}/no/such"):
            getattr(place, method)("no/such")

    def test_create_race_has_one_winner(self, place: Store) -> None:
        start = threading.Barrier(WRITERS)
        copies = [pickle.loads(pickle.dumps(place)) for _ in range(4)]  # each with a connection of its own

        def create(writer: int) -> bool:
            own = copies[writer % len(copies)]
            own.exists("x")  # connected before the race
            start.wait()
            return bool(own.create("race/marker.json", b"%d" % writer))

        with ThreadPoolExecutor(WRITERS) as pool:
            wins = list(pool.map(create, range(WRITERS)))
        assert sum(wins) == 1
        assert place.read("race/marker.json") == b"%d" % wins.index(True)
        assert place.list() == ["race/marker.json"]

    def test_create_leaves_what_exists(self, place: Store) -> None:
        place.write("marker", b"first")
        assert place.create("marker", b"second") is False
        assert place.read("marker") == b"first"

    def test_delete_is_idempotent_and_tree_goes_as_a_whole(self, place: Store) -> None:
        for key in ("a/manifest.json", "a/b/c", "ab"):
            place.write(key, b"x")
        place.delete("ab")
        place.delete("ab")
        place.write("ab", b"x")
        place.at("a").delete_tree()
        place.at("a").delete_tree()
        assert place.list() == ["ab"]

    def test_everything_is_not_deleted(self, place: Store) -> None:
        with pytest.raises(ValueError, match="refused to delete everything"):
            Store(place.uri).delete_tree()

    def test_parquet_is_read_through_open(self, place: Store, tmp_path: Path) -> None:
        table = pa.table({"a": list(range(100_000)), "b": ["x"] * 100_000})
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=10_000)
        place.put_file("t.parquet", tmp_path / "t.parquet")
        with place.open("t.parquet") as file, pq.ParquetFile(file) as parquet:
            assert parquet.read_row_group(7).column("a")[0].as_py() == 70_000
            assert parquet.read().equals(table)

    def test_survives_pickling_without_its_connection(self, place: Store) -> None:
        place.at("a").write("b", b"1")
        data = pickle.dumps(place.at("a"))
        assert b"test-secret-key" not in data
        assert len(data) < 1000
        assert pickle.loads(data) == place.at("a")
        assert pickle.loads(data).read("b") == b"1"

    def test_check_passes_and_leaves_nothing(self, place: Store) -> None:
        place.check()
        assert place.list() == []

    @pytest.mark.parametrize("key", ["../x", "a/../b", "/etc/x", "", "a//b", ".", "a\\b", "a\nb", "a/"])
    def test_keys_stay_inside(self, place: Store, key: str) -> None:
        for call in (place.at, place.read, place.exists, place.delete):
            with pytest.raises(ValueError, match="relative path"):
                call(key)
        with pytest.raises(ValueError, match="relative path"):
            place.write(key, b"")


class TestRoots:
    def test_one_folder_has_one_uri(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "my store"
        uris = (f"file://{tmp_path}/my%20store", f"FILE://localhost{tmp_path}/my store/")
        for root in ("my store", "./x/../my store", str(folder) + "/", folder, *uris):
            assert Store(root).uri == str(folder)
            assert Store(root).is_local
            assert Store(root).path == folder
        assert Store("a").at("b", "c/d").uri == str(tmp_path / "a/b/c/d")
        assert not folder.exists()

    def test_s3_uris(self) -> None:
        assert Store("s3://bucket").uri == "s3://bucket"
        assert Store("s3://bucket/a//b/").uri == "s3://bucket/a/b"
        assert Store("s3://bucket").at("a", "b").uri == "s3://bucket/a/b"
        with pytest.raises(ValueError, match="not a local folder"):
            _ = Store("s3://bucket").path

    @pytest.mark.parametrize(
        "root", ["", " ", "s3://", "s3://B/x", "gs://bucket/x", "file://host/x", "s3://bucket/../x"]
    )
    def test_other_roots_are_refused(self, root: str) -> None:
        with pytest.raises(ValueError, match=r"^(store|key)"):
            Store(root)

    def test_credentials_in_a_uri_are_refused_and_not_repeated(self) -> None:
        for root in ("s3://me:hunter2@bucket/x", "https://me:hunter2@host/x", "file://me:hunter2@host/x"):
            with pytest.raises(ValueError, match="store ") as caught:
                Store(root)
            assert "hunter2" not in str(caught.value)


class TestLocal:
    def test_a_killed_writer_leaves_nothing_visible(self, store: Store) -> None:
        store.write("file", b"old")
        script = (
            "import os, sys; from infra.store.store import Store\n"
            "os.fsync = lambda descriptor: os._exit(9)\n"  # all bytes written, name not given yet
            "store = Store(sys.argv[1]); getattr(store, sys.argv[2])(sys.argv[3], b'new' * 1000)"
        )
        for method, key in (("write", "file"), ("write", "other"), ("create", "marker")):
            done = subprocess.run([sys.executable, "-c", script, store.uri, method, key], check=False)
            assert done.returncode == 9
        assert store.list() == ["file"]
        assert store.read("file") == b"old"
        assert store.create("marker", b"x")

    def test_a_reader_never_sees_a_part(self, store: Store) -> None:
        sizes = (10, 3_000_000)
        store.write("file", b"a" * sizes[0])
        end = threading.Event()

        def keep_writing() -> None:
            for turn in range(60):
                store.write("file", b"a" * sizes[turn % 2])
            end.set()

        writer = threading.Thread(target=keep_writing)
        writer.start()
        seen = set()
        while not end.is_set():
            seen.add(len(store.read("file")))
        writer.join()
        assert seen <= set(sizes)

    def test_temporary_names_are_not_listed(self, store: Store) -> None:
        store.write("a", b"")
        for name in (".partial-1", ".partial-2/b"):
            (store.path / name).parent.mkdir(exist_ok=True)
            (store.path / name).write_bytes(b"")
        assert (store.list(), store.folders(), [info.key for info in store.scan()]) == (["a"], [], ["a"])
        assert {write.key for write in store.unfinished_writes()} == {".partial-1", ".partial-2"}

    def test_linked_folders_are_listed_but_not_those_above(self, store: Store, tmp_path: Path) -> None:
        store.write("a/b", b"")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/c").write_bytes(b"")
        (store.path / "a/up").symlink_to(store.path)
        (store.path / "a/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        assert store.list() == ["a/b", "a/link/c"]
        assert store.at("a", "up").list() == []

    def test_unwritable_folder_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        broken = Store(tmp_path / "file" / "store")
        with pytest.raises(ValueError, match=r"cannot be written.*choose a folder") as caught:
            broken.check()
        assert broken.uri in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_no_hard_links_is_said(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_links(source: Path, target: Path) -> None:
            raise OSError(1, "Operation not permitted", str(source), None, str(target))

        monkeypatch.setattr(os, "link", no_links)
        with pytest.raises(ValueError, match="no hard links"):
            store.check()
        assert store.list() == []


@pytest.mark.s3
class TestS3:
    def test_a_killed_multipart_upload_leaves_nothing_visible(self, s3_store: Store) -> None:
        s3_store.write("old", b"old")
        script = (
            "import os, sys; from infra.store.store import Store; from s3fs import S3FileSystem\n"
            "call = S3FileSystem._call_s3\n"
            "async def die(self, method, *a, **k):\n"
            "    if method == 'complete_multipart_upload': os._exit(9)\n"
            "    return await call(self, method, *a, **k)\n"
            "S3FileSystem._call_s3 = die\n"
            "Store(sys.argv[1]).write('old', b'x' * (101 << 20))"
        )
        assert subprocess.run([sys.executable, "-c", script, s3_store.uri], check=False).returncode == 9
        assert s3_store.list() == ["old"]
        assert s3_store.read("old") == b"old"

    def test_many_files_are_listed_and_deleted_in_pages(self, s3_store: Store) -> None:
        folder = s3_store.at("many")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: folder.write(f"{i:04d}", b""), range(1050)))
        assert len(folder.list()) == 1050
        folder.delete_tree()
        assert folder.list() == []

    def test_other_writers_are_seen_at_once(self, s3_store: Store) -> None:
        assert s3_store.list() == []
        other = pickle.loads(pickle.dumps(s3_store))
        other.write("a", b"1")
        assert s3_store.list() == ["a"]
        assert s3_store.exists("a")

    def test_missing_bucket(self, s3_env: S3Server) -> None:
        store = Store("s3://no-such-bucket/x")
        _fails_in_one_line(store, "there is no bucket 'no-such-bucket'.*create it", s3_env)
        with pytest.raises(ValueError, match="there is no bucket"):
            store.write("a", b"1")

    def test_wrong_secret(self, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
        store = Store("s3://tests/x")
        _fails_in_one_line(store, "refused the credentials.*check AWS_ACCESS_KEY_ID", s3_env)
        for call in (store.read, store.exists):
            with pytest.raises(ValueError, match="refused the credentials"):
                call("a")

    def test_no_credentials(self, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        _fails_in_one_line(Store("s3://tests/x"), "no credentials; set AWS_ACCESS_KEY_ID", s3_env)

    def test_unreachable_endpoint(self, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setattr("infra.store.s3.FIRST_CONTACT_SECONDS", 0.5)
        start = time.monotonic()
        _fails_in_one_line(Store("s3://tests/x"), "http://127.0.0.1:9 does not answer.*AWS_ENDPOINT_URL", s3_env)
        with pytest.raises(TransientError, match=r"does not answer .*; start the server or correct AWS_ENDPOINT_URL$"):
            Store("s3://tests/x").read("a")
        assert time.monotonic() - start < Settings().s3_retry_seconds, "a mistyped address was waited for"

    def test_nothing_is_readable_without_a_signature(self, s3_env: S3Server, s3_store: Store) -> None:
        s3_store.write("a", b"1")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{s3_env.endpoint}/{s3_store.uri.removeprefix('s3://')}/a")


def _fails_in_one_line(store: Store, match: str, server: S3Server) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        store.check()
    text = str(caught.value)
    assert text.startswith(f"store {store.uri}: ")
    assert "\n" not in text
    assert not any(secret in text for secret in (server.secret_key, server.access_key, "wrong-secret-key"))
