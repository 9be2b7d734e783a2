"""Images to codes: the same bytes whoever encodes them and however often, and every image accounted for."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from infra.artifacts.manifest import ArtifactPlan, Manifest, folder_of, key_of, publish, ref_of, verify
from infra.artifacts.reuse import Reuse
from infra.artifacts.shards import FileEntry
from infra.codes.contract import CodeRows, CodesInfo, read_codes, to_parquet
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions, map_shards
from infra.errors import TransientError
from infra.store.store import Store
from sftok.coding.encode import FAILED, EncodeJob, EncodeResult, ShardEncoder, encode, encode_images
from sftok.config import AugmentConfig, DataConfig
from sftok.images.dataset import ImageSet, variant_images
from sftok.images.decode_ahead import AHEAD, ahead
from sftok.images.preprocess import crop, resize_shorter, ten_crop, to_float, to_rgb
from sftok.images.views import CROPS
from sftok.prepare.prepare import prepare
from sftok.sources.sources import list_source
from sftok.weights.artifacts import load_tokenizer, save_tokenizer
from tests.support import ROOT
from tests.support.tiny_tokenizer import SIZE, TOKENIZER, tokenizer

DATA = DataConfig(image_size=SIZE, val_fraction=0.2, num_shards=6, num_val_shards=2)
AUGMENT = AugmentConfig(crop="center", flip=True, rotate=10)
VARIANTS = {"train": ("center", "affine-1"), "val": ("center",)}
IMAGES = ArtifactPlan(kind="images", version=1, config={})
HERE, ONE, TWO = (WorkerOptions(workers=workers) for workers in (0, 1, 2))
FIRST = "train-00000-of-00006.parquet"


def draw(folder: Path, numbers: Iterator[int] | range) -> Path:
    for number in numbers:
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 17 + number % 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def prepared(store: Store, data: Path, version: int = 1) -> Manifest:
    """An images artifact."""
    plan = IMAGES.model_copy(update={"config": {"version": version}})
    made = prepare(list_source(str(data)), DATA, out=folder_of(store, plan.kind, plan.digest))
    return publish(
        store, plan, files=made.files, counts=made.counts, metrics={}, seconds=0, content_digest=made.content_digest
    )


def plan_of(images: Manifest, store: Store) -> ArtifactPlan:
    return ArtifactPlan(kind="codes", version=1, config={}, inputs={"images": ref_of(store, images)})


def job_of(store: Store, images: Manifest, *, micro_batch: int = 4, **changes: object) -> EncodeJob:
    plan = plan_of(images, store)
    if not store.exists("tokenizer/config.json"):
        save_tokenizer(tokenizer(), store.at("tokenizer"))
    settings = {
        "tokenizer": "t" * 32,
        "codebook_size": TOKENIZER.codebook_size,
        "num_tokens": TOKENIZER.num_latent_tokens,
        "image_size": SIZE,
        "assignment": "nearest",
        "precision": "fp32",
        "class_names": ("a", "b"),
    }
    return EncodeJob(
        images=folder_of(store, images.kind, images.digest),
        tokenizer=store.at("tokenizer"),
        out=folder_of(store, plan.kind, plan.digest),
        info=CodesInfo.model_validate(settings | changes),
        variants=VARIANTS,
        augment=AUGMENT,
        micro_batch=micro_batch,
        reuse=Reuse(store, plan.prefix, "settings"),
    )


def hashes(files: list[FileEntry]) -> dict[str, str]:
    return {file.path: file.sha256 for file in files}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with prepared images and a tokenizer; tests work in copies of it."""
    home = tmp_path_factory.mktemp("home")
    images = prepared(Store(home / "store"), draw(home / "data", range(60)))
    job_of(Store(home / "store"), images)
    return home


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Callable[..., tuple[Store, Manifest]]:
    """Makes copies of the store."""

    def copy(name: str = "store") -> tuple[Store, Manifest]:
        subprocess.run(["cp", "-r", str(home / "store"), str(tmp_path / name)], check=True)
        store = Store(tmp_path / name)
        digest = IMAGES.model_copy(update={"config": {"version": 1}}).digest
        return store, Manifest.model_validate_json(store.read(f"artifacts/images/{digest}/manifest.json"))

    return copy


