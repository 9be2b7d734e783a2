"""The benchmarks of a device by name, each with its share of ten minutes."""

from collections.abc import Callable
from typing import NamedTuple

from tests.benchmarks.device import (
    align,
    decode,
    digits,
    encode,
    encode_shards,
    evaluation,
    fine_tune,
    first_sample,
    generator,
    inception,
    masked_sample,
    sample,
    whole,
)
from tests.benchmarks.device.bench import Bench


class Section(NamedTuple):
    """A benchmark, and the seconds that it may take on a card, its start included."""

    run: Callable[[Bench], None]
    seconds: int


SECTIONS = {
    "encode": Section(encode.run, 50),
    "encode_shards": Section(encode_shards.run, 45),
    "decode": Section(decode.run, 40),
    "sample": Section(sample.run_b, 55),
    "sample_xl": Section(sample.run_xl, 60),
    "masked_sample": Section(masked_sample.run, 20),
    "align": Section(align.run, 45),
    "fine_tune": Section(fine_tune.run, 35),
    "generator": Section(generator.run, 40),
    "first_sample": Section(first_sample.run, 40),
    "inception": Section(inception.run, 20),
    "evaluation": Section(evaluation.run, 30),
    "whole": Section(whole.run, 30),
    "digits": Section(digits.run, 90),
}
TOTAL_SECONDS = 600
