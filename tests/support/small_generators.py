"""Generators of a few thousand parameters whose outputs are far from uniform, and numbers to sample with."""

import torch
from torch import Tensor, nn

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, MaskedConfig
from generator.masked import MaskedGenerator
from tests.support.codes_info import codes_info

INFO = codes_info(11, 6, class_names=("a", "b", "c"))
SPACE = CodeSpace(codebook_size=11, num_tokens=6, num_classes=3)


def spread(model: nn.Module) -> None:
    """Initial weights give all but equal logits, and norms of 1: neither would show what is wrong."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def autoregressive(space: CodeSpace = SPACE, **changes: object) -> Generator:
    torch.manual_seed(0)
    values = {"width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "dropout": 0.1, **changes}
    model = Generator(GeneratorConfig.model_validate(values), space)
    model.initialise()
    spread(model)
    return model.eval()


def masked(space: CodeSpace = SPACE, **changes: object) -> MaskedGenerator:
    torch.manual_seed(0)
    values = {"kind": "masked", "width": 16, "layers": 2, "heads": 2, "ffn_width": 24, "dropout": 0.1, **changes}
    model = MaskedGenerator(MaskedConfig.model_validate(values), space)
    model.initialise()
    spread(model)
    return model.eval()


def uniform(*shape: int, seed: int = 4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
