"""Samples of AR-B drawn, decoded in eight steps and looked at by Inception (random weights), end to end.

`--samples 50000` is what papers report; fewer are drawn otherwise, and what 50,000 would take is told.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from generator.code_space import CodeSpace
from generator.config import GENERATORS, SampleConfig
from generator.kinds import prepare_sampler
from sftok.config import DecodingConfig
from sftok.metrics.functional import FeatureMoments, to_uint8
from sftok.metrics.inception.prepared import prepare_inception
from sftok.metrics.inception.weights import load_inception
from sftok.model.prepared import prepare_decoder
from tests.benchmarks.device import models
from tests.benchmarks.device.bench import Bench
from tests.benchmarks.device.inception import HOW
from tests.benchmarks.device.sample import SCALE, network
from tests.support.random_inception import write

PUBLISHED, DRAWN, DECODED, CLASSES = 50_000, 256, 64, 1000
DECODING = DecodingConfig(num_steps=8)
PARTS = ("drawing", "decoding", "features", "moments")


def run(bench: Bench) -> None:
    """bf16, with everything prepared and used once before; features in fp32."""
    work = Work(bench)
    work.some(0)
    work.seconds = dict.fromkeys(PARTS, 0.0)
    count = 0
    while count < bench.samples and not bench.is_over:
        work.some(count)
        count += work.drawn
    taken = sum(work.seconds.values())
    told = f"{PUBLISHED * taken / count:,.0f} s for {PUBLISHED:,}"
    bench.put(f"{count:,} samples, end to end", count / taken, "images/s", note=told)
    for name, seconds in work.seconds.items():
        bench.put(f"of it {name}", 100 * seconds / taken, "%")


class Work:
    """Random networks, and how long each part of the work took."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.drawn = bench, min(DRAWN, bench.samples)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        tokenizer = models.tokenizer(bench)
        space = CodeSpace(tokenizer.config.codebook_size, tokenizer.config.num_latent_tokens, CLASSES)
        model = network(bench, GENERATORS["toy" if bench.is_quick else "B"], space)
        is_compiled = bench.device.type == "cuda"
        settings = SampleConfig(cfg_scale=SCALE, precision="bf16", compile=is_compiled)
        self.sample = prepare_sampler(model, settings)
        self.decoder = prepare_decoder(tokenizer, None, "bf16", compile=is_compiled)
        with tempfile.TemporaryDirectory() as folder:
            weights = write(Path(folder))
            inception = load_inception(weights.path.read_bytes(), weights.sha256)
        self.extract = prepare_inception(inception, device=bench.device)

    def some(self, first: int) -> FeatureMoments:
        """Moments of the features of a micro-batch of samples, from the number of its first one."""
        class_B = torch.arange(first, first + self.drawn) % CLASSES
        numbers = torch.rand(self.drawn, *self.sample.numbers, generator=torch.Generator().manual_seed(first))
        codes_BN: list[Tensor] = []
        images: list[Tensor] = []
        features: list[Tensor] = []
        moments: list[FeatureMoments] = []

        def decode() -> None:
            for batch in codes_BN[0].split(DECODED):
                images.append(to_uint8(self.decoder.render(*self.decoder.predict_proxy(batch, DECODING))))

        steps = (
            lambda: codes_BN.append(self.sample(class_B, numbers)),
            decode,
            lambda: features.append(self.extract(torch.cat(images), HOW).pool),
            lambda: moments.append(FeatureMoments.of(features[0])),
        )
        for part, step in zip(PARTS, steps, strict=True):
            self.seconds[part] += self.bench.once(step)
        return moments[0]
