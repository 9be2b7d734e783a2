"""Published weights in and out: strict about keys, exact about values, deaf to foreign code."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sftok.config import TOKENIZERS, TeacherConfig, TokenizerConfig, TransformerConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import TeacherFile, TokenizerFile
from sftok.weights.convert import (
    config_file_of,
    load_published,
    open_published,
    published_caveats,
    read_tensors,
    save_tensors,
    to_published,
)
from sftok.weights.published_names import OLD_NAMES, norm_groups, size_name, slots

TEACHER = TeacherConfig(
    base_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=2, latent_channels=8, codebook_size=32, norm_groups=8
)
# Heads of 64 channels, so that no config.json is needed.
TOKENIZER = TokenizerConfig(
    patch_size=4,
    num_latent_tokens=8,
    codebook_size=40,
    code_dim=6,
    encoder=TransformerConfig(width=64, layers=1, heads=1),
    decoder=TransformerConfig(width=128, layers=2, heads=2),
    legacy_layout=True,
)
SIZE = 16
Weights = dict[str, Tensor]


def a_tokenizer(*, pixels: bool = True, config: TokenizerConfig = TOKENIZER, teacher: TeacherConfig = TEACHER) -> SFTok:
    torch.manual_seed(0)
    model = SFTok(config, teacher, SIZE, pixels=pixels)
    model.initialise()
    if pixels:
        model.take_pixel_decoder(Teacher(teacher))
    return model.requires_grad_(False).eval()


def a_teacher() -> Teacher:
    torch.manual_seed(1)
    return Teacher(TEACHER).requires_grad_(False).eval()


MODELS: dict[str, Callable[[], SFTok | Teacher]] = {"sftok": a_tokenizer, "teacher": a_teacher}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write weights to a file of its own."""

    def write(weights: Weights, name: str = "weights.safetensors") -> Path:
        file = tmp_path / name
        save_tensors(weights, file, "safetensors" if name.endswith(".safetensors") else "bin")
        return file

    return write


