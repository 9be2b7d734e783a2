"""The trained parameters of one network with what training adds to them: gradients, optimizer, schedule, average."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.compute.ranks import ALONE, Ranks
from infra.training.faults import Faults
from infra.training.schedule import OptimizerConfig, TrainingConfig


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
    may_skip: bool = False
    """whether a step that is not finite is left out instead of ending the training; scaled losses imply it."""
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
        device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.is_scaled)
        self.faults = Faults(device, are_skipped=plan.is_scaled or plan.may_skip)
        self._loss = torch.zeros((), device=device)

    def _optimizer(self, is_decayed: Callable[[str, nn.Parameter], bool]) -> torch.optim.AdamW:
        config = self.plan.optimizer
        decayed = [p for n, p in self.parameters.items() if is_decayed(n, p)]
        plain = [p for n, p in self.parameters.items() if not is_decayed(n, p)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss to that of the step."""
        self._loss += loss.detach()
        self.scaler.scale(loss / self.plan.micro_batches).backward()

    def update(self, step: int) -> dict[str, Tensor | float]:
        """One optimizer step on the added gradients; the learning rate and the gradient's norm before clipping.

        A step whose loss or gradient is not finite changes no weight and no moment; `faults` tells of it. Where losses
        are scaled, the scale is lowered then.
        """
        trained = list(self.parameters.values())
        # All ranks must leave out the same steps, so each knows of the others' losses.
        self.plan.ranks.totals_([*(p.grad for p in trained if p.grad is not None), self._loss])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trained, self.plan.optimizer.grad_clip)
        local = step - self.plan.start
        rate = learning_rate(self.plan.optimizer, local + 1, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # The fused step itself looks at the flag: the host need not know it.
        self.optimizer.found_inf = self.faults.note(step, self._loss, norm).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss.zero_()
        self._average(local)
        return {"lr": rate, "grad_norm": norm, **self.faults.figures}

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
        return weights | {f"ema.{n}": t for n, t in self.ema.items()} | moments | scaler | self.faults.tensors()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
        self._load_optimizer(tensors)
        if "skipped_steps" in tensors:
            self.faults.load(tensors["skipped_steps"])
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
