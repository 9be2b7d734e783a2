"""Decoding where the encoder computes: near Pillow's pixels, the same images fail, and a name of its own."""

import io
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from flows.recipes.schema import EncodeConfig
from infra.codes.contract import read_codes
from sftok.coding.encode import encode
from sftok.images import decode_on_device
from sftok.images.decode import squares
from sftok.images.decode_ahead import DECODERS
from sftok.images.decode_on_device import PIXELS_AT_ONCE, DeviceDecoders, centre_squares, jpeg_shape
from sftok.images.preprocess import PREPROCESSING, PREPROCESSINGS, to_rgb
from tests.sftok.coding.test_encode import FIRST, HERE, copied, hashes, home, job_of, tamper  # noqa: F401

CPU = torch.device("cpu")


def saved(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)  # type: ignore[arg-type]
    return file.getvalue()


def photographs() -> list[bytes]:
    """Two photographs in every way that a JPEG may be, and beside it."""
    turned = Image.Exif()
    turned[0x0112] = 6
    files = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        files += [saved(image, quality=90), saved(image, quality=80, progressive=True), saved(image, exif=turned)]
        files += [saved(image.convert("L")), saved(image.convert("CMYK")), saved(image, keep_rgb=True)]
        files += [saved(image, "PNG"), saved(image.crop((0, 0, 600, 31))), saved(image.crop((0, 0, 31, 400)))]
    return files


def by_pillow(files: Sequence[bytes], *, mode: str, device: torch.device) -> list[Tensor]:
    """Takes the place of torchcodec, which is not among the dependencies; it also refuses as a whole."""
    assert mode == "RGB"
    try:
        return [torch.from_numpy(np.array(to_rgb(data))).permute(2, 0, 1).to(device) for data in files]
    except ValueError as error:
        raise RuntimeError("nobody says which") from error


def torchcodec_or_pillow() -> list[object]:
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return [by_pillow]
    return [by_pillow, decode_jpeg]


@pytest.mark.parametrize("decode", torchcodec_or_pillow())
def test_pixels_are_near_those_of_pillow(decode) -> None:
    files = photographs()
    found, reasons = DeviceDecoders(CPU, decode).begin(files, (256, 64)).result()
    assert reasons == [None] * len(files)
    for at, side in enumerate((256, 64)):
        assert found[at].shape == (len(files), 3, side, side)
        for data, square in zip(files, found[at], strict=True):
            exact = torch.from_numpy(squares(data, [side])[0].copy())
            difference = (square.int() - exact.int()).abs().float()
            if min(Image.open(io.BytesIO(data)).size) > 31:  # what is very long is cut at a whole pixel here
                assert difference.mean() < 0.25  # of 255 levels
                assert (difference <= 1).float().mean() > 0.99
            else:
                assert difference.mean() < 8


def test_what_is_no_image_fails_for_pillows_reason_and_leaves_the_others() -> None:
    whole = photographs()[0]
    files = [whole, whole[:3000], b"", b"\xff\xd8 no image", whole]
    (found,), reasons = DeviceDecoders(CPU, by_pillow).begin(files, (32,)).result()
    assert [reason is None for reason in reasons] == [True, False, False, False, True]
    assert reasons[2] == "empty file"
    assert "truncated" in (reasons[1] or "")
    assert len(found) == 2
    assert torch.equal(found[0], found[1])


def test_a_full_memory_is_not_an_images_fault() -> None:
    def hungry(files: Sequence[bytes], *, mode: str, device: torch.device) -> list[Tensor]:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        DeviceDecoders(CPU, hungry).begin([photographs()[0]], (32,)).result()


def test_only_jpegs_that_all_decoders_read_alike_are_theirs() -> None:
    image = Image.fromarray(load_sample_images().images[0])
    for settings in ({}, {"progressive": True}, {"subsampling": 0}, {"comment": b"x" * 5000}):
        assert jpeg_shape(saved(image, **settings)) == (427, 640)
    assert jpeg_shape(saved(image.convert("L"))) == (427, 640)
    for other in (saved(image.convert("CMYK")), saved(image, keep_rgb=True), saved(image, "PNG"), b"", b"\xff\xd8"):
        assert jpeg_shape(other) is None
    turned = saved(image, xmp=b'<rdf:Description tiff:Orientation="6"/>')
    assert to_rgb(turned).size == (427, 640)
    assert jpeg_shape(turned) is None
    whole = saved(image)
    for end in range(0, 200, 7):
        assert jpeg_shape(whole[:end]) in (None, (427, 640))


@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (9, 90), (90, 9), (16, 16)])
def test_centre_squares_do_not_depend_on_batch_mates(shape: tuple[int, int], monkeypatch) -> None:
    images = torch.randint(0, 256, (5, 3, *shape), generator=torch.Generator().manual_seed(0)).byte()
    together = centre_squares(images, 16)
    assert torch.equal(torch.cat([centre_squares(image[None], 16) for image in images]), together)
    monkeypatch.setattr("sftok.images.decode_on_device.PIXELS_AT_ONCE", 1)
    assert torch.equal(centre_squares(images, 16), together)
    if shape == (16, 16):
        assert torch.equal(together, images)
    assert PIXELS_AT_ONCE > 1


