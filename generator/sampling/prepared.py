"""Prepare generators for fast sampling: the modules' computation, in the form that suits the machine.

On CPUs, linear layers use weights packed for oneDNN once, with the gain of the preceding norm folded in, and attention
reads only the positions written so far, in float32: such fused eager operations need no preparation time worth
mentioning and are fastest in float32. Compiled, a step is one graph, which suits CPUs in bfloat16. On CUDA the modules
run in the requested type; compiled, a step is a few kernels per layer, replayed as one CUDA graph.

Shapes: B sequences, R rows (twice B with guidance), N codes per sequence, V codebook size, W width, H heads, M = R * H
heads of all rows, D channels per head.
"""

import copy
import functools
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.autoregressive import NORM_EPSILON, Block, Generator
from generator.config import SampleConfig, SamplePrecision
from generator.masked import Block as MaskedBlock
from generator.masked import MaskedGenerator
from generator.network import GeneratorNetwork
from generator.sampling.autoregressive import Advance, Sampler, advance_of, guides, pick_of
from generator.sampling.compiled import compiled
from generator.sampling.cuda_graph import GraphReplayer, Record, SharedRecordings, record_cuda_graph
from generator.sampling.fused import FusedGenerator, Wrap
from generator.sampling.masked import MaskedSampler
from generator.sampling.sampler import CodeSampler
from infra.compute.packed import PackedLinear

DTYPES: dict[SamplePrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGE = 20_000_000
"""Number of parameters from which compiling a generator on CUDA pays."""
M = TypeVar("M", bound=GeneratorNetwork)


def is_large(model: GeneratorNetwork) -> bool:
    """Tell whether compiling a generator's step for CUDA gains more time than it takes."""
    return sum(p.numel() for p in model.parameters()) > LARGE


class PreparedGenerator(ABC, Generic[M]):
    """A generator prepared for samplers of many settings, which share its weights and the state of its recordings."""

    def __init__(self, model: M, precision: SamplePrecision, *, compile: bool, record: Record | None = None) -> None:
        """Copy its weights.

        Args:
            model: the generator, on the device to sample on.
            precision: of weights and matrix products.
            compile: on CPUs a step becomes one compiled graph; on CUDA see the kind.
            record: records steps; None: as CUDA graphs on CUDA, not at all on CPUs.

        Raises:
            ValueError: a compiler is missing.
        """
        self.precision, self.compile, self.device = precision, compile, model.device
        is_cpu = model.device.type == "cpu" and record is None
        self.is_packed, self.is_whole = is_cpu and not compile, is_cpu and compile
        self.is_by_parts = compile and not is_cpu and is_large(model)
        self.wrap: Wrap = functools.partial(compiled, device=model.device)
        self.recordings = SharedRecordings(record or record_cuda_graph) if compile and not is_cpu else None
        self._copy(model, DTYPES[precision])

    def sampler(self, config: SampleConfig) -> CodeSampler:
        """Make a sampler; its config must have this preparation's precision and compilation.

        Raises:
            ValueError: it has others, or settings for another kind of generator, or a compiler is missing.
        """
        config = config.on(self.device.type)
        if (config.precision, config.compile) != (self.precision, self.compile):
            raise ValueError(
                f"prepared for {self.precision}, compile = {self.compile}: prepare again for other settings"
            )
        return self._sampler(config)

    @abstractmethod
    def _copy(self, model: M, dtype: torch.dtype) -> None:
        """Copy the weights in the form that suits the device."""

    @abstractmethod
    def _sampler(self, config: SampleConfig) -> CodeSampler:
        """Make a sampler of a config with this preparation's settings."""


class PreparedAutoregressive(PreparedGenerator[Generator]):
    """An autoregressive generator prepared for sampling.

    Compiled on CUDA, its step is recorded as a CUDA graph, which takes little time, and the parts between its
    attentions are compiled if it has more than `LARGE` parameters: sampling from a smaller one takes less time than
    compiling it.
    """

    def _copy(self, model: Generator, dtype: torch.dtype) -> None:
        self.graphs: dict[tuple[object, ...], Advance | GraphReplayer] = {}
        self.fused: FusedGenerator | None = None
        self.network: PackedGenerator | Generator
        if self.is_packed:
            self.network = PackedGenerator(model, dtype)
            return
        self.network = twin = typed_copy(model, dtype)
        if self.is_by_parts:
            self.fused = FusedGenerator(twin, self.wrap)

    def _sampler(self, config: SampleConfig) -> Sampler:
        sampler = Sampler(self.network, config)
        if self.compile:
            # One graph serves all guidance scales, which are inputs.
            key = (guides(config, self.network.space), config.temperature, config.top_k, config.top_p)
            if key not in self.graphs:
                self.graphs[key] = self._graph(sampler)
            graph = self.graphs[key]
            if isinstance(graph, GraphReplayer):
                sampler.draw_all = graph
            else:
                sampler.advance = graph
        return sampler

    def _graph(self, sampler: Sampler) -> Advance | GraphReplayer:
        if self.recordings is None:
            return self.wrap(sampler.advance)
        ways = {"recorded": sampler.advance}
        if self.fused is not None:
            pick = self.wrap(pick_of(sampler.network, sampler.config))
            ways = {"compiled": advance_of(self.fused, pick), **ways}
        return GraphReplayer(sampler.network, sampler.config, ways, self.recordings)


class PreparedMasked(PreparedGenerator[MaskedGenerator]):
    """A masked generator prepared for sampling.

    Compiled on CUDA, its blocks are compiled if it has more than `LARGE` parameters. Its few passes are long, so
    nothing is recorded.
    """

    def _copy(self, model: MaskedGenerator, dtype: torch.dtype) -> None:
        self.network = packed_copy(model, dtype) if self.is_packed else typed_copy(model, dtype)
        if self.is_whole:
            self.network.forward = self.wrap(self.network.forward)  # type: ignore[method-assign]
        if self.is_by_parts:
            compile_blocks(self.network, self.wrap)

    def _sampler(self, config: SampleConfig) -> MaskedSampler:
        return MaskedSampler(self.network, config)


def compile_blocks(network: MaskedGenerator, wrap: Wrap) -> None:
    """Compile the blocks as one function that serves all of them."""
    call = wrap(MaskedBlock.forward)
    for block in network.blocks:
        block.forward = functools.partial(call, block)


def typed_copy(model: M, dtype: torch.dtype) -> M:
    """Make a frozen copy with weights of a type; tables that are not learned stay in float32."""
    twin = copy.deepcopy(model).requires_grad_(False).eval().to(dtype)
    twin.place_tables()
    return twin


def packed_copy(model: M, dtype: torch.dtype) -> M:
    """Make a frozen copy for CPUs with packed linear layers: products in `dtype`, everything else in float32."""
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, _PackedModule(child, dtype))
    return twin


