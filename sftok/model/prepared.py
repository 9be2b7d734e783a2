"""The tokenizer prepared for encoding and decoding: the modules' numbers, computed the way that suits the machine.

On CPUs linear layers run through weights that are laid out for oneDNN once (2.3 times as fast as `F.linear` in
float32), with the GELU or the residual added on the way out: eager operations that are fused like this reach what
compiled ones do, and cost a tiny job nothing. On CUDA weights are cast once, and blocks can be compiled.

Shapes: B images, S sequence positions, N latent tokens, P proxy positions, V proxy codes, W width, H heads,
D channels a head or of a code.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.compute.packed import PackedLinear
from sftok.config import Assignment, DecodingConfig
from sftok.model.cast_head import CastHead
from sftok.model.cast_transformer import CastTransformer
from sftok.model.decoder import decode_steps
from sftok.model.prepared_pixels import PreparedPixels
from sftok.model.quantizer import assign
from sftok.model.teacher import Teacher, to_grid
from sftok.model.tokenizer import SFTok
from sftok.model.transformer import Block, Transformer, attend, split_heads

InferencePrecision = Literal["fp32", "bf16"]
PRECISIONS: tuple[InferencePrecision, ...] = get_args(InferencePrecision)
DTYPES: dict[InferencePrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pack(linear: nn.Linear, dtype: torch.dtype) -> PackedLinear:
    """The packed twin of a linear layer."""
    return PackedLinear(linear.weight, linear.bias, dtype)


class PackedBlock:
    """A transformer block on a CPU; as under autocast, norms and the residual stream stay in float32."""

    def __init__(self, block: Block, dtype: torch.dtype, *, is_last: bool) -> None:
        self.norm_1, self.norm_2, self.dtype = block.norm_1, block.norm_2, dtype
        self.heads, qkv = block.attention.heads, block.attention.qkv
        # The last block's queries are those of the kept positions alone: they have a layer of their own.
        parts = (1, 2) if is_last else (3,)
        rows = [part * qkv.in_features for part in parts]
        weights, biases = qkv.weight.split(rows), qkv.bias.split(rows)
        self.projections = [
            (part, PackedLinear(w, b, dtype)) for part, w, b in zip(parts, weights, biases, strict=True)
        ]
        self.out = pack(block.attention.out, dtype)
        self.expand, self.contract = pack(block.mlp.expand, dtype), pack(block.mlp.contract, dtype)

    def __call__(self, x_BSW: Tensor, keep: slice | None = None) -> Tensor:
        """(B, S, W) float32 to the positions `keep` (None: all), (B, keep, W)."""
        normed_BSW = self.norm_1(x_BSW).to(self.dtype)
        inputs = [normed_BSW] if keep is None else [normed_BSW[:, keep], normed_BSW]
        heads = [
            head
            for (parts, project), x in zip(self.projections, inputs, strict=True)
            for head in split_heads(project(x), parts, self.heads)
        ]
        q_BHQD, k_BHSD, v_BHSD = heads
        y = self.out.plus(attend(q_BHQD, k_BHSD, v_BHSD), x_BSW if keep is None else x_BSW[:, keep])
        return self.contract.plus(self.expand.gelu(self.norm_2(y).to(self.dtype)), y)


class PackedTransformer:
    """A transformer on a CPU."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype) -> None:
        self.norm_in, self.norm_out = transformer.norm_in, transformer.norm_out
        *body, last = (block for block in transformer.blocks if isinstance(block, Block))
        self.body = [PackedBlock(block, dtype, is_last=False) for block in body]
        self.last = PackedBlock(last, dtype, is_last=True)

    def __call__(self, x_BSW: Tensor, keep: slice) -> Tensor:
        """(B, S, W) float32 to the positions `keep`, (B, keep, W)."""
        x_BSW = self.norm_in(x_BSW)
        for block in self.body:
            x_BSW = block(x_BSW)
        return self.norm_out(self.last(x_BSW, keep))


