"""Reference sampling: codes from a generator as it is, on its device and in its type, without preparation."""

from torch import Tensor

from generator.config import SampleConfig
from generator.sampling.autoregressive import CachedNetwork, Sampler
from generator.sampling.masked import MaskedNetwork, MaskedSampler


def sample(model: CachedNetwork, class_B: Tensor, uniform_BN: Tensor, config: SampleConfig) -> Tensor:
    """Draw codes (B, N) int64 from an autoregressive generator; `precision` and `compile` of the config are ignored."""
    return Sampler(model, config)(class_B, uniform_BN)


def sample_masked(network: MaskedNetwork, class_B: Tensor, uniform_BT2N: Tensor, config: SampleConfig) -> Tensor:
    """Draw codes (B, N) int64 from a masked generator."""
    return MaskedSampler(network, config)(class_B, uniform_BT2N)