class _PackedModule(nn.Module):
    """A packed linear layer with input and output in float32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = PackedLinear(linear.weight, linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return self.packed(x.to(self.packed.dtype)).float()


class PackedBlock:
    """A block for CPUs, one position of R rows at a time; norms, attention and residuals in float32."""

    def __init__(self, block: Block, width: int, dtype: torch.dtype) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.heads = attention.heads
        head_dim = width // self.heads
        gain = width**0.5
        # Interleave queries' and keys' halves as complex numbers need it; the order of D does not change the scores.
        pairs_D = torch.arange(head_dim).view(2, -1).T.flatten()
        heads_3HDW = attention.qkv.weight.detach().view(3, self.heads, head_dim, width)
        heads_3HDW = torch.cat([heads_3HDW[:2, :, pairs_D], heads_3HDW[2:]])
        self.qkv = PackedLinear(heads_3HDW.flatten(0, 2) * (block.norm_1.weight * gain), None, dtype)
        self.out = PackedLinear(attention.out.weight, None, dtype)
        self.gate_up = PackedLinear(feed_forward.gate_up.weight * (block.norm_2.weight * gain), None, dtype)
        self.down = PackedLinear(feed_forward.down.weight, None, dtype)
        self.dtype = dtype
        self.floor, self.head_floor = norm_floor(width), norm_floor(head_dim)
        self.head_gain_2D: Tensor | None = None
        if isinstance(attention.q_norm, nn.RMSNorm) and isinstance(attention.k_norm, nn.RMSNorm):
            gains = torch.stack([attention.q_norm.weight, attention.k_norm.weight]).detach()
            self.head_gain_2D = (gains[:, pairs_D] * head_dim**0.5)[:, None]

    def step(self, x_RW: Tensor, turn: Tensor, past_2NMD: Tensor, position: int) -> Tensor:
        """Compute one position, (R, W) to (R, W), in place.

        Args:
            x_RW: float32.
            turn: complex (2, 1, D / 2), factors of queries and keys.
            past_2NMD: keys and values of R * H heads, written at `position`.
            position: from 0.
        """
        rows = len(x_RW)
        qkv_R3HD = self.qkv(direction(x_RW, self.floor).to(self.dtype)).float().view(rows, 3, self.heads, -1)
        if self.head_gain_2D is not None:
            qkv_R3HD[:, :2] = direction(qkv_R3HD[:, :2], self.head_floor) * self.head_gain_2D
        torch.view_as_complex(qkv_R3HD[:, :2].unflatten(-1, (-1, 2))).mul_(turn)
        past_2NMD[:, position].unflatten(1, (rows, self.heads)).copy_(qkv_R3HD[:, 1:].transpose(0, 1))
        keys_SMD, values_SMD = past_2NMD[:, : position + 1]
        q_M1D = qkv_R3HD[:, 0].reshape(-1, 1, qkv_R3HD.shape[-1])
        share_M1S = torch.bmm(q_M1D, keys_SMD.permute(1, 2, 0)).softmax(-1)
        y_RW = torch.bmm(share_M1S, values_SMD.transpose(0, 1)).view(rows, -1)
        x_RW += self.out(y_RW.to(self.dtype))
        gate, up = self.gate_up(direction(x_RW, self.floor).to(self.dtype)).chunk(2, dim=-1)
        x_RW += self.down(F.silu(gate).mul_(up))
        return x_RW


def norm_floor(width: int) -> Tensor:
    """Convert the epsilon of a root mean square to one of a vector norm."""
    return torch.tensor((width * NORM_EPSILON) ** 0.5)


def direction(x: Tensor, floor: Tensor) -> Tensor:
    """Apply RMSNorm over the last dimension W, without its gain and divided by sqrt(W): the weights include both."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