@pytest.fixture(scope="module")
def reference(home: Path) -> dict[str, str]:
    """Hashes of the code shards as one plain loop over whole shards makes them."""
    store = Store(home / "store")
    digest = IMAGES.model_copy(update={"config": {"version": 1}}).digest
    images = Manifest.model_validate_json(store.read(f"artifacts/images/{digest}/manifest.json"))
    job, made = job_of(store, images), {}
    model, image_set = load_tokenizer(job.tokenizer), ImageSet.open(job.images)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in image_set.names:
        rows, variants = image_set.read_shard(name, SIZE), job.variants_of(name)
        codes = [encode_images(model, variant_images(rows, variant, AUGMENT), "nearest", 4) for variant in variants]
        table = CodeRows(
            rows.image_ids * len(variants),
            np.tile(rows.class_ids.numpy().astype(np.int32), len(variants)),
            [variant for variant in variants for _ in rows.image_ids],
            torch.cat(codes).numpy().astype(np.uint16),
        )
        made[name] = hashlib.sha256(to_parquet(job.info, table)).hexdigest()
    torch.set_num_threads(before)
    return made


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with session(num_cpus=2):
        yield


def assert_whole(store: Store, images: Manifest, made: EncodeResult) -> None:
    """Every view of every image once."""
    plan = plan_of(images, store)
    manifest = publish(store, plan, files=made.files, counts=made.counts, metrics={}, seconds=0)
    verify(store, manifest)
    expected = set()
    for entry in images.files:
        if entry.path.startswith(("train-", "val-")):
            table = pq.read_table(store.at("artifacts/images", images.digest).path / entry.path)
            variants = VARIANTS[entry.path.partition("-")[0]]
            expected |= {(image_id, view) for image_id in table["image_id"].to_pylist() for view in variants}
    keys = [key_of(manifest, entry) for entry in manifest.files if entry.path != FAILED]
    _, rows = read_codes(store, keys)
    found = list(zip(rows.image_id, rows.variant, strict=True))
    assert len(found) == len(set(found)) == made.counts["rows"]
    assert set(found) == expected


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(("options", "decoders"), [(HERE, None), (ONE, None), (TWO, None), (HERE, 2), (ONE, 2)])
def test_the_bytes_are_those_of_a_plain_loop_for_any_number_of_processes(copied, reference, options, decoders) -> None:
    store, images = copied()
    job = EncodeJob(**{**vars(job_of(store, images)), "decoders": decoders})
    made = encode(job, images, options=options)
    assert hashes(made.files) == reference
    assert made.counts == {"shards": 8, "reused": 0, "rows": rows_of(images), "failed": 0}
    assert_whole(store, images, made)


def rows_of(images: Manifest) -> int:
    return images.counts["train"] * 2 + images.counts["val"]


class SuicidalEncoder(ShardEncoder):
    """Kills its own process, once, in the middle of a shard."""

    def __init__(self, job: EncodeJob, mark: str) -> None:
        super().__init__(job)
        self.mark, self.batches, self.encode = mark, 0, self.encoder
        self.encoder = self._count  # type: ignore[assignment]

    def _count(self, *arguments: object) -> torch.Tensor:
        self.batches += 1
        if self.batches == 7 and not os.path.exists(self.mark):
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.encode(*arguments)


@pytest.mark.usefixtures("ray")
def test_kill_9_of_a_worker_in_the_middle_changes_nothing(copied, reference, tmp_path) -> None:
    store, images = copied()
    job, mark = job_of(store, images), str(tmp_path / "killed")
    shards = [entry for entry in images.files if entry.path != "rejects.parquet"]
    done = map_shards(functools.partial(SuicidalEncoder, job, mark), shards, options=TWO)
    assert os.path.exists(mark)
    assert hashes([shard.file for shard in done]) == reference
    assert_whole(store, images, encode(job, images, options=HERE))


