"""`sftok sample` on a toy generator: which samples, the artifact that they are, their images in three kinds."""

import errno
import json
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from flows.cli import sample as cli_sample
from flows.inference import files as sample_files
from flows.inference.classes import chosen_classes
from flows.inference.files import GAP, ImageBatch, labelled_sheet, npz_writer
from flows.inference.sample import SHEET_SAMPLES, SampleArguments, check, decoded
from flows.inference.tokenizer import decoding_device
from flows.pipeline.generator import SAMPLE
from generator.artifacts import GeneratorFile, save_generator
from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, MaskedConfig, SampleConfig
from generator.data import space_of
from generator.masked import MaskedGenerator
from generator.samples import SampleJob, generate, plan_shards
from infra.artifacts.artifact import Artifact
from infra.artifacts.made_on import begin_shards
from infra.artifacts.manifest import (
    MANIFEST,
    ArtifactPlan,
    ArtifactRef,
    folder_of,
    manifest_of,
    publish,
    ref_of,
    verify,
)
from infra.artifacts.shards import write_shard
from infra.artifacts.weights import load_config
from infra.codes.contract import CodesInfo, read_codes
from infra.compute.device import default_device, device_kind
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from sftok.coding.decode import ImageDecoder
from sftok.config import DecodingConfig
from sftok.model.tokenizer import SFTok
from tests.support.codes_info import codes_info
from tests.support.weights_cli import SIZE, TOKENIZER, a_teacher, a_tokenizer, published

NAMES = ("cat", "dog, hound", "7", "dove")


def run(*arguments: object) -> int:
    """The exit code; an error is one line on stderr, as in `flows.cli.main.main`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    cli_sample.register(app)
    app.callback()(lambda: None)  # one command alone would take no name
    try:
        code = app(args=["sample", *map(str, arguments)], prog_name="sftok", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"sftok: {' '.join(error.format_message().split())}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0


def a_generator(
    store: Store, tokenizer: str, *, names: tuple[str, ...] | None = NAMES, masked: bool = False
) -> ArtifactRef:
    """A generator of a tokenizer's codes, untrained, as an artifact."""
    info = codes_info(
        TOKENIZER.codebook_size, TOKENIZER.num_latent_tokens, tokenizer=tokenizer, image_size=SIZE, class_names=names
    )
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 1, "heads": 2, "ffn_width": 16}
    kind = MaskedGenerator if masked else Generator
    model = kind(MaskedConfig(**sizes) if masked else GeneratorConfig(**sizes), space_of(info))
    model.initialise()
    plan = ArtifactPlan(
        kind="generator", version=1, config={"of": tokenizer, "names": list(names or ()), "masked": masked}
    )
    files = save_generator(model, info, folder_of(store, plan.kind, plan.digest))
    return ref_of(store, publish(store, plan, files=files, counts={}, metrics={}, seconds=0.0))


@pytest.fixture
def generator(store: Store) -> ArtifactRef:
    """A generator whose tokenizer is in the store and has a pixel decoder."""
    return a_generator(store, published(store, a_tokenizer()).digest)


