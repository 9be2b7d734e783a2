"""What both training loops share: seeding, micro-batches, the loop itself with its checkpoints, log and pictures.

All randomness of a step is drawn from generators seeded by (seed, purpose, step), so the state of a run is the
weights, the optimizer's moments, the averages and the number of the step: a resumed run equals an undisturbed one.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from infra.artifacts.shards import FileEntry
from infra.compute.device import IEEE, NumericsConfig, use_numerics
from infra.compute.device import default_device as default_device
from infra.compute.memory import full_memory
from infra.compute.ranks import ALONE, Ranks
from infra.compute.transfer import fetch
from infra.config import Precision
from infra.progress import Progress, silent
from infra.store.store import Store
from infra.training.checkpoint import CHECKPOINTS, Checkpoints
from infra.training.learner import Best, Learner
from infra.training.log import Book
from infra.training.schedule import LoopConfig, TrainingConfig
from infra.training.speed import Effort

log = logging.getLogger(__name__)

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Saved(Protocol):
    """What a checkpoint holds a part of."""

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""


@dataclass(frozen=True)
class Run:
    """Where a training run writes and how it computes; `seed` and `threads` decide its numbers, the rest does not."""

    out: Store
    seed: int
    threads: int = 1
    device: str = "cpu"
    progress: Progress = field(default=silent)
    ranks: Ranks = ALONE
    numerics: NumericsConfig = IEEE


class TrainResult(NamedTuple):
    """What a training stage leaves in its folder; of several ranks, the first one's is the stage's."""

    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float]


class Validation(NamedTuple):
    """What a validation found."""

    figures: dict[str, float]
    pictures: dict[str, Tensor]
    """uint8 (3, H, W) by name."""


class LoopEnd(NamedTuple):
    """What a loop leaves behind."""

    figures: dict[str, float]
    """of the last step."""
    files: list[FileEntry]
    """the log, one JSON line a logged step, and the last pictures."""
    lines: list[dict[str, float]]
    """the log."""
    speed: dict[str, float]
    """items and operations a second since the loop was last begun; what it took, not what was computed."""

    @property
    def validation(self) -> dict[str, float]:
        """What the last validation found."""
        return {name: value for name, value in self.figures.items() if name.startswith("val_")}


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_of(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_torch(seed: int, device: str) -> None:
    """Seed torch's own randomness, on the CPU and where the run computes.

    `torch.manual_seed` would also keep a note, with the formatted stack, for every sort of device that is not there: a
    fifth of a small step's time, and memory that grows with every step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed_all(seed)


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """The autocast context of a precision: fp32 has none."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, _TYPES[precision])


def over_micro_batches(
    work: Callable[[int], Mapping[str, Tensor]], step: int, parts: int, *, run: Run
) -> dict[str, Tensor]:
    """Call `work` for every micro-batch of a step that is this rank's; the means over those of all ranks, float64.

    Figures stay on the device, so that the host goes on while it computes.

    Args:
        work: from the number of the micro-batch, in [0, parts), to scalar figures; adds to the gradients.
        step: seeds torch's own randomness (dropout) together with the number of the micro-batch.
        parts: micro-batches of the step.
        run: seed and ranks.
    """
    names: list[str] = []
    sums: Tensor | None = None
    for part in run.ranks.share(parts):
        seed_torch(seed_of(run.seed, "step", step, part), run.device)
        figures = work(part)
        names = names or list(figures)
        row = torch.stack([figures[name].detach().double() for name in names])
        sums = row if sums is None else sums + row
    assert sums is not None
    return dict(zip(names, (run.ranks.total(sums) / parts).unbind(), strict=True))


def train_loop(
    saved: Mapping[str, Saved],
    train_step: Callable[[int], Mapping[str, Tensor | float]],
    config: LoopConfig,
    *,
    run: Run,
    validate: Callable[[int], Validation],
    best: Best | None = None,
    effort: Effort | None = None,
) -> LoopEnd:
    """Call `train_step(step)` from the last checkpoint's step to the end; save, log and report on the way.

    Args:
        saved: what checkpoints hold: the learners, and what else the loop's state is.
        train_step: does one step and returns figures to log, best on the device: they are fetched where a line is
            logged, and there alone the host waits for the device. Draws all randomness from generators seeded by the
            step.
        config: length and intervals.
        run: where to write.
        validate: called every `validate_every` steps and after the last one; its figures are logged.
        best: offered what each validation found.
        effort: what a step is, for figures of speed.

    Returns:
        The last step's figures, the log and the last pictures.

    Raises:
        FloatingPointError: a loss or a gradient was not finite; names the step. Found out where figures are fetched,
            which is before every checkpoint and validation.
        ValueError: memory ran out.
    """
    torch.set_num_threads(run.threads)
    use_numerics(run.numerics, run.device)
    saved = {**saved, "best": best} if best is not None else saved
    checkpoints = Checkpoints(run.out.at(CHECKPOINTS), keep=config.keep_checkpoints)
    first, lines = _resume(saved, checkpoints)
    book = Book(run, lines, first, effort or Effort())
    watched = [part for part in saved.values() if isinstance(part, Learner)]
    with full_memory(_remedy(config)):
        for step in range(first, config.steps):
            done = step + 1
            is_last = done == config.steps
            is_validated = is_last or _falls_on(done, config.validate_every)
            is_logged = is_validated or _falls_on(done, config.log_every)
            is_saved = _falls_on(done, config.checkpoint_every) and not is_last
            with book.clock.step(step):
                figures = train_step(step)
                # The first step's too: what it takes to choose and compile kernels is then in its time alone.
                seen = _fetched(figures, watched, step) if is_logged or is_saved or step == first else {}
            if is_validated:
                with _as_written(config):
                    found = validate(done)
                seen |= found.figures
                book.show(done, found.pictures)
                if best is not None:
                    best.offer(found.figures)
                    seen[f"best_{best.metric}"] = best.best
            if is_logged:
                book.note(done, config.steps, seen)
            if is_saved:
                book.save(done, checkpoints, saved)
    if best is not None:
        best.restore()
    return LoopEnd(book.lines[-1], book.close(config.steps), book.lines, book.clock.figures())


def _as_written(config: LoopConfig) -> AbstractContextManager[object]:
    """Within the block nothing is compiled: a validation has batches of other sizes than the training."""
    if isinstance(config, TrainingConfig) and config.compile:
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


def _remedy(config: LoopConfig) -> str:
    if not isinstance(config, TrainingConfig):
        return "train on less at once"
    whole = f" (the whole batch of {config.batch_size})" if not config.micro_batch else ""
    recompute = "" if config.activation_checkpointing else ", or set training.activation_checkpointing = true"
    return f"training.micro_batch = {config.micro_batch}{whole}: set it to fewer rows than {config.at_once}{recompute}"


def _fetched(figures: Mapping[str, Tensor | float], watched: Sequence[Learner], step: int) -> dict[str, float]:
    """A step's figures, once all learners have been found to be well."""
    seen, told = fetch(figures, [learner.faults.told for learner in watched])
    for learner in watched:
        size = len(learner.faults.told)
        learner.faults.check(step, told[:size])
        told = told[size:]
    return seen


