"""Train a generator of any kind on code Parquet.

Shapes: B sequences, N codes per sequence, V codebook size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from generator.artifacts import save_generator
from generator.config import AnyGeneratorConfig, GeneratorTrainingConfig
from generator.data import CodeData, TrainCodes, check_rows, space_of, with_null
from generator.dropout import draw_keys
from generator.flops import training_flops
from generator.frequencies import frequency_nll
from generator.kinds import build_generator
from generator.network import GeneratorNetwork
from generator.objectives import HeldOutPredictions, held_out_losses
from infra.codes.contract import CodesInfo
from infra.compute.compiler import compile_in_place
from infra.compute.transfer import send
from infra.training.best import BestWeights
from infra.training.learner import Learner, OptimizerPlan
from infra.training.loop import (
    LoopEnd,
    TrainingRun,
    TrainResult,
    Validation,
    autocast,
    generator_of,
    over_micro_batches,
    seed_torch,
    train_loop,
)
from infra.training.parallel import choose_parallel, is_sharded, shard, whole_weights
from infra.training.speed import Effort

VALIDATION_BATCH = 256


def train_generator(
    train: CodeData,
    val: CodeData,
    info: CodesInfo,
    model: AnyGeneratorConfig,
    config: GeneratorTrainingConfig,
    *,
    run: TrainingRun,
) -> TrainResult:
    """Train on all variants of the training images, validate on held-out images.

    Args:
        train: rows of training images.
        val: rows of held-out images.
        info: the dataset's info.
        model: config of the network.
        config: config of the training.
        run: outputs and execution settings.

    Raises:
        ValueError: there are no rows, or the generator cannot learn from them.
    """
    if not len(val.codes):
        raise ValueError("the code dataset has no held-out rows to validate on: hold some out with data.val_fraction")
    space = space_of(info)
    check_rows(train, space, "training")
    check_rows(val, space, "held-out")
    seed_torch(run.seed, run.device)
    network = build_generator(model, space)
    network.initialise()
    network.to(run.device)
    network.recompute(config.activation_checkpointing)
    if config.compile:
        compile_in_place(network)
    if run.ranks.size > 1:
        shard_if_large(network, config, run)
    learner = Learner(network, OptimizerPlan.of(config, run.ranks))
    best = BestWeights(learner, "val_nll", higher=False) if config.keep == "best" else None
    step = training_step(network, learner, train, config, run)

    def validate(_: int) -> Validation:
        with learner.averaged():
            at_once = min(VALIDATION_BATCH, config.micro_batch or VALIDATION_BATCH)
            return Validation(held_out_figures(network, val, run, at_once=at_once), {})

    tokens, flops = config.batch_size * space.num_tokens, config.batch_size * training_flops(model, space)
    effort = Effort({"tokens": tokens}, flops, config.precision)
    end = train_loop({"model": learner}, step, config, run=run, validate=validate, best=best, effort=effort)
    learner.take_average()
    if learner.is_sharded:
        weights, network = whole_weights(network), build_generator(model, space)
        if run.ranks.is_first:
            network.load_state_dict(weights)
    metrics = {
        "train_loss": end.figures["loss"],
        "grad_norm": end.figures["grad_norm"],
        **_kept(end, best),
        **end.speed,
    }
    if not run.ranks.is_first:
        return TrainResult(end.files, {"steps": config.steps}, metrics)
    files = save_generator(network, info, run.out)
    frequency_N = frequency_nll(train, val, space)
    metrics |= {"frequency_nll": frequency_N.mean().item()} | _by_position("frequency_nll", frequency_N)
    return TrainResult([*files, *end.files], {"steps": config.steps}, metrics)


def shard_if_large(network: GeneratorNetwork, config: GeneratorTrainingConfig, run: TrainingRun) -> None:
    """Shard a generator's weights over ranks where the config says so, or where it leaves that to the size."""
    if (kind := choose_parallel(config.parallel, network, config.precision)) != "ddp":
        shard(
            network,
            network.blocks,
            run.ranks,
            device=run.device,
            param_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            by_node=kind == "hsdp",
        )


