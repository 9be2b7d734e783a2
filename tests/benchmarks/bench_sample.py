"""Autoregressive sampling with generator B, 64 codes with guidance: tokens/s beside transformers' Llama of that shape.

The roofline of a step is the time to read its weights once or to compute its products, whichever is longer, at the
bandwidth and the GEMM speed of this machine, measured in turns with the rest: of a large `torch.mm`, and of the faster
of that and a linear layer packed for oneDNN. Weights are random: speed does not depend on them.
"""

import functools

import torch

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GENERATORS, SampleConfig, SamplePrecision
from generator.kinds import prepare_sampler
from generator.sampling.autoregressive import Sampler
from generator.sampling.prepared import DTYPES
from tests.benchmarks import machine
from tests.benchmarks.llama import llama_of, llama_tokens
from tests.benchmarks.table import percent, seconds, show, times

SPACE = CodeSpace(codebook_size=8192, num_tokens=64, num_classes=1000)
CONFIG, SCALE = GENERATORS["B"], 2.0
ROUNDS = {1: 5, 16: 3, 64: 2}
# Its steps take equal time, since its cache is static: fewer of them tell as much.
REFERENCE_STEPS = {1: 32, 16: 12, 64: 4}


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    big, products = torch.ones(2**26), machine.products()
    torch.manual_seed(0)
    model = Generator(CONFIG, SPACE)
    model.initialise()
    model.eval()
    rows: list[list[object]] = []
    for precision in ("bf16", "fp32"):
        dtype = DTYPES[precision]
        ways = {"as it is": prepared(model, precision), "compiled": prepared(model, precision, compile=True)}
        llama = llama_of(CONFIG, SPACE).to(dtype)
        for batch, rounds in ROUNDS.items():
            inputs = (torch.arange(batch), torch.rand(batch, SPACE.num_tokens, dtype=torch.float64))
            runs = {name: functools.partial(sampler, *inputs) for name, sampler in ways.items()}
            runs["reference"] = functools.partial(llama_tokens, llama, inputs[0], REFERENCE_STEPS[batch], SCALE)
            limits = {name: way for name, way in products.items() if name.startswith(precision)} | {"read": big.sum}
            taken = seconds(runs | limits, rounds=rounds)
            bandwidth, peak = big.nbytes / taken["read"], machine.peak(precision, taken)
            tokens = {name: batch * SPACE.num_tokens for name in ways} | {"reference": batch * REFERENCE_STEPS[batch]}
            speed = {name: tokens[name] / taken[name] for name in runs}
            plain, best = (roofline(dtype, 2 * batch, bandwidth, gflops) for gflops in (peak.plain, peak.best))
            for name in ways:
                rows.append(
                    [
                        f"{precision}, batch {batch}: {name}",
                        f"{speed[name]:.0f}",
                        f"{speed['reference']:.0f}",
                        times(speed[name] / speed["reference"]),
                        percent(speed[name] * plain / batch),
                        percent(speed[name] * best / batch),
                        f"{bandwidth / 1e9:.0f}",
                        f"{peak.plain:.0f}, {peak.best:.0f}",
                    ]
                )
    columns = [
        "B, 64 codes, guided",
        "tokens/s",
        "Llama, static cache",
        "ratio",
        "of torch.mm's roofline",
        "of the best's",
        "read GB/s",
        "GFLOP/s",
    ]
    show("autoregressive sampling", columns, rows)


def prepared(model: Generator, precision: SamplePrecision, **changes: object) -> Sampler:
    values = {"cfg_scale": SCALE, "precision": precision, **changes}
    sampler = prepare_sampler(model, SampleConfig.model_validate(values))
    assert isinstance(sampler, Sampler)
    return sampler


def matrix_weights() -> int:
    """Weights that every step multiplies with."""
    width = CONFIG.width
    return CONFIG.layers * (4 * width**2 + 3 * width * CONFIG.ffn_width) + width * SPACE.codebook_size


def roofline(dtype: torch.dtype, rows: int, bandwidth: float, gflops: float) -> float:
    """The least seconds that a step can take."""
    weights = matrix_weights()
    return max(weights * dtype.itemsize / bandwidth, 2 * weights * rows / (gflops * 1e9))


if __name__ == "__main__":
    main()
