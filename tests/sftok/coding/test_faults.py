"""An encoding whose storage goes away, answers nonsense or is full, or that is told to end: the undisturbed bytes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from flows.make import make, run_stage
from flows.pipeline import graph
from flows.recipes.schema import EncodeConfig
from flows.requests.encode import encode_request
from flows.stage import StageJob, Work
from infra.artifacts.manifest import ArtifactPlan, Manifest, folder_of, key_of, publish, verify
from infra.codes.contract import read_codes
from infra.compute.cluster import session
from infra.progress import silent
from infra.store.store import Store
from sftok.coding.encode import EncodeResult, encode
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from tests.conftest import FOREIGN
from tests.sftok.coding.test_encode import DATA, HERE, TWO, draw, hashes, job_of, plan_of, rows_of
from tests.support import ROOT
from tests.support.s3_faults import FAULTS, FaultProxy, running_proxy
from tests.support.s3_server import Instance, running_instance
from tests.support.weights_cli import a_tokenizer, published

MANY = DATA.model_copy(update={"num_shards": 28, "num_val_shards": 4})
MARK = "SFTOK_TEST_MARK"
VIEWS = ("center", *(f"affine-{number}" for number in range(1, 100)))  # so many that a signal finds shards open
OVERRIDES = ("augment.rotate=5", "data.num_shards=24")


class EncodedStore(NamedTuple):
    """Images in more shards than a fault can pass by, and what an undisturbed encoding makes of them."""

    store: Store
    images: Manifest
    made: EncodeResult
    rows: list[tuple[str, str, bytes]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> EncodedStore:
    home = tmp_path_factory.mktemp("prepared")
    store, plan = Store(home / "store"), ArtifactPlan(kind="images", version=1, config={})
    data = list_source(str(draw(home / "data", range(60))))
    done = prepare(data, MANY, out=folder_of(store, plan.kind, plan.digest))
    images = publish(
        store, plan, files=done.files, counts=done.counts, metrics={}, seconds=0, content_digest=done.content_digest
    )
    inputs = store.list()
    made = encode(job_of(store, images), images, options=HERE)
    rows = rows_in(store, images, made)
    for name in set(store.list()) - set(inputs) - {"tokenizer/config.json", "tokenizer/model.safetensors"}:
        store.delete(name)
    return EncodedStore(store, images, made, rows)


def rows_in(store: Store, images: Manifest, made: EncodeResult) -> list[tuple[str, str, bytes]]:
    """Image, view and codes of every row, as they are read back from a published and verified artifact."""
    manifest = publish(store, plan_of(images, store), files=made.files, counts=made.counts, metrics={}, seconds=0)
    verify(store, manifest)
    _, rows = read_codes(store, [key_of(manifest, entry) for entry in manifest.files])
    return [(*row, codes.tobytes()) for *row, codes in zip(rows.image_id, rows.variant, rows.codes, strict=True)]


def assert_undisturbed(store: Store, prepared: EncodedStore, made: EncodeResult) -> None:
    """The same bytes, every row once, and nothing beside them."""
    assert hashes(made.files) == hashes(prepared.made.files)
    assert made.counts == prepared.made.counts
    rows = rows_in(store, prepared.images, made)
    lost = rows_of(prepared.images) - len({(image_id, view) for image_id, view, _ in rows})
    print(f"rows lost: {lost} of {rows_of(prepared.images)}")  # noqa: T201
    assert (lost, rows) == (0, prepared.rows)


# --- S3 --------------------------------------------------------------------------------------------------------------


class Cloud:
    """An S3 server of the test's own; which endpoint a new process goes to is in a file, so that Ray may stay."""

    def __init__(self, instance: Instance, config: Path) -> None:
        self.instance, self.config = instance, config
        self.lead_to(instance.server.endpoint)

    def lead_to(self, endpoint: str) -> None:
        self.config.write_text(f"[default]\nregion = us-east-1\nendpoint_url = {endpoint}\n")

    def copy(self, prepared: EncodedStore, name: str) -> Store:
        store = Store(f"s3://tests/{name}")
        for key in prepared.store.list():
            store.write(key, prepared.store.read(key))
        return store


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    home = tmp_path_factory.mktemp("cloud")
    with running_instance(home) as instance, pytest.MonkeyPatch.context() as patch:
        for name in (*FOREIGN, "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        environment = {**instance.server.environment, "AWS_CONFIG_FILE": str(home / "config")}
        for name in set(environment) - {"AWS_ENDPOINT_URL"}:
            patch.setenv(name, environment[name])
        with session(num_cpus=2):
            yield Cloud(instance, home / "config")


@contextlib.contextmanager
def outage(instance: Instance, seconds: float) -> Iterator[tuple[Callable[[], None], threading.Event]]:
    """Gives what kills the server, which is back after so many seconds, and the event of its being back."""
    wanted, down, back, over = (threading.Event() for _ in range(4))

    def run() -> None:
        if wanted.wait(240) and not over.is_set():
            instance.kill()
            down.set()
            time.sleep(seconds)
            if instance.start():
                back.set()
        over.wait()  # the server ends with the thread that started it

    def begin() -> None:
        wanted.set()
        assert down.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield begin, back
    finally:
        over.set()
        wanted.set()
        thread.join()
        instance.stop()
        assert instance.start()


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [4.0, 20.0])
def test_a_server_that_is_away_is_waited_for(cloud, prepared, seconds) -> None:
    cloud.lead_to(cloud.instance.server.endpoint)
    store = cloud.copy(prepared, f"outage-{seconds:.0f}")
    with outage(cloud.instance, seconds) as (begin, back):

        def listen(done: int, total: int, figures: Mapping[str, float]) -> None:
            if done == 3:
                begin()

        made = encode(job_of(store, prepared.images), prepared.images, options=TWO, progress=listen)
        assert back.is_set(), "it was done before the server was back"
        assert_undisturbed(store, prepared, made)