def _falls_on(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _resume(saved: Mapping[str, Saved], checkpoints: Checkpoints) -> tuple[int, list[dict[str, float]]]:
    """Restore the newest checkpoint, if there is one: the step to go on from, and the lines logged before it."""
    found = checkpoints.latest()
    if found is None:
        return 0, []
    for name, part in saved.items():
        prefix = f"{name}/"
        part.load({k.removeprefix(prefix): t for k, t in found.tensors.items() if k.startswith(prefix)})
    log.info("resuming from step %d", found.step)
    lines = found.state["lines"]
    assert isinstance(lines, list)
    return found.step, [dict(line) for line in lines]  # type: ignore[arg-type]


def picture_grid(rows: Sequence[Tensor]) -> Tensor:
    """Rows of images, float in [0, 1] (n, 3, H, W) each, as one picture uint8 (3, rows * H, n * W)."""
    strips = [(row.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu() for row in rows]
    return torch.cat([torch.cat(list(strip), dim=-1) for strip in strips], dim=-2)


def mean_over_ranks(values: Iterable[Tensor], run: Run) -> float:
    """The mean of all values of all ranks; a rank may have none."""
    flat = torch.cat([torch.zeros(0), *(v.detach().double().flatten().cpu() for v in values)]).double().to(run.device)
    total, count = run.ranks.total(torch.stack([flat.sum(), flat.new_tensor(len(flat))])).tolist()
    return float(total / count)
