"""The kinds of generators: one table says what each consists of; only the union of their configs lists them, too."""

from typing import Any, NamedTuple

from generator.autoregressive import Generator
from generator.code_space import CodeSpace
from generator.config import AnyGeneratorConfig, SampleConfig
from generator.masked import MaskedGenerator
from generator.network import GeneratorNetwork
from generator.sampling.prepared import PreparedAutoregressive, PreparedGenerator, PreparedMasked
from generator.sampling.sampler import CodeSampler


class Kind(NamedTuple):
    """What a kind of generator consists of, beside its config."""

    network: type[GeneratorNetwork]
    prepared: type[PreparedGenerator[Any]]


KINDS: dict[str, Kind] = {
    "autoregressive": Kind(Generator, PreparedAutoregressive),
    "masked": Kind(MaskedGenerator, PreparedMasked),
}


def build_generator(config: AnyGeneratorConfig, space: CodeSpace) -> GeneratorNetwork:
    """Build the network that a config describes, with weights not yet initialised."""
    return KINDS[config.kind].network(config, space)


def prepare(model: GeneratorNetwork, config: SampleConfig) -> PreparedGenerator[Any]:
    """Prepare a generator for sampling on its device; do it once per worker, since weights are copied.

    Raises:
        ValueError: the config has settings for another kind of generator, or needs a compiler that is missing.
    """
    config.fit(model.config)
    config = config.on(model.device.type)
    return KINDS[model.config.kind].prepared(model, config.arithmetic, compile=bool(config.compile))


def prepare_sampler(model: GeneratorNetwork, config: SampleConfig) -> CodeSampler:
    """Prepare a generator for sampling with one config only; see `prepare`."""
    return prepare(model, config).sampler(config)