@pytest.mark.s3
@pytest.mark.parametrize("seeds", [[1], pytest.param(range(2, 7), marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_faults_of_every_kind_change_nothing(cloud, prepared, seeds) -> None:
    hits = Counter[str]()
    for seed in seeds:
        cloud.lead_to(cloud.instance.server.endpoint)
        store = cloud.copy(prepared, f"faults-{seed}")
        proxy = FaultProxy(cloud.instance.server.endpoint, seed=seed, rate=0.05, stall=(0.2, 0.5))
        with running_proxy(proxy) as endpoint:
            cloud.lead_to(endpoint)
            began = time.monotonic()
            faulty = Store(store.uri)
            made = encode(job_of(faulty, prepared.images), prepared.images, options=TWO)
            told = f"{proxy.requests} requests in {time.monotonic() - began:.0f} s, faults {dict(proxy.hits)}"
            print(f"seed {seed}: {told}")  # noqa: T201
        hits += proxy.hits
        assert_undisturbed(store, prepared, made)
    assert not [kind for kind in FAULTS if not hits[kind]], "a kind of fault never happened"


@pytest.mark.s3
@pytest.mark.slow
def test_a_server_whose_disk_is_full_is_named(tmp_path) -> None:
    """It says `InternalError` for it, which may pass: so it is waited for, and then there is one line."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = 'mount -t tmpfs -o size=200m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    done = alone(shell, str(disk), sys.executable, FULL_SERVER)
    assert re.fullmatch(
        r"TransientError s3://tests/full/\d+: http://\S+ failed \(InternalError\) for \d+ s; check the server and its "
        r"disk, or retry for longer than SFTOK_S3_PATIENCE = 5 s\n[1-9]\d* whole\n",
        done,
    )


FULL_SERVER = """
import os, sys
from pathlib import Path
from infra.store.store import Store
from tests.support.s3_server import running_instance

with running_instance(Path(sys.argv[1])) as instance:
    os.environ.update(instance.server.environment, SFTOK_S3_PATIENCE="5")
    store, data = Store("s3://tests/full"), os.urandom(4 << 20)
    try:
        for number in range(100):
            store.write(str(number), data)
    except OSError as error:
        print(type(error).__name__, error)
    assert all(store.read(name) == data for name in store.list())
    print(len(store.list()), "whole")
"""


@pytest.mark.s3
def test_a_full_bucket_ends_in_one_line_and_the_rest_follows(cloud, prepared) -> None:
    cloud.lead_to(cloud.instance.server.endpoint)
    store = cloud.copy(prepared, "full")
    is_full = threading.Event()
    proxy = FaultProxy(
        cloud.instance.server.endpoint,
        chosen=lambda asked: "507" if is_full.is_set() and asked.method == "PUT" else None,
    )
    with running_proxy(proxy) as endpoint:
        cloud.lead_to(endpoint)
        faulty = Store(store.uri)
        job = job_of(faulty, prepared.images)

        def listen(done: int, total: int, figures: Mapping[str, float]) -> None:
            if done == 3:
                is_full.set()

        with pytest.raises(OSError, match=r"^s3://tests/full/\S+: no space left .*InsufficientStorage.*free") as caught:
            encode(job, prepared.images, options=HERE, progress=listen)
        assert "\n" not in str(caught.value)
        assert len([name for name in job.out.list() if name.endswith(".parquet.json")]) == 3
        is_full.clear()
        made = encode(job, prepared.images, options=HERE)
    assert_undisturbed(store, prepared, made)


def test_a_mistyped_endpoint_ends_the_command_in_one_line(tmp_path) -> None:
    """Nobody has answered there yet, so nobody is waited for."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SFTOK_"))}
    environment = {**clean, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_CONFIG_FILE": os.devnull}
    environment |= {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret", "SFTOK_S3_PATIENCE": "1e9"}
    command = [str(Path(sys.executable).parent / "sftok"), "encode", "--tokenizer", "1f2e", "--data", str(tmp_path)]
    done = subprocess.run(
        [*command, "--store", "s3://tests/x"], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = r"sftok: s3://tests/x/\S+: http://127\.0\.0\.1:9 does not answer .*; start the server or correct \w+\n"
    assert re.fullmatch(said, done.stderr)


# --- a full disk -----------------------------------------------------------------------------------------------------

FULL = """
import json, os, sys
from pathlib import Path
from infra.artifacts.manifest import Manifest
from infra.store.store import Store
from sftok.coding.encode import encode
from tests.sftok.coding.test_encode import HERE, hashes, job_of

disk, manifest = Path(sys.argv[1]), Path(sys.argv[2])
images = Manifest.model_validate_json(manifest.read_bytes())
filler = disk / "filler"
with filler.open("wb", buffering=0) as file:  # all but a few pages: two shards at least, and never all of them
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
os.truncate(filler, filler.stat().st_size // 4096 * 4096 - 12 * 4096)
job = job_of(Store(disk / "store"), images)
told = {}
try:
    encode(job, images, options=HERE)
except OSError as error:
    told |= {"kind": type(error).__name__, "said": str(error)}
told |= {"store": job.out.uri, "listed": job.out.list(), "files": sorted(os.listdir(job.out.path))}
kept = {name: (job.out.path / name).stat().st_mtime_ns for name in told["listed"] if name + ".json" in told["listed"]}
filler.unlink()
made = encode(job, images, options=HERE)
told["kept"] = sorted(name for name in kept if (job.out.path / name).stat().st_mtime_ns == kept[name])
told["made"] = hashes(made.files)
print(json.dumps(told))
"""


@pytest.mark.slow  # it mounts, which not every machine lets one do
def test_a_full_disk_ends_in_one_line_and_the_rest_follows(prepared, tmp_path) -> None:
    """On a real file system of 2 MB, which is gone with the process that sees it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    plan = ArtifactPlan(kind="images", version=1, config={})
    manifest = prepared.store.path / "artifacts/images" / plan.digest / "manifest.json"
    shell = 'mount -t tmpfs -o size=2m tmpfs "$1" && cp -r "$2" "$1/store" && exec "$3" -c "$4" "$1" "$5"'
    shown = [str(disk), str(prepared.store.path), sys.executable, FULL, str(manifest)]
    told = json.loads(alone(shell, *shown))
    assert told["kind"] == "StoreFullError"
    assert told["said"].startswith(f"{told['store']}/")
    assert "no space left (No space left on device); free some or choose another store" in told["said"]
    assert "\n" not in told["said"]
    assert ".partial-" not in told["said"]
    finished = [name for name in told["listed"] if f"{name}.json" in told["listed"]]
    assert 0 < len(finished) < len(prepared.made.files)
    assert told["kept"] == finished, "what was done is not done again"
    assert not [name for name in told["files"] if name.startswith(".")], "temporary files were left"
    assert told["made"] == hashes(prepared.made.files)


def alone(shell: str, *arguments: str) -> str:
    """What a shell script prints that mounts file systems which nobody else sees, and which end with it."""
    apart = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*apart, "sh", "-c", shell, "sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- signals ---------------------------------------------------------------------------------------------------------


class Cli:
    """`sftok encode` in a process group of its own, on prepared images that take it a while."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.store = Store(folder / "store")
        self.codes = self.store.at("artifacts", "codes")
        self.tokenizer = str(published(self.store, a_tokenizer()))
        self.images = self._prepared(str(draw(folder / "data", range(60))))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_", "SFTOK_"))}
        self.environment = {**clean, "SFTOK_HOME": str(folder / "home"), "SFTOK_STORE": self.store.uri, MARK: self.mark}
        self.command = [
            str(Path(sys.executable).parent / "sftok"), "encode", "--tokenizer", self.tokenizer, "--data", self.images,
            "--variants", ",".join(VIEWS), "--micro-batch", "4", "--json",
        ]  # fmt: skip
        for override in OVERRIDES:
            self.command += ["--set", override]

    def job(self, data: str) -> StageJob:
        """What the command would do, for doing it here."""
        views = EncodeConfig(variants=VIEWS, micro_batch=4)
        request = encode_request(
            views, tokenizer=self.tokenizer, data=data, store=self.store.uri, overrides=list(OVERRIDES)
        )
        return StageJob(request.recipe, self.store, data, HERE)

    def _prepared(self, data: str) -> str:
        return str(make(graph.PREPARE, self.job(data), {})[0])

    def start(self, workers: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, "--workers", str(workers)],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.default_int_handler
            ),  # a background shell ignores it
        )

    def finished(self) -> list[str]:
        return [name for name in self.codes.list() if name.endswith(".parquet.json")]

    def disturb(self, number: signal.Signals, moment: str, workers: int) -> tuple[int, list[str]]:
        """Send a signal as it starts, or when a shard more is done; the exit code and the lines on stderr."""
        before, process = len(self.finished()), self.start(workers)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("run ")
        while moment == "works" and len(self.finished()) <= before:
            assert process.poll() is None, f"it ended before it was disturbed: {process.communicate()[1][-3000:]}"
            time.sleep(0.01)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=120)
        assert out == "", f"it was done before the signal, or did not mind it: {err[-3000:]}"
        assert "Traceback" not in err
        assert self.left() == []
        return process.returncode, err.splitlines()

    def left(self) -> list[psutil.Process]:
        """Processes that are not gone within a while; they are known by a variable that they inherit."""
        end = time.monotonic() + 30
        while (found := list(self._marked())) and time.monotonic() < end:
            time.sleep(0.2)
        return found

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    found = Cli(tmp_path)
    yield found
    for process in found._marked():
        with contextlib.suppress(psutil.Error):
            process.kill()


