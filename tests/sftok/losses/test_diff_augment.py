"""DiffAug: what each change does to an image, and that a seed decides it."""

import pytest
import torch
from torch import Tensor

from sftok.losses.diff_augment import PUBLISHED, Strengths, diff_augment

NOTHING = Strengths(translation=0, brightness=0, saturation=0, contrast=0, cutout=0)
SIDE = 40


def images(count: int = 64) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_strengths() -> None:
    assert Strengths(translation=0.125, brightness=0.5, saturation=1, contrast=0.5, cutout=0.2) == PUBLISHED


def test_no_strength_changes_nothing() -> None:
    torch.testing.assert_close(diff_augment(images(), seeded(), NOTHING), images(), atol=1e-6, rtol=0)


def test_a_seed_decides_and_images_differ_in_their_draws() -> None:
    x = images(1).expand(8, -1, -1, -1)
    once, again, other = (diff_augment(x, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len({tuple(image.flatten().tolist()) for image in once}) == 8


def test_draws_do_not_depend_on_strengths() -> None:
    """A run resumes alike whatever it left out: the generator stands at the same place afterwards."""
    one, other = seeded(), seeded()
    diff_augment(images(), one)
    diff_augment(images(), other, NOTHING)
    assert torch.equal(one.get_state(), other.get_state())


def test_gradients_reach_every_image() -> None:
    x = images().requires_grad_()
    diff_augment(x, seeded()).square().sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()


def test_the_gradient_of_a_change_is_that_of_finite_differences() -> None:
    x = images(2)[:, :, :8, :8].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: diff_augment(y, seeded(3)), (x,))


def test_translation_shifts_by_whole_pixels_and_fills_with_zero() -> None:
    x = images(400)
    moved = diff_augment(x, seeded(), Strengths(0.125, 0, 0, 0, 0))
    seen = set()
    for before, after in zip(x, moved, strict=True):
        filled = (after == 0).all(0)  # images hold no zeros
        down, right = shift_of(filled)
        padded = torch.nn.functional.pad(before, (5, 5, 5, 5))
        wanted = padded[:, 5 - down : 5 - down + SIDE, 5 - right : 5 - right + SIDE]
        torch.testing.assert_close(after, wanted, atol=1e-6, rtol=0)
        seen |= {("down", down), ("right", right)}
    assert seen == {(way, shift) for way in ("down", "right") for shift in range(-5, 6)}


def shift_of(filled: Tensor) -> tuple[int, int]:
    """How far an image went, from the rows and columns that are empty."""
    shifts = []
    for lines in (filled.all(1), filled.all(0)):
        count = int(lines.sum())
        shifts.append(count if lines[0] else -count)
    return shifts[0], shifts[1]


def test_brightness_moves_the_mean_and_nothing_else() -> None:
    x = images(2000)
    added = (diff_augment(x, seeded(), Strengths(0, 0.5, 0, 0, 0)) - x).flatten(1)
    assert added.std(1).max() < 1e-5
    assert added.amin() == pytest.approx(-0.5, abs=0.01)
    assert added.amax() == pytest.approx(0.5, abs=0.01)
    assert added.mean().item() == pytest.approx(0, abs=0.02)


def test_saturation_scales_distances_from_grey_between_0_and_2() -> None:
    x = images(2000)
    y = diff_augment(x, seeded(), Strengths(0, 0, 1, 0, 0))
    torch.testing.assert_close(y.mean(1), x.mean(1), atol=1e-5, rtol=0)
    factors = slopes(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True))
    assert (factors.min().item(), factors.max().item()) == pytest.approx((0, 2), abs=0.01)


def test_contrast_scales_distances_from_the_mean_between_half_and_one_and_a_half() -> None:
    x = images(2000)
    y = diff_augment(x, seeded(), Strengths(0, 0, 0, 0.5, 0))
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(y.mean((1, 2, 3), keepdim=True), mean, atol=1e-5, rtol=0)
    factors = slopes(x - mean, y - mean)
    assert (factors.min().item(), factors.max().item()) == pytest.approx((0.5, 1.5), abs=0.01)


def slopes(x: Tensor, y: Tensor) -> Tensor:
    """The factor that makes `x` into `y`, image by image; that it is one factor is asserted."""
    x, y = x.flatten(1), y.flatten(1)
    factors = (x * y).sum(1) / x.square().sum(1)
    torch.testing.assert_close(x * factors[:, None], y, atol=1e-5, rtol=0)
    return factors


def test_values_are_not_clamped() -> None:
    y = diff_augment(images(), seeded())
    assert y.min() < 0
    assert y.max() > 1


@pytest.mark.parametrize(("fraction", "length"), [(0.2, 8), (0.125, 5)])
def test_cutout_zeroes_a_square_that_edges_may_crop(fraction: float, length: int) -> None:
    x = images(3000)
    y = diff_augment(x, seeded(), Strengths(0, 0, 0, 0, fraction))
    hole = (y == 0).all(1)
    torch.testing.assert_close(y, x * ~hole[:, None], atol=1e-6, rtol=0)
    heights, widths = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), heights * widths)  # a filled rectangle
    assert int(heights.max()) == int(widths.max()) == length
    for edge in (hole[:, 0], hole[:, -1]):  # centred on the outermost row or line between rows, at either end
        assert int(heights[edge.any(1)].min()) == length // 2 + length % 2
    assert ((heights == length) & (widths == length)).float().mean() > 0.5
    # Any centre is as likely as another, so that the corners are hit as well.
    assert hole.any(0).all()
