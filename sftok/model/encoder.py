"""The encoder: an image to continuous latent tokens.

Shapes: B images, P patches, N latent tokens, W width, D channels of a code.
"""

import torch
from torch import Tensor, nn

from sftok.config import TokenizerConfig
from sftok.model.transformer import Transformer, free_parameter


class Encoder(nn.Module):
    """Patches and learned latent tokens attend to each other; the latent tokens are the output."""

    def __init__(self, config: TokenizerConfig, image_size: int) -> None:
        super().__init__()
        width, patches = config.encoder.width, (image_size // config.patch_size) ** 2
        self.num_latent_tokens, self.legacy_layout = config.num_latent_tokens, config.legacy_layout
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.class_token = free_parameter(1, width)
        self.patch_positions = free_parameter(1 + patches, width)
        self.latent_tokens = free_parameter(config.num_latent_tokens, width)
        self.latent_positions = free_parameter(config.num_latent_tokens, width)
        self.transformer = Transformer(config.encoder)
        self.project = nn.Linear(width, config.code_dim)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Encode float RGB in [0, 1], (B, 3, H, W), to z (B, N, D)."""
        patches_BPW = self.patch_embed(images_B3HW).flatten(2).transpose(1, 2)
        return self.read_out(self.transformer(self.sequence(patches_BPW), self.kept))

    @property
    def kept(self) -> slice:
        """The latent tokens in the sequence, the only positions that are kept."""
        return slice(-self.num_latent_tokens, None)

    def sequence(self, patches_BPW: Tensor) -> Tensor:
        """Build the transformer's input (B, 1 + P + N, W) from row-major patches: class, patches, latent tokens."""
        batch = patches_BPW.shape[0]
        image_BSW = torch.cat([self.class_token.expand(batch, 1, -1), patches_BPW], dim=1) + self.patch_positions
        latent_BNW = (self.latent_tokens + self.latent_positions).expand(batch, -1, -1)
        return torch.cat([image_BSW, latent_BNW.to(image_BSW.dtype)], dim=1)

    def read_out(self, y_BNW: Tensor) -> Tensor:
        """Project the transformer's output at the latent tokens to z (B, N, D)."""
        if self.legacy_layout:
            # The published code reads the (N, W) memory as (W, N) without transposing, and was trained that way.
            y_BNW = y_BNW.reshape(len(y_BNW), -1, self.num_latent_tokens).transpose(1, 2)
        return self.project(y_BNW)
