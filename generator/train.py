"""Training of the autoregressive generator on code Parquet.

Shapes: B sequences, N codes a sequence, V codebook size.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.artifacts import save_generator
from generator.config import GeneratorConfig, GeneratorTrainingConfig
from generator.data import CodeData, TrainCodes, space_of, with_null
from generator.model import Generator
from infra.codes import CodesInfo
from infra.training import Learner, Run, TrainResult, autocast, decay_matrices, train_loop

VALIDATION_BATCH = 256


class BestWeights:
    """The averaged weights of the lowest held-out negative log-likelihood so far."""

    def __init__(self, learner: Learner) -> None:
        self.nll = torch.tensor(math.inf)
        self.weights = {name: p.detach().clone() for name, p in learner.parameters.items()}

    def offer(self, nll: float, learner: Learner) -> None:
        """Keep the learner's current weights if they are better."""
        if nll < float(self.nll):
            self.nll.fill_(nll)
            for name, parameter in learner.parameters.items():
                self.weights[name].copy_(parameter.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs."""
        return {"nll": self.nll, **{f"best.{n}": t for n, t in self.weights.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.nll.copy_(tensors["nll"])
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"best.{name}"])


def train_generator(
    train: CodeData,
    val: CodeData,
    info: CodesInfo,
    model: GeneratorConfig,
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
    network = Generator(model, space)
    network.initialise()
    network.to(run.device)
    learner = Learner(network.named_parameters(), config.optimizer, steps=config.steps, is_decayed=decay_matrices)
    best = BestWeights(learner)
    stream = TrainCodes(train, space, seed=run.seed, batch_size=config.batch_size, class_dropout=config.class_dropout)

    def step(step: int) -> dict[str, float]:
        batch = stream.batch(step)
        codes_BN = batch.codes.to(run.device)
        network.train()
        with autocast(config.precision, run.device):
            logits_BNV = network(batch.classes.to(run.device), codes_BN)
            loss = F.cross_entropy(
                logits_BNV.float().flatten(0, 1), codes_BN.flatten(), label_smoothing=config.label_smoothing
            )
        return {"loss": loss.item(), **learner.update(loss, step)}

    def validate(_: int) -> dict[str, float]:
        with learner.averaged():
            nll = negative_log_likelihood(network, val).item()
            best.offer(nll, learner)
        return {"val_nll": nll, "best_val_nll": float(best.nll)}

    end = train_loop({"model": learner, "best": best}, step, config, run=run, validate=validate)
    weights = best.weights if config.keep == "best" else learner.ema
    network.load_state_dict(weights)
    metrics = {
        "train_loss": end.figures["loss"],
        "val_nll": float(best.nll) if config.keep == "best" else end.figures["val_nll"],
    }
    return TrainResult([*save_generator(network, info, run.out), end.log], {"steps": config.steps}, metrics)


@torch.no_grad()
def negative_log_likelihood(network: Generator, data: CodeData) -> Tensor:
    """Mean negative log-likelihood of a code given its class and the codes before it, in nats; scalar."""
    network.eval()
    device, total = network.head.weight.device, torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(data.codes)).split(VALIDATION_BATCH):
        codes_BN = data.codes[rows].long().to(device)
        logits_BNV = network(with_null(data.classes[rows], network.space).to(device), codes_BN)
        total += F.cross_entropy(logits_BNV.flatten(0, 1), codes_BN.flatten(), reduction="sum").double().cpu()
    return total / data.codes.numel()
