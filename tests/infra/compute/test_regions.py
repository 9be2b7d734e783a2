"""Blocks of a network are compiled separately, and a validation compiles nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from generator.autoregressive import Block
from generator.code_space import CodeSpace
from generator.config import GeneratorConfig, MaskedConfig
from generator.kinds import build_generator
from infra.compute.compiler import compile_in_place
from infra.compute.regions import REPEATABLE, blocks
from sftok.model.teacher import ResBlock, Teacher
from sftok.model.transformer import Block as TokenizerBlock
from tests.support.tiny_tokenizer import TEACHER, tokenizer


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Record the calls of torch's compiler, which is replaced by one that compiles nothing."""
    found: list[dict[str, object]] = []

    def record(
        module: torch.fx.GraphModule, _: object, config_patches: dict[str, object] | None = None, **__: object
    ) -> Callable[..., object]:
        found.append({name: (config_patches or {}).get(name) for name in REPEATABLE})
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", record)
    monkeypatch.setattr("infra.compute.compiler.check_compiler", lambda _: None)
    monkeypatch.setattr("generator.sampling.compiled.check_compiler", lambda _: None)
    monkeypatch.setattr("sftok.model.cast_transformer.check_compiler", lambda _: None)
    return found


def test_what_is_promised_again_is_not_tuned_by_timing(asked: list[dict[str, object]]) -> None:
    """Guards against two workers that split sums differently because each autotuned its own kernels."""
    from generator.sampling.compiled import compiled
    from sftok.model.cast_transformer import CastTransformer

    def shifted(x: Tensor) -> Tensor:
        return x.sum() + 1

    compiled(shifted, torch.device("cuda"))(torch.ones(3))
    model = tokenizer(pixels=True)
    transformer = CastTransformer(model.decoder.transformer, torch.float32, compile=True)
    width = transformer.norm_in.shape[0]
    transformer(torch.ones(1, 4, width), slice(2))
    assert len(asked) >= 3
    assert all(options == REPEATABLE for options in asked)


class Scale(nn.Module):
    """Multiply by a weight; torch 2.11 does not compile the forward pass of its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_trainings_are_tuned_unless_they_are_to_repeat(asked: list[dict[str, object]]) -> None:
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
        try:
            network = Scale()
            compile_in_place(network)
            network(torch.ones(1, 2))
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [{"deterministic": None}, REPEATABLE]
