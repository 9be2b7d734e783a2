"""DiffAug: differentiable random augmentations of all images that the discriminator sees (Zhao et al. 2020).

A discriminator that never sees an image unchanged cannot memorise the training set, and gradients still reach the
generator through the augmentations.

Shapes: B images, S uniform draws per image, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infra.compute.transfer import send

DRAWS = 7  # per image: two of translation, three of colour, two of cutout


@dataclass(frozen=True)
class Strengths:
    """Strengths of the augmentations; 0 turns one off. The defaults are the published ones (method.md 1.3)."""

    translation: float = 0.125
    """largest shift, as a fraction of the side."""
    brightness: float = 0.5
    """largest number added to all pixels."""
    saturation: float = 1.0
    """largest deviation from 1 of the factor of a pixel's distance from its grey value."""
    contrast: float = 0.5
    """largest deviation from 1 of the factor of a pixel's distance from the image's mean."""
    cutout: float = 0.2
    """side of the square that is set to 0, as a fraction of the image's side."""


PUBLISHED = Strengths()


def diff_augment(images_B3HW: Tensor, generator: torch.Generator, strengths: Strengths = PUBLISHED) -> Tensor:
    """Translate, recolour and cut out images, each by draws of its own.

    Args:
        images_B3HW: float RGB in [0, 1], or somewhat beyond, as reconstructions are.
        generator: on the CPU; the number of draws per image does not depend on the strengths.
        strengths: of the augmentations.

    Returns:
        (B, 3, H, W), not clamped, as published: clamping would stop the gradient where a value leaves [0, 1].
    """
    draws_BS = send(torch.rand(len(images_B3HW), DRAWS, generator=generator), images_B3HW.device)
    shift_B2, colour_B3, centre_B2 = draws_BS.split((2, 3, 2), dim=1)
    x_B3HW = translate(images_B3HW, shift_B2, strengths.translation)
    x_B3HW = recolour(x_B3HW, 2 * colour_B3 - 1, strengths)
    return cut_out(x_B3HW, centre_B2, strengths.cutout)


def translate(images_B3HW: Tensor, draws_B2: Tensor, fraction: float) -> Tensor:
    """Shift images by whole pixels down and right, at most round(fraction * side) either way; uncovered pixels are 0.

    `draws_B2` is uniform in [0, 1).
    """
    for dim, draws_B in zip((2, 3), draws_B2.unbind(1), strict=True):
        side = images_B3HW.shape[dim]
        most = round(fraction * side)
        shift_B = (draws_B * (2 * most + 1)).long() - most
        source_BL = torch.arange(side, device=shift_B.device) - shift_B[:, None]
        source_BL = source_BL.view(-1, 1, side, 1) if dim == 2 else source_BL.view(-1, 1, 1, side)
        moved_B3HW = images_B3HW.gather(dim, source_BL.clamp(0, side - 1).expand_as(images_B3HW))
        images_B3HW = moved_B3HW * ((source_BL >= 0) & (source_BL < side))
    return images_B3HW


def recolour(images_B3HW: Tensor, draws_B3: Tensor, strengths: Strengths) -> Tensor:
    """Change brightness, saturation and contrast, in this order; `draws_B3` is uniform in [-1, 1)."""
    brightness_B, saturation_B, contrast_B = draws_B3.view(-1, 3, 1, 1, 1).unbind(1)
    x_B3HW = images_B3HW + strengths.brightness * brightness_B
    grey_B1HW = x_B3HW.mean(1, keepdim=True)
    x_B3HW = grey_B1HW + (x_B3HW - grey_B1HW) * (1 + strengths.saturation * saturation_B)
    mean_B111 = x_B3HW.mean((1, 2, 3), keepdim=True)
    return mean_B111 + (x_B3HW - mean_B111) * (1 + strengths.contrast * contrast_B)


def cut_out(images_B3HW: Tensor, draws_B2: Tensor, fraction: float) -> Tensor:
    """Set a square of round(fraction * side) pixels to 0, centred anywhere in the image, so edges may crop it.

    `draws_B2` is uniform in [0, 1).
    """
    inside = []
    for dim, draws_B in zip((2, 3), draws_B2.unbind(1), strict=True):
        side = images_B3HW.shape[dim]
        length = round(fraction * side)
        # An even square has its centre between two pixels, which adds one possible position.
        first_B = (draws_B * (side + 1 - length % 2)).long() - length // 2
        offset_BL = torch.arange(side, device=first_B.device) - first_B[:, None]
        inside.append((offset_BL >= 0) & (offset_BL < length))
    hole_BHW = inside[0][:, :, None] & inside[1][:, None, :]
    return images_B3HW * ~hole_BHW[:, None]
