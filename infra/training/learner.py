"""Train the parameters of one network: gradient accumulation, optimizer, schedule, and EMA of the weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.compute.ranks import ALONE, Ranks
from infra.training.config import OptimizerConfig, TrainingConfig
from infra.training.non_finite import Faults
from infra.training.schedule import learning_rate


def decay_matrices(name: str, parameter: nn.Parameter) -> bool:
    """Select the parameters for weight decay: matrices that are neither embeddings, positions nor tokens."""
    free = ("embed", "norm", "bias", "token", "positions", "codebook")
    return parameter.ndim >= 2 and not any(word in name for word in free)


@dataclass(frozen=True)
class OptimizerPlan:
    """Optimizer and schedule of a learner, and this process's share of a step."""

    optimizer: OptimizerConfig
    steps: int
    start: int = 0
    """step at which it begins; its schedule and EMA count from there."""
    micro_batches: int = 1
    """backward passes per step, over all ranks."""
    is_scaled: bool = False
    """whether losses are scaled, as half precision needs."""
    may_skip: bool = False
    """whether a step that is not finite is skipped instead of ending the training; implied by scaled losses."""
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, config: TrainingConfig, ranks: Ranks) -> "OptimizerPlan":
        """Make the plan of a stage's network."""
        return cls(
            config.optimizer,
            config.steps,
            micro_batches=config.micro_batches,
            is_scaled=config.precision == "fp16",
            ranks=ranks,
        )


class Learner:
    """Parameters with their optimizer and EMA; accumulates gradients over micro-batches and ranks for each step."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        plan: OptimizerPlan,
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
        """Accumulate the gradient of one micro-batch's mean loss."""
        self._loss += loss.detach()
        self.scaler.scale(loss / self.plan.micro_batches).backward()

    def update(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step; return the learning rate and the gradient norm before clipping.

        A step whose loss or gradient is not finite changes no weights and no moments; `faults` records it. If losses
        are scaled, the scale is then lowered.
        """
        trained = list(self.parameters.values())
        # All ranks must skip the same steps, so the losses are summed as well.
        self.plan.ranks.totals_([*(p.grad for p in trained if p.grad is not None), self._loss])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trained, self.plan.optimizer.grad_clip)
        local = step - self.plan.start
        rate = learning_rate(self.plan.optimizer, local + 1, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # The fused step reads the flag on the device, so the host does not wait for it.
        self.optimizer.found_inf = self.faults.record(step, self._loss, norm).float()  # type: ignore[attr-defined]
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
        """Swap the EMA weights into the network within the block."""
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
        """Return everything that a checkpoint needs, by name."""
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
        """Restore the state that `tensors` returned."""
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
        """Load the optimizer's state through `load_state_dict`, which places each tensor, `step` too, on its device.

        The right device for `step` depends on the device and on the optimizer's implementation there, so a checkpoint
        of one device can be loaded on another.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {parameter: name for name, parameter in self.parameters.items()}
        state = {}
        for index, parameter in enumerate(trained):
            if f"exp_avg.{names[parameter]}" in tensors:
                saved = {key: tensors[f"{key}.{names[parameter]}"] for key in _STATE}
                # Moments take the parameter's memory layout, since the fused step walks both in parallel.
                moments = {key: torch.empty_like(parameter).copy_(saved[key]) for key in ("exp_avg", "exp_avg_sq")}
                state[index] = {"step": saved["step"].clone(), **moments}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


_STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state per parameter
_SCALER = ("scale", "_growth_tracker")
