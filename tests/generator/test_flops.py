"""The FLOPs formula of a generator, compared with PyTorch's FlopCounterMode."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, MaskedConfig
from generator.flops import forward_flops, training_flops
from generator.kinds import build_generator

SPACE = CodeSpace(codebook_size=50, num_tokens=7, num_classes=3)
BATCH = 4
CONFIGS: dict[str, GeneratorConfig | MaskedConfig] = {
    "plain": GeneratorConfig(width=24, layers=3, heads=2, ffn_width=40),
    "all options": GeneratorConfig.model_validate(
        {
            "width": 24, "layers": 2, "heads": 3, "ffn_width": 56, "qk_norm": True, "tied": True,
            "order": {"kind": "annealed", "start_step": 1, "end_step": 2},
        }
    ),
    "masked": MaskedConfig(width=24, layers=3, heads=2, ffn_width=40),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_is_what_is_counted(name: str) -> None:
    config = CONFIGS[name]
    model = build_generator(config, SPACE)
    model.initialise()
    classes, codes = torch.arange(BATCH) % 3, torch.arange(BATCH * 7).view(BATCH, 7)
    view = model.draw_view(BATCH, step=0, generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH):  # fused attention computes scores again in the backward pass
        with FlopCounterMode(display=False) as forward:
            loss = model.train().training_loss(classes, codes, view, label_smoothing=0.0)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert forward.get_total_flops() == BATCH * forward_flops(config, SPACE)
    assert forward.get_total_flops() + backward.get_total_flops() == BATCH * training_flops(config, SPACE)
