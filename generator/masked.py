"""The masked generator: a bidirectional transformer that predicts masked codes from the class and the other codes.

The paper's generator (method.md 1.5): BERT's shape, with norms after the residuals, exact GELU and learned positions.
The input is [class, code 1, ..., code N]; the outputs are the logits of codes 1 to N. One table embeds everything:
V codes, the mask, the classes, the null class.

Shapes: B sequences, S = 1 + N positions, N codes per sequence, V codebook size, W width, H heads, D channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.code_space import CodeSpace
from generator.config import MaskedConfig
from generator.dropout import drop
from generator.network import GeneratorNetwork
from generator.objectives import code_weights, masked_loss, random_mask

NORM_EPSILON = 1e-12
INIT_STD = 0.02


class Attention(nn.Module):
    """Bidirectional multi-head attention with dropout of the attention weights in training."""

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BSW: Tensor, lines: Tensor | None = None, constants_W: Tensor | None = None) -> Tensor:
        """Map (B, S, W) to (B, S, W); attention weights are dropped by their lines (H, 2, B, S), if there are any."""
        q, k, v = self.qkv(x_BSW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if lines is None or constants_W is None:
            y_BHSD = F.scaled_dot_product_attention(q, k, v)
        else:  # written out, since fused kernels draw masks of their own
            share_BHSS = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
            y_BHSD = drop(share_BHSS, lines.permute(1, 2, 0, 3), constants_W, self.dropout).to(v.dtype) @ v
        return self.out(y_BHSD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Post-norm transformer block: norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm_1 = nn.LayerNorm(config.width, NORM_EPSILON)
        self.expand = nn.Linear(config.width, config.ffn_width)
        self.contract = nn.Linear(config.ffn_width, config.width)
        self.norm_2 = nn.LayerNorm(config.width, NORM_EPSILON)
        self.dropout = config.dropout

    def forward(self, x_BSW: Tensor, lines: Tensor | None = None, constants_W: Tensor | None = None) -> Tensor:
        """Map (B, S, W) to (B, S, W); residuals and attention weights are dropped by lines (2 + H, 2, B, S), if any."""
        if lines is None or constants_W is None:
            x_BSW = self.norm_1(x_BSW + self.attention(x_BSW))
            return self.norm_2(x_BSW + self._feed_forward(x_BSW))
        y_BSW = self.attention(x_BSW, lines[2:], constants_W)
        x_BSW = self.norm_1(x_BSW + drop(y_BSW, lines[0], constants_W, self.dropout))
        return self.norm_2(x_BSW + drop(self._feed_forward(x_BSW), lines[1], constants_W, self.dropout))

    def _feed_forward(self, x_BSW: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x_BSW)))


class MaskedGenerator(GeneratorNetwork):
    """Class-conditional model of masked codes given the unmasked ones."""

    config: MaskedConfig

    def __init__(self, config: MaskedConfig, space: CodeSpace) -> None:
        super().__init__(config, space)
        self.embed = nn.Embedding(space.codebook_size + 1 + space.num_classes + 1, config.width)
        self.positions = nn.Embedding(1 + space.num_tokens, config.width)
        # Two token types, as in BERT; all tokens have type 0. Kept for the published layout.
        self.type_embed = nn.Embedding(2, config.width)
        self.norm_in = nn.LayerNorm(config.width, NORM_EPSILON)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.places_per_block = 2 + config.heads
        self.head = nn.Linear(config.width, space.codebook_size)

    @property
    def mask_id(self) -> int:
        """Return the id of the mask token, which stands for a masked code."""
        return self.space.codebook_size

    def initialise(self) -> None:
        """Initialise the weights.

        | what | how |
        |---|---|
        | linear, embedding | normal, std 0.02; bias 0 |
        | norm | weight 1, bias 0 |
        """
        for child in self.modules():
            if isinstance(child, nn.Linear | nn.Embedding):
                nn.init.normal_(child.weight, std=INIT_STD)
            if isinstance(child, nn.Linear):
                nn.init.zeros_(child.bias)
            if isinstance(child, nn.LayerNorm):
                child.reset_parameters()

    def draw_view(self, batch: int, *, step: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG002  # as others
        """Draw the masks of a training batch, (B, N) bool, true = masked."""
        return random_mask(batch, self.space.num_tokens, generator)

    def row_weights(self, view_BN: Tensor | None, batch: int) -> Tensor:  # noqa: ARG002  # the view has as many rows
        """Return the weights (B,) of a batch's rows: those of their codes, masked or not."""
        assert view_BN is not None
        return code_weights(view_BN, self.config.unmasked_weight).sum(1)

    def training_loss(
        self,
        class_B: Tensor,
        codes_BN: Tensor,
        view_BN: Tensor | None,
        keys_B: Tensor | None = None,
        *,
        label_smoothing: float,
    ) -> Tensor:
        """Return the weighted mean cross-entropy of masked and unmasked codes."""
        assert view_BN is not None
        logits_BNV = self(class_B, codes_BN.masked_fill(view_BN, self.mask_id), keys_B)
        weight = self.config.unmasked_weight
        return masked_loss(logits_BNV, codes_BN, view_BN, unmasked_weight=weight, label_smoothing=label_smoothing)

    def draw_targets(self, codes_BN: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the codes to predict in validation, (B, N) bool: random masks."""
        return random_mask(len(codes_BN), codes_BN.shape[1], generator).to(codes_BN.device)

    def predict(self, class_B: Tensor, codes_BN: Tensor, targets_BN: Tensor) -> Tensor:
        """Return logits (B, N, V), with the targets masked in the input."""
        return self(class_B, codes_BN.masked_fill(targets_BN, self.mask_id))

    def forward(self, class_B: Tensor, ids_BN: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Map class ids (B,) and codes (B, N), `mask_id` where masked, to logits (B, N, V).

        With the keys of the rows' dropout, as in training, values are dropped.

        Raises:
            ValueError: the number of codes is wrong.
        """
        self.check_length(ids_BN)
        ids_BS = torch.cat([(self.mask_id + 1 + class_B)[:, None], ids_BN], dim=1)
        x_BSW = self.embed(ids_BS) + self.positions.weight + self.type_embed.weight[0]
        masks = self.masks(keys_B)
        return self.head(self.through_blocks(self.drop_input(self.norm_in(x_BSW), masks), masks=masks)[:, 1:])