@pytest.mark.usefixtures("ray")
def test_kill_9_from_outside_changes_nothing(copied, reference) -> None:
    """As the system does it where memory runs out."""
    store, images = copied()
    job, killed = job_of(store, images), threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(name.endswith(".parquet.json") for name in job.out.list()):
            time.sleep(0.005)
        for process in psutil.process_iter(["cmdline"]):
            if any("ray::_Actor" in part for part in process.info["cmdline"] or ()) and is_ours(process):
                process.kill()
                killed.set()
                return

    thread = threading.Thread(target=kill)
    thread.start()
    made = encode(job, images, options=TWO)
    thread.join()
    assert killed.is_set()
    assert hashes(made.files) == reference


def is_ours(process: psutil.Process) -> bool:
    return any(parent.pid == os.getpid() for parent in process.parents())


def test_what_is_done_is_not_done_again(copied, reference) -> None:
    store, images = copied()
    job = job_of(store, images)
    encode(job, images, options=HERE)
    job.out.delete(FIRST)
    job.out.delete(f"{FIRST}.json")
    times = {name: (job.out.path / name).stat().st_mtime_ns for name in job.out.list()}
    assert hashes(encode(job, images, options=HERE).files) == reference
    assert {name: (job.out.path / name).stat().st_mtime_ns for name in times} == times


ENCODE = """
import sys, time
from pathlib import Path
from infra.artifacts.manifest import Manifest
from infra.store.store import Store
from infra.compute.workers import WorkerOptions
from sftok.coding.encode import encode
from tests.sftok.coding.test_encode import hashes, job_of
store = Store(sys.argv[1])
images = Manifest.model_validate_json(store.read(sys.argv[2]))
job = job_of(store, images)
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.001)
made = encode(job, images, options=WorkerOptions(workers=0))
print(sorted(hashes(made.files).items()), made.counts)
"""