INTERRUPT, TERMINATE = (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "disturbances",
    [
        pytest.param([(TERMINATE, "starts", 0), (INTERRUPT, "works", 2)], id="Ctrl-C"),
        pytest.param([(TERMINATE, "works", 2), (TERMINATE, "works", 0)], id="SIGTERM"),
        pytest.param([(INTERRUPT, "starts", 2), (INTERRUPT, "works", 0)], id="again"),
    ],
)
def test_a_run_that_is_told_to_end_goes_on_from_there(cli, tmp_path, disturbances) -> None:
    kept: dict[str, int] = {}
    for (number, code, word), moment, workers in disturbances:
        ended, lines = cli.disturb(number, moment, workers)
        assert ended == code
        assert [line for line in lines if line][-1] == f"sftok: {word}; the same command resumes from here"
        now = {name: (cli.codes.path / name).stat().st_mtime_ns for name in cli.finished()}
        assert moment == "starts" or len(now) > len(kept)
        assert {name: now.get(name) for name in kept} == kept
        kept = now
    assert not list(cli.codes.path.rglob("manifest.json"))
    process = cli.start(workers=0)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    shown = json.loads(out)
    assert shown["counts"]["failed"] == 0
    assert {name: (cli.codes.path / name).stat().st_mtime_ns for name in kept} == kept
    digest = shown["stages"]["encode"]["digest"]
    manifest = Manifest.model_validate_json(cli.codes.read(f"{digest}/manifest.json"))
    verify(cli.store, manifest)
    assert hashes(list(manifest.files)) == undisturbed(cli, manifest, Store(tmp_path / "undisturbed"))


def undisturbed(cli: Cli, manifest: Manifest, out: Store) -> dict[str, str]:
    """Hashes of the shards that the same stage makes elsewhere, in this process and at once."""
    return hashes(run_stage(graph.ENCODE, Work(cli.job(cli.images), manifest.plan, out, silent)).files)
