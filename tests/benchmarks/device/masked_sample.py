"""Masked sampling with the published generator, eight steps with guidance, beside a bare loop of the same passes."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from generator.code_space import CodeSpace
from generator.config import MASKED_GENERATORS, SampleConfig, SamplePrecision
from generator.flops import forward_flops
from generator.kinds import prepare_sampler
from generator.masked import MaskedGenerator
from tests.benchmarks.device.bench import Bench, lazily, share_equal
from tests.benchmarks.device.sample import SCALE, SPACE, TOY_SPACE

BATCH, QUICK_BATCH, STEPS = 256, 4, 8


def run(bench: Bench) -> None:
    """bf16, eager and compiled, and which codes differ from those in fp32."""
    space, batch = (TOY_SPACE, QUICK_BATCH) if bench.is_quick else (SPACE, BATCH)
    config = MASKED_GENERATORS["toy" if bench.is_quick else "published"]
    model = network(bench, space)
    class_B = torch.arange(batch) % space.num_classes
    numbers = torch.rand(batch, STEPS, 2, space.num_tokens, dtype=torch.float64)
    flops = 2 * STEPS * forward_flops(config, space)  # with guidance each pass has two rows an image

    drawn: dict[str, Tensor] = {}

    def draw(name: str, precision: SamplePrecision, *, is_compiled: bool) -> Callable[[], object]:
        settings = SampleConfig(cfg_scale=SCALE, num_steps=STEPS, precision=precision, compile=is_compiled)
        made = lazily(lambda: prepare_sampler(model, settings))
        return lambda: drawn.update({name: made(class_B, numbers)})

    measure = functools.partial(bench.race, items=batch, unit="images/s", flops=flops, rounds=3)
    exact = {"ours": draw("fp32", "fp32", is_compiled=False)}
    measure(f"fp32, batch {batch}", exact, precision="fp32", rounds=1, warm=1)
    ways = {
        "bare loop": functools.partial(bare_sample, model, class_B),
        "ours": draw("bf16", "bf16", is_compiled=False),
        "ours, compiled": draw("bf16, compiled", "bf16", is_compiled=True),
    }
    measure(f"bf16, batch {batch}", ways)
    wanted = drawn.pop("fp32", None)
    if wanted is not None:
        for name, found in drawn.items():
            bench.put(f"{name}: codes as in fp32", 100 * share_equal(found, wanted), "%")


def network(bench: Bench, space: CodeSpace) -> MaskedGenerator:
    torch.manual_seed(0)
    with bench.device:
        model = MaskedGenerator(MASKED_GENERATORS["toy" if bench.is_quick else "published"], space)
        model.initialise()
    return model.eval()


@torch.inference_mode()
def bare_sample(model: MaskedGenerator, class_B: Tensor) -> Tensor:
    """The network's passes under autocast, the most likely code at each place."""
    rows = torch.cat([class_B, torch.full_like(class_B, model.space.null_class)]).to(model.device)
    ids_BN = torch.full((len(class_B), model.space.num_tokens), model.mask_id, device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        for _ in range(STEPS):
            cond_BNV, uncond_BNV = model(rows, ids_BN.repeat(2, 1)).float().chunk(2)
            ids_BN = (uncond_BNV + SCALE * (cond_BNV - uncond_BNV)).argmax(-1)
    return ids_BN
