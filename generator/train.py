"""Training of a generator, autoregressive or masked, on code Parquet.

Shapes: B sequences, N codes a sequence, V codebook size.
"""

import torch
from torch import Tensor

from generator.artifacts import build_generator, save_generator
from generator.config import GeneratorConfig, GeneratorTrainingConfig, MaskedConfig
from generator.data import CodeData, TrainCodes, space_of, with_null
from generator.masked import MaskedGenerator
from generator.model import Generator
from generator.objectives import draw_view, held_out_losses, training_loss
from infra.codes import CodesInfo
from infra.learner import Best, Learner, Plan
from infra.training import (
    Run,
    TrainResult,
    Validation,
    autocast,
    generator_of,
    mean_over_ranks,
    over_micro_batches,
    train_loop,
)

VALIDATION_BATCH = 256


def train_generator(
    train: CodeData,
    val: CodeData,
    info: CodesInfo,
    model: GeneratorConfig | MaskedConfig,
    config: GeneratorTrainingConfig,
    *,
    run: Run,
) -> TrainResult:
    """Train on all variants of the training images, validate on held-out images.

    Args:
        train: rows to learn from.
        val: rows of held-out images.
        info: what the codes are.
        model: the network.
        config: the training.
        run: where to write.
    """
    torch.manual_seed(run.seed)
    space = space_of(info)
    network = build_generator(model, space)
    network.initialise()
    network.to(run.device)
    network.recompute(config.activation_checkpointing)
    if config.compile:
        network.compile()
    learner = Learner(network.named_parameters(), Plan.of(config, run.ranks))
    best = Best(learner, "val_nll", higher=False) if config.keep == "best" else None
    stream = TrainCodes(train, space, seed=run.seed, batch_size=config.batch_size, class_dropout=config.class_dropout)

    def step(step: int) -> dict[str, float]:
        whole, size = stream.batch(step), config.batch_size // config.micro_batches
        views = draw_view(
            model, config.batch_size, space.num_tokens, step=step, generator=generator_of(run.seed, "view", step)
        )

        def part(part: int) -> dict[str, Tensor]:
            rows = slice(part * size, (part + 1) * size)
            view_BN = views[rows].to(run.device) if views is not None else None
            network.train()
            with autocast(config.precision, run.device):
                loss = training_loss(
                    network,
                    whole.classes[rows].to(run.device),
                    whole.codes[rows].to(run.device),
                    view_BN,
                    label_smoothing=config.label_smoothing,
                )
            learner.backward(loss)
            return {"loss": loss}

        return over_micro_batches(part, step, config.micro_batches, run=run) | learner.update(step)

    def validate(_: int) -> Validation:
        with learner.averaged():
            nll = negative_log_likelihood(network, val, run)
        return Validation({"val_nll": nll}, {})

    end = train_loop({"model": learner}, step, config, run=run, validate=validate, best=best)
    network.load_state_dict(learner.ema)
    metrics = {"train_loss": end.figures["loss"], "val_nll": best.best if best is not None else end.figures["val_nll"]}
    files = save_generator(network, info, run.out) if run.ranks.is_first else []
    return TrainResult([*files, *end.files], {"steps": config.steps}, metrics)


@torch.no_grad()
def negative_log_likelihood(network: Generator | MaskedGenerator, data: CodeData, run: Run) -> float:
    """Mean negative log-likelihood in nats, shared by all ranks.

    Of a code given its class and the codes before it; for a masked generator, of a hidden code given the others, under
    masks that are the same at every validation.
    """
    network.eval()
    losses = []
    for first in range(run.ranks.rank * VALIDATION_BATCH, len(data.codes), run.ranks.size * VALIDATION_BATCH):
        rows = slice(first, first + VALIDATION_BATCH)
        class_B = with_null(data.classes[rows], network.space).to(run.device)
        codes_BN = data.codes[rows].long().to(run.device)
        losses.append(held_out_losses(network, class_B, codes_BN, generator_of(run.seed, "held_out", first)))
    return mean_over_ranks(losses, run)
