"""The step of a sampler as one CUDA graph: recorded at the first call, replayed at every other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from generator.model import Cache

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Cache], tuple[Tensor, Tensor]]
WARM_UP_CALLS = 3


class Captured:
    """A step with static inputs and a cache of its own, for each number of rows.

    The cache of a call is where the recording's comes from; later ones are left alone. That gives the same result,
    since a sequence starts at position 0 and a step reads no position that has not been written before it.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.recordings: dict[torch.Size, _Recording] = {}

    def __call__(
        self, x_RW: Tensor, position: Tensor, uniform_B: Tensor, scale: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """As the step does, in new tensors."""
        inputs = (x_RW, position, uniform_B, scale)
        if x_RW.shape not in self.recordings:
            self.recordings[x_RW.shape] = self._record(inputs, cache)
        recording = self.recordings[x_RW.shape]
        for static, given in zip(recording.inputs, inputs, strict=True):
            static.copy_(given)
        recording.graph.replay()
        code_B, next_RW = recording.outputs
        return code_B.clone(), next_RW.clone()

    def _record(self, inputs: tuple[Tensor, ...], cache: Cache) -> "_Recording":
        static = tuple(tensor.clone() for tensor in inputs)
        x_RW, position, uniform_B, scale = static
        # Compilation, library handles and workspaces come with the first calls, and must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self.step(x_RW, position, uniform_B, scale, cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step(x_RW, position, uniform_B, scale, cache)
        return _Recording(graph, static, outputs, cache)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, Tensor]
    cache: Cache
    """kept alive: the graph writes into it."""