def training_step(
    network: GeneratorNetwork,
    learner: Learner,
    train: CodeData,
    config: GeneratorTrainingConfig,
    run: TrainingRun,
) -> Callable[[int], dict[str, Tensor | float]]:
    """Make the function that takes a training step and returns the figures to log: loss, rate, gradient norm."""
    stream = TrainCodes(
        train,
        network.space,
        seed=run.seed,
        batch_size=config.batch_size,
        class_dropout=config.class_dropout,
        device=run.device,
    )
    loss_of = learner.spread(network.training_loss)

    def step(step: int) -> dict[str, Tensor | float]:
        whole, size = stream.batch(step), config.batch_size // config.micro_batches
        # Drawn for the whole batch and cut like it, so that micro-batches and ranks change nothing.
        views = network.draw_view(config.batch_size, step=step, generator=generator_of(run.seed, "view", step))
        keys = draw_keys(config.batch_size, generator_of(run.seed, "dropout", step))
        weights = network.row_weights(views, config.batch_size)

        def part(part: int) -> dict[str, Tensor]:
            rows = slice(part * size, (part + 1) * size)
            view_BN = send(views[rows], run.device) if views is not None else None
            keys_B = send(keys[rows], run.device) if network.config.dropout else None
            share = float(weights[rows].mean() / weights.mean())
            network.train()
            with autocast(config.precision, run.device):
                loss = loss_of(
                    whole.classes[rows],
                    whole.codes[rows],
                    view_BN,
                    keys_B,
                    label_smoothing=config.label_smoothing,
                )
            loss = share * loss
            learner.backward(loss)
            return {"loss": loss}

        figures = over_micro_batches(part, step, config.micro_batches, run=run, learners=[learner])
        return figures | learner.update(step)

    return step


def _kept(end: LoopEnd, best: BestWeights | None) -> dict[str, float]:
    """Return the validation figures of the published weights: the best or the last ones."""
    validated = [line for line in end.lines if "val_nll" in line]
    line = validated[-1] if best is None else min(validated, key=lambda line: line["val_nll"])
    return {name: value for name, value in line.items() if name.startswith("val_")}


@torch.no_grad()
def held_out_figures(
    network: GeneratorNetwork, data: CodeData, run: TrainingRun, *, at_once: int = VALIDATION_BATCH
) -> dict[str, float]:
    """Compute held-out NLL, perplexity and top-1 accuracy per code; the work is shared by all ranks.

    `val_nll` is the mean negative log-likelihood in nats of a code given its class and the codes before it; for a
    masked generator, of a masked code given the others, with the same masks at every validation. `val_nll/07` is that
    of the eighth position (omitted if nothing was masked there), `val_perplexity` is exp(`val_nll`), `val_top1` the
    share of codes that the generator finds most likely. A pass has `at_once` sequences.
    """
    network.eval()
    passes = math.ceil(VALIDATION_BATCH / at_once) if is_sharded(network) else 0
    sums_3N = torch.zeros(3, network.space.num_tokens, dtype=torch.float64, device=run.device)

    def losses_of(rows: slice, noise: torch.Generator) -> HeldOutPredictions:
        class_B = with_null(data.classes[rows], network.space).to(run.device)
        return held_out_losses(network, class_B, data.codes[rows].long().to(run.device), noise, at_once)

    for start in range(0, len(data.codes), run.ranks.size * VALIDATION_BATCH):
        first = start + run.ranks.rank * VALIDATION_BATCH
        rows = range(len(data.codes))[first : first + VALIDATION_BATCH]
        if rows:
            predictions = losses_of(slice(rows.start, rows.stop), generator_of(run.seed, "held_out", first))
            sums_3N += torch.stack([part.double().sum(0) for part in predictions])
        for _ in range(passes - math.ceil(len(rows) / at_once)):  # keep the other ranks company
            losses_of(slice(0, 1), generator_of(run.seed))
    loss_N, right_N, count_N = run.ranks.total(sums_3N).cpu()
    nll = float(loss_N.sum() / count_N.sum())
    return {
        "val_nll": nll,
        "val_perplexity": math.exp(nll),
        "val_top1": float(right_N.sum() / count_N.sum()),
        **_by_position("val_nll", loss_N / count_N),
    }


def _by_position(name: str, figure_N: Tensor) -> dict[str, float]:
    """Name a figure's values by position, zero-padded so that names sort; positions without a value are omitted."""
    digits = len(str(len(figure_N) - 1))
    return {
        f"{name}/{place:0{digits}d}": value for place, value in enumerate(figure_N.tolist()) if not math.isnan(value)
    }