def test_no_image_is_decoded_while_others_are_still_resized(monkeypatch) -> None:
    """The engine of a GPU writes at once, where memory may be that of images whose resizing is queued."""
    order: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            order.append("synchronize")

    def decode(files: Sequence[bytes], *, mode: str, device: torch.device) -> list[Tensor]:
        order.append("decode")
        return by_pillow(files, mode=mode, device=device)

    monkeypatch.setattr("sftok.images.decode_on_device.PIXELS_AT_ONCE", 1)
    decoders = DeviceDecoders(CPU, decode)
    decoders._stream = Stream()  # type: ignore[assignment]
    decoders.begin([photographs()[0]] * 3, (32,)).result()
    assert order == ["synchronize", "decode"] * 3 + ["synchronize"]


def test_what_shrinks_beyond_what_a_gpus_kernel_can_do_is_resized_by_the_cpu(monkeypatch) -> None:
    moved: list[tuple[int, ...]] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda image: moved.append(tuple(image.shape)) or cpu(image))
    for height in (320, 640):
        centre_squares(torch.zeros(1, 3, height, 700, dtype=torch.uint8), 8)
    assert moved == [(1, 3, 640, 700)]


def test_few_decoded_images_wait_to_be_resized_also_of_other_formats(monkeypatch) -> None:
    """A chunk of large ones would take gigabytes."""
    begun: list[bytes] = []
    waiting: list[int] = []
    by_pillow, resize = decode_on_device._by_pillow, decode_on_device.centre_squares
    monkeypatch.setattr(decode_on_device, "_by_pillow", lambda data: begun.append(data) or by_pillow(data))

    def resized(images: Tensor, side: int) -> Tensor:
        waiting.append(len(begun) - len(waiting))
        return resize(images, side)

    monkeypatch.setattr(decode_on_device, "centre_squares", resized)
    colours = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(40)]
    (found,), _ = DeviceDecoders(CPU, no_jpeg).begin([saved(image, "PNG") for image in colours], (8,)).result()
    assert found[:, 0, 0, 0].tolist() == list(range(40))
    assert max(waiting) <= 2 * DECODERS


def no_jpeg(*_: object, **__: object) -> list[Tensor]:
    raise AssertionError


@pytest.mark.gpu
@pytest.mark.parametrize("times", [39, 60])
def test_a_gpu_shrinks_as_much_as_asked(times: int) -> None:
    generator = torch.Generator().manual_seed(times)
    images = torch.randint(0, 256, (2, 3, 8 * times, 9 * times), generator=generator).byte()
    found = centre_squares(images.cuda(), 8)
    assert found.is_cuda
    assert (found.cpu().int() - centre_squares(images, 8).int()).abs().max() <= 1


def test_shards_are_whole_and_failures_are_the_same(copied, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("sftok.images.decode_on_device.torchcodec_decoder", lambda: by_pillow)
    store, images = copied()
    lost = tamper(store, images, FIRST)
    job = job_of(store, images)
    usual = encode(job, images, options=HERE)
    other = type(job)(**{**vars(job), "decoder": "torchcodec", "out": store.at("other"), "reuse": None})
    made = encode(other, images, options=HERE)
    assert made.counts == usual.counts
    assert hashes(made.files).keys() == hashes(usual.files).keys()
    _, rows = read_codes(other.out, [FIRST])
    assert rows.image_id == read_codes(job.out, [FIRST])[1].image_id
    assert lost not in rows.image_id


def test_without_torchcodec_it_is_refused_in_one_line(copied, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    store, images = copied()
    job = job_of(store, images)
    with pytest.raises(ValueError, match=r'^encode.decoder = "torchcodec" needs .*pip install torchcodec, or set .*$'):
        encode(type(job)(**{**vars(job), "decoder": "torchcodec"}), images, options=HERE)


def test_the_decoder_is_part_of_what_codes_are_and_the_usual_one_is_not_named() -> None:
    assert "decoder" not in EncodeConfig().identity()
    assert EncodeConfig(decoder="torchcodec").identity()["decoder"] == "torchcodec"
    assert PREPROCESSINGS["pil"] == PREPROCESSING == "resize-bicubic-antialias-crop/1"
    assert len(set(PREPROCESSINGS.values())) == 2


@pytest.mark.gpu
def test_a_gpu_decodes_near_what_pillow_does() -> None:
    """nvJPEG's own inverse transform and upsampling of colours differ from the libraries' by more than rounding."""
    pytest.importorskip("torchcodec", minversion="0.16")
    files = photographs()
    decoders = DeviceDecoders(torch.device("cuda"))
    (found,), reasons = decoders.begin(files, (256,)).result()
    assert reasons == [None] * len(files)
    assert found.is_cuda
    for data, square in zip(files, found.cpu(), strict=True):
        exact = torch.from_numpy(squares(data, [256])[0].copy())
        if min(Image.open(io.BytesIO(data)).size) > 31:
            assert (square.int() - exact.int()).abs().float().mean() < 3
    (again,), _ = decoders.begin(files, (256,)).result()
    assert torch.equal(again, found)
