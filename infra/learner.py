"""The trained parameters of one network with what training adds to them: gradients, optimizer, schedule, average."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.ranks import ALONE, Ranks
from infra.schedule import OptimizerConfig, TrainingConfig

FUSED_DEVICES = ("cpu", "cuda")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of `step` (from 0) of `steps`: linear from 0 during the warm-up, then half a cosine down to `end_lr`."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.end_lr + (config.lr - config.end_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def decay_matrices(name: str, parameter: nn.Parameter) -> bool:
    """Which parameters weight decay applies to: matrices that are neither embeddings, positions nor tokens."""
    free = ("embed", "norm", "bias", "token", "positions", "codebook")
    return parameter.ndim >= 2 and not any(word in name for word in free)


@dataclass(frozen=True)
class Plan:
    """How a learner trains: its optimizer and schedule, and what of a step falls to this process."""

    optimizer: OptimizerConfig
    steps: int
    start: int = 0
    """step at which it begins: its schedule and average count from there."""
    micro_batches: int = 1
    """backward passes a step, over all ranks."""
    is_scaled: bool = False
    """whether losses are scaled, as half precision needs."""
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, config: TrainingConfig, ranks: Ranks) -> "Plan":
        """The plan of a stage's network."""
        return cls(
            config.optimizer,
            config.steps,
            micro_batches=config.micro_batches,
            is_scaled=config.precision == "fp16",
            ranks=ranks,
        )


class Learner:
    """Adds up gradients of micro-batches and ranks, then takes one optimizer step."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        plan: Plan,
        *,
        is_decayed: Callable[[str, nn.Parameter], bool] = decay_matrices,
    ) -> None:
        self.plan = plan
        self.parameters = dict(parameters)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = self._optimizer(is_decayed)
        device = next(iter(self.parameters.values())).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=plan.is_scaled)

    def _optimizer(self, is_decayed: Callable[[str, nn.Parameter], bool]) -> torch.optim.AdamW:
        config = self.plan.optimizer
        decayed = [p for n, p in self.parameters.items() if is_decayed(n, p)]
        plain = [p for n, p in self.parameters.items() if not is_decayed(n, p)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        device = next(iter(self.parameters.values())).device.type
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device in FUSED_DEVICES)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss to that of the step.

        Raises:
            FloatingPointError: the loss is not finite; nothing was changed.
        """
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.scaler.scale(loss / self.plan.micro_batches).backward()

    def update(self, step: int) -> dict[str, float]:
        """One optimizer step on the added gradients; the learning rate and the gradient's norm before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was changed. Where losses are scaled, such a step is
                left out and the scale lowered instead.
        """
        trained = list(self.parameters.values())
        self.plan.ranks.totals_([p.grad for p in trained if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(trained, self.plan.optimizer.grad_clip))
        if not math.isfinite(norm) and not self.plan.is_scaled:
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        local = step - self.plan.start
        rate = learning_rate(self.plan.optimizer, local + 1, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._average(local)
        return {"lr": rate, "grad_norm": norm}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = 0.0 if step == 0 else min((1 + step) / (10 + step), self.plan.optimizer.ema_decay)
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
        scale = self.scaler.state_dict()
        scaler = {f"scaler.{key}": torch.tensor(scale[key], dtype=torch.float64) for key in _SCALER if key in scale}
        return weights | {f"ema.{n}": t for n, t in self.ema.items()} | moments | scaler

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
        self._load_optimizer(tensors)
        if self.plan.is_scaled:
            state = self.scaler.state_dict()
            scale, tracker = tensors["scaler.scale"].item(), int(tensors["scaler._growth_tracker"])
            self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": tracker})

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Hand the optimizer its state: it places each tensor as it would have made it, `step` too.

        Where `step` belongs depends on the device and on the kind of step that is taken there, so a checkpoint of one
        device can be read on another.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {parameter: name for name, parameter in self.parameters.items()}
        state = {}
        for index, parameter in enumerate(trained):
            if f"exp_avg.{names[parameter]}" in tensors:
                saved = {key: tensors[f"{key}.{names[parameter]}"] for key in _STATE}
                # Moments take the parameter's memory layout: the fused step walks both side by side.
                moments = {key: torch.empty_like(parameter).copy_(saved[key]) for key in ("exp_avg", "exp_avg_sq")}
                state[index] = {"step": saved["step"].clone(), **moments}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


_STATE = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, a parameter
_SCALER = ("scale", "_growth_tracker")


class Best:
    """The averaged weights of the best validation so far."""

    def __init__(self, learner: Learner, metric: str, *, higher: bool) -> None:
        self.learner, self.metric, self.sign = learner, metric, 1.0 if higher else -1.0
        self.value = torch.tensor(-math.inf, dtype=torch.float64)
        self.weights = {name: t.clone() for name, t in learner.ema.items()}

    def offer(self, figures: Mapping[str, float]) -> None:
        """Keep the learner's averaged weights if they are better."""
        value = self.sign * figures[self.metric]
        if value > float(self.value):
            self.value.fill_(value)
            torch._foreach_copy_(list(self.weights.values()), list(self.learner.ema.values()))

    @property
    def best(self) -> float:
        """The metric of the kept weights."""
        return self.sign * float(self.value)

    def restore(self) -> None:
        """Make the kept weights the learner's average."""
        torch._foreach_copy_(list(self.learner.ema.values()), list(self.weights.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs."""
        return {"value": self.value, **{f"best.{n}": t for n, t in self.weights.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.value.copy_(tensors["value"])
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"best.{name}"])
