"""Recorded sampling: on a CPU with fakes of CUDA graphs, correct and faulty ones; on a GPU with real ones."""

import gc
import logging
import re
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import SampleConfig
from generator.sampling import prepared as fast_sample
from generator.sampling.autoregressive import Sampler
from generator.sampling.compiled import isolated
from generator.sampling.cuda_graph import Tick
from generator.sampling.filters import draw, misfit
from generator.sampling.fused import FusedGenerator
from generator.sampling.prepared import PreparedAutoregressive, compile_blocks, typed_copy
from tests.support.plain_sampling import sample
from tests.support.small_generators import autoregressive, masked, uniform

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied": True},
    "fixed": {"order": {"kind": "fixed", "seed": 2}},
    "annealed": {"order": {"kind": "annealed", "start_step": 1, "end_step": 2}},
    "one layer": {"layers": 1},
}
CLASSES = torch.tensor([0, 1, 2, 3])


def recorded(tick: Tick, rewind: Tick) -> Tick:
    """Record correctly: warm up, rewind, and replay the same step."""
    for _ in range(9):
        rewind()
        tick()
    return tick


def empty(_tick: Tick, _rewind: Tick) -> Tick:
    """Record nothing."""
    return lambda: None


def impossible(_tick: Tick, _rewind: Tick) -> Tick:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def sampler_of(
    model: Generator, config: SampleConfig, record: Callable[[Tick, Tick], Tick] | None = recorded
) -> Sampler:
    config = config.on(model.device.type)
    prepared = PreparedAutoregressive(model, config.arithmetic, compile=True, record=record)
    sampler = prepared.sampler(config.model_copy(update={"compile": True}))
    assert isinstance(sampler, Sampler)
    return sampler


@pytest.fixture
def by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small generators like large ones, without compiling."""
    monkeypatch.setattr(fast_sample, "LARGE", 0)
    monkeypatch.setattr(fast_sample, "compiled", lambda function, device: function)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_fused_steps_equal_those_of_the_modules(variant: str) -> None:
    model = autoregressive(**VARIANTS[variant])
    fused, codes = FusedGenerator(model, lambda function: function), torch.randint(11, (4, 6))
    caches, x_RW = [model.empty_cache(4), fused.empty_cache(4)], model.class_embed(CLASSES)
    for step in range(6):
        plain, found = (n.step(x_RW, torch.tensor(step), c) for n, c in zip((model, fused), caches, strict=True))
        assert torch.allclose(plain, found, atol=1e-5)
        x_RW = model.code_embed(codes[:, step])
    for plain, found in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        assert torch.allclose(plain, found, atol=1e-5)
    with pytest.raises(ValueError, match=r"make it with empty_cache\(3\)"):
        fused.step(x_RW[:3], torch.tensor(0), caches[0])


CHANGES = [{}, {"cfg_scale": 3.0, "cfg_schedule": "linear", "temperature": 0.8}, {"top_k": 5, "temperature": 0}]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("variant", ["plain", "fixed"])
def test_recorded_steps_draw_the_same(variant: str, changes: dict[str, object]) -> None:
    model, config = autoregressive(**VARIANTS[variant]), SampleConfig.model_validate(changes)
    sampler = sampler_of(model, config)
    for count, seed in ((4, 4), (4, 5), (3, 6), (4, 4)):  # recorded, replayed, recorded for another size, replayed
        numbers = uniform(count, 6, seed=seed)
        assert torch.equal(sampler(CLASSES[:count], numbers), sample(model, CLASSES[:count], numbers, config))


@pytest.mark.usefixtures("by_parts")
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_in_parts_draw_the_same(
    variant: str, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    model, config = autoregressive(**VARIANTS[variant]), SampleConfig.model_validate(changes)
    sampler = sampler_of(model, config)
    for seed in (4, 5):
        numbers = uniform(4, 6, seed=seed)
        assert torch.equal(sampler(CLASSES, numbers), sample(model, CLASSES, numbers, config))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (empty, r"draws other codes \(\d+% of them; up to 1% is rounding\)"),
        (impossible, r"cannot be recorded \(operation not permitted when stream is capturing\)"),
    ],
)
def test_a_faulty_recording_is_found_and_said_once(
    record: Callable[[Tick, Tick], Tick], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a faulty recording that always draws the first code."""
    model, config = autoregressive(), SampleConfig(cfg_scale=2.0)
    prepared = PreparedAutoregressive(model, "fp32", compile=True, record=record)
    with caplog.at_level(logging.WARNING):
        for temperature in (1.0, 0.9):
            changed = config.model_copy(update={"temperature": temperature, "compile": True})
            sampler = prepared.sampler(changed)
            for seed in (4, 5):
                numbers = uniform(4, 6, seed=seed)
                assert torch.equal(sampler(CLASSES, numbers), sample(model, CLASSES, numbers, changed))
    (message,) = caplog.messages
    assert re.fullmatch(rf"torch {re.escape(torch.__version__)}: the recorded step {said}; .*", message)


