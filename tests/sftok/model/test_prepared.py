"""The prepared tokenizer: the modules' numbers whatever the batch, and blocks that compute what is kept alone."""

import functools
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.compute import packed
from infra.compute.packed import PackedLinear, can_pack
from infra.store.store import Store
from sftok.coding.decode import ImageDecoder
from sftok.coding.encode import EncodeJob, ShardEncoder, encode_batches, encode_images
from sftok.config import AugmentConfig, DecodingConfig, TransformerConfig
from sftok.model.cast_transformer import CastTransformer
from sftok.model.prepared import (
    PRECISIONS,
    InferencePrecision,
    PreparedEncoder,
    prepare_decoder,
    prepare_encoder,
)
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.model.transformer import Transformer, attend, initialise
from sftok.weights.artifacts import save_tokenizer
from tests.support.codes_info import codes_info
from tests.support.tiny_tokenizer import SIZE, TEACHER, TOKENIZER, tokenizer

WIDE = TransformerConfig(width=96, layers=3, heads=3, init_std=0.1)
CONFIG = TOKENIZER.model_copy(update={"encoder": WIDE, "decoder": WIDE, "codebook_size": 4096})
STEPS = DecodingConfig(num_steps=4)
ONEDNN = torch.backends.mkldnn.is_available()


def model(*, pixels: bool = False, legacy: bool = False) -> SFTok:
    torch.manual_seed(0)
    made = SFTok(CONFIG.model_copy(update={"legacy_layout": legacy}), TEACHER, SIZE, pixels=pixels)
    made.initialise()
    return made.eval()


def teacher() -> Teacher:
    torch.manual_seed(3)
    return Teacher(TEACHER).requires_grad_(False).eval()


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


def codes_of(count: int) -> Tensor:
    return torch.randint(4096, (count, 8), generator=torch.Generator().manual_seed(8))


def distance_gap(made: SFTok, images: Tensor) -> Tensor:
    """How much farther the second nearest code is than the nearest, (B, N)."""
    with torch.no_grad():
        z = F.normalize(made.encoder(images), dim=-1).double()
        nearest = torch.cdist(z, made.quantizer.codebook().double()).topk(2, largest=False).values
    return nearest[..., 1] - nearest[..., 0]


@pytest.mark.parametrize("legacy", [False, True])
def test_prepared_float32_codes_are_the_models(legacy: bool) -> None:
    made, images = model(legacy=legacy), pictures(16)
    encoder = prepare_encoder(made)
    with torch.no_grad():
        assert torch.allclose(encoder.latents(images), made.encoder(images), atol=1e-5)
        differ = encoder(images) != made.encode(images).codes
    assert (distance_gap(made, images)[differ] < 1e-5).all()
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_image_is_bitwise_the_same_beside_any_others(precision: InferencePrecision) -> None:
    """At a fixed micro-batch, at any place in it: shards may then be cut in any way."""
    encoder, images = prepare_encoder(model(), precision), pictures(13)
    with torch.inference_mode():
        together = torch.cat([encoder.latents(images[:8]), encoder.latents(images[5:13])[3:]])
        for shift in (1, 3, 7):
            moved = encoder.latents(images.roll(shift, 0)[:8])
            assert torch.equal(moved, together.roll(shift, 0)[:8])
    codes = encode_batches(encoder, images, "nearest", 8)
    assert torch.equal(encode_batches(encoder, images.flip(0), "nearest", 8).flip(0), codes)
    assert torch.equal(encode_batches(encoder, images[9:10], "nearest", 8), codes[9:10])


def test_another_micro_batch_changes_near_ties_alone() -> None:
    made, images = model(), pictures(24)
    codes, gap = encode_images(made, images, "nearest", 8), distance_gap(made, images)
    for micro_batch in (1, 3, 24):
        differ = encode_images(made, images, "nearest", micro_batch) != codes
        assert (gap[differ] < 1e-5).all()


def test_bf16_is_computed_in_bf16_and_stays_close() -> None:
    made, images = model(), pictures(16)
    with torch.no_grad():
        exact, rounded = made.encoder(images), prepare_encoder(made, "bf16").latents(images)
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.02
    far = distance_gap(made, images) > 0.02
    assert far.any()
    assert torch.equal(prepare_encoder(made, "bf16")(images)[far], made.encode(images).codes[far])


# --- weights that are cast, as on CUDA -------------------------------------------------------------------------------


def cast(made: SFTok, precision: InferencePrecision = "fp32", *, compile: bool = False) -> PreparedEncoder:
    return PreparedEncoder(made, precision, compile=compile, is_packed=False)


@pytest.mark.parametrize("legacy", [False, True])
def test_cast_float32_codes_are_the_models(legacy: bool) -> None:
    made, images = model(legacy=legacy), pictures(16)
    encoder = cast(made)
    with torch.no_grad():
        assert torch.allclose(encoder.latents(images), made.encoder(images), atol=1e-5)
    differ = encoder(images) != made.encode(images).codes
    assert (distance_gap(made, images)[differ] < 1e-5).all()
    assert differ.float().mean() < 0.01


