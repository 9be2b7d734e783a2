"""Metrics of a tokenizer before fine-tuning on held-out images, decoded to pixels by the teacher.

Images stream through in micro-batches; sums are kept, and a few numbers of each image. Batches have one fixed size, the
last one padded, and all randomness is seeded by the image's id, so no metric depends on batch mates.

Shapes: B images, N latent tokens, P proxy positions, V proxy codes, D channels of a code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from infra.config import Config
from infra.training.loop import generator_of
from sftok.coding.decode import ImageDecoder
from sftok.config import DecodingConfig
from sftok.evaluation.agreement import measure_agreement
from sftok.evaluation.reconstruction import figures_of
from sftok.images.preprocess import to_float
from sftok.metrics import functional
from sftok.metrics.frechet import frechet_distance
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.image_meter import ImageMeter
from sftok.metrics.random_features import RandomFeatures
from sftok.metrics.step_agreement import StepAgreement
from sftok.model.decoder import random_mask
from sftok.model.iterative_decoding import decode_steps
from sftok.model.prepared import prepare_encoder
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok


class ImageQuality(Config):
    """Closeness of images to their originals: means over images, and a distance between the two sets."""

    psnr: float = Field(description="dB, over RGB")
    ssim: float
    fd_random: float = Field(description="Fréchet distance between random features; not FID")


class StepQuality(ImageQuality):
    """Quality of reconstructions in a number of decoding steps."""

    num_steps: int
    code_agreement: float = Field(description="share of positions with the teacher's code")


class CrossEntropies(Config):
    """Cross-entropy of the teacher's codes at masked positions, in nats per position."""

    all_hidden: float = Field(description="the first decoding step's input")
    truth_given: float = Field(description="arccos mask; unmasked positions hold the teacher's codes")
    own_given: float = Field(description="arccos mask; unmasked positions hold the model's own first-step prediction")


class Agreement(Config):
    """Agreement of a prediction with the final one."""

    kl: float = Field(description="KL(prediction || final), nats per position")
    top1: float = Field(description="share of positions with the same likeliest code")


class AlignmentMetrics(Config):
    """All metrics of one tokenizer."""

    num_images: int
    temperature: float = Field(description="of decoding; 0 is deterministic")
    extractor: str
    extractor_sha256: str
    teacher: ImageQuality = Field(description="of the teacher's own reconstructions: every code predicted correctly")
    by_steps: tuple[StepQuality, ...]
    cross_entropy: CrossEntropies
    agreement_steps: int = Field(description="decoding steps of the comparison with the final prediction")
    truth: Agreement
    steps: tuple[Agreement, ...] = Field(description="steps 1 to agreement_steps - 1")


class _Reconstructions:
    """Figures of reconstructed images, and the moments of their features."""

    def __init__(self, features: RandomFeatures) -> None:
        self.features, self.figures = features, ImageMeter()
        self.moments: FeatureMoments | None = None

    def add(self, images: Tensor, originals: Tensor, codes: Tensor, teacher_codes: Tensor) -> None:
        self.figures.add(**figures_of(images, originals, codes, teacher_codes))
        self.moments = _merged(self.moments, FeatureMoments.of(self.features(images)))

    def quality(self, reference: FeatureMoments) -> ImageQuality:
        assert self.moments is not None
        psnr, ssim = self.figures.mean("psnr"), self.figures.mean("ssim")
        return ImageQuality(psnr=psnr, ssim=ssim, fd_random=frechet_distance(self.moments, reference))


