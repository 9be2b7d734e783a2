"""The tokenizer as a whole: shapes, layouts, sizes of the published models, files."""

import pytest
import torch

from infra.store.store import Store
from sftok.coding.encode import encode_images
from sftok.config import BASE, LARGE, DecodingConfig, TeacherConfig, TokenizerConfig
from sftok.model.prepared import prepare_encoder
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import load_tokenizer, save_tokenizer
from tests.support.tiny_tokenizer import SIZE, TEACHER, tokenizer


def millions(module: torch.nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize(("decoder", "size", "total"), [(BASE, 88.87, 205.85), (LARGE, 307.92, 424.90)])
def test_published_sizes(decoder: object, size: float, total: float) -> None:
    """method.md 1.1: B and L differ in the decoder alone."""
    with torch.device("meta"):
        model = SFTok(TokenizerConfig(decoder=decoder), TeacherConfig(), 256, pixels=True)
        teacher = Teacher(TeacherConfig())
    assert millions(model.decoder) == pytest.approx(size, abs=0.01)
    assert millions(model) == pytest.approx(total, abs=0.02)
    # The published table counts the encoder without the latent tokens, which are a parameter of the whole model.
    assert millions(model.encoder) == pytest.approx(85.92 + 64 * 768 / 1e6, abs=0.03)
    assert (millions(teacher.encoder), millions(teacher.decoder)) == (23.78, 30.48)


def test_legacy_layout_rereads_the_memory() -> None:
    """method.md 1.1: token t, channel c reads row (c * N + t) // W, column (c * N + t) % W."""
    model, width, tokens = tokenizer(), 32, 8
    y = torch.randn(2, tokens, width)
    model.encoder.transformer.forward = lambda x, keep: y
    model.encoder.project = torch.nn.Identity()
    assert torch.equal(model.encoder(torch.rand(2, 3, SIZE, SIZE)), y)
    model.encoder.legacy_layout = True
    read = model.encoder(torch.rand(2, 3, SIZE, SIZE))
    for token, channel in [(0, 0), (3, 5), (7, 31)]:
        flat = channel * tokens + token
        assert torch.equal(read[:, token, channel], y[:, flat // width, flat % width])


def test_codes_do_not_depend_on_the_batch_or_its_padding() -> None:
    model, images = tokenizer(), torch.rand(7, 3, SIZE, SIZE)
    codes = encode_images(model, images, "nearest", micro_batch=4)
    assert torch.equal(encode_images(model, images.flip(0), "nearest", micro_batch=4).flip(0), codes)
    assert torch.equal(encode_images(model, images[5:6], "nearest", micro_batch=4), codes[5:6])


def test_soft_decoding_of_certain_logits_is_the_teachers_decoding() -> None:
    model, teacher = tokenizer(pixels=True), Teacher(TEACHER)
    model.take_pixel_decoder(teacher)
    proxy = torch.randint(32, (2, 16))
    certain = torch.nn.functional.one_hot(proxy, 32).float() * 1e4
    assert torch.allclose(model.render(proxy, certain, None), teacher.decode(proxy), atol=1e-5)


def test_a_tokenizer_without_pixels_asks_for_its_teacher() -> None:
    model = tokenizer()
    proxy, logits = model.predict_proxy(torch.zeros(1, 8, dtype=torch.int64), DecodingConfig())
    with pytest.raises(ValueError, match="teacher is needed"):
        model.render(proxy, logits, None)


def test_a_round_trip_through_the_store_is_exact(store: Store) -> None:
    model = tokenizer(pixels=True)
    save_tokenizer(model, store)
    loaded = load_tokenizer(store)
    assert loaded.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert not any(p.requires_grad for p in loaded.parameters())


def test_damaged_weights_are_named(store: Store) -> None:
    save_tokenizer(tokenizer(), store)
    store.write("model.safetensors", store.read("model.safetensors")[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors does not match the network"):
        load_tokenizer(store)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 8)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    model = tokenizer()
    for encode in (model.encode, prepare_encoder(model)):
        with pytest.raises(ValueError, match=r"this tokenizer takes \(n, 3, 16, 16\)"):
            encode(torch.rand(shape))
