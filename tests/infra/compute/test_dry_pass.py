"""Memory that is counted without a GPU: its parts are those of torch's own allocations, types and kernels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from generator.code_space import CodeSpace
from generator.config import GENERATORS, MASKED_GENERATORS, AnyGeneratorConfig
from generator.kinds import build_generator
from generator.network import GeneratorNetwork
from infra.compute.dry_pass import Allocations, _AsOnCuda, backward, peak_bytes
from infra.training.loop import autocast
from sftok.config import TeacherConfig
from sftok.model.teacher import ResBlock

SPACE = CodeSpace(512, 16, 10)
MODELS: dict[str, AnyGeneratorConfig] = {
    "autoregressive": GENERATORS["toy"].model_copy(update={"qk_norm": True}),
    "masked": MASKED_GENERATORS["toy"],
}
BF16 = torch.bfloat16


def passing(network: GeneratorNetwork, rows: int, precision: str = "fp32") -> Callable[[], None]:
    """A training pass, with gradients that are there before."""
    device = str(network.device)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
    codes_BN = torch.zeros(rows, network.space.num_tokens, dtype=torch.int64, device=device)
    view_BN = network.draw_view(rows, step=0, generator=torch.Generator())

    def work() -> None:
        view = None if view_BN is None else view_BN.to(device)
        with autocast(precision, device):  # type: ignore[arg-type]
            loss = network.training_loss(codes_BN[:, 0], codes_BN, view, codes_BN[:, 0], label_smoothing=0.0)
        backward(loss)

    return work


def network(config: AnyGeneratorConfig, device: str, *, recomputes: bool = False) -> GeneratorNetwork:
    with torch.device(device):
        made = build_generator(config, SPACE)
    if device != "meta":
        made.initialise()
    made.recompute(recomputes)
    return made.train()


def profiled_peak(work: Callable[[], None]) -> int:
    """The most bytes that torch's own profiler sees allocated at a time, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def held(network: GeneratorNetwork) -> list[Tensor]:
    """Tensors that are there before a pass."""
    parameters = list(network.parameters())
    return [*parameters, *network.buffers(), *(p.grad for p in parameters if p.grad is not None)]


def counted_peak(made: GeneratorNetwork, rows: int) -> int:
    """The most bytes that our counter sees allocated at a time, as the device itself computes."""
    work = passing(made, rows)
    with Allocations(held(made)) as counted:
        work()
    return counted.peak


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_counts_what_torchs_profiler_measures(config: AnyGeneratorConfig, recomputes: bool) -> None:
    """On a CPU, whose allocations can be measured: the same pass on the meta device is counted as much."""
    made = network(config, "cpu", recomputes=recomputes)
    measured = profiled_peak(passing(made, rows=16))
    assert counted_peak(made, rows=16) == pytest.approx(measured, rel=0.005)
    on_meta = counted_peak(network(config, "meta", recomputes=recomputes), rows=16)
    assert on_meta == pytest.approx(measured, rel=0.05)  # attention has another kernel there


def test_what_was_given_or_freed_is_not_counted() -> None:
    weight = torch.empty(1000, device="meta")

    def work() -> None:
        (weight * 2).sum()
        weight.view(10, 100).add_(1)
        weight + 1

    assert peak_bytes(work, given=[weight]) == [4004]


def test_blocks_that_are_recomputed_keep_their_inputs_and_one_block() -> None:
    """Guards against recomputation that is not seen, whose types and kernels would then not be CUDA's."""
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)]
    for block in blocks:
        block.to("meta")
    x = torch.empty(1000, 64, device="meta", requires_grad=True)
    weights = [p for block in blocks for p in block.parameters()]

    def work() -> None:
        y = x
        with autocast("bf16", "meta"):
            for block in blocks:
                y = checkpoint(block, y, use_reentrant=False)
        backward(y.float().sum())

    one = 1000 * 64 * 2
    (peak,) = peak_bytes(work, given=[x, *weights])
    assert 8 * one < peak < 8 * one + 12 * one


def saved(work: Callable[[], object]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types that autograd keeps, each storage once."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sorted(((tuple(t.shape), t.dtype) for t in found.values()), key=str)


def mlp(device: str) -> Callable[[], Tensor]:
    with torch.device(device):
        norm, rms, inner, outer = nn.LayerNorm(64), nn.RMSNorm(64), nn.Linear(64, 256), nn.Linear(256, 64, bias=False)
        x = torch.empty(2, 8, 64, requires_grad=True)

    def forward() -> Tensor:
        y = x + F.dropout(outer(F.gelu(inner(rms(x)))), 0.1)
        y = y + outer(F.silu(inner(norm(y))).softmax(-1))
        return F.mse_loss(y @ inner.weight.T, torch.zeros((), device=device).expand(2, 8, 256))

    return forward


def residual(device: str) -> Callable[[], Tensor]:
    with torch.device(device):
        block, x = ResBlock(8, 16, TeacherConfig(norm_groups=4)), torch.empty(2, 8, 16, 16, requires_grad=True)
    return lambda: block(x).float().square().sum()


@pytest.mark.parametrize("made", [mlp, residual])
def test_types_and_fused_kernels_are_those_of_cudas_autocast(made: Callable[[str], Callable[[], Tensor]]) -> None:
    """Against torch's own dispatch to CUDA, of tensors that only pretend to be there."""
    forward = made("meta")
    with _AsOnCuda(fused_attention=True), autocast("bf16", "meta"):
        ours = saved(forward)
    with FakeTensorMode():
        forward = made("cuda")
        torch.set_autocast_dtype("cuda", BF16)
        torch.set_autocast_enabled("cuda", True)
        try:
            torchs = saved(forward)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    assert ours == torchs


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 64), (BF16, 100), (torch.float32, 64)])
def test_attention_keeps_no_scores(dtype: torch.dtype, width: int) -> None:
    q = torch.empty(2, 4, 256, width, dtype=dtype, device="meta", requires_grad=True)
    with _AsOnCuda(fused_attention=True):
        fused = saved(lambda: F.scaled_dot_product_attention(q * 1, q * 2, q * 3, is_causal=True))
    with _AsOnCuda(fused_attention=False):
        plain = saved(lambda: F.scaled_dot_product_attention(q * 1, q * 2, q * 3, is_causal=True))
    assert not any(shape[-2:] == (256, 256) for shape, _ in fused)
    assert any(shape[-2:] == (256, 256) for shape, _ in plain)
    padded = -(-width // 8) * 8
    assert {shape[-1] for shape, kind in fused if kind == dtype and len(shape) == 4} <= {padded, width}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_gpu_allocates_as_much(config: AnyGeneratorConfig, recomputes: bool, precision: str) -> None:
    made = network(config, "meta", recomputes=recomputes)
    work = passing(made, 256, precision)
    (counted,) = peak_bytes(work, given=held(made))
    work = passing(network(config, "cuda", recomputes=recomputes), 256, precision)
    work()  # makes workspaces, which are not counted
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(counted, rel=0.15)
