"""The step of a sampler as a CUDA graph: recorded once for each size of batch, checked, and replayed for every code.

A recording that draws other codes says nothing of it: so the first codes of each are held against the step that it was
made of, and where they do not fit, the next way of drawing takes its place, with a warning.

Shapes: B sequences, R rows (twice B with guidance), N codes a sequence, V codebook size, W width.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from generator.config import SampleConfig, SamplePrecision
from generator.sampling.autoregressive import Advance, Cache, Steps, guided_logits
from generator.sampling.filters import misfit

Tick = Callable[[], None]
Record = Callable[[Tick, Tick], Tick]
"""From a step on tensors that stay where they are, and what goes back to its beginning, to what does the step again."""
WARM_UP_CALLS = 3

log = logging.getLogger(__name__)


class Bound(NamedTuple):
    """What a recording may differ by from the plain step, which rounds otherwise."""

    misfit: float
    """in probability, see `generator.sampling.filters.misfit`."""
    share: float
    """of the codes that may differ by more."""


# Rounding in bfloat16 is multiplied by guidance; a faulty recording misfits with most of its codes.
BOUNDS: dict[SamplePrecision, Bound] = {"fp32": Bound(1e-3, 0.01), "bf16": Bound(0.1, 0.1)}


@dataclass(frozen=True)
class State:
    """What a recorded step reads and writes."""

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
    def of(cls, network: Steps, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> "State":
        """Room for a batch like this one."""
        tensors = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x_RW, uniform_BN, scales_N))
        x_RW, uniform_BN, scales_N = tensors
        position = torch.zeros((), dtype=torch.int64, device=x_RW.device)
        codes_BN = torch.zeros(uniform_BN.shape, dtype=torch.int64, device=x_RW.device)
        return cls(x_RW, position, uniform_BN, scales_N, codes_BN, network.empty_cache(len(x_RW)))

    def load(self, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> None:
        """Begin a batch. The cache is left as it is: no step reads a position that was not written before it."""
        self.rows.copy_(x_RW)
        self.uniform.copy_(uniform_BN)
        self.scales.copy_(scales_N)
        self.rewind()

    def rewind(self) -> None:
        """Back to the first position."""
        self.position.zero_()

    def tick(self, advance: Advance) -> None:
        """Draw the codes of one position and go on to the next, without the host."""
        where = self.position[None]
        uniform_B, scale = self.uniform.index_select(1, where)[:, 0], self.scales.index_select(0, where)[0]
        code_B, next_RW = advance(self.rows, self.position, uniform_B, scale, self.cache)
        self.codes.index_copy_(1, where, code_B[:, None])
        self.rows.copy_(next_RW)
        self.position.add_(1)


@dataclass
class Desk:
    """What recordings of one network share, since they are replayed one after the other."""

    record: Record
    states: dict[tuple[torch.Size, torch.Size], State] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    """ways that drew other codes, or could not be recorded."""


class Captured:
    """Draws batches by replaying a recorded step: the first of several ways whose recording draws what it should.

    The last resort is the plain step itself, called from the host.
    """

    def __init__(self, network: Steps, config: SampleConfig, ways: Mapping[str, Advance], desk: Desk) -> None:
        """Take the network as its modules compute it, and ways to advance it by name, the last one the plain step."""
        self.network, self.config, self.ways, self.desk = network, config, ways, desk
        self.replays: dict[tuple[torch.Size, torch.Size], Tick] = {}

    def __call__(self, x_RW: Tensor, uniform_BN: Tensor, scales_N: Tensor) -> Tensor:
        """Codes (B, N) in the order of drawing, in a new tensor."""
        key, batch = (x_RW.shape, uniform_BN.shape), (x_RW, uniform_BN, scales_N)
        if key not in self.desk.states:
            self.desk.states[key] = State.of(self.network, *batch)
        state = self.desk.states[key]
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
            if name in self.desk.refused:
                continue
            tick = partial(state.tick, advance)
            try:
                state.load(*batch)
                replay = self.desk.record(tick, state.rewind)
                share = self._share_of_misfits(self._draw(state, replay, batch), batch, bound.misfit)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what cannot be compiled or recorded
                reason = f"cannot be recorded ({str(error).strip().splitlines()[0]})"
            else:
                if share <= bound.share:
                    return replay
                reason = f"draws other codes ({share:.0%} of them; up to {bound.share:.0%} is rounding)"
            self.desk.refused.add(name)
            log.warning("torch %s: the %s step %s; it is drawn another way", torch.__version__, name, reason)
        return partial(state.tick, list(self.ways.values())[-1])

    def _share_of_misfits(self, codes_BN: Tensor, batch: tuple[Tensor, Tensor, Tensor], bound: float) -> float:
        """The share of codes that their uniform numbers cannot have drawn, by the plain step given those before."""
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
    """Record a step as a CUDA graph, which lives as long as what replays it."""
    # Compilation, library handles and workspaces come with the first calls, and must not be recorded.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            rewind()
            tick()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Where recording fails, torch leaves its own stream in place of the one before.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        tick()
    return graph.replay
