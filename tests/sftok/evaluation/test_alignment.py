"""The metrics of a tokenizer before fine-tuning belong to the images, not to their batches."""

import math

import pytest
import torch

from sftok.config import DecodingConfig
from sftok.evaluation.alignment import AlignmentMeter, AlignmentMetrics
from sftok.metrics.random_features import RandomFeatures
from sftok.model.teacher import Teacher
from tests.support.tiny_tokenizer import SIZE, TEACHER, images, tokenizer


def teacher() -> Teacher:
    torch.manual_seed(3)
    return Teacher(TEACHER).eval().requires_grad_(False)


def meter(micro_batch: int, temperature: float = 0.0) -> AlignmentMeter:
    return AlignmentMeter(
        tokenizer(),
        teacher(),
        steps=(1, 4),
        decoding=DecodingConfig(num_steps=4, temperature=temperature),
        micro_batch=micro_batch,
        features=RandomFeatures(0, SIZE),
        seed=0,
    )


def measured(
    micro_batch: int, *, backwards: bool = False, count: int = 12, temperature: float = 0.0
) -> AlignmentMetrics:
    rows = images().val
    order = list(reversed(range(count))) if backwards else list(range(count))
    made = meter(micro_batch, temperature)
    for at in range(0, count, micro_batch):
        some = order[at : at + micro_batch]
        made.add(rows.images[some], [rows.image_ids[index] for index in some])
    return made.metrics()


def flat(figures: AlignmentMetrics) -> list[float]:
    steps = [value for step in figures.by_steps for value in step.model_dump().values()]
    agreement = [value for one in (figures.truth, *figures.steps) for value in one.model_dump().values()]
    return [*steps, *figures.teacher.model_dump().values(), *figures.cross_entropy.model_dump().values(), *agreement]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_figures_belong_to_the_images_not_to_their_batches(temperature: float) -> None:
    whole = measured(12, temperature=temperature)
    for other in (
        measured(5, temperature=temperature),
        measured(5, backwards=True, temperature=temperature),
    ):
        assert other.num_images == whole.num_images == 12
        assert flat(other) == pytest.approx(flat(whole), rel=1e-4)


def test_untrained_figures_are_where_they_must_be() -> None:
    made = measured(12)
    chance = math.log(TEACHER.codebook_size)
    assert chance * 0.9 < made.cross_entropy.all_hidden < chance * 1.6
    assert [step.num_steps for step in made.by_steps] == [1, 4]
    assert len(made.steps) == made.agreement_steps - 1
    assert all(0 <= one.top1 <= 1 for one in (made.truth, *made.steps))
    assert made.truth.kl > made.steps[-1].kl
    assert made.teacher.psnr != made.by_steps[0].psnr


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="1 held-out images are too few"):
        measured(4, count=1)
    pixels = torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(ValueError, match="3 images, 3 ids: give 1 to 2, and one id per image"):
        meter(2).add(pixels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 images, 2 ids"):
        meter(4).add(pixels, ["a", "b"])
