"""Training loop of all stages: seeding, micro-batches, checkpoints, log and pictures.

All randomness of a step is drawn from generators seeded by (seed, purpose, step), so the state of a run consists of
the weights, the optimizer's moments, the EMA and the step number: a resumed run equals an uninterrupted one.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from infra.artifacts.shards import FileEntry
from infra.compute.device import IEEE, NumericsConfig, use_numerics
from infra.compute.device import default_device as default_device
from infra.compute.dry_pass import AUTOCAST_AS, META
from infra.compute.memory import reraise_out_of_memory
from infra.compute.ranks import ALONE, Ranks
from infra.compute.transfer import fetch
from infra.config import Precision
from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.best import BestWeights
from infra.training.checkpoint import CHECKPOINTS, Checkpoints
from infra.training.config import LoopConfig, TrainingConfig
from infra.training.learner import STATE, Learner
from infra.training.log import TrainingLog
from infra.training.speed import Effort

log = logging.getLogger(__name__)

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Checkpointable(Protocol):
    """Interface of an object whose state is saved in checkpoints; all ranks call its methods together."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, by name: DTensors, or plain tensors that are equal on all ranks."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state from tensors like those that `tensors` returned; some may be these very tensors."""


@dataclass(frozen=True)
class TrainingRun:
    """Outputs and execution settings of a training run; only `seed` and `threads` affect its numbers on a device."""

    out: Store
    seed: int
    threads: int = 1
    device: str = "cpu"
    progress: Progress = field(default=silent)
    ranks: Ranks = ALONE
    numerics: NumericsConfig = IEEE


class TrainResult(NamedTuple):
    """Files, counts and metrics of a training stage; with several ranks, the first one's result counts."""

    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float]


class Validation(NamedTuple):
    """Figures and pictures of a validation."""

    figures: dict[str, float]
    pictures: dict[str, Tensor]
    """uint8 (3, H, W) by name."""


class LoopEnd(NamedTuple):
    """Result of a training loop."""

    figures: dict[str, float]
    """of the last step."""
    files: list[FileEntry]
    """the log, one JSON line per logged step, and the latest pictures."""
    lines: list[dict[str, float]]
    """the log."""
    speed: dict[str, float]
    """items and operations per second since the loop was last started; measured, so not reproducible."""

    @property
    def validation(self) -> dict[str, float]:
        """Return the figures of the last validation."""
        return {name: value for name, value in self.figures.items() if name.startswith("val_")}


def seed_of(*parts: object) -> int:
    """Derive a 63-bit seed from all parts; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_of(*parts: object) -> torch.Generator:
    """Make a CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_torch(seed: int, device: str) -> None:
    """Seed torch's global generators, on the CPU and on the run's device.

    `torch.manual_seed` would also queue a call, with a formatted stack trace, for every device type that is not
    initialized: a fifth of a small step's time, and memory that grows with every step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed_all(seed)


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; for fp32 it does nothing."""
    if precision == "fp32":
        return nullcontext()
    kind = torch.device(device).type
    return torch.autocast(AUTOCAST_AS if kind == META else kind, _TYPES[precision])


def over_micro_batches(
    work: Callable[[int], Mapping[str, Tensor]],
    step: int,
    parts: int,
    *,
    run: TrainingRun,
    learners: Sequence[Learner] = (),
) -> dict[str, Tensor]:
    """Call `work` for each of this rank's micro-batches of a step; return figures averaged over all ranks, in float64.

    Figures stay on the device, so that the host need not wait for it.

    Args:
        work: maps the index of a micro-batch, in [0, parts), to scalar figures, and accumulates gradients.
        step: together with the index of the micro-batch, seeds torch's global generators (dropout).
        parts: micro-batches per step.
        run: seed and ranks.
        learners: those whose gradients `work` accumulates; they are summed over ranks in the last micro-batch.
    """
    names: list[str] = []
    sums: Tensor | None = None
    own = run.ranks.share(parts)
    passes = _passes(own, parts, run.ranks, learners)
    for index, part in enumerate(passes):
        seed_torch(seed_of(run.seed, "step", step, part), run.device)
        with ExitStack() as stack:
            for learner in learners:
                if index >= len(own):
                    stack.enter_context(learner.idle())
                if index + 1 < len(passes):
                    stack.enter_context(learner.accumulating())
            figures = work(part)
        if index >= len(own):
            continue
        names = names or list(figures)
        row = torch.stack([figures[name].detach().double() for name in names])
        sums = row if sums is None else sums + row
    assert sums is not None
    return dict(zip(names, (run.ranks.total(sums) / parts).unbind(), strict=True))