def assert_equal(ours: SFTok | Teacher, theirs: SFTok | Teacher) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_round_trip_is_exact(write: Callable[..., Path], kind: str, name: str) -> None:
    model = MODELS[kind]()
    file = write(to_published(model), name)
    loaded = load_published(file, kind=kind)
    file.unlink()  # the model stands on its own
    assert_equal(loaded, model)
    assert config_file_of(loaded) == config_file_of(model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    again = load_published(write(to_published(loaded), f"again-{name}"))
    assert_equal(again, model)


def test_the_imported_model_computes_the_same(write: Callable[..., Path]) -> None:
    """Guards against levels in the wrong order, which equal shapes would hide."""
    teacher, images = a_teacher(), torch.rand(2, 3, SIZE, SIZE)
    loaded = load_published(write(to_published(teacher)))
    assert torch.equal(loaded(images).images, teacher(images).images)
    model = a_tokenizer()
    again = load_published(write(to_published(model), "b.safetensors"))
    assert torch.equal(again.encode(images).codes, model.encode(images).codes)
    logits = torch.randn(2, 16, 32)
    assert torch.equal(again.soft_decode(logits), model.soft_decode(logits))


def test_the_index_offset_is_written() -> None:
    offset = to_published(a_tokenizer())["quantize.index_offset"]
    assert offset.dtype == torch.int64
    assert offset.tolist() == [0]


@pytest.mark.parametrize("kind", MODELS)
def test_the_native_layout_is_no_import(write: Callable[..., Path], kind: str) -> None:
    with pytest.raises(ValueError, match="this project's own layout, which needs no conversion"):
        load_published(write(dict(MODELS[kind]().state_dict())))


def test_half_precision_is_widened_exactly(write: Callable[..., Path]) -> None:
    weights = to_published(a_teacher())
    half = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    loaded = to_published(load_published(write(half)))
    assert all(torch.equal(loaded[name], half[name].float()) for name in half)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_parameters_instead_of_tensors_are_read(write: Callable[..., Path]) -> None:
    weights = to_published(a_teacher())
    given = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    assert_equal(load_published(write(given, "weights.bin")), a_teacher())


# --- what the shapes tell --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["S", "B", "L"])
@pytest.mark.parametrize("pixels", [False, True])
def test_published_sizes_are_recognised(size: str, pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone, without memory: L would take 1.7 GB."""
    config = TOKENIZERS[size].model_copy(update={"legacy_layout": True})
    with torch.device("meta"):
        model = SFTok(config, TeacherConfig(), 256, pixels=pixels)
    weights = {slot.name: torch.empty(slot.shape, device="meta") for slot in slots(model).values()}
    weights["quantize.index_offset"] = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr("sftok.weights.convert.read_tensors", lambda file: weights)
    monkeypatch.setattr("sftok.weights.convert._find", lambda path: (path, None))
    opened = open_published(Path("weights.bin"))
    assert opened.config == TokenizerFile(tokenizer=config, teacher=TeacherConfig(), image_size=256, pixels=pixels)
    assert opened.layout == ("stage_3" if pixels else "stage_1_2")
    assert size_name(opened.config.tokenizer) == size


def test_no_size_of_ours_is_said_to_be_none() -> None:
    assert size_name(TOKENIZER) is None


@pytest.mark.parametrize(("base", "groups"), [(128, 32), (96, 32), (8, 8), (40, 20), (37, 1)])
def test_norm_groups_are_32_or_the_most_below_that_fit(base: int, groups: int) -> None:
    assert norm_groups(base) == groups


def test_both_spellings_and_wrappers_are_read(write: Callable[..., Path]) -> None:
    model = a_tokenizer()
    new_names = {new: old for old, new in OLD_NAMES.items()}
    old = {f"module._orig_mod.{new_names.get(name, name)}": t for name, t in to_published(model).items()}
    assert "module._orig_mod.decoder.embedding_positional_embedding" in old
    assert_equal(load_published(write(old)), model)


def test_both_spellings_at_once_are_one_too_many(write: Callable[..., Path]) -> None:
    weights = to_published(a_tokenizer())
    (old, new), *_ = OLD_NAMES.items()
    with pytest.raises(ValueError, match=rf"1 unexpected \({old}\) of \d+ keys"):
        load_published(write({**weights, old: weights[new].clone()}))


def test_a_tokenizer_without_pixels_belongs_to_the_published_teacher(write: Callable[..., Path]) -> None:
    teacher = TeacherConfig(codebook_size=50)
    model = SFTok(TOKENIZER, teacher, 32, pixels=False)
    model.initialise()
    loaded = load_published(write(to_published(model)))
    assert loaded.teacher_config == teacher
    assert loaded.pixel_decoder is None
    assert_equal(loaded, model)


def test_another_teacher_has_to_be_described(write: Callable[..., Path], tmp_path: Path) -> None:
    model = a_tokenizer(pixels=False)
    file = write(to_published(model))
    with pytest.raises(ValueError, match=r"16 proxy positions of a 16 px image .* config\.json that describes"):
        load_published(file)
    config = tmp_path / "config.json"
    config.write_text(config_file_of(model).model_dump_json())
    assert load_published(file, config).teacher_config == TEACHER
    assert load_published(tmp_path).teacher_config == TEACHER, "beside the weights"


# --- config.json -----------------------------------------------------------------------------------------------------


NARROW = TOKENIZER.model_copy(
    update={
        "encoder": TransformerConfig(width=24, layers=1, heads=3, init_std=0.1),
        "decoder": TransformerConfig(width=16, layers=1, heads=2),
        "legacy_layout": False,
    }
)


def test_what_shapes_cannot_tell_comes_from_the_config(write: Callable[..., Path], tmp_path: Path) -> None:
    """Heads, layout and norm groups leave no trace in shapes, and change every output."""
    teacher = TEACHER.model_copy(update={"base_channels": 4, "channel_multipliers": (2, 4, 4), "norm_groups": 2})
    model = a_tokenizer(config=NARROW, teacher=teacher)
    file = write(to_published(model))
    with pytest.raises(ValueError, match=r"encoder\.width = 24 is no multiple of 64.*states tokenizer\.encoder\.heads"):
        load_published(file)
    (tmp_path / "config.json").write_text(config_file_of(model).model_dump_json())
    loaded, images = load_published(tmp_path), torch.rand(2, 3, SIZE, SIZE)
    assert config_file_of(loaded) == config_file_of(model)
    assert torch.equal(loaded.encode(images).codes, model.encode(images).codes)


@pytest.mark.parametrize(
    ("field", "value", "weights"),
    [
        ("tokenizer.codebook_size", 41, 40),
        ("tokenizer.encoder.layers", 3, 1),
        ("teacher.latent_channels", 16, 8),
        ("teacher.num_res_blocks", 1, 2),
        ("image_size", 32, 16),
        ("pixels", False, True),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    write: Callable[..., Path], tmp_path: Path, field: str, value: object, weights: object
) -> None:
    model = a_tokenizer()
    plain = json.loads(config_file_of(model).model_dump_json())
    *parents, name = field.split(".")
    place = plain
    for parent in parents:
        place = place[parent]
    place[name] = value
    config = tmp_path / "config.json"
    config.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=rf"have {field} = {weights}, but .*config\.json says {field} = {value}$"):
        load_published(write(to_published(model)), config)


def authors_config(**changes: object) -> str:
    """The authors' config.json of the toy tokenizer: a dump of their YAML."""
    tokenizer = {"codebook_size": 40, "token_size": 6, "num_latent_tokens": 8, "vit_enc_patch_size": 4, **changes}
    plain = {"experiment": {"name": "x"}, "model": {"vq_model": tokenizer}}
    return json.dumps({**plain, "dataset": {"preprocessing": {"crop_size": SIZE}}})


@pytest.mark.parametrize(("stated", "legacy"), [({}, True), ({"is_legacy": True}, True), ({"is_legacy": False}, False)])
def test_the_authors_config_states_the_layout(
    write: Callable[..., Path], tmp_path: Path, stated: dict[str, bool], legacy: bool
) -> None:
    write(to_published(a_tokenizer()))
    (tmp_path / "config.json").write_text(authors_config(**stated))
    assert load_published(tmp_path).config.legacy_layout is legacy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_size": 12}, r"code_dim = 6, but .* model\.vq_model\.token_size = 12"),
        ({"vit_dec_model_size": "large"}, r"layers = 2, but .*vit_dec_model_size = 'large', whose layers = 24"),
        ({"vit_dec_model_size": "giant"}, "'giant' is none of small, base, large"),
    ],
)
def test_the_authors_config_is_compared_too(
    write: Callable[..., Path], tmp_path: Path, change: dict[str, object], said: str
) -> None:
    write(to_published(a_tokenizer()))
    (tmp_path / "config.json").write_text(authors_config(**change))
    with pytest.raises(ValueError, match=said):
        load_published(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "neither the authors' nor this project's"),
        ('{"architecture": "bert"}', "neither the authors' nor this project's"),
        ('{"teacher": {}}', "not the config of an SFTok tokenizer: tokenizer: Field required"),
    ],
)
def test_configs_of_something_else(write: Callable[..., Path], tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_published(write(to_published(a_tokenizer())), config)


def test_a_tokenizers_config_beside_a_teacher_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_file_of(a_tokenizer()).model_dump_json())
    write(to_published(a_teacher()))
    with pytest.raises(ValueError, match="not the config of a teacher"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text(TeacherFile(teacher=TEACHER).model_dump_json())
    assert_equal(load_published(tmp_path), a_teacher())


# --- keys ------------------------------------------------------------------------------------------------------------


def refusal(file: Path, **options: object) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:  # one line
        load_published(file, **options)
    message = str(refused.value)
    assert file.name in message
    return message


def test_missing_unexpected_and_misshapen_keys_are_listed_at_once(write: Callable[..., Path]) -> None:
    weights = to_published(a_tokenizer())
    for i in range(3):
        weights[f"loss.{i}"] = torch.zeros(1)
    for name in [n for n in weights if n.startswith("decoder.transformer.0.")]:
        del weights[name]
    weights["encoder.ln_pre.weight"] = torch.ones(65)
    said = refusal(write(weights))
    assert "12 missing (decoder.transformer.0.attn.in_proj_bias, decoder.transformer.0.attn.in_proj_weight, " in said
    assert "and 8 more)" in said
    assert "3 unexpected (loss.0, loss.1, loss.2)" in said
    assert "1 misshapen (encoder.ln_pre.weight is [65], not [64])" in said


@pytest.mark.parametrize("kind", MODELS)
def test_every_single_key_is_needed(write: Callable[..., Path], kind: str) -> None:
    """Each one removed in turn: the file is refused by its name."""
    weights = to_published(MODELS[kind]())
    for i, name in enumerate(weights):
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        assert f"1 missing ({name})" in refusal(write(rest, f"{i}.safetensors"))


@pytest.mark.parametrize("kind", MODELS)
def test_every_single_shape_is_compared(write: Callable[..., Path], kind: str) -> None:
    weights = to_published(MODELS[kind]())
    for i, name in enumerate(weights):
        wrong = {**weights, name: weights[name][None]}
        assert name in refusal(write(wrong, f"{i}.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(write: Callable[..., Path], value: float) -> None:
    weights = {name: tensor.clone() for name, tensor in to_published(a_tokenizer()).items()}
    weights["decoder.ffn.0.weight"][3, 5] = value
    weights["latent_tokens"][0, 0] = value
    assert "NaN or infinity in 2 weights, such as decoder.ffn.0.weight" in refusal(write(weights))


def test_other_types_are_refused(write: Callable[..., Path]) -> None:
    weights = to_published(a_tokenizer())
    said = refusal(write({**weights, "latent_tokens": weights["latent_tokens"].double()}))
    assert "latent_tokens is torch.float64" in said
    said = refusal(write({**weights, "quantize.index_offset": torch.tensor([8192])}, "b.safetensors"))
    assert "quantize.index_offset = 8192" in said


def test_positions_that_are_no_square_are_refused(write: Callable[..., Path]) -> None:
    weights = to_published(a_tokenizer())
    weights["encoder.positional_embedding"] = torch.zeros(16, 64)
    assert "encoder.positional_embedding has 15 positions" in refusal(write(weights))


@pytest.mark.parametrize(("kind", "other"), [("sftok", "teacher"), ("teacher", "sftok")])
def test_the_wrong_kind_is_named(write: Callable[..., Path], kind: str, other: str) -> None:
    said = refusal(write(to_published(MODELS[kind]())), kind=other)
    assert f"the kind is {kind}, not {other}" in said


def test_weights_of_another_network_are_refused(write: Callable[..., Path]) -> None:
    said = refusal(write(dict(torch.nn.Linear(2, 2).state_dict())))
    assert "2 keys of neither SFTok nor its teacher, such as 'bias'" in said


# --- files -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_without_running_it(tmp_path: Path, zipped: bool) -> None:
    proof, file = tmp_path / "it-ran", tmp_path / "weights.bin"
    weights = {**to_published(a_teacher()), "bomb": Bomb(proof)}
    if zipped:
        torch.save(weights, file)
    else:
        file.write_bytes(pickle.dumps(weights, protocol=2))
    assert "could run code and was not unpickled" in refusal(file)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists(), "the bomb is none"


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_cut_files_are_refused(write: Callable[..., Path], name: str, share: float) -> None:
    file = write(to_published(a_teacher()), name)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert "damaged, cut short or" in refusal(file)


def test_old_files_of_torch_are_read_and_their_pieces_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save(to_published(a_teacher()), file, _use_new_zipfile_serialization=False)
    assert_equal(load_published(file), a_teacher())
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged, cut short or" in refusal(file)


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" + bytes(99), b"<html>Not found</html>", bytes(1000)])
def test_other_files_under_such_names_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    assert "fetch it again" in refusal(file)


def test_other_content_of_torch_files_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    for content, said in [
        ([torch.ones(2)], "not a dict of weights"),
        ({}, "not a dict of weights"),
        ({"state_dict": {"latent_tokens": torch.ones(2)}}, "'state_dict' is no weight but dict"),
        ({3: torch.ones(2)}, "3 is no weight"),
    ]:
        torch.save(content, file)
        assert said in refusal(file)


def test_paths_that_hold_no_weights_are_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.bin")
    (tmp_path / "notes.txt").write_text("hello")
    assert "give one that ends in .bin" in refusal(tmp_path / "notes.txt")
    assert "there are: none" in refusal(tmp_path)
    for name in ("a.bin", "b.safetensors"):
        (tmp_path / name).touch()
    assert "there are: a.bin, b.safetensors; name it" in refusal(tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_tensors({"a": shared, "b": shared}, file, "safetensors")
    assert not list(tmp_path.iterdir())
    save_tensors({"a": shared}, file, "safetensors")
    assert torch.equal(read_tensors(file)["a"], shared)
    assert list(tmp_path.iterdir()) == [file]


# --- what the published code has to know -----------------------------------------------------------------------------


def test_caveats_name_what_the_published_code_does_not_assume() -> None:
    published = TeacherConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1)
    assert not published_caveats(a_tokenizer(teacher=published))
    said = published_caveats(a_tokenizer(config=NARROW))
    assert said == [
        "the encoder's output is not in the legacy layout: set is_legacy to false",
        "heads of the encoder have 8 channels, published ones 64",
        "heads of the decoder have 8 channels, published ones 64",
        "group norms have 8 groups, published ones 32",
    ]
    assert published_caveats(a_teacher()) == ["group norms have 8 groups, published ones 32"]
