import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
import torchvision.transforms.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sftok.config import AugmentConfig
from sftok.images import decode
from sftok.images.preprocess import (
    UnreadableImageError,
    augment,
    crop,
    resize_shorter,
    ten_crop,
    to_float,
    to_rgb,
    uniforms,
    variant_name,
)
from sftok.images.views import CROPS, expanded, ten_crop_side

RED, WHITE = (255, 0, 0), (255, 255, 255)
AFFINE = AugmentConfig(crop="center", flip=True, rotate=20, shift=0.1, zoom=0.2)


def saved(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rgba(alpha: int) -> Image.Image:
    return Image.new("RGBA", (8, 8), (255, 0, 0, alpha))


def palette_with_transparency() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return saved(image, transparency=1)


def animated(file_format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if file_format == "WEBP" else {}
    return saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)


def grey_16(file_format: str) -> bytes:
    return saved(Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16)), file_format)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: tuple[int, int, int, int], pixels: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write: (width, height, bits, colour type)."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def white_is_zero_tiff() -> bytes:
    return saved(Image.fromarray(np.full((8, 8), 0xFF00, dtype=np.uint16)), "TIFF", tiffinfo={262: 0})


ODD: dict[str, tuple[Callable[[], bytes], tuple[int, int, int]]] = {
    "cmyk jpeg": (lambda: saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED),
    "cmyk tiff": (lambda: saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED),
    "grey": (lambda: saved(Image.new("L", (8, 8), 100)), (100, 100, 100)),
    "grey jpeg": (lambda: saved(Image.new("L", (8, 8), 100), "JPEG"), (100, 100, 100)),
    "1 bit": (lambda: saved(Image.new("1", (8, 8), 1)), WHITE),
    "16 bit grey png": (lambda: grey_16("PNG"), (128, 128, 128)),
    "16 bit grey tiff": (lambda: grey_16("TIFF"), (128, 128, 128)),
    "16 bit grey pgm": (lambda: b"P5 8 8 65535\n" + b"\x80\xff" * 64, (128, 128, 128)),
    "16 bit grey tiff, white is zero": (white_is_zero_tiff, (0, 0, 0)),
    "16 bit rgb png": (lambda: png((8, 8, 16, 2), (b"\0" + b"\xff\xff\0\0\0\0" * 8) * 8), RED),
    "16 bit grey + alpha png": (lambda: png((8, 8, 16, 4), (b"\0" + b"\0\0\x80\0" * 8) * 8), (127, 127, 127)),
    "palette": (lambda: saved(Image.new("RGB", (8, 8), RED).convert("P")), RED),
    "palette with transparency": (palette_with_transparency, WHITE),
    "rgb with a transparent colour": (lambda: saved(Image.new("RGB", (8, 8), RED), transparency=RED), WHITE),
    "grey with a transparent grey": (lambda: saved(Image.new("L", (8, 8), 9), transparency=9), WHITE),
    "rgba, transparent": (lambda: saved(rgba(0)), WHITE),
    "rgba, half": (lambda: saved(rgba(128)), (255, 127, 127)),
    "la": (lambda: saved(Image.new("LA", (8, 8), (0, 128))), (127, 127, 127)),
    "gif, animated": (lambda: animated("GIF"), RED),
    "webp, animated": (lambda: animated("WEBP"), RED),
    "png, animated": (lambda: animated("PNG"), RED),
    "tiff of several pages": (lambda: animated("TIFF"), RED),
    "webp": (lambda: saved(Image.new("RGB", (8, 8), RED), "WEBP", lossless=True), RED),
    "webp with alpha": (lambda: saved(rgba(0), "WEBP", lossless=True), WHITE),
    "bmp": (lambda: saved(Image.new("RGB", (8, 8), RED), "BMP"), RED),
    "tiff": (lambda: saved(Image.new("RGB", (8, 8), RED), "TIFF", compression="tiff_lzw"), RED),
    "jpeg, progressive": (lambda: saved(Image.new("RGB", (8, 8), RED), "JPEG", progressive=True), RED),
    "jpeg 2000": (lambda: saved(Image.new("RGB", (8, 8), RED), "JPEG2000"), RED),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_decode_right(name):
    make, color = ODD[name]
    image = to_rgb(make(), checksums=True)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3), np.tile(color, (64, 1)), atol=2)


