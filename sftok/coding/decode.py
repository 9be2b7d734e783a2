"""Decode codes to images in micro-batches, the inverse of `encode`.

Shapes: B images, N latent tokens, P proxy positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infra.training.loop import seed_of
from sftok.config import DecodingConfig
from sftok.metrics.functional import to_uint8
from sftok.model.prepared import InferencePrecision, prepare_decoder
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok


class DecodedImages(NamedTuple):
    """Decoded images and their proxy codes."""

    images: Tensor
    """uint8 (n, 3, H, W)."""
    proxy_codes: Tensor
    """int64 (n, P)."""


class Predictor(NamedTuple):
    """Predicts the proxy codes of latent tokens, step by step."""

    step: Callable[[Tensor, Tensor], Tensor]
    """from proxy codes (B, P), hidden ones included, and the output of `given`, to logits (B, P, V)."""
    given: Callable[[Tensor], Tensor]
    """from codes (B, N) to the input that all steps share."""


class ImageDecoder:
    """A tokenizer, with its teacher if it has no pixel decoder of its own, prepared to decode codes to images."""

    def __init__(
        self,
        model: SFTok,
        teacher: Teacher | None,
        *,
        micro_batch: int,
        seed: int = 0,
        precision: InferencePrecision = "fp32",
        compile: bool = False,
    ) -> None:
        self.decoder = prepare_decoder(model, teacher, precision, compile=compile)
        self.micro_batch, self.seed = micro_batch, seed

    @property
    def predictor(self) -> Predictor:
        """The predictor that metrics of predictions use.

        On CPUs it is the model's own modules, whose float32 rounds differently from the prepared decoder's; changing
        that would change the metrics of existing artifacts.
        """
        if self.decoder.device.type == "cpu":
            return Predictor(self.decoder.model.decoder, self.decoder.model.quantizer.lookup)
        return Predictor(self.decoder.step, self.decoder.given)

    def __call__(self, codes_BN: Tensor, image_ids: Sequence[str], decoding: DecodingConfig) -> DecodedImages:
        """Decode codes (n, N) int64 to images on the CPU; see `decode`.

        Raises:
            ValueError: there are no codes, or not one id per image.
        """
        return DecodedImages(*(part.cpu() for part in self.decode(codes_BN, image_ids, decoding)))

    def decode(self, codes_BN: Tensor, image_ids: Sequence[str], decoding: DecodingConfig) -> DecodedImages:
        """Decode codes (n, N) int64 to images on the models' device.

        An image and its noise depend on its codes, the seed and its id. Batches have one fixed size, the last one
        padded, for the same reason as in encoding.

        Raises:
            ValueError: there are no codes, or not one id per image.
        """
        if not len(codes_BN) == len(image_ids) > 0:
            raise ValueError(f"{len(codes_BN)} rows of codes for {len(image_ids)} image ids: give one id per row")
        images, proxies = [], []
        for at in range(0, len(codes_BN), self.micro_batch):
            part, ids = codes_BN[at : at + self.micro_batch], image_ids[at : at + self.micro_batch]
            missing = self.micro_batch - len(part)
            padded = torch.cat([part, part.new_zeros(missing, part.shape[1])])
            keys_B = noise_keys(self.seed, [*ids, *[""] * missing]) if decoding.temperature else None
            proxy_BP, logits_BPV = self.decoder.predict_proxy(padded, decoding, keys_B)
            images.append(to_uint8(self.decoder.render(proxy_BP, logits_BPV))[: len(part)])
            proxies.append(proxy_BP[: len(part)])
        return DecodedImages(torch.cat(images), torch.cat(proxies))

    def decode_all(
        self, codes_BN: Tensor, image_ids: Sequence[str], decoding: DecodingConfig, *, at_once: int
    ) -> Iterator[DecodedImages]:
        """Decode any number of codes, about `at_once` images at once, in whole micro-batches."""
        size = -(-at_once // self.micro_batch) * self.micro_batch
        for at in range(0, len(codes_BN), size):
            yield self.decode(codes_BN[at : at + size], image_ids[at : at + size], decoding)


def noise_keys(seed: int, image_ids: Sequence[str]) -> Tensor:
    """Make the keys of the images' decoding noise, (B,) int64, from a seed and the image's id alone."""
    return torch.tensor([seed_of(seed, "decode", image_id) for image_id in image_ids], dtype=torch.int64)
