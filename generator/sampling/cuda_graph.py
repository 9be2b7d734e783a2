"""Run a sampler's step as a CUDA graph: recorded once per batch size, checked, and replayed for every code.

A recording that draws wrong codes raises no error, so the first codes of each are compared with the plain step; if they
do not match, the next variant of the step is used instead, with a warning.

Shapes: B sequences, R rows (twice B with guidance), N codes per sequence, V codebook size, W width.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from generator.config import SampleConfig, SamplePrecision
from generator.sampling.autoregressive import Advance, Cache, CachedNetwork, guided_logits
from generator.sampling.filters import misfit

Tick = Callable[[], None]
Record = Callable[[Tick, Tick], Tick]
"""Records a step on tensors at fixed addresses, given also what rewinds it; returns a function that replays it."""
WARM_UP_CALLS = 3

log = logging.getLogger(__name__)


class Bound(NamedTuple):
    """Tolerance for a recording, which rounds differently from the plain step."""

    misfit: float
    """in probability, see `generator.sampling.filters.misfit`."""
    share: float
    """share of the codes that may exceed `misfit`."""


# Guidance amplifies rounding in bfloat16; most codes of a faulty recording exceed the bound.
BOUNDS: dict[SamplePrecision, Bound] = {"fp32": Bound(1e-3, 0.01), "bf16": Bound(0.1, 0.1)}


@dataclass(frozen=True)
class State:
    """Tensors that a recorded step reads and writes."""

    rows: Tensor
    """embeddings (R, W)."""
    position: Tensor
    """scalar int64."""
    uniform: Tensor
    """(B, N)."""
    scales: Tensor
    """(N,)."""
    codes: Tensor
    """(B, N) int64, in the order of drawing."""
    cache: Cache

    @classmethod
    def of(cls, network: CachedNetwork, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> "State":
        """Allocate the state for batches of this shape."""
        tensors = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x_RW, uniform_BN, scales_N))
        x_RW, uniform_BN, scales_N = tensors
        position = torch.zeros((), dtype=torch.int64, device=x_RW.device)
        codes_BN = torch.zeros(uniform_BN.shape, dtype=torch.int64, device=x_RW.device)
        return cls(x_RW, position, uniform_BN, scales_N, codes_BN, network.empty_cache(len(x_RW)))

    def load(self, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> None:
        """Load a batch. The cache is not cleared: no step reads a position before it is written."""
        self.rows.copy_(x_RW)
        self.uniform.copy_(uniform_BN)
        self.scales.copy_(scales_N)
        self.rewind()

    def rewind(self) -> None:
        """Return to the first position."""
        self.position.zero_()

    def tick(self, advance: Advance) -> None:
        """Draw the codes of one position and move to the next, without host synchronization."""
        where = self.position[None]
        uniform_B, scale = self.uniform.index_select(1, where)[:, 0], self.scales.index_select(0, where)[0]
        code_B, next_RW = advance(self.rows, self.position, uniform_B, scale, self.cache)
        self.codes.index_copy_(1, where, code_B[:, None])
        self.rows.copy_(next_RW)
        self.position.add_(1)


@dataclass
class SharedRecordings:
    """State that recordings of one network can share, since they are replayed one at a time."""

    record: Record
    states: dict[tuple[torch.Size, torch.Size], State] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    """names of variants that drew wrong codes or could not be recorded."""


class GraphReplayer:
    """Draws batches by replaying a recorded step: the first of several variants whose recording draws correct codes.

    The last resort is the plain step itself, called from the host.
    """

    def __init__(
        self, network: CachedNetwork, config: SampleConfig, ways: Mapping[str, Advance], recordings: SharedRecordings
    ) -> None:
        """Take the plain network, and variants of its step by name, the last of which is the plain step."""
        self.network, self.config, self.ways, self.recordings = network, config, ways, recordings
        self.replays: dict[tuple[torch.Size, torch.Size], Tick] = {}

    def __call__(self, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> Tensor:
        """Draw codes (B, N) in the order of drawing, in a new tensor."""
        key, batch = (x_RW.shape, uniform_BN.shape), (x_RW, uniform_BN, scales_N)
        if key not in self.recordings.states:
            self.recordings.states[key] = State.of(self.network, *batch)
        state = self.recordings.states[key]
        if key not in self.replays:
            self.replays[key] = self._choose(state, batch)
        return self._draw(state, self.replays[key], batch)

    def _draw(self, state: State, replay: Tick, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        state.load(*batch)
        for _ in range(len(state.scales)):
            replay()
        return state.codes.clone()

    def _choose(self, state: State, batch: tuple[Tensor, Tensor, Tensor]) -> Tick:
        bound = BOUNDS[self.config.arithmetic]
        for name, advance in self.ways.items():
            if name in self.recordings.refused:
                continue
            tick = partial(state.tick, advance)
            try:
                state.load(*batch)
                replay = self.recordings.record(tick, state.rewind)
                share = self._share_of_misfits(self._draw(state, replay, batch), batch, bound.misfit)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # it cannot be compiled or recorded
                reason = f"cannot be recorded ({str(error).strip().splitlines()[0]})"
            else:
                if share <= bound.share:
                    return replay
                reason = f"draws other codes ({share:.0%} of them; up to {bound.share:.0%} is rounding)"
            self.recordings.refused.add(name)
            log.warning("torch %s: the %s step %s; it is drawn another way", torch.__version__, name, reason)
        return partial(state.tick, list(self.ways.values())[-1])

    def _share_of_misfits(self, codes_BN: Tensor, batch: tuple[Tensor, Tensor, Tensor], bound: float) -> float:
        """Return the share of codes that the plain step, given the codes before, would not have drawn."""
        x_RW, uniform_BN, scales_N = batch
        cache, wrong = self.network.empty_cache(len(x_RW)), []
        for place, code_B in enumerate(codes_BN.unbind(1)):
            position = torch.tensor(place, device=x_RW.device)
            logits_RV = self.network.step(x_RW, position, cache)
            logits_BV = guided_logits(logits_RV, scales_N[place], self.config, self.network.space)
            wrong.append(~(misfit(logits_BV, uniform_BN[:, place], code_B, self.config) <= bound))  # NaN is wrong
            x_RW = self.network.code_embed(code_B.repeat(len(x_RW) // len(code_B)))
        return torch.stack(wrong).double().mean().item()


def record_cuda_graph(tick: Tick, rewind: Tick) -> Tick:
    """Record a step as a CUDA graph, which lives as long as the function that replays it."""
    # The first calls compile, and create library handles and workspaces; these must not be recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            rewind()
            tick()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # If recording fails, torch does not restore the current stream; the outer context does.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        tick()
    return graph.replay