def test_two_processes_at_once_do_not_harm_each_other(copied, reference, tmp_path) -> None:
    store, images = copied()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    manifest = f"artifacts/images/{images.digest}/manifest.json"
    command = [sys.executable, "-c", ENCODE, store.uri, manifest, str(theirs), str(ours)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not theirs.exists():
            assert process.poll() is None
            time.sleep(0.001)
        ours.touch()
        made = encode(job_of(store, images), images, options=HERE)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert hashes(made.files) == reference
    assert out == f"{sorted(reference.items())} {made.counts}\n"
    again = encode(job_of(store, images), images, options=HERE)
    assert hashes(again.files) == reference
    assert_whole(store, images, again)


# --- images that fail ------------------------------------------------------------------------------------------------


def tamper(store: Store, images: Manifest, name: str, data: bytes = b"\xff\xd8 no image") -> str:
    """Replace the bytes of an image inside a shard; the Parquet stays valid."""
    path = store.at("artifacts", "images", images.digest).path / name
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = data
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return rows[1]["image_id"]


def test_an_image_that_fails_fails_into_the_ledger(copied, reference) -> None:
    store, images = copied()
    lost = tamper(store, images, FIRST)
    job = job_of(store, images)
    made = encode(job, images, options=HERE)
    assert made.counts == {"shards": 8, "reused": 0, "rows": rows_of(images) - 2, "failed": 2}
    others = {name: sha256 for name, sha256 in hashes(made.files).items() if name not in (FIRST, FAILED)}
    assert others == {name: sha256 for name, sha256 in reference.items() if name != FIRST}
    failed = pq.read_table(job.out.path / FAILED).to_pylist()
    assert [(row["image_id"], row["variant"]) for row in failed] == [(lost, "affine-1"), (lost, "center")]
    assert {row["reason"] for row in failed} == {"not an image in a known format"}
    info, rows = read_codes(job.out, [FIRST])
    assert info == job.info
    assert lost not in rows.image_id
    told = json.loads(pq.read_schema(job.out.path / FIRST).metadata[b"sftok.failed"])
    assert told == [[lost, "not an image in a known format"]]
    again = encode(job, images, options=HERE)  # from what the shards say, nothing is encoded
    assert again == made


def test_the_other_images_keep_their_codes(copied) -> None:
    store, images = copied()
    whole = job_of(store, images)
    encode(whole, images, options=HERE)
    _, before = read_codes(whole.out, [FIRST])
    store, images = copied("tampered")
    lost = tamper(store, images, FIRST)
    encode(job_of(store, images), images, options=HERE)
    _, after = read_codes(job_of(store, images).out, [FIRST])
    kept = [row for row, image_id in enumerate(before.image_id) if image_id != lost]
    assert after.image_id == [before.image_id[row] for row in kept]
    assert np.array_equal(after.codes, before.codes[kept])


def test_a_shard_in_which_an_image_failed_is_tried_again_by_the_next_version(copied) -> None:
    store, images = copied()
    tamper(store, images, FIRST)
    encode(job_of(store, images), images, options=HERE)
    job = other_version(job_of(store, images))
    assert encode(job, images, options=HERE).counts["reused"] == 7


def other_version(job: EncodeJob) -> EncodeJob:
    assert job.reuse is not None
    other = Reuse(job.reuse.root, "artifacts/codes/" + "f" * 32, job.reuse.identity)
    return EncodeJob(**{**vars(job), "out": other.root.at(other.artifact), "reuse": other})


def test_counts_that_do_not_add_up_are_not_published(copied) -> None:
    store, images = copied()
    more = images.model_copy(update={"counts": {**images.counts, "val": images.counts["val"] + 1}})
    expected = rows_of(images)
    with pytest.raises(ValueError, match=rf"= {expected + 1}, but .* has {expected} rows \+ 0 failed = {expected}:"):
        encode(job_of(store, images), more, options=HERE)


def test_a_shard_with_other_rows_than_its_entry_says_is_refused(copied) -> None:
    store, images = copied()
    path = store.at("artifacts", "images", images.digest).path / FIRST
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    job = job_of(store, images)
    with pytest.raises(ValueError, match=rf"{FIRST} has {len(table) - 1} images, its manifest says {len(table)}"):
        encode(job, images, options=HERE)
    assert not job.out.exists(FIRST)


@pytest.mark.parametrize("damage", ["cut", "scrambled"])
def test_a_damaged_shard_is_named(copied, damage) -> None:
    store, images = copied()
    path = store.at("artifacts", "images", images.digest).path / FIRST
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "cut" else data[:4] + bytes(60) + data[64:])
    with pytest.raises(ValueError, match=rf"{FIRST} is no image Parquet"):
        encode(job_of(store, images), images, options=HERE)


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("options", [HERE, ONE], ids=["0", "1"])
def test_a_full_memory_is_not_a_failed_image(copied, options) -> None:
    store, images = copied()
    job = job_of(store, images)
    shards = [entry for entry in images.files if entry.path == FIRST]
    with pytest.raises(TransientError, match=r"memory ran out .*smaller encode\.micro_batch"):
        map_shards(functools.partial(HungryEncoder, job), shards, options=options)
    assert not [name for name in job.out.list() if name.startswith("train")]


class HungryEncoder(ShardEncoder):
    """Asks torch for more memory than there is."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__(job)
        self.encoder = lambda *_: torch.empty(1 << 55)  # type: ignore[assignment]


def test_unknown_views_are_refused_before_workers_start(copied) -> None:
    store, images = copied()
    job = job_of(store, images)
    for variant, said in (("tilted", "'tilted' is not known"), ("affine-1", "would equal center")):
        other = EncodeJob(**{**vars(job), "variants": {"train": (variant,), "val": ("center",)}})
        with pytest.raises(ValueError, match=said):
            encode(EncodeJob(**{**vars(other), "augment": AugmentConfig()}), images, options=HERE)


class PixelEncoder(ShardEncoder):
    """Its codes tell images apart: they are some pixels."""

    def __init__(self, job: EncodeJob) -> None:
        super().__init__(job)
        self.encoder = lambda images, _: self.codes(images)  # type: ignore[assignment,misc]

    @staticmethod
    def codes(images: torch.Tensor) -> torch.Tensor:
        """The red of the diagonal, (n, N) below the codebook's size."""
        diagonal = images[:, 0].diagonal(dim1=1, dim2=2)[:, : TOKENIZER.num_latent_tokens]
        return (diagonal * 255).round().long() % TOKENIZER.codebook_size


