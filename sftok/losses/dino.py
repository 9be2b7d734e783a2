"""The frozen DINO ViT-S/16 whose features the discriminator judges (Caron et al. 2021; method.md 1.3).

Modules are named as in the published file, `dino_deitsmall16_pretrain.pth`.

Shapes: B images, S side of the square images, N patches, T = N + 1 tokens, D = 384 channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftok.weights.pickled import fill, read_state

WIDTH, HEADS, LAYERS, PATCH = 384, 6, 12, 16
SIZE = 224  # side of the images that it was trained on, in pixels
SMALLEST = 2 * PATCH  # the discriminator's widest circular kernel wraps at most once
READ_AFTER = (2, 5, 8, 11)  # blocks; the tokens before block 0 are read too
READOUTS = 1 + len(READ_AFTER)
EPSILON = 1e-6
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # The approximate GELU is the discriminator's; DINO was trained with the exact one.
        return self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=EPSILON), nn.LayerNorm(WIDTH, eps=EPSILON)
        self.attn, self.mlp = _Attention(), _Mlp()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class _PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        return self.proj(images_B3SS).flatten(2).transpose(1, 2)


class Dino(nn.Module):
    """Images to tokens at five depths; frozen, with gradients to the images."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images_B3SS: Tensor) -> list[Tensor]:
        """Read patch tokens plus class token, (B, D, N), before block 0 and after 2, 5, 8 and 11, of RGB in [0, 1].

        S is a multiple of 16; positions are interpolated for grids other than 14 x 14.
        """
        patches_BND = self.patch_embed((images_B3SS - self.mean) / self.deviation)
        x_BTD = torch.cat([self.cls_token.expand(len(patches_BND), -1, -1), patches_BND], dim=1)
        x_BTD = x_BTD + self._positions(images_B3SS.shape[2] // PATCH)
        readouts = [_read(x_BTD)]
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD)
            if index in READ_AFTER:
                readouts.append(_read(x_BTD))
        return readouts

    def _positions(self, side: int) -> Tensor:
        """Return positions (1, 1 + side^2, D), interpolated by bicubic for grids other than the trained one."""
        trained = SIZE // PATCH
        if side == trained:
            return self.pos_embed
        cls_11D, grid_1ND = self.pos_embed.split((1, trained**2), dim=1)
        grid_1Dhw = grid_1ND.transpose(1, 2).unflatten(2, (trained, trained))
        resized_1Dhw = F.interpolate(grid_1Dhw, size=(side, side), mode="bicubic")
        return torch.cat([cls_11D, resized_1Dhw.flatten(2).transpose(1, 2)], dim=1)


def _read(x_BTD: Tensor) -> Tensor:
    return (x_BTD[:, 1:] + x_BTD[:, :1]).transpose(1, 2)


def load_dino(data: bytes, what: str = "DINO") -> Dino:
    """Load DINO ViT-S/16 from its published file; its final norm is not used.

    Raises:
        ValueError: the file is damaged, holds more than weights, or holds other weights.
    """
    state = read_state(data, what)
    model = Dino()
    fill(model, {name: value for name, value in state.items() if name not in ("norm.weight", "norm.bias")}, what)
    for module in model.modules():
        if isinstance(module, _Attention):
            # As the published discriminator does. It changes nothing but rounding: softmax ignores a constant that is
            # added to the scores of all keys.
            module.qkv.bias.data[WIDTH : 2 * WIDTH] = 0
    return model


def check_dino_size(image_size: int) -> None:
    """Check that an image size divides into DINO's patches.

    Raises:
        ValueError: `image_size` is at most 224 and either below 32 or not a multiple of 16.
    """
    if image_size > SIZE or (image_size >= SMALLEST and image_size % PATCH == 0):
        return
    raise ValueError(
        f"image_size = {image_size} does not suit the DINO discriminator: choose one above {SIZE}, or a multiple of "
        f'{PATCH} from {SMALLEST} on; or set adversarial.kind = "patch"'
    )


def dino_view(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
    """Reduce images above 224 pixels to 224: all cropped at one random place, or all shrunk, with equal probability.

    Args:
        images_B3SS: float RGB (B, 3, S, S).
        generator: on the CPU.

    Returns:
        (B, 3, 224, 224); smaller images as they are.
    """
    room = images_B3SS.shape[2] - SIZE
    if room <= 0:
        return images_B3SS
    is_cut = torch.rand((), generator=generator).item() < 0.5
    top, left = torch.randint(room + 1, (2,), generator=generator).tolist()
    if is_cut:
        return images_B3SS[:, :, top : top + SIZE, left : left + SIZE]
    return shrink(images_B3SS)


def shrink(images_B3SS: Tensor, *, by_products: bool | None = None) -> Tensor:
    """Shrink images to 224 x 224, each pixel the mean of those that it covers.

    Args:
        images_B3SS: float (B, 3, S, S), S above 224.
        by_products: compute it as two matrix products; None: on CUDA, where the gradient of pooling is summed in
            varying order, so that no two runs would be equal.
    """
    if not (images_B3SS.is_cuda if by_products is None else by_products):
        return F.interpolate(images_B3SS, size=(SIZE, SIZE), mode="area")
    matrix_S = _covered(images_B3SS.shape[2], images_B3SS.device)
    return matrix_S @ images_B3SS @ matrix_S.T


def _covered(side: int, device: torch.device) -> Tensor:
    """Return weights (224, side) of the pixels that each pixel of a shrunk image averages, along one axis."""
    place_1S, to_S1 = torch.arange(side, device=device), torch.arange(SIZE, device=device)[:, None]
    first_S1, last_S1 = to_S1 * side // SIZE, -(-(to_S1 + 1) * side // SIZE)
    covered_SS = ((place_1S >= first_S1) & (place_1S < last_S1)).float()
    return covered_SS / covered_SS.sum(1, keepdim=True)
