"""The random feature extractor: the same bits everywhere, and a distance that orders damage."""

import pytest
import torch

from sftok.metrics.frechet import frechet_distance
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.random_features import RandomFeatures


def shapes(n: int, seed: int) -> torch.Tensor:
    """Bright squares at random places on black, 32x32."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    for image, (row, column) in zip(made, torch.randint(2, 18, (n, 2), generator=generator).tolist(), strict=True):
        image[:, row : row + 10, column : column + 10] = 220
    return made


def noised(images: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + strength * noise).clamp(0, 255).to(torch.uint8)


def test_weights_are_these_bits():
    """Another NumPy or platform must give the same extractor, or distances shift unseen."""
    assert RandomFeatures(0, 32).sha256 == "ce7456f23ed23759827d10366763b4c8d59e09e351dc9dccba5834aa98063148"
    assert RandomFeatures(1, 32).sha256 != RandomFeatures(0, 32).sha256


def test_weights_are_he_uniform():
    for weight in RandomFeatures(3, 32).weights:
        fan_in = weight[0].numel()
        assert weight.abs().max() <= (6 / fan_in) ** 0.5
        assert weight.var().item() == pytest.approx(2 / fan_in, rel=0.25)


@pytest.mark.parametrize(("size", "dimensions"), [(8, 48), (32, 240), (64, 368)])
def test_dimensions(size, dimensions):
    extractor = RandomFeatures(0, size)
    features = extractor(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert extractor.dimensions == dimensions
    assert features.shape == (2, dimensions)
    assert features.dtype == torch.float32


def test_features_do_not_depend_on_batch_mates():
    extractor, images = RandomFeatures(0, 32), noised(shapes(70, 0), 30)
    together = extractor(images)
    assert torch.equal(together[65:66], extractor(images[65:66]))
    assert torch.equal(together, torch.cat([extractor(images[:33]), extractor(images[33:])]))


def test_distance_orders_damage():
    extractor = RandomFeatures(0, 32)
    real = FeatureMoments.of(extractor(shapes(300, 1)))
    distances = [
        frechet_distance(real, FeatureMoments.of(extractor(images)))
        for images in (
            shapes(300, 2),
            noised(shapes(300, 2), 10),
            noised(shapes(300, 2), 40),
            noised(shapes(300, 2), 90),
        )
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0]


def test_never_called_fid():
    assert RandomFeatures.label == "FD (random features)"
    assert "FID" not in RandomFeatures.name


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 1, 32, 32)]
)
def test_refuses_other_images(images):
    with pytest.raises(ValueError, match="give uint8"):
        RandomFeatures(0, 32)(images)


def test_refuses_tiny_images():
    with pytest.raises(ValueError, match="image_size = 4"):
        RandomFeatures(0, 4)