def test_ten_crops_are_ten_rows_an_image_and_leave_other_views_alone(copied, home, reference) -> None:
    store, images = copied()
    job = job_of(store, images)
    views = {"variants": {"train": ("center", "flip", *CROPS), "val": ("center",)}, "ten_crop_resize": 1.5}
    cropped = EncodeJob(**{**vars(job), **views, "out": store.at("cropped"), "reuse": None})
    made = encode(cropped, images, options=HERE)
    assert (made.counts["rows"], made.counts["failed"]) == (12 * images.counts["train"] + images.counts["val"], 0)
    assert {file.path: file.sha256 for file in made.files if "val" in file.path}.items() <= reference.items()

    entry, pixels = next(file for file in images.files if file.path == FIRST), store.at("pixels")
    PixelEncoder(EncodeJob(**{**vars(cropped), "out": pixels}))(entry)
    rows = read_codes(pixels, [FIRST])[1]
    found = dict(zip(zip(rows.image_id, rows.variant, strict=True), rows.codes.tolist(), strict=True))
    assert len(found) == 12 * (entry.rows or 0)
    for image_id in set(rows.image_id):
        image = to_rgb((home / "data" / image_id).read_bytes())
        small, large = (crop(resize_shorter(image, side), side) for side in (SIZE, int(SIZE * 1.5)))
        expected = [small, small.flip(-1), *(ten_crop(large, SIZE, number) for number in range(1, 11))]
        codes = PixelEncoder.codes(to_float(torch.stack(expected))).tolist()
        assert [found[image_id, view] for view in cropped.variants["train"]] == codes
        assert len(set(map(tuple, codes))) == 12


def test_crops_without_room_are_refused_before_workers_start(copied) -> None:
    store, images = copied()
    tight = {"variants": {"train": CROPS, "val": ("center",)}, "ten_crop_resize": 1.01}
    with pytest.raises(ValueError, match=f"leaves crops of {SIZE} pixels no room"):
        encode(EncodeJob(**{**vars(job_of(store, images)), **tight}), images, options=HERE)


# --- other versions of the data --------------------------------------------------------------------------------------