def test_16_bit_grey_keeps_its_gradient():
    # convert("RGB") clips 16 bits at 255: everything but black turns white
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.array_equal(np.asarray(to_rgb(saved(Image.fromarray(ramp))))[:, :, 1], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera_is_applied_once(file_format, orientation):
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste(WHITE, (0, 0, 16, 16))
    turn = Image.Transpose
    turns = (None, turn(0), turn(3), turn(1), turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270)
    stored = upright if orientation == 1 else upright.transpose(turns[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"TIFF": {"tiffinfo": {274: orientation}}, "WEBP": {"lossless": True, "exif": exif}}
    image = to_rgb(saved(stored, file_format, **options.get(file_format, {"exif": exif})))
    assert image.size == upright.size
    np.testing.assert_allclose(np.asarray(image).astype(int), np.asarray(upright), atol=40)


def test_broken_exif_does_not_cost_the_image():
    data = saved(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    assert to_rgb(data).getpixel((4, 4))[0] > 250


def test_colour_of_a_tiff_of_floats_is_not_guessed():
    with pytest.raises(UnreadableImageError, match="mode F"):
        to_rgb(saved(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BROKEN = {
    "empty": (lambda: b"", "empty file"),
    "text": (lambda: b"no image, whatever its name says", "not an image"),
    "html": (lambda: b"<!DOCTYPE html><html>404</html>", "not an image"),
    "zeros": (lambda: bytes(1000), "not an image"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    **{
        f"truncated {kind}": (
            lambda kind=kind: (lambda d: d[: len(d) // 2])(saved(noise((200, 150)), kind)),
            "cannot|not an",
        )
        for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
    },
    "png without an end": (lambda: saved(noise())[:-12], "cannot be decoded"),
    "png with a wrong checksum": (lambda: flipped(saved(noise()), -13), "cannot be decoded"),
    "no pixels": (lambda: b"GIF89a\0\0\0\0\0\0\0," + bytes(8) + b"\0\2\0;", "not an image"),
    "head of a jpeg only": (lambda: saved(noise(), "JPEG")[:20], "."),
}


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG with more chunks between its header and its pixels."""
    data = saved(noise())
    return data[:33] + b"".join(chunks) + data[33:]


METADATA = {
    "compressed text above 1 MB": [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000)))],
    "international text above 1 MB": [chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))],
    "colour profile above 1 MB": [chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(3_000_000)))],
    "64 MB of text": [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000)))] * 80,
    "text with a wrong checksum": [flipped(chunk(b"tEXt", b"k\0text"), -1)],
    "EXIF with a wrong checksum": [flipped(chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0"), -1)],
}


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_a_png_does_not_make_its_pixels_unreadable(name, checksums):
    assert to_rgb(with_chunks(*METADATA[name]), checksums=checksums).tobytes() == noise().convert("RGB").tobytes()
    with pytest.raises(UnreadableImageError, match=r"cannot be decoded|not an image"):
        to_rgb(with_chunks(*METADATA[name], flipped(chunk(b"IDAT", b"x"), -1))[:-3], checksums=True)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused_with_a_reason_of_one_line(name):
    make, reason = BROKEN[name]
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        to_rgb(make(), checksums=True)
    assert "\n" not in str(caught.value)
    assert "object at 0x" not in str(caught.value), "a reason with an address differs between runs"


@given(
    st.binary(max_size=60), st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.integers(0, 400)
)
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_else(junk, kind, at):
    data = saved(Image.new("RGB", (8, 8), RED), kind)
    at = min(at, len(data))
    try:
        image = to_rgb(data[:at] + junk + data[at + len(junk) :], max_pixels=1_000_000, checksums=True)
    except UnreadableImageError:
        return
    assert image.mode == "RGB"


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = png((30_000, 30_000, 1, 0), zlib.compress(b""))  # 900 million pixels that are not even there
    with pytest.raises(UnreadableImageError, match="too large for Pillow"):
        to_rgb(bomb)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match="12 x 10 is more than max_pixels = 119"):
        to_rgb(saved(noise((12, 10))), max_pixels=119)


def test_full_memory_is_not_the_fault_of_the_image(monkeypatch):
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "_as_rgb", fail)
    with pytest.raises(MemoryError):
        to_rgb(saved(noise()))


@pytest.mark.parity
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (101, 67), (65, 200), (32, 32), (16, 50)])
def test_resize_and_crop_equal_torchvision(size):
    image = noise(size)
    resized = reference.resize(image, 32, reference.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(resize_shorter(image, 32), reference.pil_to_tensor(resized))
    expected = reference.pil_to_tensor(reference.center_crop(resized, [32, 32]))
    assert torch.equal(crop(resize_shorter(image, 32), 32), expected)


def test_a_long_image_does_not_become_a_huge_one():
    # 2 x 100,000 would become 256 x 12,800,000: 10 GB
    image = noise((1000, 5))
    assert resize_shorter(image, 16).shape == (3, 16, 64)
    tall = resize_shorter(Image.new("RGB", (2, 100_000), RED), 256)
    assert tall.shape == (3, 1024, 256)
    whole = reference.pil_to_tensor(
        reference.center_crop(reference.resize(image, 16, reference.InterpolationMode.BICUBIC), [16, 16])
    )
    assert (crop(resize_shorter(image, 16), 16).int() - whole.int()).abs().max() <= 1


def test_crops_reach_both_ends():
    image = torch.arange(3 * 4 * 10).reshape(3, 4, 10)
    assert torch.equal(crop(image, 4, 0.0), image[:, :, :4])
    assert torch.equal(crop(image, 4, 0.999), image[:, :, 6:])


def test_float_images_span_0_to_1():
    floats = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert floats.dtype == torch.float32
    assert torch.equal(floats, torch.tensor([0.0, 0.2, 1.0]))


def test_uniforms_are_a_function_of_the_key():
    assert uniforms("train", 0, 12) == uniforms("train", 0, 12)
    assert uniforms("train", 0, 12) != uniforms("train", 1, 12)
    assert uniforms("train", 1, 23) != uniforms("train", 12, 3), "keys must not run into each other"
    draws = np.array([uniforms("spread", i) for i in range(2000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.1


def images(count: int, size: int = 13) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@given(st.permutations(range(7)), st.integers(1, 7), st.sampled_from([8, 13, 32]))
@settings(max_examples=30, deadline=None)
def test_augmentation_does_not_depend_on_batch_mates(order, batch, size):
    whole, draws = images(7, size), [uniforms(i) for i in range(7)]
    expected = augment(whole, AFFINE, draws)
    for start in range(0, 7, batch):
        part = list(order[start : start + batch])
        assert torch.equal(augment(whole[part], AFFINE, [draws[i] for i in part]), expected[part])


def test_augmentation_stays_in_range_and_moves_every_image():
    out = augment(images(20), AFFINE, [uniforms(i) for i in range(20)])
    assert out.shape == (20, 3, 13, 13)
    assert out.min() >= 0
    assert out.max() <= 1
    assert ((out - images(20)).abs().amax((1, 2, 3)) > 0.05).all()


def test_flip_mirrors_about_half():
    config = AugmentConfig(crop="center", flip=True)
    whole = images(200)
    out = augment(whole, config, [uniforms(i) for i in range(200)])
    mirrored = [torch.equal(out[i], whole[i].flip(-1)) for i in range(200)]
    assert all(mirrored[i] or torch.equal(out[i], whole[i]) for i in range(200))
    assert 70 < sum(mirrored) < 130


def draw(**at: float) -> list[list[float]]:
    middle = {"rotate": 0.5, "zoom": 0.5, "shift_x": 0.5, "shift_y": 0.5} | at
    return [[*middle.values(), 1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("config", "at", "expected"),
    [
        ({"shift": 0.25}, {"shift_x": 1.0}, lambda x: torch.cat([x[..., :1].expand(1, 3, 8, 2), x[..., :-2]], -1)),
        (
            {"shift": 0.25},
            {"shift_y": 0.0},
            lambda x: torch.cat([x[..., 2:, :], x[..., -1:, :].expand(1, 3, 2, 8)], -2),
        ),
        ({"rotate": 90}, {"rotate": 1.0}, lambda x: x.rot90(-1, (2, 3))),
        ({"rotate": 180}, {"rotate": 0.0}, lambda x: x.flip(2, 3)),
        ({"rotate": 90}, {}, lambda x: x),
        ({"zoom": 0.5}, {"zoom": 0.0, "rotate": 0.5}, None),
    ],
)
def test_affine_does_what_the_config_says(config, at, expected):
    # the border repeats; shift is a fraction of the side, towards the right and the bottom
    x = images(1, 8)
    out = augment(x, AugmentConfig(crop="center", flip=False, **config), draw(**at))
    if expected is None:  # half as large: the frame of 2 pixels shows the border, the middle the image averaged
        assert torch.allclose(out[..., 0, 0], x[..., 0, 0])
        assert torch.allclose(out[..., 2:6, 2:6], torch.nn.functional.avg_pool2d(x, 2), atol=1e-5)
    else:
        assert torch.allclose(out, expected(x), atol=1e-5)


def test_identity_without_bounds():
    still = AugmentConfig(crop="center", flip=False)
    assert torch.equal(augment(images(3), still, [uniforms(i) for i in range(3)]), images(3))


@pytest.mark.parametrize("name", ["affine-0", "affine-", "affine-01", "affine--1", "Center", "affine-1\n", ""])
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match="choose center"):
        variant_name(name)
    assert variant_name("affine-12") == ("affine", 12)
    assert variant_name("crop-10") == ("crop", 10)


@pytest.mark.parametrize("name", ["crop-0", "crop-11", "crop-01", "crop", "ten_crop-1", "ten_crop"])
def test_there_are_ten_crops(name):
    with pytest.raises(ValueError, match="is not known: choose center"):
        variant_name(name)
    assert [variant_name(crop) for crop in CROPS] == [("crop", number) for number in range(1, 11)]


@given(st.integers(8, 40), st.floats(1.01, 2), st.tuples(st.integers(8, 60), st.integers(8, 60)))
@settings(max_examples=60, deadline=None)
def test_ten_crops_are_those_of_torchvision(size, resize, shape):
    """LlamaGen's: the centre square at the larger size, then TenCrop; also where an odd room has no middle."""
    side = max(int(size * resize), size + 1)
    image = noise(shape)
    square = crop(resize_shorter(image, side), side)
    expected = transforms.TenCrop(size)(reference.to_pil_image(square))
    for number, one in enumerate(expected, 1):
        assert torch.equal(ten_crop(square, size, number), reference.pil_to_tensor(one)), CROPS[number - 1]


def test_ten_crops_of_a_whole_image():
    image, size, side = noise((50, 30)), 16, ten_crop_side(16, 1.1)
    assert side == 17
    published = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.TenCrop(size),
        ]
    )
    square = crop(resize_shorter(image, side), side)
    made = [ten_crop(square[None], size, number)[0] for number in range(1, 11)]
    assert all(torch.equal(a, reference.pil_to_tensor(b)) for a, b in zip(made, published(image), strict=True))
    assert len({one.numpy().tobytes() for one in made[:4]}) == 4


def test_ten_crop_stands_for_ten_views_and_needs_room():
    assert expanded(["center", "ten_crop", "flip"]) == ("center", *CROPS, "flip")
    assert (ten_crop_side(256, 1.1), ten_crop_side(10, 1.1), ten_crop_side(32, 1.04)) == (281, 11, 33)
    with pytest.raises(ValueError, match=r"1\.1 leaves crops of 9 pixels no room to move: set at least 1\.12"):
        ten_crop_side(9, 1.1)
