"""Count the memory of a GPU that a generator's training takes, from its configs.

Blocks are alike, so passes of two and of three of them tell how much each adds, forward and backward.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from generator.code_space import CodeSpace
from generator.config import AnyGeneratorConfig, GeneratorTrainingConfig
from generator.kinds import build_generator
from generator.network import GeneratorNetwork
from infra.compute.dry_pass import META, backward, peak_bytes
from infra.config import Precision
from infra.training.loop import autocast
from infra.training.memory import FLOAT, MemoryNeed, Parameters, Spread, held
from infra.training.parallel import choose_parallel

FEW = 2  # blocks that are counted
ALMOST_NO_CODES = 8  # of a vocabulary whose logits take next to nothing


def training_memory(
    config: AnyGeneratorConfig,
    training: GeneratorTrainingConfig,
    space: CodeSpace,
    *,
    ranks: int = 1,
    ranks_per_node: int | None = None,
    fused_attention: bool = True,
) -> MemoryNeed:
    """Return what a training takes on each of its ranks' GPUs.

    Args:
        config: of the network.
        training: of the training.
        space: codes and classes.
        ranks: over all nodes.
        ranks_per_node: on each; None: all on one.
        fused_attention: whether fused kernels may be used.
    """
    network = _on_meta(config, space)
    spread = Spread.of(choose_parallel(training.parallel, network, training.precision), ranks, ranks_per_node)
    with_gradients = spread.is_sharded or spread.has_gradients(training.micro_batches)
    trained = sum(p.numel() for p in network.parameters())

    def adds(codebook_size: int) -> int:
        """Count what a pass adds to what is held."""
        few, more = (
            _pass(
                _Pass(
                    config.model_copy(update={"layers": layers}),
                    space._replace(codebook_size=codebook_size),
                    training.at_once,
                    training.precision,
                    training.activation_checkpointing,
                    spread.is_sharded,
                    with_gradients,
                    fused_attention,
                )
            )
            for layers in (FEW, FEW + 1)
        )
        peak = max(a + (config.layers - FEW) * (b - a) for a, b in zip(few, more, strict=True))
        return peak if with_gradients else max(peak - FLOAT * trained, 0)

    whole, without_logits = adds(space.codebook_size), adds(ALMOST_NO_CODES)
    block = sum(p.numel() for p in network.blocks[0].parameters())
    sizes = Parameters(trained, block, outside=trained - config.layers * block)
    return held(sizes, training, spread)._replace(activations=without_logits, logits=max(whole - without_logits, 0))


def _on_meta(config: AnyGeneratorConfig, space: CodeSpace) -> GeneratorNetwork:
    with torch.device(META):
        return build_generator(config, space)


class _Pass(NamedTuple):
    """What decides the memory of a micro-batch's pass."""

    config: AnyGeneratorConfig
    space: CodeSpace
    rows: int
    precision: Precision
    recomputes: bool
    is_sharded: bool
    with_gradients: bool
    """whether gradients are there before."""
    fused_attention: bool


@lru_cache(maxsize=512)  # remedies that are looked for repeat most of them
def _pass(key: _Pass) -> tuple[int, ...]:
    """Count the most bytes that a micro-batch adds to weights and gradients, forward and backward."""
    network = _on_meta(key.config, key.space).train()
    network.recompute(key.recomputes)
    given = [*network.parameters(), *network.buffers()]
    if key.is_sharded:
        _as_shards(network, key.precision)
    elif key.with_gradients:
        given += _give_gradients(network)
    class_B = torch.zeros(key.rows, dtype=torch.int64, device=META)
    codes_BN = torch.zeros(key.rows, key.space.num_tokens, dtype=torch.int64, device=META)
    view_BN = network.draw_view(key.rows, step=0, generator=torch.Generator())
    losses: list[Tensor] = []

    def forward() -> None:
        view = None if view_BN is None else view_BN.to(META)
        with autocast(key.precision, META):
            losses.append(network.training_loss(class_B, codes_BN, view, class_B, label_smoothing=0.0))

    given += [class_B, codes_BN]
    peaks = peak_bytes(forward, lambda: backward(losses.pop()), given=given, fused_attention=key.fused_attention)
    return tuple(peaks)


def _give_gradients(network: GeneratorNetwork) -> list[Tensor]:
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def _as_shards(network: GeneratorNetwork, precision: Precision) -> None:
    """Give the parameters the type in which shards are gathered, and free their gradients at once."""
    for parameter in network.parameters():
        if precision == "bf16":
            parameter.data = parameter.data.bfloat16()
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
