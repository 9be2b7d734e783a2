"""SFTok as the published code computes it, to measure against; written anew from method.md, with our weights put in.

What differs from ours is how the work is done: attention by `nn.MultiheadAttention`, positions first; every block
computes every position; Sinkhorn assigns codes at inference too; the decoder runs on all tokens in every step, twice
where guidance is on; training encodes each batch twice, the first time outside autocast.

Shapes: B images, S sequence positions, N latent tokens, P proxy positions, V proxy codes, K codes, W width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.losses.proxy import proxy_loss
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.model.transformer import Block, Transformer


class PublishedBlock(nn.Module):
    """A block over (S, B, W) with PyTorch's multi-head attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, width = block.attention, block.norm_1.normalized_shape[0]
        self.ln_1, self.ln_2 = block.norm_1, block.norm_2
        self.attn = nn.MultiheadAttention(width, attention.heads)
        with torch.no_grad():
            self.attn.in_proj_weight.copy_(attention.qkv.weight)
            self.attn.in_proj_bias.copy_(attention.qkv.bias)
            self.attn.out_proj.load_state_dict(attention.out.state_dict())
        self.mlp = nn.Sequential(block.mlp.expand, nn.GELU(), block.mlp.contract)

    def forward(self, x_SBW: Tensor) -> Tensor:
        normed = self.ln_1(x_SBW)
        x_SBW = x_SBW + self.attn(normed, normed, normed, need_weights=False)[0]
        return x_SBW + self.mlp(self.ln_2(x_SBW))


def published_blocks(transformer: Transformer) -> nn.ModuleList:
    return nn.ModuleList(PublishedBlock(block) for block in transformer.blocks if isinstance(block, Block))


def run_all(transformer: Transformer, blocks: nn.ModuleList, x_BSW: Tensor, keep: slice) -> Tensor:
    """Every position through every block, what is kept taken at the end."""
    x_SBW = transformer.norm_in(x_BSW).permute(1, 0, 2)
    for block in blocks:
        x_SBW = block(x_SBW)
    return transformer.norm_out(x_SBW.permute(1, 0, 2)[:, keep])


def sinkhorn_codes(distance_MK: Tensor, iterations: int = 5) -> Tensor:
    """The published assignment, as method.md 1.1 states it."""
    q_KM = torch.exp(-10 * (distance_MK - distance_MK.min())).T
    K, M = q_KM.shape
    q_KM = q_KM / (q_KM.sum() + 1e-8)
    for _ in range(iterations):
        q_KM = q_KM / (q_KM.sum(1, keepdim=True) + 1e-8) / K
        q_KM = q_KM / (q_KM.sum(0, keepdim=True) + 1e-8) / M
    return (q_KM * M).argmax(0)


class PublishedTokenizer(nn.Module):
    """The published tokenizer around our model's weights."""

    def __init__(self, model: SFTok) -> None:
        super().__init__()
        self.model = model
        self.encoder_blocks = published_blocks(model.encoder.transformer)
        self.decoder_blocks = published_blocks(model.decoder.transformer)

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """Images to z (B, N, D)."""
        encoder = self.model.encoder
        patches_BPW = encoder.patch_embed(images_B3HW).flatten(2).transpose(1, 2)
        y = run_all(encoder.transformer, self.encoder_blocks, encoder.sequence(patches_BPW), encoder.kept)
        return encoder.read_out(y)

    def quantize(self, z_BND: Tensor, *, nearest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, N, D) to z_q, codes (B, N) and the quantizer's loss, in float32."""
        with torch.autocast(z_BND.device.type, enabled=False):
            z_BND, codebook_KD = F.normalize(z_BND.float(), dim=-1), self.model.quantizer.codebook()
            distance_MK = torch.cdist(z_BND.detach().flatten(0, 1), codebook_KD.detach())
            codes_M = distance_MK.argmin(1) if nearest else sinkhorn_codes(distance_MK)
            code_BND = codebook_KD[codes_M].view_as(z_BND)
            loss = 0.25 * F.mse_loss(z_BND, code_BND.detach()) + F.mse_loss(code_BND, z_BND.detach())
            return z_BND + (code_BND - z_BND).detach(), codes_M.view(z_BND.shape[:2]), loss

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor, *, nearest: bool = False) -> Tensor:
        """Images to codes (B, N)."""
        return self.quantize(self.latents(images_B3HW), nearest=nearest)[1]

    def logits(self, ids_BP: Tensor, z_q_BND: Tensor) -> Tensor:
        """One pass of the decoder, (B, P, V)."""
        decoder = self.model.decoder
        sequence_BSW = decoder.sequence(ids_BP, decoder.latents(z_q_BND))
        return decoder.head(run_all(decoder.transformer, self.decoder_blocks, sequence_BSW, decoder.kept))

    @torch.no_grad()
    def decode(self, codes_BN: Tensor, *, num_steps: int = 8, guidance: float = 0.0) -> tuple[Tensor, Tensor]:
        """Codes to proxy codes (B, P) and images, without noise; guidance doubles each pass and changes nothing."""
        decoder, z_q = self.model.decoder, self.model.quantizer.codebook()[codes_BN]
        mask_id, positions = decoder.mask_id, decoder.num_positions
        ids_BP = torch.full((len(codes_BN), positions), mask_id, device=z_q.device)
        for step in range(num_steps):
            ratio, hidden_BP = (step + 1) / num_steps, ids_BP == mask_id
            logits_BPV = self.logits(ids_BP, z_q)
            if guidance:
                logits_BPV = logits_BPV + guidance * (logits_BPV - self.logits(ids_BP, z_q))
            found_BP = torch.where(hidden_BP, logits_BPV.argmax(-1), ids_BP)
            confidence_BP = logits_BPV.gather(-1, found_BP[..., None])[..., 0].masked_fill(~hidden_BP, math.inf)
            wanted = math.floor(positions * math.acos(ratio) / (math.pi / 2))
            count = max(1, min(wanted, int(hidden_BP[0].sum()) - 1))
            cut_B1 = confidence_BP.sort(1).values[:, count - 1 : count]
            is_last = step == num_steps - 1
            ids_BP = found_BP if is_last else found_BP.masked_fill(confidence_BP <= cut_B1, mask_id)
        return ids_BP, self.model.soft_decode(logits_BPV).clamp(0, 1)

    def alignment_step(
        self, teacher: Teacher, images: Tensor, hidden_BP: Tensor, optimizer: torch.optim.Optimizer, *, bf16: bool
    ) -> Tensor:
        """One step of distribution alignment, all positions replaced by the guide; returns the loss."""
        decoder = self.model.decoder
        with torch.no_grad():  # the guide: outside autocast, from an encoding of its own
            proxy_BP = teacher.nearest(teacher.encoder(images))
            z_q = self.quantize(self.latents(images))[0]
            guide_BP = self.logits(decoder.all_masked(z_q), z_q).argmax(-1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            z_q, _, quantizer_loss = self.quantize(self.latents(images))
            logits_BPV = self.logits(guide_BP.masked_fill(hidden_BP, decoder.mask_id), z_q)
        loss = proxy_loss(logits_BPV, proxy_BP, hidden_BP, unmasked_weight=0.1, label_smoothing=0.0) + quantizer_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()
        return loss.detach()


def average(shadow: dict[str, Tensor], module: nn.Module, decay: float) -> Callable[[], None]:
    """The published EMA: one parameter after the other."""

    @torch.no_grad()
    def update() -> None:
        for name, parameter in module.named_parameters():
            shadow[name].sub_((1 - decay) * (shadow[name] - parameter))

    return update