def sample(capsys: pytest.CaptureFixture[str], ref: ArtifactRef, store: Store, *arguments: object) -> dict:
    given = ["--per-class", 3, "--micro-batch", 4, "--workers", 0, *arguments]
    code = run("--generator", ref, "--store", store.uri, *given, "--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def refused(capsys: pytest.CaptureFixture[str], ref: object, store: Store, *arguments: object, code: int = 2) -> str:
    """The one line that is printed."""
    assert run("--generator", ref, "--store", store.uri, "--workers", 0, *arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    error = printed.err.splitlines()[-1]
    assert error.startswith("sftok: ")
    return error


def rows_of(store: Store, made: dict) -> tuple[CodesInfo, list[str], np.ndarray, np.ndarray]:
    manifest = manifest_of(store, ArtifactRef(kind="samples", digest=made["samples"].split("/")[1], uri=made["uri"]))
    verify(store, manifest)
    info, rows = read_codes(Store(made["uri"]), [file.path for file in manifest.files])
    return info, rows.image_id, rows.class_id, rows.codes


# --- codes -----------------------------------------------------------------------------------------------------------


def test_samples_are_a_balanced_artifact_that_is_found_again(
    store: Store, generator: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sample(capsys, generator, store, "--classes", "0,2-3", "--cfg-scale", 1.5, "--seed", 5)
    info, ids, classes, _ = rows_of(store, first)
    assert Counter(classes.tolist()) == {0: 3, 2: 3, 3: 3}
    assert len(set(ids)) == 9
    assert info.sampling is not None
    assert info.sampling["samples_per_shard"] == 256
    noted = [info.sampling[name] for name in ("generator", "seed", "classes", "cfg_scale")]
    assert noted == [generator.digest, 5, [0, 2, 3], 1.5]
    assert first == {
        "samples": first["samples"],
        "uri": f"{store.uri}/artifacts/{first['samples']}",
        "state": "Completed",
        "generator": str(generator),
        "classes": [0, 2, 3],
        "per_class": 3,
        "count": 9,
        "images": None,
        "grid": None,
        "npz": None,
    }
    again = sample(capsys, generator, store, "--classes", "dove,2", "--classes", "cat", "--cfg-scale", 1.5, "--seed", 5)
    assert again == {**first, "state": "Cached"}
    for other in (["--seed", 6], ["--seed", 5, "--temperature", 0.5], ["--seed", 5, "--top-k", 3]):
        changed = sample(capsys, generator, store, "--classes", "0,2-3", "--cfg-scale", 1.5, *other)
        assert changed["samples"] != first["samples"]


def test_samples_of_all_classes_are_those_of_the_pipeline(
    store: Store, generator: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an identity of its own for what a run has drawn already."""
    config = SampleConfig(per_class=3, micro_batch=4).on("cpu")
    what = {"sample": config.as_json(), "seed": 0, "threads": 1}  # as flows.pipeline.graph identifies them
    plan = ArtifactPlan(kind="samples", version=SAMPLE.version, config=what, inputs={"generator": generator})
    folder = folder_of(store, plan.kind, plan.digest)
    job = SampleJob(folder_of(store, "generator", generator.digest), folder, config, 0, generator.digest)
    files = generate(job, options=WorkerOptions())
    publish(store, plan, files=files, counts={"shards": 1, "samples": 12}, metrics={}, seconds=0.0)
    for classes in ([], ["--classes", "0-3"]):
        made = sample(capsys, generator, store, *classes)
        assert (made["state"], made["samples"]) == ("Cached", f"samples/{plan.digest}")


def test_a_class_is_drawn_the_same_alone_and_among_others(
    store: Store, generator: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []
    for classes, count in (("2", 3), ("1-3", 9)):
        _, ids, _, rows = rows_of(store, sample(capsys, generator, store, "--classes", classes))
        assert len(ids) == count
        codes.append({name: row.tolist() for name, row in zip(ids, rows, strict=True) if "class-00002" in name})
    assert len(codes[0]) == 3
    assert codes[0] == codes[1]


@pytest.mark.slow
def test_workers_change_no_byte(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards in a store of their own for each, and the images decoded from them."""
    written = []
    for workers in (0, 1):
        place = Store(tmp_path / f"store-{workers}")
        ref = a_generator(place, published(place, a_tokenizer()).digest)
        npz = tmp_path / f"{workers}.npz"
        made = sample(capsys, ref, place, "--classes", "0,1", "--workers", workers, "--npz", npz)
        shards = {name: place.at("artifacts", made["samples"]).read(name) for name in _shards(place, made)}
        written.append((shards, npz.read_bytes()))
    assert len(written[0][0]) == 1
    assert written[0] == written[1]


def _shards(store: Store, made: dict) -> list[str]:
    return [name for name in store.at("artifacts", made["samples"]).list() if name.endswith(".parquet")]


def test_masked_generators_and_those_without_classes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = published(store, a_tokenizer()).digest
    masked = a_generator(store, tokenizer, masked=True)
    assert sample(capsys, masked, store, "--num-steps", 3)["count"] == 12
    assert "--top-k = 5 has no effect on a generator that is masked" in refused(capsys, masked, store, "--top-k", 5)
    assert sample(capsys, masked, store, "--num-steps", 3, "--annealing", 0.5, 0.8)["state"] == "Completed"
    said = refused(capsys, masked, store, "--annealing", 0, 1)
    assert said == "sftok: --annealing = (0.0, 1.0) divides by 0 or less: give a > 0 and b >= 0"
    plain = a_generator(store, tokenizer, names=None)
    made = sample(capsys, plain, store)
    assert (made["count"], made["classes"]) == (3, [])
    assert set(rows_of(store, made)[2].tolist()) == {-1}
    assert "was trained without classes: leave out --classes" in refused(capsys, plain, store, "--classes", 0)


def test_a_shard_of_another_length_is_not_published(
    store: Store, generator: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sample(capsys, generator, store)
    folder = folder_of(store, "samples", made["samples"].split("/")[1])
    (shard,) = _shards(store, made)
    data = folder.read(shard)
    for name in (MANIFEST, shard, f"{shard}.json"):
        folder.delete(name)
    write_shard(folder, shard, data, 11)
    arguments = ["--per-class", 3, "--micro-batch", 4, "--grid", tmp_path / "grid.png"]
    assert "has 11 samples of 12" in refused(capsys, generator, store, *arguments, code=1)
    assert not folder.exists(MANIFEST)
    assert not (tmp_path / "grid.png").exists()


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [
        ([], None),
        (["0-3"], None),
        (["3,0,0-1"], (0, 1, 3)),
        (["dog, hound"], (1,)),  # a name with a comma
        (["dog, hound", "dove, cat"], (0, 1, 3)),
        (["2"], (2,)),  # a number is an id
        (["#2", "0"], (0, 2)),
        (["#0-1,#3"], (0, 1, 3)),
        (["7"], (2,)),  # or the name of the only class that it can be
    ],
)
def test_classes_as_people_write_them(texts: list[str], chosen: tuple[int, ...] | None) -> None:
    assert chosen_classes(texts, NAMES, "generator/x") == chosen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4", "--classes 4: class ids are 0 to 3"),
        ("#7", "--classes #7: class ids are 0 to 3"),  # not the class whose name it is
        ("2-99999999999999", "class ids are 0 to 3"),
        ("3-1", "ends before it starts: write 1-3"),
        ("cad", "'cad' is not a class of the generator; did you mean cat?"),
        ("zebra", "give a name or an id from #0 to #3"),
        ("", "'' is not a class"),
        ("1,,2", "'' is not a class"),
        ("-1", "'-1' is not a class"),
    ],
)
def test_classes_that_are_not_there(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="--classes") as refusal:
        chosen_classes([text], NAMES, "generator/x")
    assert said in str(refusal.value)


def test_a_name_of_two_classes_is_ambiguous() -> None:
    with pytest.raises(ValueError, match="2 classes have this name; give an id, quoted: #0 or #2"):
        chosen_classes(["crane"], ["crane", "maillot", "crane"], "generator/x")


def test_a_number_that_could_be_an_id_or_a_name_is_taken_as_neither() -> None:
    names = ["0", "1", "10", "11", "2", "3"]  # numbers sorted as text, as older generators have them
    for text in ("2", "10,2", "1-3", "0-1,2"):
        with pytest.raises(ValueError, match=r"--classes .* could be .*: write '#") as refusal:
            chosen_classes([text], names, "generator/x")
        assert "called" in str(refusal.value)
    assert chosen_classes(["0", "1", "10"], names, "generator/x") == (0, 1, 2)  # no other reading
    assert chosen_classes(["#2", "#4-5"], names, "generator/x") == (2, 4, 5)
    assert chosen_classes(["3-4"], [str(name) for name in range(12)], "generator/x") == (3, 4)


def test_names_are_compared_in_unicode_normal_form_c() -> None:
    assert chosen_classes(["cafe\u0301"], ["bar", "caf\u00e9"], "generator/x") == (1,)


@pytest.mark.parametrize(("classes", "said"), [((0, 4), "class id 4"), ((-1,), "class id -1"), ((1, 1), "twice")])
def test_shards_of_classes_that_are_not_there_are_not_planned(classes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_shards(CodeSpace(8, 4, 4), SampleConfig(), classes)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_drawn(
    store: Store, generator: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ArtifactRef(kind="tokenizer", digest="f" * 32, uri="")
    lost = a_generator(store, tokenizer.digest)
    other = Store(tmp_path / "other")
    alone = a_generator(other, published(other, a_tokenizer(pixels=False)).digest)
    taken = tmp_path / "taken.png"
    taken.write_bytes(b"mine")
    grid = ["--grid", tmp_path / "new" / "grid.png"]
    tokenizers = store.at("artifacts", "tokenizer").folders()
    for ref, arguments, said in [
        (generator, ["--classes", "0-9"], "class ids are 0 to 3"),
        (generator, ["--top-p", 0], "--top-p 0: input should be greater than 0"),
        (generator, ["--temperature", -1], "--temperature -1: input should be greater than or equal to 0"),
        (generator, ["--num-steps", 3], "--num-steps = 3 has no effect"),
        (generator, ["--grid", taken], f"{taken} exists"),
        (generator, ["--grid", tmp_path / "grid.jpg"], "the name must end in .png"),
        (generator, ["--npz", tmp_path / "all.npy"], "the name must end in .npz"),
        (lost, grid, f"draws codes of {tokenizer}, which is not in {store.uri}"),
        (alone.uri, grid, "names no teacher to decode them"),
        ("tokenizer/", grid, "is no finished artifact"),
        (f"tokenizer/{next(iter(tokenizers))}", grid, "where a generator is wanted"),
    ]:
        place = other if ref == alone.uri else store
        assert said in refused(capsys, ref, place, *arguments)
    assert taken.read_bytes() == b"mine"
    assert not (tmp_path / "new").exists()
    assert not list(store.at("artifacts", "samples").folders())
    assert sample(capsys, lost, store)["count"] == 12  # codes alone need no tokenizer


def test_pictures_are_never_overwritten(
    store: Store, generator: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / "class-00001" / "sample-000002.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert f"{mine} exists" in refused(capsys, generator, store, "--per-class", 3, "--images", tmp_path / "out")
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [mine]
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("also", [(), ("--npz",)])
def test_pictures_that_were_interrupted_go_on(
    also: tuple[str, ...], store: Store, generator: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A full disk at the seventh: the same command leaves those that are there alone and makes the others."""
    folder = tmp_path / "out"
    arguments = ["--per-class", 3, "--micro-batch", 4, "--images", folder, *also]
    arguments += [tmp_path / "all.npz"] if also else []
    whole = sample_files.write_whole

    def full(file: Path, data: bytes) -> None:
        if file.suffix == ".png" and len(list(folder.rglob("*.png"))) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file, data)

    with monkeypatch.context() as broken:
        broken.setattr(sample_files, "write_whole", full)
        assert "No space left" in refused(capsys, generator, store, *arguments, code=1)
    begun = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*.png")}
    assert len(begun) == 6
    assert all(Image.open(file).size == (SIZE, SIZE) for file in begun)
    # Of other settings they are somebody's pictures.
    assert "exists: name another" in refused(capsys, generator, store, *arguments, "--decode-steps", 2)
    assert sample(capsys, generator, store, *arguments)["images"] == str(folder)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in begun} == begun
    assert len(list(folder.rglob("*.png"))) == 12
    assert not [file for file in folder.rglob("*") if file.name.startswith(".")]
    assert "exists: name another" in refused(capsys, generator, store, *arguments)  # finished


def test_samples_that_another_kind_of_device_began_are_not_mixed(
    store: Store, generator: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node of another kind that goes on with them is told so before it draws, and may begin anew."""
    made = sample(capsys, generator, store, "--seed", 9)
    folder = Store(made["uri"])
    folder.delete("manifest.json")
    theirs = {"kind": "cpu of another sort", "torch": "2.14.1"}
    folder.at("made-on").delete("kind.json")
    begin_shards(folder, theirs)
    (shard,) = [name for name in folder.list() if name.endswith(".parquet")]
    folder.write(shard, b"theirs")  # what must not be in what is published
    line = refused(capsys, generator, store, "--per-class", 3, "--micro-batch", 4, "--seed", 9, code=1)
    assert "its shards were begun on cpu of another sort" in line
    assert "--anew" in line
    again = sample(capsys, generator, store, "--seed", 9, "--anew")
    assert again == made
    manifest = manifest_of(store, ArtifactRef(kind="samples", digest=made["samples"].split("/")[1], uri=made["uri"]))
    verify(store, manifest)
    assert [facts["kind"] for facts in manifest.made_on] == [device_kind("cpu")]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_decoded_where_samples_were_asked_to_be_drawn(
    store: Store, generator: ArtifactRef, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    """On a machine with a GPU, which `--device cpu` leaves alone; without one, what a cluster's drew, on the CPU."""
    monkeypatch.setattr("flows.inference.tokenizer.default_device", lambda: "cuda")  # that is not here: it would fail
    sample(capsys, generator, store, "--device", "cpu", "--grid", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()
    monkeypatch.undo()
    assert decoding_device("cuda") == default_device()


def expected_images(store: Store, made: dict, model: SFTok, teacher: object = None) -> dict[str, np.ndarray]:
    """All samples (S, S, 3) as the library decodes them, by id, in the order of the shards."""
    _, ids, _, codes = rows_of(store, made)
    decoder = ImageDecoder(model, teacher, micro_batch=4)
    images = decoder(torch.from_numpy(codes).long(), ids, DecodingConfig(num_steps=2)).images
    return dict(zip(ids, images.permute(0, 2, 3, 1).numpy(), strict=True))


def test_three_kinds_of_images_of_one_decoding(
    store: Store, generator: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, grid, npz = tmp_path / "pictures", tmp_path / "grid.png", tmp_path / "samples.npz"
    arguments = ["--classes", "1,3", "--decode-steps", 2]
    made = sample(capsys, generator, store, *arguments, "--images", folder, "--grid", grid, "--npz", npz)
    assert [made[name] for name in ("images", "grid", "npz")] == [str(folder), str(grid), str(npz)]
    expected = expected_images(store, made, a_tokenizer())
    assert sorted(expected) == [f"class-0000{c}/sample-00000{n}" for c in (1, 3) for n in range(3)]

    found = {str(file.relative_to(folder)): np.array(Image.open(file)) for file in folder.rglob("*.png")}
    assert found.keys() == {f"{name}.png" for name in expected}
    assert all(np.array_equal(found[f"{name}.png"], image) for name, image in expected.items())

    with np.load(npz) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (6, SIZE, SIZE, 3))
    assert np.array_equal(array, np.stack(list(expected.values())))
    assert {file.name for file in tmp_path.iterdir()} == {"store", "pictures", "grid.png", "samples.npz"}

    sheet = np.array(Image.open(grid))
    pitch = sheet.shape[0] // 2 + GAP // 2  # a title and a picture for each of two classes
    for row, class_id in enumerate((1, 3)):
        top = row * pitch + pitch - GAP - SIZE
        for number in range(3):
            left = number * (SIZE + GAP)
            picture = expected[f"class-0000{class_id}/sample-00000{number}"]
            assert np.array_equal(sheet[top : top + SIZE, left : left + SIZE], picture)
        assert (sheet[row * pitch : top] < 128).any(), "no title"


def test_a_contact_sheet_decodes_the_first_samples_only(
    store: Store, generator: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.png"
    assert (
        run(
            "--generator",
            generator,
            "--store",
            store.uri,
            "--workers",
            0,
            "--classes",
            0,
            "--per-class",
            300,
            "--grid",
            grid,
        )
        == 0
    )
    printed = capsys.readouterr()
    assert "decode: 10/10" in printed.err
    lines = printed.out.splitlines()
    assert lines[0].endswith("  drawn")
    assert lines[2] == "samples    300, 300 of each of 1 classes: cat"
    assert lines[-1] == str(grid)
    assert Image.open(grid).width == SHEET_SAMPLES * (SIZE + GAP) - GAP


def test_a_tokenizer_without_pixel_decoder_takes_its_teacher(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, teacher = a_tokenizer(pixels=False), a_teacher()
    teacher_ref = published(store, teacher)
    ref = a_generator(store, published(store, model, teacher=teacher_ref).digest)
    made = sample(capsys, ref, store, "--npz", tmp_path / "a.npz", "--decode-steps", 2)
    expected = expected_images(store, made, model, teacher)
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], np.stack(list(expected.values())))
    folder_of(store, "teacher", teacher_ref.digest).delete_tree()
    assert str(teacher_ref) in refused(capsys, ref, store, "--npz", tmp_path / "b.npz")


def test_another_tokenizer_than_that_of_the_codes_is_refused_unless_asked_for(
    store: Store, generator: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = load_config(folder_of(store, "generator", generator.digest), GeneratorFile).codes.tokenizer
    model = a_tokenizer()
    with torch.no_grad():
        model.quantizer.embedding.mul_(-1)  # its codes mean something else
    other = published(store, model, teacher=published(store, a_teacher()))
    config = TOKENIZER.model_copy(update={"codebook_size": 32})
    small = SFTok(config, model.teacher_config, SIZE, pixels=False)
    small.initialise()
    third = published(store, small, teacher=other)
    npz = ["--decode-steps", 2, "--npz"]
    said = refused(capsys, generator, store, "--tokenizer", other, *npz, tmp_path / "no.npz")
    assert f"draws codes of tokenizer/{own}, not of {other}" in said
    assert "--any-tokenizer" in said
    said = refused(capsys, generator, store, "--tokenizer", third, "--any-tokenizer", *npz, tmp_path / "no.npz")
    assert "has 32 codes in the codebook" in said
    assert "names none" in refused(capsys, generator, store, "--any-tokenizer")
    assert not (tmp_path / "no.npz").exists()
    made = sample(capsys, generator, store, "--tokenizer", f"tokenizer/{own}", *npz, tmp_path / "own.npz")
    sample(capsys, generator, store, *npz, tmp_path / "default.npz")
    sample(capsys, generator, store, "--tokenizer", other, "--any-tokenizer", *npz, tmp_path / "other.npz")
    images = {name: np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("own", "default", "other")}
    assert np.array_equal(images["own"], images["default"])
    assert np.array_equal(images["other"], np.stack(list(expected_images(store, made, model).values())))
    assert not np.array_equal(images["own"], images["other"])


def test_images_are_decoded_a_micro_batch_at_a_time(
    store: Store, generator: ArtifactRef, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against decoding a shard, or all of them, before the first image is written."""
    made = sample(capsys, generator, store, "--classes", "0-2")
    request = check(
        SampleArguments(
            str(generator), SampleConfig(per_class=3, micro_batch=4), 0, ["0-2"], store=store.uri, workers=0
        )
    )
    samples = Artifact.find(store, request.plan)
    assert samples is not None
    assert str(samples.ref) == made["samples"]
    sizes, before = [], None
    for part in decoded(request, samples):
        assert before is None or before() is None, "images are kept after they were taken"
        sizes.append(len(part.images))
        before = weakref.ref(part.images)
        del part
    assert sizes == [4, 4, 1]


def parts(count: int, size: int) -> list[ImageBatch]:
    images = torch.arange(8 * 3 * size * size).remainder(251).to(torch.uint8).view(8, 3, size, size)
    return [ImageBatch(["x"] * 8, images)] * (count // 8)


def test_the_array_is_written_in_constant_memory(tmp_path: Path) -> None:
    """64 times the images, 50 MB of them: the peak must not move by more than one part's size."""
    peaks = []
    for count in (16, 1024):
        tracemalloc.start()
        with npz_writer(tmp_path / f"{count}.npz", count, 128) as take:
            for part in parts(count, 128):
                take(part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 8 * 3 * 128 * 128
    array = np.load(tmp_path / "1024.npz")["arr_0"]
    assert array.shape == (1024, 128, 128, 3)
    assert np.array_equal(array[-8:], parts(8, 128)[0].images.permute(0, 2, 3, 1).numpy())


def test_an_array_that_was_not_finished_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 of 16 images were written"), npz_writer(tmp_path / "a.npz", 16, 4) as take:
        take(parts(8, 4)[0])
    with pytest.raises(OSError, match="full"), npz_writer(tmp_path / "a.npz", 8, 4) as take:
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_a_title_longer_than_its_row_is_cut() -> None:
    pictures = [torch.zeros(3, 16, 16, dtype=torch.uint8)] * 2
    short, long = (labelled_sheet({title: pictures}) for title in ("cat", "a very long name of a class"))
    assert short.shape == long.shape
    assert (long.numpy() < 128).any()