class PreparedEncoder:
    """Images to codes. Holds the weights as they were when it was made, and the model's small modules themselves.

    Products are computed in the type of the precision; norms, the residual stream and the quantizer in float32, and
    what stands before and after the blocks too, except that on CUDA patches are embedded in the precision's type.
    """

    def __init__(
        self, model: SFTok, precision: InferencePrecision, *, compile: bool = False, is_packed: bool | None = None
    ) -> None:
        """Prepare the weights; `is_packed` is how CPUs do it unless they compile, None what suits the device.

        Raises:
            ValueError: a compiler is missing.
        """
        self.model, self.precision, self.dtype = model, precision, DTYPES[precision]
        self.device = model.quantizer.embedding.device
        self.num_tokens = model.config.num_latent_tokens
        with torch.no_grad():
            self.codebook_KD = model.quantizer.codebook().float()
        self.is_packed = self.device.type == "cpu" and not compile if is_packed is None else is_packed
        convolution, transformer = model.encoder.patch_embed, model.encoder.transformer
        self.patch_size = model.config.patch_size
        self.patch_embed: Callable[[Tensor], Tensor]
        self.transformer: Callable[[Tensor, slice], Tensor]
        if self.is_packed:
            # In float32 whatever the precision: one percent of the work, and the rounding of pixels would reach all.
            self.patch_embed = PackedLinear(convolution.weight.flatten(1), convolution.bias, torch.float32)
            self.transformer = PackedTransformer(transformer, self.dtype)
        else:
            assert convolution.bias is not None
            self.weight = convolution.weight.detach().flatten(1).to(self.dtype, copy=True)
            self.bias = convolution.bias.detach().to(self.dtype, copy=True)
            self.patch_embed = self._embed
            self.transformer = CastTransformer(transformer, self.dtype, compile=compile)

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor, assignment: Assignment = "nearest") -> Tensor:
        """Float RGB in [0, 1], (B, 3, H, W), to codes (B, N) int64, on the model's device.

        Raises:
            ValueError: the images have another size than the tokenizer's.
        """
        self.model.check_images(images_B3HW)
        images_B3HW = images_B3HW.to(self.device)
        z_BND = F.normalize(self.latents(images_B3HW).float(), dim=-1)
        return assign(z_BND.flatten(0, 1), self.codebook_KD, assignment).view(z_BND.shape[:2])

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """The encoder's output before quantization, z (B, N, D)."""
        encoder = self.model.encoder
        patches_BPW = self.patch_embed(to_patches(images_B3HW, self.patch_size))
        return encoder.read_out(self.transformer(encoder.sequence(patches_BPW), encoder.kept))

    def _embed(self, patches_BPC: Tensor) -> Tensor:
        """Flattened patches to (B, P, W) float32; on CUDA a float32 product would take as long as two blocks."""
        return F.linear(patches_BPC.to(self.dtype), self.weight, self.bias).float()