class Counting:
    """How many shards are encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        original = ShardEncoder._encode

        def counted(encoder: ShardEncoder, shards: Sequence[FileEntry]) -> object:
            self.names += [images.path for images in shards]
            return original(encoder, shards)

        monkeypatch.setattr(ShardEncoder, "_encode", counted)


@pytest.mark.parametrize("change", ["add", "change", "remove"])
def test_only_the_touched_shard_is_encoded_again(home, copied, tmp_path, monkeypatch, change) -> None:
    store, images = copied()
    encode(job_of(store, images), images, options=HERE)
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(home / "data"), str(data)], check=True)
    if change == "add":
        draw(data, [777])
    elif change == "change":
        (data / "a" / "010.png").write_bytes((data / "b" / "011.png").read_bytes())
    else:
        (data / "a" / "010.png").unlink()
    newer = prepared(store, data, version=2)
    touched = {entry.path for entry in newer.files} - {
        new.path for new, old in zip(newer.files, images.files, strict=True) if new.sha256 == old.sha256
    }
    assert len(touched) == 1
    counting = Counting(monkeypatch)
    made = encode(job_of(store, newer), newer, options=HERE)
    assert set(counting.names) == touched
    assert len(counting.names) == 1
    assert made.counts["reused"] == 7
    assert_whole(store, newer, made)
    scratch = Store(tmp_path / "scratch")
    again = prepared(scratch, data, version=2)
    assert hashes(encode(job_of(scratch, again), again, options=HERE).files) == hashes(made.files)


def test_references_go_to_where_the_file_is_not_from_one_to_the_next(copied) -> None:
    store, images = copied()
    first = job_of(store, images)
    encode(first, images, options=HERE)
    second = other_version(first)
    encode(second, images, options=HERE)
    third = EncodeJob(**{**vars(second), "out": store.at("artifacts/codes/" + "e" * 32)})
    third = EncodeJob(**{**vars(third), "reuse": Reuse(store, "artifacts/codes/" + "e" * 32, "settings")})
    made = encode(third, images, options=HERE)
    assert first.reuse is not None
    assert {file.source for file in made.files} == {f"{first.reuse.artifact}/{file.path}" for file in made.files}
    assert third.out.list() == []


@pytest.mark.parametrize("damage", ["gone", "of another size", "an unreadable record"])
def test_a_reference_that_does_not_hold_is_encoded_again(copied, monkeypatch, damage) -> None:
    store, images = copied()
    first = job_of(store, images)
    before = encode(first, images, options=HERE)
    if damage == "gone":
        first.out.delete(FIRST)
    elif damage == "of another size":
        first.out.write(FIRST, first.out.read(FIRST) + b"x")
    else:
        for name in store.list("shards/"):
            store.write(name, b"{")
    counting = Counting(monkeypatch)
    second = other_version(first)
    made = encode(second, images, options=HERE)
    assert sorted(counting.names) == [FIRST] if damage != "an unreadable record" else len(counting.names) == 8
    assert hashes(made.files) == hashes(before.files)
    third = EncodeJob(**{**vars(second), "reuse": Reuse(store, "artifacts/codes/" + "e" * 32, "settings")})
    third = EncodeJob(**{**vars(third), "out": store.at("artifacts/codes/" + "e" * 32)})
    assert encode(third, images, options=HERE).counts["reused"] == 8  # the record was mended


def test_other_settings_share_nothing(copied, monkeypatch) -> None:
    store, images = copied()
    encode(job_of(store, images), images, options=HERE)
    job = other_version(job_of(store, images))
    assert job.reuse is not None
    job = EncodeJob(**{**vars(job), "reuse": Reuse(store, job.reuse.artifact, "other settings")})
    assert encode(job, images, options=HERE).counts["reused"] == 0


# --- memory ----------------------------------------------------------------------------------------------------------


def test_what_is_decoded_ahead_is_bounded_and_overlaps() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    for number in ahead(items(), AHEAD):
        deadline = time.monotonic() + 5
        while len(made) < min(number + 1 + AHEAD, 20) and time.monotonic() < deadline:
            time.sleep(0.001)  # the next ones are made while this one is in use
        time.sleep(0.005)
        assert len(made) == min(number + 1 + AHEAD, 20)


def test_an_error_while_decoding_ahead_comes_out_and_stops_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    found = ahead(items(), AHEAD)
    assert next(found) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(found)
    threads = threading.active_count()
    one = ahead(iter(range(100)), AHEAD)
    next(one)
    one.close()
    assert threading.active_count() <= threads


def test_no_more_than_a_micro_batch_is_ever_float(copied, monkeypatch) -> None:
    store, images = copied()
    sizes: list[int] = []

    def measured(rows, variant, augment):
        sizes.append(len(rows.image_ids))
        return variant_images(rows, variant, augment)

    for module in ("encode", "shard"):
        monkeypatch.setattr(f"sftok.coding.{module}.variant_images", measured)
    encode(job_of(store, images, micro_batch=2), images, options=HERE)
    assert max(sizes) == 2
    assert sum(sizes) == rows_of(images) + 2  # and one image for each view, to see that it is known


@pytest.mark.s3
def test_on_s3(copied, reference, s3_store) -> None:
    store, images = copied()
    for name in store.list():
        s3_store.write(name, store.read(name))
    job = job_of(s3_store, images)
    assert hashes(encode(job, images, options=HERE).files) == reference
    made = encode(other_version(job), images, options=HERE)
    assert made.counts["reused"] == 8
    assert hashes(made.files) == reference