def _passes(own: range, parts: int, ranks: Ranks, learners: Sequence[Learner]) -> list[int]:
    """Return the micro-batches that this rank passes; with shards, as many as any other rank, the last one again."""
    most = -(-parts // ranks.size) if any(learner.is_sharded for learner in learners) else len(own)
    return [*own, *[own[-1]] * (most - len(own))]


def train_loop(
    saved: Mapping[str, Checkpointable],
    train_step: Callable[[int], Mapping[str, Tensor | float]],
    config: LoopConfig,
    *,
    run: TrainingRun,
    validate: Callable[[int], Validation],
    best: BestWeights | None = None,
    effort: Effort | None = None,
) -> LoopEnd:
    """Call `train_step(step)` from the last checkpoint's step to the end; save, log and report along the way.

    Args:
        saved: the state that checkpoints hold, by name: the learners, and any other state of the loop.
        train_step: takes one step and returns figures to log, preferably on the device: they are fetched only when a
            line is logged, and only then does the host wait for the device. Draws all randomness from generators
            seeded by the step.
        config: length and intervals.
        run: outputs and execution settings.
        validate: called every `validate_every` steps and after the last one; its figures are logged.
        best: receives the figures of each validation.
        effort: work per step, for throughput figures.

    Returns:
        The last step's figures, the log and the latest pictures.

    Raises:
        FloatingPointError: a loss or a gradient was not finite; names the step. Detected when figures are fetched,
            which is before every checkpoint and validation.
        ValueError: memory ran out.
    """
    torch.set_num_threads(run.threads)
    use_numerics(run.numerics, run.device)
    saved = {**saved, "best": best} if best is not None else saved
    learners = [part for part in saved.values() if isinstance(part, Learner)]
    folder = run.out.at(CHECKPOINTS)
    with Checkpoints(folder, config.keep_checkpoints, run.ranks) as checkpoints, reraise_out_of_memory(_remedy(config)):
        first, lines = _resume(saved, checkpoints)
        output = TrainingLog(run, lines, first, effort or Effort())
        for step in range(first, config.steps):
            done = step + 1
            is_last = done == config.steps
            is_validated = is_last or _falls_on(done, config.validate_every)
            is_logged = is_validated or _falls_on(done, config.log_every)
            is_saved = _falls_on(done, config.checkpoint_every) and not is_last
            with output.clock.step(step):
                on_device = train_step(step)
                # Also at the first step, so that only its own time includes choosing and compiling kernels.
                figures = _fetch_checked(on_device, learners, step) if is_logged or is_saved or step == first else {}
            if is_validated:
                with _uncompiled(config):
                    validation = validate(done)
                figures |= validation.figures
                output.add_pictures(done, validation.pictures)
                if best is not None:
                    best.offer(validation.figures)
                    figures[f"best_{best.metric}"] = best.best
            if is_logged:
                output.log_step(done, config.steps, figures)
            if is_saved:
                output.save_checkpoint(done, checkpoints, _tensors(saved))
    if best is not None:
        best.restore()
    return LoopEnd(output.lines[-1], output.close(config.steps), output.lines, output.clock.figures())


def _uncompiled(config: LoopConfig) -> AbstractContextManager[object]:
    """Disable compiled code within the block: validation batches have other sizes than those of training."""
    if isinstance(config, TrainingConfig) and config.compile:
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


def _remedy(config: LoopConfig) -> str:
    if not isinstance(config, TrainingConfig):
        return "train on smaller batches"
    whole = f" (the whole batch of {config.batch_size})" if not config.micro_batch else ""
    recompute = "" if config.activation_checkpointing else ", or set training.activation_checkpointing = true"
    return f"training.micro_batch = {config.micro_batch}{whole}: set it to fewer rows than {config.at_once}{recompute}"


def _fetch_checked(figures: Mapping[str, Tensor | float], learners: Sequence[Learner], step: int) -> dict[str, float]:
    """Fetch a step's figures, and check that the losses and gradients of all learners were finite."""
    fetched, statuses = fetch(figures, [learner.faults.status for learner in learners])
    for learner in learners:
        size = len(learner.faults.status)
        learner.faults.check(step, statuses[:size])
        statuses = statuses[size:]
    return fetched


def _falls_on(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _resume(saved: Mapping[str, Checkpointable], checkpoints: Checkpoints) -> tuple[int, list[dict[str, float]]]:
    """Restore the newest checkpoint, if any; return the step to resume from and the lines logged before it."""
    tensors = _tensors(saved)
    begun = [name for name in tensors if name.partition("/")[2].startswith(tuple(f"{key}." for key in STATE))]
    restored = checkpoints.load_into(tensors, optional=begun)
    if restored is None:
        return 0, []
    for name, part in saved.items():
        prefix = f"{name}/"
        part.load({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    log.info("resuming from step %d", restored.step)
    lines = restored.state["lines"]
    assert isinstance(lines, list)
    return restored.step, [dict(line) for line in lines]  # type: ignore[arg-type]


def _tensors(saved: Mapping[str, Checkpointable]) -> dict[str, Tensor]:
    return {f"{name}/{key}": tensor for name, part in saved.items() for key, tensor in part.tensors().items()}


def picture_grid(rows: Sequence[Tensor]) -> Tensor:
    """Arrange rows of images, float in [0, 1] (n, 3, H, W) each, in one picture, uint8 (3, rows * H, n * W)."""
    strips = [(row.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu() for row in rows]
    return torch.cat([torch.cat(list(strip), dim=-1) for strip in strips], dim=-2)


def mean_over_ranks(values: Iterable[Tensor], run: TrainingRun) -> float:
    """Return the mean of all values of all ranks; a rank may have none."""
    flat = torch.cat([torch.zeros(0), *(v.detach().double().flatten().cpu() for v in values)]).double().to(run.device)
    total, count = run.ranks.total(torch.stack([flat.sum(), flat.new_tensor(len(flat))])).tolist()
    return float(total / count)
