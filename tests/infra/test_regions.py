"""Which parts of a network are compiled by themselves, and that a validation compiles nothing."""

import pytest
from torch import nn

from generator.artifacts import build_generator
from generator.config import GeneratorConfig, MaskedConfig
from generator.model import Block
from generator.space import CodeSpace
from infra.regions import blocks
from sftok.proxy import ResBlock, Teacher
from sftok.transformer import Block as TokenizerBlock
from tests.sftok.tiny import TEACHER, tokenizer


def test_the_repeated_blocks_are_compiled() -> None:
    model, teacher = tokenizer(pixels=True), Teacher(TEACHER)
    assert [type(block) for block in blocks(model.encoder)] == [TokenizerBlock]
    assert [type(block) for block in blocks(model.decoder)] == [TokenizerBlock] * 2
    assert {type(block) for block in blocks(teacher.encoder)} == {ResBlock}
    for network in (teacher.encoder, teacher.decoder):
        assert set(blocks(network)) == {module for module in network.modules() if isinstance(module, ResBlock)}
    generator = build_generator(GeneratorConfig(width=8, layers=3, heads=2, ffn_width=8), CodeSpace(16, 4, 2))
    assert [type(block) for block in blocks(generator)] == [Block] * 3


def test_masked_blocks_too() -> None:
    masked = build_generator(MaskedConfig(width=8, layers=3, heads=2, ffn_width=8), CodeSpace(16, 4, 2))
    assert len(list(blocks(masked))) == 3


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh())])
def test_layers_alone_are_no_blocks(network: nn.Module) -> None:
    assert not list(blocks(network))
