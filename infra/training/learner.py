"""Train the parameters of one network: gradient accumulation, optimizer, schedule, and EMA of the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from infra.compute.ranks import ALONE, Ranks
from infra.training.config import OptimizerConfig, TrainingConfig
from infra.training.non_finite import Faults
from infra.training.parallel import as_part_of, own_part, replicate, shard_group
from infra.training.schedule import learning_rate

P = ParamSpec("P")
T = TypeVar("T")


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
    """The trained parameters of a network with their optimizer and EMA; sums gradients of micro-batches over ranks.

    Parameters may be sharded (`infra.training.parallel.shard`): everything is then kept for this rank's parts only.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: OptimizerPlan,
        *,
        is_decayed: Callable[[str, nn.Parameter], bool] = decay_matrices,
    ) -> None:
        """Train those parameters of a network that require gradients."""
        self.network, self.plan = network, plan
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._parts: dict[str, Tensor] = {name: own_part(p) for name, p in self.parameters.items()}
        self.ema = {name: part.detach().clone() for name, part in self._parts.items()}
        self.optimizer = self._optimizer(is_decayed)
        self._begin_optimizer()
        first = next(iter(self._parts.values()))
        self.scaler = torch.amp.GradScaler(first.device.type, enabled=plan.is_scaled)
        self.faults = Faults(first.device, are_skipped=plan.is_scaled or plan.may_skip)
        self._loss = torch.zeros((), device=first.device)
        self._group = shard_group(next(iter(self.parameters.values())))
        self._replica: nn.parallel.DistributedDataParallel | None = None
        self._is_idle = False

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the parameters, and so have to make equally many passes."""
        return self._group is not None

    def spread(self, call: Callable[P, T]) -> Callable[P, T]:
        """Return a function of the network that computes what the loss is made of, ready for several ranks.

        Args:
            call: uses the trained parameters; returns tensors, or tuples and dicts of them.
        """
        if self.plan.ranks.size == 1 or self.is_sharded:
            return call
        assert self._replica is None, "a learner has one function"
        self._replica = replicate(self.network, call)
        return cast(Callable[P, T], self._replica)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Accumulate gradients within the block without summing them over ranks, as before a step's last micro-batch.

        Shards are summed all the same, over the ranks that hold them: whole gradients would not fit.
        """
        with ExitStack() as stack:
            if self._replica is not None:
                stack.enter_context(self._replica.no_sync())
            if self.is_sharded:
                self.network.set_requires_all_reduce(False)  # type: ignore[operator]
                stack.callback(self.network.set_requires_all_reduce, True)  # type: ignore[arg-type]
            yield

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Let passes within the block count for nothing: they keep other ranks company."""
        self._is_idle = True
        try:
            yield
        finally:
            self._is_idle = False

    def _optimizer(self, is_decayed: Callable[[str, nn.Parameter], bool]) -> torch.optim.AdamW:
        config = self.plan.optimizer
        decayed = [self._parts[n] for n, p in self.parameters.items() if is_decayed(n, p)]
        plain = [self._parts[n] for n, p in self.parameters.items() if not is_decayed(n, p)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def _begin_optimizer(self) -> None:
        """Make the optimizer's state, as its first step would, so that a checkpoint can be loaded into it."""
        for part in self._parts.values():
            zeros = (torch.zeros_like(part, memory_format=torch.preserve_format) for _ in range(2))
            step = torch.zeros((), dtype=torch.float32, device=part.device)
            self.optimizer.state[part] = dict(zip(STATE, (step, *zeros), strict=True))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""
        if self._is_idle:
            (loss * 0).backward()
            return
        self._loss += loss.detach()
        # Ranks average their gradients, so each counts for as many micro-batches as it does not compute itself.
        self.scaler.scale(loss / (self.plan.micro_batches / self.plan.ranks.size)).backward()

    def update(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step; return the learning rate and the gradient norm before clipping.

        A step whose loss or gradient is not finite changes no weights and no moments; `faults` records it. If losses
        are scaled, the scale is then lowered.
        """
        if self.is_sharded:
            for name, parameter in self.parameters.items():
                self._parts[name].grad = None if parameter.grad is None else own_part(parameter.grad)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        local = step - self.plan.start
        rate = learning_rate(self.plan.optimizer, local + 1, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # All ranks must skip the same steps, so the losses are summed as the gradients are. The fused step reads the
        # flag on the device, so the host does not wait for it.
        is_bad = self.faults.record(step, self.plan.ranks.total(self._loss), norm)
        self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.is_sharded:
            self.network.zero_grad(set_to_none=True)
        self._loss.zero_()
        self._average(local)
        return {"lr": rate, "grad_norm": norm, **self.faults.figures}

    def _clip(self) -> Tensor:
        """Scale gradients down to the largest norm that is allowed; return the norm before."""
        trained = [part for part in self._parts.values() if part.grad is not None]
        norm = nn.utils.get_total_norm([part.grad for part in trained if part.grad is not None])
        if self._group is not None:
            norm = self.plan.ranks.total(norm.square(), self._group).sqrt()
        nn.utils.clip_grads_with_norm_(trained, self.plan.optimizer.grad_clip, norm)
        return norm

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = 0.0 if step == 0 else min((1 + step) / (10 + step), self.plan.optimizer.ema_decay)
        torch._foreach_lerp_(list(self.ema.values()), [part.detach() for part in self._parts.values()], 1 - decay)

    @torch.no_grad()
    def take_average(self) -> None:
        """Replace the weights by their EMA, at the end of the training."""
        for name, part in self._parts.items():
            part.copy_(self.ema[name])

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
        for name, part in self._parts.items():
            kept = part.detach().clone()
            part.copy_(self.ema[name])
            self.ema[name].copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint needs, by name."""
        moments = {
            f"{key}.{name}": self.as_saved(name, value)
            for name, part in self._parts.items()
            for key, value in self.optimizer.state[part].items()
        }
        weights = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        ema = {f"ema.{name}": self.as_saved(name, part) for name, part in self.ema.items()}
        scale = self.scaler.state_dict()
        scaler = {f"scaler.{key}": torch.tensor(scale[key], dtype=torch.float64) for key in _SCALER if key in scale}
        return weights | ema | moments | scaler | self.faults.tensors()

    def as_saved(self, name: str, state: Tensor) -> Tensor:
        """Return state of a parameter as a part of the whole, if this rank's part of the parameter is one."""
        return as_part_of(self.parameters[name], state) if state.shape == self._parts[name].shape else state

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        for name, part in self._parts.items():
            part.copy_(own_part(tensors[f"weight.{name}"]))
            self.ema[name].copy_(own_part(tensors[f"ema.{name}"]))
        self._load_optimizer(tensors)
        if "skipped_steps" in tensors:
            self.faults.load(tensors["skipped_steps"])
        if self.plan.is_scaled:
            state = self.scaler.state_dict()
            scale, tracker = tensors["scaler.scale"].item(), int(tensors["scaler._growth_tracker"])
            self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": tracker})

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the optimizer's state, which lies on the right device and in the parameter's memory layout."""
        for name, part in self._parts.items():
            for key, value in self.optimizer.state[part].items():
                # Older checkpoints lack the state of an optimizer that had not begun.
                if f"{key}.{name}" in tensors:
                    value.copy_(own_part(tensors[f"{key}.{name}"]))


STATE = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state per parameter."""
_SCALER = ("scale", "_growth_tracker")