class PackedGenerator:
    """Cached steps of an autoregressive generator on CPUs, with a packed copy of its weights."""

    @torch.no_grad()
    def __init__(self, model: Generator, dtype: torch.dtype) -> None:
        self.config, self.space, self.dtype = model.config, model.space, dtype
        self.class_embed, self.code_embed = copy.deepcopy(model.class_embed), copy.deepcopy(model.code_embed)
        self.order, self.target_positions = model.order, copy.deepcopy(model.target_positions)
        width = self.config.width
        self.blocks = [PackedBlock(b, width, dtype) for b in model.blocks if isinstance(b, Block)]
        head = model.code_embed if model.head is None else model.head
        self.head = PackedLinear(head.weight * (model.norm_out.weight * width**0.5), None, dtype)
        self.floor, self.head_dim = norm_floor(width), width // self.config.heads
        half = self.head_dim // 2
        turn = torch.complex(model.cos[:-1, :half], model.sin[:-1, :half])
        # The scale of the scores is applied to the queries' factors.
        self.turn = torch.stack([turn * self.head_dim**-0.5, turn], dim=1)[:, :, None]

    @property
    def device(self) -> torch.device:
        """Return the device that it computes on."""
        return self.order.device

    def empty_cache(self, batch: int) -> Tensor:
        """Allocate a cache for `batch` sequences, (layers, 2, N, batch * H, D).

        Always in float32, whose products read a slice in place, while those in bfloat16 would copy it first. Positions
        come first, so that a step writes contiguous memory. Uninitialised, since no step reads before it writes.
        """
        heads = batch * self.config.heads
        return torch.empty(self.config.layers, 2, self.space.num_tokens, heads, self.head_dim)

    def step(self, x_BW: Tensor, position: Tensor, cache: Tensor) -> Tensor:
        """Return logits (B, V) of the code at `position`, as `Generator.step` does.

        Raises:
            ValueError: the cache has other sizes.
        """
        place, heads = int(position), len(x_BW) * self.config.heads
        if cache.shape[2:4] != (self.space.num_tokens, heads):
            raise ValueError(
                f"the cache holds {cache.shape[3]} heads of {cache.shape[2]} codes, not {heads} of "
                f"{self.space.num_tokens}: make it with empty_cache({len(x_BW)})"
            )
        x_BW = x_BW.clone() if self.target_positions is None else x_BW + self.target_positions(position)
        for block, past_2NMD in zip(self.blocks, cache, strict=True):
            x_BW = block.step(x_BW, self.turn[place], past_2NMD, place)
        return self.head(direction(x_BW, self.floor).to(self.dtype))