def test_cast_bf16_rounds_as_the_packed_one() -> None:
    """Norms and the residual stream in float32: their rounding would at least double the error."""
    made, images = model(), pictures(16)
    with torch.no_grad():
        exact = made.encoder(images)
        errors = [
            ((encoder.latents(images) - exact).norm() / exact.norm()).item()
            for encoder in (prepare_encoder(made, "bf16"), cast(made, "bf16"))
        ]
    assert 1e-4 < errors[1] < 1.5 * errors[0]


def test_cast_weights_are_copies() -> None:
    made, images = model(), pictures(2)
    encoder = cast(made)
    before = encoder(images)
    with torch.no_grad():
        for parameter in made.encoder.transformer.blocks.parameters():
            parameter.zero_()
    assert torch.equal(encoder(images), before)


def test_blocks_are_compiled_into_one_graph_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at any depth: the first block, those between, the last one. What a graph becomes is not asked here."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    monkeypatch.setattr("sftok.model.cast_transformer.check_compiler", lambda device: None)
    deep, x = Transformer(WIDE.model_copy(update={"layers": 6})), torch.randn(4, 11, 96)
    initialise(deep, 0.1)
    eager, compiled = CastTransformer(deep, torch.float32), CastTransformer(deep, torch.float32, compile=True)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(compiled(x, slice(-3, None)), eager(x, slice(-3, None)), atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_sinkhorn_is_assigned_as_in_training() -> None:
    made, images = model(), pictures(16)
    codes = made.encode(images, "sinkhorn").codes
    assert not torch.equal(codes, made.encode(images).codes)
    assert (prepare_encoder(made)(images, "sinkhorn") == codes).float().mean() > 0.98


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_prepared_decoding_is_the_models(temperature: float) -> None:
    made, codes = model(), codes_of(5)
    decoding = DecodingConfig(num_steps=4, temperature=temperature)
    proxy, logits = made.predict_proxy(codes, decoding, torch.arange(5))
    prepared_proxy, prepared_logits = prepare_decoder(made, None).predict_proxy(codes, decoding, torch.arange(5))
    assert torch.equal(prepared_proxy, proxy)
    assert torch.allclose(prepared_logits, logits, atol=1e-4)


def test_logits_of_bf16_decoding_are_not_rounded_to_bf16() -> None:
    """Logits of eight bits tie by the hundred, and ties decide which positions stay."""
    made, codes = model(), codes_of(4)
    _, exact = made.predict_proxy(codes, DecodingConfig(num_steps=1))
    _, logits = prepare_decoder(made, None, "bf16").predict_proxy(codes, DecodingConfig(num_steps=1))
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    assert 1e-4 < ((logits - exact).norm() / exact.norm()).item() < 0.03


@pytest.mark.parametrize("pixels", [True, False])
def test_prepared_rendering_is_the_models(pixels: bool) -> None:
    made, master = model(pixels=pixels), teacher()
    if pixels:
        made.take_pixel_decoder(master)
    proxy, logits = made.predict_proxy(codes_of(3), STEPS)
    with torch.no_grad():
        images = made.render(proxy, logits, master)
        assert torch.allclose(prepare_decoder(made, master).render(proxy, logits), images, atol=1e-4)
        rounded = prepare_decoder(made, master, "bf16").render(proxy, logits)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - images).abs().max() < 0.1
    assert next(made.parameters()).dtype == next(master.parameters()).dtype == torch.float32  # ours were copied


def test_decoding_without_pixels_asks_for_a_teacher() -> None:
    decoder = prepare_decoder(model(), None)
    with pytest.raises(ValueError, match="teacher is needed"):
        decoder.render(*decoder.predict_proxy(codes_of(1), STEPS))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_decoded_image_is_bitwise_the_same_beside_any_others(precision: InferencePrecision) -> None:
    decoder = ImageDecoder(model(), teacher(), micro_batch=4, precision=precision)
    codes, ids, decoding = codes_of(7), [f"{i}" for i in range(7)], DecodingConfig(num_steps=3, temperature=1.0)
    images, proxy = decoder(codes, ids, decoding)
    for rows in ([6], [3, 1, 0], [5, 4, 3, 2, 1]):
        again = decoder(codes[rows], [ids[row] for row in rows], decoding)
        assert torch.equal(again.images, images[rows])
        assert torch.equal(again.proxy_codes, proxy[rows])


def test_codes_need_an_id_each() -> None:
    decoder = ImageDecoder(model(), teacher(), micro_batch=4)
    with pytest.raises(ValueError, match="3 rows of codes for 2 image ids"):
        decoder(codes_of(3), ["a", "b"], STEPS)


