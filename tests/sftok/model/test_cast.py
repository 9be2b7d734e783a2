"""Decoding where weights are cast instead of packed, as on CUDA: the same numbers, in micro-batches of one size."""

import pytest
import torch

from sftok.coding.decode import ImageDecoder
from sftok.config import DecodingConfig
from sftok.model.cast_head import CastHead, unrounded_product
from sftok.model.prepared import PreparedDecoder, prepare_decoder
from sftok.model.prepared_pixels import PreparedPixels
from tests.sftok.model.test_prepared import codes_of, model, teacher

STEPS = DecodingConfig(num_steps=4, temperature=1.0)
CPU = torch.device("cpu")


def test_cast_decoding_is_packed_decoding() -> None:
    made, codes, keys = model(), codes_of(5), torch.arange(5)
    packed, cast = (PreparedDecoder(made, None, "fp32", is_packed=is_packed) for is_packed in (True, False))
    proxy, logits = packed.predict_proxy(codes, STEPS, keys)
    cast_proxy, cast_logits = cast.predict_proxy(codes, STEPS, keys)
    assert torch.equal(cast_proxy, proxy)
    torch.testing.assert_close(cast_logits, logits, rtol=0, atol=1e-4)


def test_cast_bf16_is_bf16_with_logits_that_do_not_tie() -> None:
    made, codes, first = model(), codes_of(4), DecodingConfig(num_steps=1)
    _, exact = made.predict_proxy(codes, first)
    _, logits = PreparedDecoder(made, None, "bf16", is_packed=False).predict_proxy(codes, first)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    assert 1e-4 < ((logits - exact).norm() / exact.norm()).item() < 0.03


def test_the_head_holds_the_weights_as_they_were() -> None:
    head = model().decoder.head
    made, x = CastHead(head[0], head[2], torch.float32), torch.randn(2, 3, head[0].in_features)
    with torch.no_grad():
        before = head(x)
        torch.testing.assert_close(made(x), before)
        head[2].weight.zero_()
    torch.testing.assert_close(made(x), before)


def test_an_unrounded_product_keeps_its_sums() -> None:
    x, weight = torch.full((1, 3), 1.0).bfloat16(), torch.tensor([[256.0, 1.0, 0.5]]).bfloat16()
    assert unrounded_product(x, weight).tolist() == [[257.5]]
    assert (x @ weight.T).float().tolist() != [[257.5]]


@pytest.mark.parametrize(("count", "seen"), [(3, [3]), (4, [4]), (5, [3, 3]), (9, [3, 3, 3])])
def test_pixels_are_computed_in_parts_of_one_size(count: int, seen: list[int]) -> None:
    master, sizes = teacher(), []
    pixels = PreparedPixels(master.decoder, torch.float32, CPU)
    grids = master.grid(torch.randint(32, (count, 16), generator=torch.Generator().manual_seed(0)))
    whole = pixels(grids)
    pixels.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    pixels.at_once = 4
    torch.testing.assert_close(pixels(grids), whole)
    assert sizes == seen


def test_decoding_a_part_at_a_time_is_decoding_all() -> None:
    decoder, codes, ids = ImageDecoder(model(), teacher(), micro_batch=2), codes_of(7), list("abcdefg")
    whole = decoder(codes, ids, STEPS)
    parts = list(decoder.decode_all(codes, ids, STEPS, at_once=3))
    assert [len(part.images) for part in parts] == [4, 3]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.proxy_codes for part in parts]), whole.proxy_codes)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_decodes_what_the_cpu_does(compile: bool) -> None:
    """Share of proxy codes, noise included, since near-ties fall either way; pixels of the same proxy codes."""
    made, codes, keys = model(pixels=True), codes_of(8), torch.arange(8)
    made.take_pixel_decoder(teacher())
    on_cpu = prepare_decoder(made, None)
    proxy, logits = on_cpu.predict_proxy(codes, STEPS, keys)
    images = on_cpu.render(proxy, logits)
    made = made.cuda()
    for precision, least, most in (("fp32", 0.98, 1e-3), ("bf16", 0.6, 0.1)):
        decoder = prepare_decoder(made, None, precision, compile=compile)
        found, found_logits = decoder.predict_proxy(codes, STEPS, keys)
        assert found_logits.dtype == torch.float32
        assert (found.cpu() == proxy).float().mean() >= least
        assert (decoder.render(proxy.cuda(), logits.cuda()).cpu() - images).abs().max() < most


@pytest.mark.gpu
def test_decoding_steps_do_not_wait_for_cuda() -> None:
    made = model().cuda()
    decoder, codes, keys = prepare_decoder(made, None, "bf16"), codes_of(4).cuda(), torch.arange(4).cuda()
    decoder.predict_proxy(codes, STEPS, keys)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.predict_proxy(codes, STEPS, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