class PreparedDecoder:
    """Codes to proxy codes, and those to images: by the model's pixel decoder, or by the teacher's where it has none.

    Holds the weights as they were when it was made, and the model's small modules themselves. Products are computed in
    the type of the precision; norms, the residual stream, logits and what stands before the blocks in float32.
    """

    def __init__(
        self,
        model: SFTok,
        teacher: Teacher | None,
        precision: InferencePrecision,
        *,
        compile: bool = False,
        is_packed: bool | None = None,
    ) -> None:
        """Prepare the weights; `is_packed` is how CPUs do it unless they compile, None what suits the device.

        Raises:
            ValueError: a compiler is missing.
        """
        self.model, self.teacher, self.dtype = model, teacher, DTYPES[precision]
        self.device, decoder = model.quantizer.embedding.device, model.decoder
        with torch.no_grad():
            self.codebook_KD = model.quantizer.codebook().float()
        hidden, logits = _linears(decoder.head)
        self.transformer: Callable[[Tensor, slice], Tensor]
        self.head: Callable[[Tensor], Tensor]
        if self.device.type == "cpu" and not compile if is_packed is None else is_packed:
            self.transformer = PackedTransformer(decoder.transformer, self.dtype)
            self.hidden, self.logits = pack(hidden, self.dtype), pack(logits, torch.float32)
            self.head = self._packed_head
        else:
            self.transformer = CastTransformer(decoder.transformer, self.dtype, compile=compile)
            self.head = CastHead(hidden, logits, self.dtype)
        pixels = model.pixel_decoder if model.pixel_decoder is not None else teacher and teacher.decoder
        self.pixels = None if pixels is None else PreparedPixels(pixels, self.dtype, self.device, compile=compile)

    @torch.inference_mode()
    def predict_proxy(
        self, codes_BN: Tensor, decoding: DecodingConfig, keys_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes (B, N) to proxy codes (B, P) and the last step's logits (B, P, V), as `SFTok.predict_proxy` does."""
        given = self.given(codes_BN)
        return decode_steps(
            self.step,
            self.model.decoder.all_masked(given),
            given,
            num_steps=decoding.num_steps,
            temperature=decoding.temperature,
            keys_B=None if keys_B is None else keys_B.to(self.device),
        )

    @torch.inference_mode()
    def given(self, codes_BN: Tensor) -> Tensor:
        """What of codes (B, N) every step is given, (B, N, W)."""
        return self.model.decoder.latents(F.embedding(codes_BN.to(self.device), self.codebook_KD))

    @torch.inference_mode()
    def step(self, ids_BP: Tensor, latent_BNW: Tensor) -> Tensor:
        """Proxy codes (B, P), hidden ones among them, and what `given` made of codes to logits (B, P, V) float32."""
        decoder = self.model.decoder
        return self.head(self.transformer(decoder.sequence(ids_BP, latent_BNW), decoder.kept))

    def _packed_head(self, y_BPW: Tensor) -> Tensor:
        # In float32 whatever the precision: bf16 logits tie by the hundred, and ties decide which positions stay.
        return self.logits(self.hidden(y_BPW.to(self.dtype)).float().tanh_())

    @torch.inference_mode()
    def render(self, proxy_BP: Tensor, logits_BPV: Tensor) -> Tensor:
        """What `predict_proxy` returned to float RGB in [0, 1], (B, 3, H, W).

        Raises:
            ValueError: the tokenizer has no pixel decoder and no teacher is given.
        """
        if self.pixels is None:
            return self.model.render(proxy_BP, logits_BPV, None)  # says what is missing
        if self.model.pixel_codebook is not None:
            vectors_BPC = logits_BPV.softmax(-1) @ self.model.pixel_codebook.weight
        else:
            assert self.teacher is not None
            vectors_BPC = self.teacher.codebook(proxy_BP)
        return self.pixels(to_grid(vectors_BPC))


def _linears(head: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    first, last = head[0], head[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return first, last


def to_patches(images_B3HW: Tensor, size: int) -> Tensor:
    """Images to flattened patches, row-major, in the order of a convolution's weights: (B, P, 3 * size * size)."""
    patches = images_B3HW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def prepare_encoder(model: SFTok, precision: str = "fp32", *, compile: bool = False) -> PreparedEncoder:
    """Prepare a tokenizer for encoding on the device that it is on; once a worker.

    Args:
        model: the tokenizer.
        precision: arithmetic of the products, fp32 or bf16.
        compile: whether its blocks are compiled; for CUDA, and for batches of one size.

    Raises:
        ValueError: there is no such precision, or a compiler is missing.
    """
    return PreparedEncoder(model, _checked(precision), compile=compile)


def prepare_decoder(
    model: SFTok, teacher: Teacher | None, precision: str = "fp32", *, compile: bool = False
) -> PreparedDecoder:
    """Prepare a tokenizer, and its teacher where it has no pixel decoder, for decoding; once a worker.

    Args:
        model: the tokenizer.
        teacher: the teacher, needed for images where the tokenizer has no pixel decoder.
        precision: arithmetic of the products, fp32 or bf16.
        compile: whether blocks and the pixel decoder are compiled; for CUDA, and for batches of one size.

    Raises:
        ValueError: there is no such precision, or a compiler is missing.
    """
    return PreparedDecoder(model, teacher, _checked(precision), compile=compile)


def _checked(precision: str) -> InferencePrecision:
    for known in PRECISIONS:
        if precision == known:
            return known
    raise ValueError(f"precision = {precision!r} is not known: name one of {', '.join(PRECISIONS)}")
