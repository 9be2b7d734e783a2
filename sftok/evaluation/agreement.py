"""Agreement of each decoding step's prediction with the last one's, on images whose codes are known.

Shapes: B images, N latent tokens, P proxy positions.
"""

import functools
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sftok.coding.decode import ImageDecoder, noise_keys
from sftok.config import DecodingConfig
from sftok.metrics.step_agreement import StepAgreement, decode_logits


@torch.no_grad()
def measure_agreement(
    decoder: ImageDecoder, decoding: DecodingConfig, codes_BN: Tensor, image_ids: Sequence[str], truth_BP: Tensor
) -> StepAgreement:
    """Decode in the decoder's micro-batches and compare the steps; codes beyond the teacher's are padding.

    On a GPU the last batch is padded: the decoder may be compiled there, for batches of one size.
    """
    predictor, device, size = decoder.predictor, decoder.decoder.device, decoder.micro_batch
    found = []
    for at in range(0, len(truth_BP), size):
        rows, ids, truth = codes_BN[at : at + size], image_ids[at : at + size], truth_BP[at : at + size].to(device)
        if (missing := size - len(rows)) and device.type != "cpu":
            rows, ids = F.pad(rows, (0, 0, 0, missing)), [*ids, *[""] * missing]
        given = predictor.given(rows)
        logits = decode_logits(
            predictor.step,
            decoder.decoder.model.decoder.all_masked(given),
            given,
            num_steps=decoding.num_steps,
            temperature=decoding.temperature,
            keys_B=noise_keys(decoder.seed, ids).to(device),
        )
        found.append(StepAgreement.of([one[: len(truth)] for one in logits], truth))
    return functools.reduce(operator.add, found)
