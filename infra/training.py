"""What both training loops share: optimizer, schedule, average of the weights, seeding, checkpoints, logging.

All randomness of a step is drawn from generators seeded by (seed, purpose, step), so the state of a run is the
weights, the optimizer's moments, the averages and the number of the step: a resumed run equals an undisturbed one.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from infra.artifacts import FileEntry, put
from infra.checkpoint import CHECKPOINTS, Checkpoints
from infra.progress import Progress, silent
from infra.schedule import LoopConfig, OptimizerConfig, Precision
from infra.store import Store

log = logging.getLogger(__name__)

FUSED_DEVICES = ("cpu", "cuda")


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


class TrainResult(NamedTuple):
    """What a training stage leaves in its folder."""

    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float]


class LoopEnd(NamedTuple):
    """What a loop leaves behind."""

    figures: dict[str, float]
    """of the last step."""
    log: FileEntry
    """one JSON line a logged step."""

    @property
    def validation(self) -> dict[str, float]:
        """What the last validation found."""
        return {name: value for name, value in self.figures.items() if name.startswith("val_")}


def default_device() -> str:
    """Where to compute: cuda if this process may use a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_of(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of `step` (from 0) of `steps`: linear from 0 during the warm-up, then half a cosine down to `end_lr`."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """The autocast context of a precision: fp32 has none."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


class Learner:
    """The trained parameters of one network with their optimizer, schedule and average (EMA)."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        *,
        steps: int,
        is_decayed: Callable[[str, nn.Parameter], bool],
        start: int = 0,
    ) -> None:
        self.config, self.steps, self.start = config, steps, start
        self.parameters = dict(parameters)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        decayed = [p for n, p in self.parameters.items() if is_decayed(n, p)]
        plain = [p for n, p in self.parameters.items() if not is_decayed(n, p)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        device = next(iter(self.parameters.values())).device.type
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device in FUSED_DEVICES)

    def update(self, loss: Tensor, step: int) -> dict[str, float]:
        """One optimizer step on `loss`; returns the learning rate and the norm of the gradient before clipping.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; nothing was changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {step} (loss {float(loss):.4g})")
        local = step - self.start
        rate = learning_rate(self.config, local + 1, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._average(local)
        return {"lr": rate, "grad_norm": norm}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = 0.0 if step == 0 else min((1 + step) / (10 + step), self.config.ema_decay)
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the network holds the average of its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.ema[name])
            self.ema[name].copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs, by name."""
        moments = {
            f"{key}.{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        weights = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        return weights | {f"ema.{n}": t for n, t in self.ema.items()} | moments

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
            if f"exp_avg.{name}" in tensors:
                # Moments take the parameter's memory layout: the fused step walks both side by side.
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"].clone(),
                    "exp_avg": torch.empty_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
                }


def decay_matrices(name: str, parameter: nn.Parameter) -> bool:
    """Which parameters weight decay applies to: matrices that are neither embeddings, positions nor tokens."""
    free = ("embed", "norm", "bias", "token", "positions", "codebook")
    return parameter.ndim >= 2 and not any(word in name for word in free)


def train_loop(
    saved: Mapping[str, Saved],
    train_step: Callable[[int], Mapping[str, float]],
    config: LoopConfig,
    *,
    run: Run,
    validate: Callable[[int], dict[str, float]] | None = None,
) -> LoopEnd:
    """Call `train_step(step)` from the last checkpoint's step to the end; save, log and report on the way.

    Args:
        saved: what checkpoints hold: the learners, and what else the loop's state is.
        train_step: does one step and returns figures to log; draws all randomness from generators seeded by the step.
        config: length and intervals.
        run: where to write.
        validate: called every `validate_every` steps and after the last one; its figures are logged.

    Returns:
        The last step's figures and the log.
    """
    torch.set_num_threads(run.threads)
    checkpoints = Checkpoints(run.out.at(CHECKPOINTS))
    first, lines = _resume(saved, checkpoints)
    started = time.perf_counter()
    for step in range(first, config.steps):
        torch.manual_seed(seed_of(run.seed, "step", step))
        seen = dict(train_step(step))
        done = step + 1
        is_last = done == config.steps
        is_validated = validate is not None and (is_last or _falls_on(done, config.validate_every))
        if validate is not None and is_validated:
            seen |= validate(done)
        if is_last or is_validated or _falls_on(done, config.log_every):
            lines.append({"step": float(done), **seen})
            log.info("%s", json.dumps({"event": "step", **{k: round(v, 6) for k, v in lines[-1].items()}}))
            speed = {"steps_per_s": (done - first) / (time.perf_counter() - started)}
            run.progress(done, config.steps, seen | speed)
        if _falls_on(done, config.checkpoint_every) and not is_last:
            tensors = {f"{name}/{k}": t for name, part in saved.items() for k, t in part.tensors().items()}
            checkpoints.save(done, tensors, {"lines": [dict(line) for line in lines]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return LoopEnd(lines[-1], put(run.out, "log.jsonl", text.encode()))


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