def test_a_job_names_its_precision(store: Store) -> None:
    save_tokenizer(model(), store)
    info = codes_info(4096, 8, image_size=SIZE, precision="fp8", class_names=None)
    job = EncodeJob(store, store, store, info, {"train": ("center",)}, AugmentConfig(), 8)
    assert pickle.loads(pickle.dumps(job)) == job
    with pytest.raises(ValueError, match="precision = 'fp8'"):
        ShardEncoder(job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_layers_are_linear_layers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights laid out for oneDNN where it has the type, and where there is no oneDNN."""
    torch.manual_seed(0)
    layer, x, residual = nn.Linear(40, 24), torch.randn(3, 5, 40), torch.randn(3, 5, 24)
    with torch.no_grad():
        wanted = [layer(x), F.gelu(layer(x)), residual + layer(x)]
    # CPUs without AVX-512 have no bfloat16, and oneDNN 3.10 on AVX2 does not keep rows: both take the plain product.
    has_type = ONEDNN and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for is_available in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda is_there=is_available: is_there)
        made = PackedLinear(layer.weight, layer.bias, dtype)
        assert made.is_packed == can_pack(dtype)
        if torch.__version__ >= "2.14":
            assert made.is_packed == (is_available and has_type)
        given = x.to(dtype)
        found = [made(given), made.gelu(given), made.plus(given, residual)]
        assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one.float(), other, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.fixture
def tried_anew() -> Iterator[None]:
    """What oneDNN can do is tried once a process; here it is to change."""
    packed._multiplies.cache_clear()
    yield
    packed._multiplies.cache_clear()


@pytest.mark.usefixtures("tried_anew")
@pytest.mark.parametrize("lacks", ["_reorder_linear_weight", "_linear_pointwise"])
@pytest.mark.parametrize("error", [AttributeError("no such operation"), RuntimeError("not of this type")])
def test_a_build_without_the_operations_multiplies_plainly(
    lacks: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch for other processors may say that oneDNN is there and have none of this."""

    def missing(*_: object) -> None:
        raise error

    operations = {"_reorder_linear_weight": lambda *_: None, "_linear_pointwise": lambda *_: None, lacks: missing}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operations))
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    plain = PackedLinear(layer.weight, layer.bias, torch.float32)
    assert not plain.is_packed
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("keep", [slice(-3, None), slice(1, 8)])
def test_the_last_block_computes_what_is_kept_alone(keep: slice) -> None:
    torch.manual_seed(0)
    transformer, x = Transformer(WIDE), torch.randn(2, 11, 96)
    initialise(transformer, 0.1)
    widths: list[int] = []
    transformer.blocks[-1].mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    kept = transformer(x, keep)
    whole = transformer(x, slice(None))
    assert torch.allclose(kept, whole[:, keep], atol=1e-5)
    assert widths == [kept.shape[1], 11]


def test_bf16_attention_on_cpus_is_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    exact = attend(q, k, v)
    rounded = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert torch.allclose(rounded, exact, atol=0.03)
    assert not torch.equal(rounded, exact)


def gradients(transformer: Transformer, x: Tensor, precision: torch.dtype | None) -> list[Tensor]:
    transformer.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = transformer(x, slice(1, 8)).float().square().sum()
    loss.backward()
    return [parameter.grad.clone() for parameter in transformer.parameters()]


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_recomputing_gives_the_same_gradients_bit_for_bit(precision: torch.dtype | None) -> None:
    torch.manual_seed(0)
    transformer, x, runs = Transformer(WIDE), torch.randn(2, 11, 96), []
    initialise(transformer, 0.1)
    for block in transformer.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    kept = gradients(transformer, x, precision)
    assert len(runs) == 3
    transformer.recompute(True)
    again = gradients(transformer, x, precision)
    assert len(runs) == 3 + 6  # each block forward, and once more in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    with torch.no_grad():
        transformer(x, slice(1, 8))
    assert len(runs) == 3 + 6 + 3
    assert not tokenizer().encoder.transformer.recomputes  # off unless asked for


@pytest.mark.gpu
def test_cuda_computes_what_the_cpu_does() -> None:
    made, images, codes = model(pixels=True), pictures(8), codes_of(4)
    made.take_pixel_decoder(teacher())
    on_cpu, cpu_decoder = prepare_encoder(made)(images), prepare_decoder(made, None)
    proxy, logits = cpu_decoder.predict_proxy(codes, STEPS)
    rendered = cpu_decoder.render(proxy, logits)
    made = made.cuda()
    with torch.no_grad():
        latents = made.encoder(images.cuda())
    for compile in (False, True):
        encoder = prepare_encoder(made, compile=compile)
        assert torch.allclose(encoder.latents(images.cuda()), latents, atol=1e-4)
        assert (encoder(images).cpu() == on_cpu).float().mean() > 0.98
        rounded = prepare_encoder(made, "bf16", compile=compile).latents(images.cuda())
        assert 1e-4 < ((rounded - latents).norm() / latents.norm()).item() < 0.02
    for precision, tolerance in (("fp32", 1e-2), ("bf16", 0.1)):
        decoder = prepare_decoder(made, None, precision)
        decoder.predict_proxy(codes, STEPS)
        assert (decoder.render(proxy.cuda(), logits.cuda()).cpu() - rendered).abs().max() < tolerance
