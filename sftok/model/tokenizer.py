"""SFTok: encoder, quantizer and multi-step decoder, and a pixel decoder of its own after fine-tuning.

Shapes: B images, N latent tokens, P proxy positions, V proxy codes, C channels of a proxy code.
"""

import torch
from torch import Tensor, nn

from sftok.config import Assignment, DecodingConfig, TeacherConfig, TokenizerConfig
from sftok.model.decoder import Decoder
from sftok.model.encoder import Encoder
from sftok.model.iterative_decoding import decode_steps
from sftok.model.quantizer import Quantizer, QuantizerOutput
from sftok.model.teacher import Teacher, TeacherDecoder, to_grid
from sftok.model.transformer import initialise


class SFTok(nn.Module):
    """The tokenizer. Without a pixel decoder it predicts proxy codes, which the teacher decodes to an image."""

    def __init__(self, config: TokenizerConfig, teacher: TeacherConfig, image_size: int, *, pixels: bool) -> None:
        super().__init__()
        num_positions = (image_size // teacher.downsample_factor) ** 2
        self.config, self.teacher_config, self.image_size = config, teacher, image_size
        self.encoder = Encoder(config, image_size)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config, num_positions, teacher.codebook_size)
        self.pixel_codebook = nn.Embedding(teacher.codebook_size, teacher.latent_channels) if pixels else None
        self.pixel_decoder = TeacherDecoder(teacher) if pixels else None

    def initialise(self) -> None:
        """Initialise encoder, decoder and quantizer; the pixel decoder is copied from a teacher."""
        initialise(self.encoder, self.config.encoder.init_std)
        initialise(self.decoder, self.config.decoder.init_std)
        self.quantizer.initialise()

    def take_weights(self, other: "SFTok") -> None:
        """Copy encoder, quantizer and decoder of another tokenizer of the same config."""
        self.encoder.load_state_dict(other.encoder.state_dict())
        self.quantizer.load_state_dict(other.quantizer.state_dict())
        self.decoder.load_state_dict(other.decoder.state_dict())

    def take_pixel_decoder(self, teacher: Teacher) -> None:
        """Copy the teacher's codebook and decoder into this model's own."""
        assert self.pixel_codebook is not None
        assert self.pixel_decoder is not None
        self.pixel_codebook.load_state_dict(teacher.codebook.state_dict())
        self.pixel_decoder.load_state_dict(teacher.decoder.state_dict())

    def encode(self, images_B3HW: Tensor, assignment: Assignment = "nearest") -> QuantizerOutput:
        """Encode float RGB in [0, 1], (B, 3, H, W), to codes (B, N) and their vectors.

        With `nearest`, an image's codes do not depend on its batch mates; with `sinkhorn` they do.

        Raises:
            ValueError: the images have another size than the tokenizer's.
        """
        self.check_images(images_B3HW)
        return self.quantizer(self.encoder(images_B3HW), assignment)

    def check_images(self, images_B3HW: Tensor) -> None:
        """Check the shape of images.

        Raises:
            ValueError: they have another size than the tokenizer's; names both.
        """
        side, shape = self.image_size, tuple(images_B3HW.shape)
        if len(shape) != 4 or shape[1:] != (3, side, side):
            raise ValueError(
                f"images have shape {shape}, this tokenizer takes (n, 3, {side}, {side}): resize and crop them first"
            )

    def soft_decode(self, logits_BPV: Tensor) -> Tensor:
        """Decode the expected pixel code of every position: float RGB (B, 3, H, W), not clamped."""
        assert self.pixel_codebook is not None
        assert self.pixel_decoder is not None
        return self.pixel_decoder(to_grid(logits_BPV.softmax(-1) @ self.pixel_codebook.weight))

    @torch.no_grad()
    def predict_proxy(
        self, codes_BN: Tensor, decoding: DecodingConfig, keys_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode codes (B, N) iteratively to proxy codes (B, P) and the last step's logits (B, P, V)."""
        z_q = self.quantizer.lookup(codes_BN)
        return decode_steps(
            self.decoder,
            self.decoder.all_masked(z_q),
            z_q,
            num_steps=decoding.num_steps,
            temperature=decoding.temperature,
            keys_B=keys_B,
        )

    def render(self, proxy_BP: Tensor, logits_BPV: Tensor, teacher: Teacher | None) -> Tensor:
        """Render the results of `predict_proxy` as float RGB in [0, 1], by its own pixel decoder or else the teacher's.

        Raises:
            ValueError: the tokenizer has no pixel decoder and no teacher is given.
        """
        if self.pixel_decoder is not None:
            return self.soft_decode(logits_BPV).clamp(0, 1)
        if teacher is None:
            raise ValueError(
                "this tokenizer ends in proxy codes (it was not fine-tuned): a teacher is needed for pixels"
            )
        return teacher.decode(proxy_BP)