class _RunningMean:
    """A mean over batches of values."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.sum += values.double().sum().item()
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.sum / max(self.count, 1)


class AlignmentMeter:
    """Takes held-out images micro-batch by micro-batch, then returns the metrics."""

    def __init__(
        self,
        model: SFTok,
        teacher: Teacher,
        *,
        steps: Sequence[int],
        decoding: DecodingConfig,
        micro_batch: int,
        features: RandomFeatures,
        seed: int,
    ) -> None:
        """Prepare the models; `steps` are the step counts of reconstructions, `decoding` is for the step agreement."""
        self.model, self.teacher, self.features, self.seed = model, teacher, features, seed
        self.steps, self.decoding, self.micro_batch = tuple(steps), decoding, micro_batch
        self.device = model.quantizer.embedding.device
        self._encode = prepare_encoder(model)
        precision = decoding.on(self.device.type).arithmetic
        self._decode = ImageDecoder(model, teacher, micro_batch=micro_batch, seed=seed, precision=precision)
        self._originals: FeatureMoments | None = None
        self._count, self._ceiling = 0, _Reconstructions(features)
        self._made = {num_steps: _Reconstructions(features) for num_steps in self.steps}
        self._entropy = {name: _RunningMean() for name in CrossEntropies.model_fields}
        self._agreement: StepAgreement | None = None

    @torch.no_grad()
    def add(self, images: Tensor, image_ids: Sequence[str]) -> None:
        """Measure held-out images, uint8 (n, 3, S, S), at most a micro-batch of them.

        Raises:
            ValueError: there are none, more than a micro-batch, or not one id per image.
        """
        count = len(images)
        if not count == len(image_ids) > 0 or count > self.micro_batch:
            wanted = f"give 1 to {self.micro_batch}, and one id per image"
            raise ValueError(f"{count} images, {len(image_ids)} ids: {wanted}")
        images, missing = images.to(self.device), self.micro_batch - count
        pixels = to_float(torch.cat([images, images.new_zeros(missing, *images.shape[1:])]))
        truth_BP, codes_BN = self.teacher.encode(pixels), self._encode(pixels)
        self._count += count
        self._originals = _merged(self._originals, FeatureMoments.of(self.features(images)))
        taught, truth = functional.to_uint8(self.teacher.decode(truth_BP)[:count]), truth_BP[:count]
        self._ceiling.add(taught, images, truth, truth)
        for num_steps in self.steps:
            decoding = self.decoding.model_copy(update={"num_steps": num_steps})
            made = self._decode.decode(codes_BN[:count], image_ids, decoding)
            self._made[num_steps].add(made.images, images, made.proxy_codes, truth)
        self._predictions(truth_BP, codes_BN, image_ids)

    def _predictions(self, truth_BP: Tensor, codes_BN: Tensor, image_ids: Sequence[str]) -> None:
        """Measure the decoder's predictions at masked positions."""
        decoder, count, padding = self.model.decoder, len(image_ids), [""] * (self.micro_batch - len(image_ids))
        names = [*image_ids, *padding]
        step, given = self._decode.predictor.step, self._decode.predictor.given(codes_BN)
        first_BP = decoder.all_masked(given)
        masks = [random_mask(truth_BP[:1].shape, generator_of(self.seed, "held-out mask", name)) for name in names]
        hidden_BP = torch.cat(masks).to(self.device)
        own_BP = decode_steps(step, first_BP, given, num_steps=1)[0]
        for name, ids_BP in (
            ("all_hidden", first_BP),
            ("truth_given", truth_BP.masked_fill(hidden_BP, decoder.mask_id)),
            ("own_given", own_BP.masked_fill(hidden_BP, decoder.mask_id)),
        ):
            logits_BPV, asked_BP = step(ids_BP, given)[:count], (ids_BP == decoder.mask_id)[:count]
            self._entropy[name].add(F.cross_entropy(logits_BPV[asked_BP], truth_BP[:count][asked_BP], reduction="none"))
        found = measure_agreement(self._decode, self.decoding, codes_BN, names, truth_BP[:count])
        self._agreement = found if self._agreement is None else self._agreement + found

    def metrics(self) -> AlignmentMetrics:
        """Return the metrics of all images so far.

        Raises:
            ValueError: there are too few images for a distance between sets.
        """
        if self._originals is None or self._agreement is None or self._count < 2:
            raise ValueError(f"{self._count} held-out images are too few to measure: hold out at least 2")
        pairs = zip(self._agreement.kl, self._agreement.top1, strict=True)
        truth, *steps = [Agreement(kl=kl, top1=top1) for kl, top1 in pairs]
        by_steps = [
            StepQuality(
                num_steps=num_steps,
                code_agreement=made.figures.mean("code_agreement"),
                **made.quality(self._originals).model_dump(),
            )
            for num_steps, made in self._made.items()
        ]
        return AlignmentMetrics(
            num_images=self._count,
            temperature=self.decoding.temperature,
            extractor=self.features.description,
            extractor_sha256=self.features.sha256,
            teacher=self._ceiling.quality(self._originals),
            by_steps=tuple(by_steps),
            cross_entropy=CrossEntropies(**{name: mean.value for name, mean in self._entropy.items()}),
            agreement_steps=self.decoding.num_steps,
            truth=truth,
            steps=tuple(steps),
        )


def _merged(total: FeatureMoments | None, more: FeatureMoments) -> FeatureMoments:
    return more if total is None else total + more
