"""Codes to images in micro-batches: the way back of encode.py.

Shapes: B images, N latent tokens, P proxy positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infra.training import generator_of
from sftok.config import DecodingConfig
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

    def __init__(self, model: SFTok, teacher: Teacher | None, *, micro_batch: int, seed: int = 0) -> None:
        self.model, self.teacher, self.micro_batch, self.seed = model, teacher, micro_batch, seed

    @torch.no_grad()
    def __call__(self, codes_BN: Tensor, image_ids: Sequence[str], decoding: DecodingConfig) -> Decoded:
        """Decode codes (n, N) int64; an image's noise depends on the seed and its id, not on its batch mates."""
        images, proxies = [], []
        device = next(self.model.parameters()).device
        for at in range(0, len(codes_BN), self.micro_batch):
            part = codes_BN[at : at + self.micro_batch].to(device)
            ids = image_ids[at : at + self.micro_batch]
            generators = [generator_of(self.seed, "decode", image_id) for image_id in ids]
            proxy_BP, logits_BPV = self.model.predict_proxy(part, decoding, generators)
            images.append(to_uint8(self.model.render(proxy_BP, logits_BPV, self.teacher)).cpu())
            proxies.append(proxy_BP.cpu())
        return Decoded(torch.cat(images), torch.cat(proxies))
