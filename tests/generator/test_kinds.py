"""The table of kinds and the union of their configs name the same kinds, and each builds its network."""

from typing import get_args

import torch

from generator.config import AnyGeneratorConfig, SampleConfig
from generator.kinds import KINDS, build_generator, prepare_sampler
from generator.network import GeneratorNetwork
from tests.support.small_generators import SPACE


def test_each_kind_of_config_builds_its_network_and_its_sampler() -> None:
    union, _ = get_args(AnyGeneratorConfig)
    configs = [get_args(member)[0](width=16, layers=1, heads=2, ffn_width=16) for member in get_args(union)]
    assert [config.kind for config in configs] == list(KINDS)
    for config in configs:
        network = build_generator(config, SPACE)
        assert isinstance(network, GeneratorNetwork)
        assert network.config == config
        sampler = prepare_sampler(network.eval(), SampleConfig())
        numbers = torch.zeros(2, *sampler.numbers)
        assert sampler(torch.tensor([0, 1]), numbers).shape == (2, SPACE.num_tokens)