@pytest.mark.usefixtures("by_parts")
def test_a_compiled_step_that_draws_other_codes_gives_way_to_the_recorded_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against torch 2.11, which drew code 0 from codebooks of up to 128 (pytorch#189895)."""

    def faulty(function: Callable[..., object], device: torch.device) -> Callable[..., object]:
        def zero(logits_RV: Tensor, uniform_B: Tensor, _scale: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(uniform_B), dtype=torch.int64), torch.zeros(len(logits_RV), 16)

        return zero if function.__name__ == "pick" else function

    monkeypatch.setattr(fast_sample, "compiled", faulty)
    model, config, calls = autoregressive(), SampleConfig(cfg_scale=2.0), []

    def counted(tick: Tick, rewind: Tick) -> Tick:
        replay = recorded(tick, rewind)
        return lambda: (calls.append(1), replay())[1]

    sampler, numbers = sampler_of(model, config, counted), uniform(4, 6)
    assert torch.equal(sampler(CLASSES, numbers), sample(model, CLASSES, numbers, config))
    assert len(calls) == 3 * 6  # both ways tried, then drawn with the second
    (message,) = caplog.messages
    assert "the compiled step draws other codes" in message


def test_memory_that_runs_out_is_no_fault_of_a_recording() -> None:
    def full(_tick: Tick, _rewind: Tick) -> Tick:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        sampler_of(autoregressive(), SampleConfig(), full)(CLASSES, uniform(4, 6))


def test_samplers_of_one_network_share_the_room_of_a_batch() -> None:
    model = autoregressive()
    prepared = PreparedAutoregressive(model, "fp32", compile=True, record=recorded)
    configs = [SampleConfig(temperature=t, compile=True) for t in (0.5, 1.0, 1.5)]
    samplers = [prepared.sampler(config) for config in configs]
    for _ in range(2):  # recorded in turns, replayed in turns
        for sampler, config in zip(samplers, configs, strict=True):
            assert torch.equal(sampler(CLASSES, uniform(4, 6)), sample(model, CLASSES, uniform(4, 6), config))
    assert prepared.recordings is not None
    assert len(prepared.recordings.states) == 1


@pytest.mark.usefixtures("by_parts")
def test_what_was_prepared_is_freed_when_it_is_dropped() -> None:
    prepared = PreparedAutoregressive(autoregressive(), "fp32", compile=True, record=recorded)
    prepared.sampler(SampleConfig(compile=True))(CLASSES, uniform(4, 6))
    assert prepared.recordings is not None
    held = [weakref.ref(prepared.network), *(weakref.ref(state) for state in prepared.recordings.states.values())]
    del prepared
    gc.collect()
    assert [ref() for ref in held] == [None] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_misfit_is_zero_for_codes_that_were_drawn(temperature: float) -> None:
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 2
    config, numbers = SampleConfig(temperature=temperature, top_k=100, top_p=0.95), uniform(200)
    codes = draw(logits, numbers, config)
    assert misfit(logits, numbers, codes, config).max() < 1e-9
    assert misfit(logits, numbers, (codes + 150) % 300, config).median() > 0.05
    assert misfit(logits * torch.nan, numbers, codes, config).isnan().all()


class Counting:
    """Backend of torch.compile that compiles nothing and counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return module.forward

    def wrap(self, function: Callable[..., object]) -> Callable[..., object]:
        return isolated(function, backend=self)


@torch.no_grad()
def test_all_layers_share_one_graph() -> None:
    model, counting = autoregressive(layers=5, qk_norm=True), Counting()
    fused, cache, plain_cache = FusedGenerator(model, counting.wrap), model.empty_cache(4), model.empty_cache(4)
    for step in range(3):
        x_RW = torch.randn(4, 16)
        found = fused.step(x_RW, torch.tensor(step), cache)
        assert torch.allclose(found, model.step(x_RW, torch.tensor(step), plain_cache), atol=1e-5)
    assert counting.graphs == 3  # before, between and after the attentions


@torch.no_grad()
def test_all_blocks_of_a_masked_generator_share_one_graph() -> None:
    model, counting = masked(layers=5), Counting()
    twin, codes = typed_copy(model, torch.float32), torch.randint(12, (4, 6))
    compile_blocks(twin, counting.wrap)
    for _ in range(2):
        assert torch.equal(twin(CLASSES, codes), model(CLASSES, codes))
    assert counting.graphs == 1


@pytest.mark.parametrize("can_isolate", [None, False])
def test_functions_of_the_same_code_have_graphs_of_their_own(
    can_isolate: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exceeds torch's recompile limit; on versions without isolation, our own must keep graphs separate."""
    if can_isolate is not None:
        monkeypatch.setattr("generator.sampling.compiled.CAN_ISOLATE", can_isolate)

    class Scaled:
        def __init__(self, scale: int) -> None:
            self.scale = scale

        def times(self, x: Tensor, *, more: int = 1) -> Tensor:
            return x * self.scale * more

    def shifted(shift: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x + shift

    for number in range(12):
        assert isolated(Scaled(number).times, backend="eager")(torch.ones(2)).tolist() == [number] * 2
        assert isolated(shifted(number), backend="eager")(torch.ones(2)).tolist() == [number + 1] * 2


KERNEL = """
    import torch
    from generator.sampling.attention_kernel import launch
    from generator.sampling.fused import attend
    from generator.autoregressive import NORM_EPSILON

    torch.manual_seed(0)
    for rows, heads, count, dim in ((3, 2, 6, 8), (2, 1, 70, 24)):  # of 70 positions, 64 are taken at a time
        half = torch.randn(2, count + 1, dim // 2)
        tables = tuple(torch.cat([half, half], dim=-1))
        for gains in (None, (torch.randn(dim), torch.randn(dim))):
            caches = [tuple(torch.full((rows, heads, count, dim), torch.nan) for _ in range(2)) for _ in range(2)]
            caches[0] = tuple(tensor.zero_() for tensor in caches[0])
            for place in range(count):
                qkv, position = torch.randn(rows, 3 * heads * dim), torch.tensor(place)
                wanted = attend(qkv, position, tables, gains, caches[0])
                found = launch(qkv, position, tables, gains, caches[1], NORM_EPSILON)
                assert torch.allclose(found, wanted, atol=1e-5), (place, gains)
            for found, wanted in zip(caches[1], caches[0]):
                assert torch.allclose(found, wanted, atol=1e-5)
"""


@pytest.mark.slow
def test_the_attention_kernel_computes_what_the_operations_do() -> None:
    """Runs Triton's interpreter in its own process, since it is chosen when Triton is imported."""
    triton = pytest.importorskip("triton", "3.8")  # older interpreters fail with numpy 2.4
    assert triton is not None
    code = "import os\nos.environ['TRITON_INTERPRET'] = '1'\n" + textwrap.dedent(KERNEL)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kernel_that_triton_cannot_compile_is_refused_like_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's errors are not RuntimeErrors, on which the next variant is used."""
    triton = pytest.importorskip("triton")
    from generator.sampling import attention_kernel

    class Kernel:
        def __getitem__(self, _: object) -> object:
            raise triton.TritonError("out of resource: shared memory")

    monkeypatch.setattr(attention_kernel, "attend_kernel", Kernel())
    table, room = torch.ones(4, 8), torch.zeros(1, 1, 3, 8)
    with pytest.raises(RuntimeError, match=r"^Triton: out of resource: shared memory"):
        attention_kernel.launch(torch.ones(1, 24), torch.tensor(0), (table, table), None, (room, room), 1e-6)


COMPILES = """
    import torch
    from torch._dynamo.utils import counters
    from infra.compute.compiler import keep_compiled
    keep_compiled()
    from generator.sampling.compiled import isolated
    from generator.sampling.fused import between, LayerWeights

    weights = LayerWeights(*(torch.ones(s) for s in ((8,), (24, 8), (8, 8), (8,), (32, 8), (8, 16))))
    with torch.inference_mode():
        isolated(between)(torch.ones(2, 8), torch.ones(2, 8), weights, torch.ones(8), torch.ones(24, 8))
    found = counters["inductor"]
    print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    said = [
        subprocess.run([sys.executable, "-c", textwrap.dedent(COMPILES)], check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [run.stdout.split()[-2:] for run in said] == [["0", "1"], ["1", "0"]]


def gpu_codes(model: Generator, config: SampleConfig, classes: Tensor, numbers: Tensor) -> list[Tensor]:
    """Draw codes twice with a recorded sampler, and return them on the CPU."""
    sampler = sampler_of(model, config, None)
    return [sampler(classes, numbers).cpu() for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("codes", [11, 300])  # one chunk and several, see generator.sampling.filters.invert
@pytest.mark.parametrize("changes", [{}, {"cfg_scale": 2.0, "top_k": 8, "top_p": 0.9}, {"temperature": 0}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_recorded_and_compiled_draw_the_same_on_a_gpu(
    variant: str,
    changes: dict[str, object],
    codes: int,
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fast_sample, "LARGE", 0 if large else 10**9)
    model = autoregressive(space=CodeSpace(codes, 6, 3), **VARIANTS[variant])
    config = SampleConfig.model_validate({"precision": "fp32", **changes})
    classes, numbers = torch.arange(32) % 4, uniform(32, 6)
    on_cpu = sample(model, classes, numbers, config)
    eager = sample(model.cuda(), classes, numbers, config).cpu()
    assert (eager == on_cpu).double().mean() >= 0.99
    for found in gpu_codes(model, config, classes, numbers):
        assert (found == eager).double().mean() >= 0.99
    assert caplog.messages == []  # neither way was refused


@pytest.mark.gpu
@torch.inference_mode()
def test_compiled_logits_in_bf16_are_those_of_the_modules_within_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """Given the same codes, the RMS difference of logits is within 2 % of their spread."""
    from generator.sampling.compiled import compiled

    model = autoregressive(width=128, heads=2, layers=4, ffn_width=344, space=CodeSpace(300, 70, 3))
    model = typed_copy(model.cuda(), torch.bfloat16)
    fused = FusedGenerator(model, lambda function: compiled(function, model.device))
    codes = torch.randint(300, (16, 70), device="cuda")
    caches, x_RW = (model.empty_cache(16), fused.empty_cache(16)), model.class_embed(codes[:, 0] % 4)
    differing = []
    for step in range(70):
        position = torch.tensor(step, device="cuda")
        plain, found = (n.step(x_RW, position, c).float() for n, c in zip((model, fused), caches, strict=True))
        assert found.isfinite().all()
        assert (found - plain).square().mean().sqrt() < 0.02 * plain.std() + 1e-3
        numbers = uniform(16, seed=step).cuda()
        differing.append((draw(plain, numbers, SampleConfig()) != draw(found, numbers, SampleConfig())).double().mean())
        x_RW = model.code_embed(codes[:, step])
    with capsys.disabled():
        print(f"\nbf16: {torch.stack(differing).mean().item():.1%} of codes differ")  # noqa: T201


@pytest.mark.gpu
def test_replays_do_not_wait_for_the_host_and_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_sample, "LARGE", 0)
    model, numbers = autoregressive().cuda(), uniform(4, 6).cuda()
    gc.collect()
    before, classes = torch.cuda.memory_allocated(), CLASSES.cuda()
    sampler = sampler_of(model, SampleConfig(cfg_scale=2.0))
    first = sampler(classes, numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = sampler._draw(classes, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
    del sampler, first, again
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**26  # cuBLAS keeps a workspace
