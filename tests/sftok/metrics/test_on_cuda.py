"""Figures computed on a GPU are those of the CPU but for the rounding of float64; and what stands for it on CPUs."""

import pytest
import torch

from sftok.metrics import functional, nearest
from sftok.metrics.class_reader import thumbnails
from sftok.metrics.frechet import Gaussian, distance
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.image_meter import ImageMeter, pair_metrics
from sftok.metrics.inception.prepared import prepare_inception
from sftok.metrics.inception.resize import pillow_bicubic_products, resize
from sftok.metrics.measure import Features, Reference, measure
from sftok.metrics.protocols import TORCH_FIDELITY, ScoreProtocol
from sftok.metrics.random_features import RandomFeatures
from tests.support.random_inception import network, pictures

PROTOCOL: ScoreProtocol = TORCH_FIDELITY.at(120)


def features(count: int, seed: int, dims: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dims, generator=generator) @ torch.randn(dims, dims, generator=generator)


def sides() -> tuple[Features, Reference]:
    samples = Features(features(120, 1), features(120, 2), features(120, 3, 10))
    real = Features(features(200, 4), features(200, 5), features(200, 6, 10))
    return samples, Reference.of(real, PROTOCOL, "real ones")


@pytest.mark.parametrize("side", [16, 32, 299, 300, 512])
def test_bicubic_as_products_is_pillows(side: int) -> None:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
    torch.testing.assert_close(pillow_bicubic_products(images), resize(images, "pillow_bicubic"), rtol=0, atol=2e-5)


def test_bicubic_as_products_knows_height_from_width() -> None:
    images = pictures(2, 48, seed=0)[:, :, :40]
    assert torch.equal(pillow_bicubic_products(images), resize(images, "pillow_bicubic"))


def test_references_that_come_in_any_parts_are_compared_in_blocks() -> None:
    queries, references = pictures(5, 8, seed=0), pictures(41, 8, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nearest._BLOCK_ROWS, "cpu", 7)
        search = nearest.NearestSearch([queries, references[[40, 3]]])
        for part in references.split([1, 0, 20, 3, 17]):
            search.add(part)
        found = search.found()
    whole = nearest.nearest_distances([queries, references[[40, 3]]], references)
    for some, expected in zip(found, whole, strict=True):
        assert torch.equal(some.distances, expected.distances)
        assert torch.equal(some.indices, expected.indices)
    assert found[1].indices.tolist() == [40, 3]
    with pytest.raises(ValueError, match="cannot look for"):
        nearest.NearestSearch([queries]).add(pictures(3, 16, seed=0))


def test_the_meter_gives_figures_in_the_order_of_the_images() -> None:
    images, originals, meter = pictures(5, 16, seed=0), pictures(5, 16, seed=1), ImageMeter()
    for a, b in zip(images.split(2), originals.split(2), strict=True):
        meter.add(**pair_metrics(a, b))
    assert meter.count == 5
    assert "psnr" in meter
    assert "lpips" not in meter
    torch.testing.assert_close(meter["ssim"], functional.ssim(images, originals), rtol=1e-12, atol=0)


def test_moments_of_a_gpu_are_those_of_the_cpu() -> None:
    """By the very function, since it names no device."""
    rows = features(5000, 0)
    expected = FeatureMoments.of(rows)
    total, outer = functional._sums_on_cuda(rows)
    torch.testing.assert_close(total, expected.sum, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(outer, expected.outer, rtol=1e-12, atol=1e-9)


@pytest.mark.gpu
def test_scores_on_cuda_are_those_of_the_cpu() -> None:
    samples, reference = sides()
    on_cpu = measure(PROTOCOL, samples, reference)
    on_cuda = measure(PROTOCOL, samples, reference, device="cuda")
    for one, other in zip(on_cuda, on_cpu, strict=True):
        assert one.name == other.name
        assert one.value == pytest.approx(other.value, rel=1e-8, abs=1e-10)
        assert one.interval == pytest.approx(other.interval, rel=1e-6, abs=1e-8)
        if other.at_infinity is not None:
            assert one.at_infinity is not None
            assert one.at_infinity.value == pytest.approx(other.at_infinity.value, rel=1e-6, abs=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [30, 400])
def test_frechet_on_cuda_is_that_of_the_cpu(count: int) -> None:
    """Of full rank, and of fewer samples than dimensions."""
    a, b = (FeatureMoments.of(features(count, seed)) for seed in (1, 2))
    on_cuda = [FeatureMoments.of(features(count, seed).cuda()) for seed in (1, 2)]
    assert on_cuda[0].outer.is_cuda
    torch.testing.assert_close(on_cuda[0].outer.cpu(), a.outer, rtol=1e-12, atol=1e-9)
    found = distance(*(Gaussian.of(side) for side in on_cuda))
    assert found == pytest.approx(distance(Gaussian.of(a), Gaussian.of(b)), rel=1e-8)


@pytest.mark.gpu
def test_figures_of_images_on_cuda_are_those_of_the_cpu() -> None:
    images, originals = pictures(70, 32, seed=1), pictures(70, 32, seed=2)
    on_cpu, on_cuda = pair_metrics(images, originals), pair_metrics(images.cuda(), originals.cuda())
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_cuda[name].cpu(), expected, rtol=1e-9, atol=1e-12)
    extractor = RandomFeatures(0, 32)
    torch.testing.assert_close(extractor(images.cuda()).cpu(), extractor(images), rtol=1e-2, atol=1e-3)
    assert abs(thumbnails(images.cuda()) - thumbnails(images)).max() < 1e-12


@pytest.mark.gpu
def test_the_nearest_on_cuda_are_those_of_the_cpu_exactly() -> None:
    queries, references = pictures(30, 32, seed=1), torch.cat([pictures(500, 32, seed=2), pictures(30, 32, seed=1)])
    on_cpu = nearest.nearest_distances([queries], references)[0]
    on_cuda = nearest.nearest_distances([queries], references, "cuda")[0]
    assert torch.equal(on_cuda.distances, on_cpu.distances)
    assert torch.equal(on_cuda.indices, on_cpu.indices)
    assert (on_cuda.distances == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["tensorflow_bilinear", "pillow_bicubic", "torch_bilinear", "torch_bilinear_antialias"])
def test_inception_on_cuda_is_that_of_the_cpu(how: str) -> None:
    """In one batch of 256 with the last one filled up, and in IEEE arithmetic."""
    model, images = network(), pictures(9, 32, seed=3)
    pixels = resize(images, how)
    torch.testing.assert_close(resize(images.cuda(), how).cpu(), pixels, rtol=0, atol=0.01)
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        expected = prepare_inception(model)(images, how)
        found = prepare_inception(model, device="cuda")(images, how)
        rounded = prepare_inception(model, device="cuda", precision="bf16")(images, how)
    finally:
        torch.backends.cudnn.allow_tf32 = kept
    for one, other in zip(found, expected, strict=True):
        assert one.is_cuda
        assert ((one.cpu() - other).norm() / other.norm()).item() < 1e-3
    assert ((rounded.pool.cpu() - expected.pool).norm() / expected.pool.norm()).item() < 0.1
