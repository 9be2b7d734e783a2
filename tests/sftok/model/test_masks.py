"""Training masks: each schedule hides the share that its formula says, from all to what it ends at."""

import math

import pytest
import torch

from sftok.config import MaskSchedule
from sftok.model.decoder import MASK_RATIOS, random_mask

# schedule, power, mean over t uniform in [0, 1], share at the end
SCHEDULES: list[tuple[MaskSchedule, float, float, float]] = [
    ("arccos", 1.0, 2 / math.pi, 0),
    ("arccos", 2.0, (math.pi - 2) / (math.pi / 2) ** 2, 0),
    ("cosine", 1.0, 1 / 2, 0),
    ("linear", 1.0, 1 / 2, 0),
    ("quadratic", 1.0, 1 / 2, 0),
    ("quadratic", 2.0, 1 / 3, 0),
    ("cubic", 1.0, 1 / 4, 0),
    ("exponential", 1.0, 1 - math.exp(-1), math.exp(-1)),
    ("exponential", 3.0, (1 - math.exp(-3)) / 3, math.exp(-3)),
]


@pytest.mark.parametrize(("schedule", "power", "mean", "end"), SCHEDULES)
def test_a_schedule_hides_its_share(schedule: MaskSchedule, power: float, mean: float, end: float) -> None:
    ratio = MASK_RATIOS[schedule](torch.linspace(0, 1, 101), power)
    assert ratio[0].item() == pytest.approx(1, abs=1e-6)
    assert ratio[-1].item() == pytest.approx(end, abs=1e-6)
    assert (ratio.diff() <= 1e-7).all()
    hidden = random_mask(torch.Size([8000, 64]), torch.Generator().manual_seed(0), schedule, power).float()
    assert hidden.mean().item() == pytest.approx(mean, abs=0.015)
    assert hidden.mean(1).min().item() == pytest.approx(end, abs=1 / 64)
    assert hidden.mean(1).max().item() == 1
    assert hidden.mean(0).std() < 0.02  # no position is preferred


@pytest.mark.parametrize("schedule", ["cosine", "linear", "cubic"])
def test_schedules_without_a_power_ignore_it(schedule: MaskSchedule) -> None:
    one, two = (random_mask(torch.Size([9, 64]), torch.Generator().manual_seed(0), schedule, p) for p in (1.0, 2.0))
    assert torch.equal(one, two)


def test_every_schedule_of_the_config_is_there() -> None:
    from typing import get_args

    assert set(MASK_RATIOS) == set(get_args(MaskSchedule))


def test_the_default_is_the_papers() -> None:
    shape = torch.Size([50, 64])
    plain, arccos = (random_mask(shape, torch.Generator().manual_seed(1), *rest) for rest in ((), ("arccos", 1.0)))
    assert torch.equal(plain, arccos)
