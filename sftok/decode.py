"""Codes to images in micro-batches: the way back of encode.py.

Shapes: B images, N latent tokens, P proxy positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infra.training import generator_of
from sftok.config import DecodingConfig
from sftok.inference import InferencePrecision, prepare_decoder
from sftok.metrics import to_uint8
from sftok.model import SFTok
from sftok.proxy import Teacher


class Decoded(NamedTuple):
    """Images, and the proxy codes behind them."""

    images: Tensor
    """uint8 (n, 3, H, W)."""
    proxy_codes: Tensor
    """int64 (n, P)."""


class ImageDecoder:
    """A tokenizer, and where it has no pixel decoder of its own its teacher, ready to turn codes into images."""

    def __init__(
        self,
        model: SFTok,
        teacher: Teacher | None,
        *,
        micro_batch: int,
        seed: int = 0,
        precision: InferencePrecision = "fp32",
    ) -> None:
        self.decoder = prepare_decoder(model, teacher, precision)
        self.micro_batch, self.seed = micro_batch, seed

    def __call__(self, codes_BN: Tensor, image_ids: Sequence[str], decoding: DecodingConfig) -> Decoded:
        """Decode codes (n, N) int64; an image and its noise depend on its codes, the seed and its id.

        Batches are of one fixed size, the last one padded, for the same reason as in encoding.

        Raises:
            ValueError: there are no codes, or not one id an image.
        """
        if not len(codes_BN) == len(image_ids) > 0:
            raise ValueError(f"{len(codes_BN)} rows of codes for {len(image_ids)} image ids: give one id a row")
        images, proxies = [], []
        for at in range(0, len(codes_BN), self.micro_batch):
            part, ids = codes_BN[at : at + self.micro_batch], image_ids[at : at + self.micro_batch]
            missing = self.micro_batch - len(part)
            padded = torch.cat([part, part.new_zeros(missing, part.shape[1])])
            generators = [generator_of(self.seed, "decode", image_id) for image_id in [*ids, *[""] * missing]]
            proxy_BP, logits_BPV = self.decoder.predict_proxy(padded, decoding, generators)
            images.append(to_uint8(self.decoder.render(proxy_BP, logits_BPV)).cpu()[: len(part)])
            proxies.append(proxy_BP.cpu()[: len(part)])
        return Decoded(torch.cat(images), torch.cat(proxies))
