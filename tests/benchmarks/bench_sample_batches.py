"""Count the samples that change with the size of micro-batches, at the same seeds and settings.

At one size they are the same bit for bit, in any order and on any number of workers. At another, sums are rounded
otherwise, and where a draw is close the other code is taken. Weights are random: generator B gives its codes about
equal chances, as close as draws can be; the toys' weights are six times as large, and so are their preferences.
"""

import torch

from generator.code_space import CodeSpace
from generator.config import GENERATORS, MASKED_GENERATORS, GeneratorConfig, MaskedConfig, SampleConfig, SamplePrecision
from generator.kinds import build_generator, prepare_sampler
from generator.samples import SampleSpec, share_changed
from tests.benchmarks import machine
from tests.benchmarks.table import percent, show

TOY_SPACE, SPACE = CodeSpace(256, 16, 10), CodeSpace(8192, 64, 1000)
CASES: list[tuple[str, GeneratorConfig | MaskedConfig, CodeSpace, float, int, tuple[int, int]]] = [
    ("toy, 16 codes of 256", GENERATORS["toy"], TOY_SPACE, 6.0, 960, (64, 16)),
    ("masked toy, 16 codes of 256", MASKED_GENERATORS["toy"], TOY_SPACE, 6.0, 960, (64, 16)),
    ("B, 64 codes of 8,192", GENERATORS["B"], SPACE, 1.0, 16, (16, 4)),
]
PRECISIONS: tuple[SamplePrecision, ...] = ("fp32", "bf16")


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    rows = []
    for name, config, space, gain, count, sizes in CASES:
        torch.manual_seed(0)
        model = build_generator(config, space)
        model.initialise()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(gain if parameter.ndim > 1 else 1)
        wanted = [SampleSpec(i % space.num_classes, i // space.num_classes) for i in range(count)]
        shares = []
        for precision in PRECISIONS:
            sampler = prepare_sampler(model.eval(), SampleConfig(cfg_scale=2.0, precision=precision))
            shares.append(share_changed(sampler, wanted, sizes, seed=0))
        rows.append([name, f"{sizes[0]}, {sizes[1]}", f"{count:,}", *(percent(share) for share in shares)])
    columns = ["", "micro-batches", "samples", *(f"changed in {p}" for p in PRECISIONS)]
    show("samples that change with the micro-batch", columns, rows)


if __name__ == "__main__":
    main()
