"""Noise by counting: the published generator's numbers, and that no image's noise depends on another's."""

import math

import pytest
import torch

from infra.compute.splitmix import splitmix
from sftok.coding.decode import noise_keys
from sftok.model.noise import gumbel

BITS = 2**64


def reference(seed: int, count: int) -> list[int]:
    """SplitMix64 as it is published (Vigna's splitmix64.c), in integers that do not wrap by themselves."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % BITS
        z = seed
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % BITS
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % BITS
        found.append(z ^ (z >> 31))
    return found


def signed(value: int) -> int:
    return value - BITS if value >= BITS // 2 else value


def test_the_integers_are_the_published_generators() -> None:
    assert reference(1234567, 2) == [6457827717110365317, 3203168211198807973]  # the values given with the C code
    states = [signed((7 + (place + 1) * 0x9E3779B97F4A7C15) % BITS) for place in range(5)]
    assert splitmix(torch.tensor(states)).tolist() == [signed(value) for value in reference(7, 5)]


def test_the_noise_is_that_of_the_integers() -> None:
    draws = reference(99, 3)
    for draw, start in enumerate(draws):
        expected = [-math.log(-math.log(((bits >> 41) + 0.5) / 2**23)) for bits in reference(start, 12)]
        found = gumbel(torch.tensor([99]), draw, (3, 4))
        assert found.shape == (1, 3, 4)
        torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_an_images_noise_is_its_own() -> None:
    keys = noise_keys(0, ["a", "b", "c"])
    together = gumbel(keys, 5, (16, 32))
    assert torch.equal(gumbel(keys[[2, 0]], 5, (16, 32)), together[[2, 0]])
    assert torch.equal(noise_keys(0, ["c"]), keys[2:])
    assert not torch.equal(noise_keys(1, ["a"]), keys[:1])
    assert not torch.equal(gumbel(keys, 4, (16, 32)), together)


def test_it_is_gumbels() -> None:
    """Mean, variance and tails, and nothing between images, draws and neighbouring places."""
    noise = torch.stack([gumbel(torch.arange(4), draw, (50_000,)) for draw in range(2)]).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert (noise > 5).double().mean().item() == pytest.approx(1 - math.exp(-math.exp(-5)), abs=5e-4)
    rows = noise.flatten(0, 1)
    correlations = torch.corrcoef(torch.cat([rows[:, 1:], rows[:, :-1]])) - torch.eye(16)
    assert correlations.abs().max() < 0.02


@pytest.mark.gpu
def test_cuda_draws_what_the_cpu_draws() -> None:
    keys = noise_keys(0, [str(number) for number in range(64)])
    on_cpu, on_cuda = gumbel(keys, 3, (256, 128)), gumbel(keys.cuda(), 3, (256, 128))
    assert on_cuda.device.type == "cuda"
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-5, atol=1e-6)
