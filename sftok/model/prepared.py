"""The tokenizer prepared for inference: the numbers of its modules, computed in the way that suits the device.

Weights are cast once, and blocks can be compiled (`cast_transformer`, `cast_head`). CPUs that do not compile have a
faster way with the same numbers (`cpu`).

Shapes: B images, N latent tokens, P patches or proxy positions, V proxy codes, W width, C values of a patch or channels
of a proxy code, D channels of a code, K codes.
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
from sftok.model.cpu import PackedHead, PackedTransformer
from sftok.model.iterative_decoding import decode_steps
from sftok.model.prepared_pixels import PreparedPixels
from sftok.model.quantizer import assign
from sftok.model.teacher import Teacher, to_grid
from sftok.model.tokenizer import SFTok

InferencePrecision = Literal["fp32", "bf16"]
PRECISIONS: tuple[InferencePrecision, ...] = get_args(InferencePrecision)
DTYPES: dict[InferencePrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PreparedEncoder:
    """Images to codes. Holds the weights as they were when it was made, and the model's small modules themselves.

    Products are computed in the type of the precision; norms, the residual stream, the quantizer and the layers before
    and after the blocks in float32, except that on CUDA patches are embedded in the precision's type.
    """

    def __init__(
        self, model: SFTok, precision: InferencePrecision, *, compile: bool = False, is_packed: bool | None = None
    ) -> None:
        """Prepare the weights; `is_packed` takes the CPU's way (None: on CPUs, unless they compile).

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
        if not self.is_packed:
            assert convolution.bias is not None
            self.weight = convolution.weight.detach().flatten(1).to(self.dtype, copy=True)
            self.bias = convolution.bias.detach().to(self.dtype, copy=True)
            self.patch_embed = self._embed
            self.transformer = CastTransformer(transformer, self.dtype, compile=compile)
        else:
            # In float32 whatever the precision: 1 % of the work, and rounded pixels would spoil everything after them.
            self.patch_embed = PackedLinear(convolution.weight.flatten(1), convolution.bias, torch.float32)
            self.transformer = PackedTransformer(transformer, self.dtype)

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor, assignment: Assignment = "nearest") -> Tensor:
        """Encode float RGB in [0, 1], (B, 3, H, W), to codes (B, N) int64, on the model's device.

        Raises:
            ValueError: the images have another size than the tokenizer's.
        """
        self.model.check_images(images_B3HW)
        images_B3HW = images_B3HW.to(self.device)
        z_BND = F.normalize(self.latents(images_B3HW).float(), dim=-1)
        return assign(z_BND.flatten(0, 1), self.codebook_KD, assignment).view(z_BND.shape[:2])

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """Return the encoder's output before quantization, z (B, N, D)."""
        encoder = self.model.encoder
        patches_BPW = self.patch_embed(to_patches(images_B3HW, self.patch_size))
        return encoder.read_out(self.transformer(encoder.sequence(patches_BPW), encoder.kept))

    def _embed(self, patches_BPC: Tensor) -> Tensor:
        """Embed flattened patches, (B, P, W) float32; on CUDA a float32 product would take as long as two blocks."""
        return F.linear(patches_BPC.to(self.dtype), self.weight, self.bias).float()


class PreparedDecoder:
    """Codes to proxy codes, and those to images: by the model's pixel decoder, or by the teacher's where it has none.

    Holds the weights as they were when it was made, and the model's small modules themselves. Products are computed in
    the type of the precision; norms, the residual stream, logits and the layers before the blocks in float32.
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
        """Prepare the weights; `is_packed` takes the CPU's way (None: on CPUs, unless they compile).

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
        self.is_packed = self.device.type == "cpu" and not compile if is_packed is None else is_packed
        if not self.is_packed:
            self.transformer = CastTransformer(decoder.transformer, self.dtype, compile=compile)
            self.head = CastHead(hidden, logits, self.dtype)
        else:
            self.transformer = PackedTransformer(decoder.transformer, self.dtype)
            self.head = PackedHead(hidden, logits, self.dtype)
        pixels = model.pixel_decoder if model.pixel_decoder is not None else teacher and teacher.decoder
        self.pixels = None if pixels is None else PreparedPixels(pixels, self.dtype, self.device, compile=compile)

    @torch.inference_mode()
    def predict_proxy(
        self, codes_BN: Tensor, decoding: DecodingConfig, keys_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode codes (B, N) to proxy codes (B, P) and the last step's logits (B, P, V), as `SFTok.predict_proxy`."""
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
        """Embed codes (B, N) as the input that all decoding steps share, (B, N, W)."""
        return self.model.decoder.latents(F.embedding(codes_BN.to(self.device), self.codebook_KD))

    @torch.inference_mode()
    def step(self, ids_BP: Tensor, latent_BNW: Tensor) -> Tensor:
        """Run one decoding step: proxy codes (B, P), hidden ones included, and `given`'s output to logits (B, P, V).

        Logits are float32.
        """
        decoder = self.model.decoder
        return self.head(self.transformer(decoder.sequence(ids_BP, latent_BNW), decoder.kept))

    @torch.inference_mode()
    def render(self, proxy_BP: Tensor, logits_BPV: Tensor) -> Tensor:
        """Render the results of `predict_proxy` as float RGB in [0, 1], (B, 3, H, W).

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
    """Cut images into row-major patches, flattened in the order of a convolution's weights, (B, P, 3 * size^2)."""
    patches = images_B3HW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def prepare_encoder(model: SFTok, precision: str = "fp32", *, compile: bool = False) -> PreparedEncoder:
    """Prepare a tokenizer for encoding on its device; once per worker.

    Args:
        model: the tokenizer.
        precision: arithmetic of the products, fp32 or bf16.
        compile: compile its blocks; for CUDA, and for batches of one size.

    Raises:
        ValueError: the precision is unknown, or a compiler is missing.
    """
    return PreparedEncoder(model, _checked(precision), compile=compile)


def prepare_decoder(
    model: SFTok, teacher: Teacher | None, precision: str = "fp32", *, compile: bool = False
) -> PreparedDecoder:
    """Prepare a tokenizer, and its teacher where it has no pixel decoder, for decoding; once per worker.

    Args:
        model: the tokenizer.
        teacher: the teacher, needed for images where the tokenizer has no pixel decoder.
        precision: arithmetic of the products, fp32 or bf16.
        compile: compile blocks and the pixel decoder; for CUDA, and for batches of one size.

    Raises:
        ValueError: the precision is unknown, or a compiler is missing.
    """
    return PreparedDecoder(model, teacher, _checked(precision), compile=compile)


def _checked(precision: str) -> InferencePrecision:
    for known in PRECISIONS:
        if precision == known:
            return known
    raise ValueError(f"precision = {precision!r} is not known: name one of {', '.join(PRECISIONS)}")
