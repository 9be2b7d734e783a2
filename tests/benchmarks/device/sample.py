"""Autoregressive sampling with guidance, 64 codes of 8,192: tokens/s as eager steps, captured, and compiled.

Beside it a bare loop (the modules, softmax, torch.multinomial) and transformers' Llama of that shape with its static
cache. The limit of a step is the time to read its weights once and half of a full cache, at the speed of a copy, and
then to compute its products at that of a large one; nothing overlaps in it.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GENERATORS, GeneratorConfig, SampleConfig, SamplePrecision
from generator.kinds import prepare_sampler
from generator.sampling.autoregressive import Sampler
from generator.sampling.cuda_graph import GraphReplayer, SharedRecordings, record_cuda_graph
from generator.sampling.prepared import DTYPES
from tests.benchmarks.device.bench import Bench, share_equal

SPACE, TOY_SPACE = CodeSpace(8192, 64, 1000), CodeSpace(256, 16, 10)
BATCHES, QUICK_BATCHES = (256, 64, 1024), (2, 4)  # the first one is where fp32 is looked at, and compilation begins
REFERENCE_BATCHES, REFERENCE_STEPS = (64, 256), 16
SCALE = 2.0
WAYS = ("eager", "captured", "compiled")


def run_b(bench: Bench) -> None:
    """Generator B."""
    measure(bench, "B", with_llama=True)


def run_xl(bench: Bench) -> None:
    """Generator XL."""
    measure(bench, "XL", with_llama=False)


def measure(bench: Bench, size: str, *, with_llama: bool) -> None:
    """Every batch in bf16; then, at the first one, whether other ways to compute draw other codes."""
    config, space = (GENERATORS["toy"], TOY_SPACE) if bench.is_quick else (GENERATORS[size], SPACE)
    model = network(bench, config, space)
    batches = QUICK_BATCHES if bench.is_quick else BATCHES
    if bench.is_quick and size == "XL":  # the toy that B was, too
        batches = batches[:1]
    made = samplers(bench, model, "bf16")
    bare = functools.partial(bare_sample, half(model))
    for batch in batches:
        given = inputs(model, batch)
        if with_llama and (bench.is_quick or batch in REFERENCE_BATCHES):
            bench.attempt(f"bf16, batch {batch}: Llama", functools.partial(llama_speed, bench, model, batch))
        ways = {"bare loop": functools.partial(bare, given[0])}
        ways |= {f"ours, {way}": functools.partial(draw, sampler, given) for way, sampler in made.items()}
        speed(bench, model, batch, ways)
        if batch == batches[0]:
            compare_codes(bench, "bf16", made, given)
    compare_codes(bench, "fp32", samplers(bench, model, "fp32"), inputs(model, batches[0]))


def network(bench: Bench, config: GeneratorConfig, space: CodeSpace) -> Generator:
    torch.manual_seed(0)
    with bench.device:
        model = Generator(config, space)
        model.initialise()
    return model.eval()


def samplers(bench: Bench, model: Generator, precision: SamplePrecision) -> dict[str, Callable[[], Sampler]]:
    """Samplers that are eager; captured, which on CPUs records nothing; and compiled, which on CUDA is captured too."""

    def make(way: str) -> Sampler:
        sampler = prepare_sampler(model, SampleConfig(cfg_scale=SCALE, precision=precision, compile=way == "compiled"))
        assert isinstance(sampler, Sampler)
        if way == "captured":
            recordings = SharedRecordings(record_cuda_graph if bench.device.type == "cuda" else lambda tick, _: tick)
            sampler.draw_all = GraphReplayer(sampler.network, sampler.config, {"recorded": sampler.advance}, recordings)
        return sampler

    # Made at the first call: within what may fail and take time.
    return {way: functools.cache(functools.partial(make, way)) for way in WAYS}


def draw(made: Callable[[], Sampler], given: tuple[Tensor, Tensor]) -> Tensor:
    """Codes of classes and uniform numbers."""
    return made()(*given)


def inputs(model: Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Classes and uniform numbers."""
    numbers = torch.rand(batch, model.space.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.arange(batch) % model.space.num_classes, numbers


def speed(bench: Bench, model: Generator, batch: int, ways: dict[str, Callable[[], object]]) -> None:
    """One batch in bf16, and how near its limit the fastest way comes."""
    tokens = batch * model.space.num_tokens
    found = bench.race(f"bf16, batch {batch}", ways, items=tokens, unit="tokens/s", rounds=3, warm=2)
    if found:
        best = max(found, key=found.__getitem__)
        limit = batch / step_seconds(bench, model.config, model.space, batch)
        bench.put(f"bf16, batch {batch}: {best}, of the limit", 100 * found[best] / limit, "%")


def compare_codes(
    bench: Bench, precision: str, made: dict[str, Callable[[], Sampler]], given: tuple[Tensor, Tensor]
) -> None:
    """Share of codes that differ from eager ones: in fp32 none should, in bf16 rounding decides some draws."""
    wanted = draw(made["eager"], given)

    def compare(name: str, sampler: Callable[[], Sampler]) -> None:
        first = bench.once(lambda: draw(sampler, given))
        differs, note = 100 * (1 - share_equal(draw(sampler, given), wanted)), f"(its first call took {first:.1f} s)"
        draws = sampler().draw_all
        if isinstance(draws, GraphReplayer) and draws.recordings.refused:
            note += f"; drawn another way, since it was refused: {', '.join(sorted(draws.recordings.refused))}"
        bench.put(name, differs, "%", note=note)

    for way in WAYS[1:]:
        name = f"{precision}, batch {len(wanted)}: {way} codes that differ from eager"
        bench.attempt(name, functools.partial(compare, name, made[way]))


def step_seconds(bench: Bench, config: GeneratorConfig, space: CodeSpace, batch: int) -> float:
    """The limit of a step in bf16, in seconds."""
    weights = config.layers * (4 * config.width**2 + 3 * config.width * config.ffn_width)
    weights += config.width * space.codebook_size
    cache = 2 * batch * config.layers * 2 * space.num_tokens * config.width
    read = DTYPES["bf16"].itemsize * (weights + cache / 2)
    return read / bench.bandwidth() + 2 * weights * 2 * batch / bench.peak("bf16")


def half(model: Generator) -> Generator:
    """A copy with weights in bf16."""
    twin = copy.deepcopy(model).to(torch.bfloat16)
    twin.place_tables()
    return twin


@torch.inference_mode()
def bare_sample(model: Generator, class_B: Tensor) -> Tensor:
    """The network's own cached steps, drawn from by torch.multinomial."""
    space, class_B = model.space, class_B.to(model.device)
    rows_R = torch.cat([class_B, torch.full_like(class_B, space.null_class)])
    x_RW, cache, codes = model.class_embed(rows_R), model.empty_cache(len(rows_R)), []
    for position in torch.arange(space.num_tokens, device=model.device):
        cond_BV, uncond_BV = model.step(x_RW, position, cache).float().chunk(2)
        shares_BV = (uncond_BV + SCALE * (cond_BV - uncond_BV)).softmax(-1)
        codes.append(torch.multinomial(shares_BV, 1)[:, 0])
        x_RW = model.code_embed(codes[-1].repeat(2))
    return torch.stack(codes, dim=1)


def llama_speed(bench: Bench, model: Generator, batch: int) -> None:
    """transformers' Llama, not compiled; steps of a static cache take equal time, so a few tell as much."""
    from tests.benchmarks.llama import llama_of, llama_tokens

    network = llama_of(model.config, model.space).to(bench.device, torch.bfloat16)
    steps = min(REFERENCE_STEPS, model.space.num_tokens)
    class_B = torch.arange(batch, device=bench.device) % model.space.num_classes
    taken = bench.seconds(lambda: llama_tokens(network, class_B, steps, SCALE), rounds=3, warm=1)
    bench.put(f"bf16, batch {batch}: transformers' Llama, static cache", batch * steps / taken, "tokens/s")
