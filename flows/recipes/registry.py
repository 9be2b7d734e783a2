"""The registry of recipes: every named configuration, by its name."""

from collections.abc import Callable

from flows.recipes.imagenet import (
    imagenet256_ar_3b,
    imagenet256_ar_b,
    imagenet256_ar_l,
    imagenet256_ar_xl,
    imagenet256_ar_xxl,
    imagenet256_maskgit,
    imagenet256_sftok_b,
    imagenet256_sftok_l,
)
from flows.recipes.schema import Recipe
from flows.recipes.small import digits, digits_maskgit, digits_tiny, small64

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        digits_maskgit,
        digits_tiny,
        small64,
        imagenet256_sftok_b,
        imagenet256_sftok_l,
        imagenet256_ar_b,
        imagenet256_ar_l,
        imagenet256_ar_xl,
        imagenet256_ar_xxl,
        imagenet256_ar_3b,
        imagenet256_maskgit,
    )
}
