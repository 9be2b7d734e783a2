"""Decode and resize images on the device that encodes them; the pixels differ from Pillow's, so they have another name.

JPEGs are decoded by torchcodec: on CUDA by nvJPEG, on CPUs by the library that Pillow uses, too. Other files, and JPEGs
of kinds that decoders read differently, are decoded by Pillow. All are resized by torch's antialiased bicubic in
float32, whereas Pillow rounds to eight bits between the two directions: on CPUs, where the decoders agree, one in seven
pixel values of photographs differs, nearly always by one of 255 levels.
"""

import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.compute.transfer import send
from sftok.images.decode import UnreadableImageError, to_rgb
from sftok.images.decode_ahead import DECODERS, only_good
from sftok.images.preprocess import crop
from sftok.images.resize_and_crop import LONGEST_SIDE, Pixels

PIXELS_AT_ONCE = 2**25  # decoded, or being resized at 12 bytes each: this bounds the memory
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; others are lossless or arithmetic
_LONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_END, _SCAN, _APP1, _ADOBE = 0xD9, 0xDA, 0xE1, 0xEE
_MOST_SHRUNK = 40  # largest factor on CUDA: from 47 on, its kernel has no room for the weights

Decode = Callable[..., list[Tensor]]
Result = tuple[list[Tensor], list[str | None]]


def torchcodec_decoder() -> Decode:
    """Import torchcodec's decoder of JPEGs.

    Raises:
        ValueError: torchcodec is not installed, or is not compatible with this torch.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(
            f'encode.decoder = "torchcodec" needs torchcodec 0.16 or newer ({said}): pip install torchcodec, or set '
            'encode.decoder = "pil"'
        ) from error
    return decode_jpeg


class DeviceDecoders:
    """Decodes in a thread, on its own CUDA stream, concurrently with the encoder."""

    def __init__(self, device: torch.device, decode: Decode | None = None) -> None:
        """Use the decoder `decode`, or torchcodec's.

        Raises:
            ValueError: torchcodec is not installed.
        """
        self.device, self._decode = device, decode or torchcodec_decoder()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="decode-on-device")
        self._files = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def begin(self, files: Sequence[bytes], sides: Sequence[int]) -> "DeviceSquares":
        """Begin to decode images and cut their centre squares, on the device."""
        return DeviceSquares(self._pool.submit(self._squares, files, sides))

    def _squares(self, files: Sequence[bytes], sides: Sequence[int]) -> Result:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            squares = [torch.empty(len(files), 3, side, side, dtype=torch.uint8, device=self.device) for side in sides]
            reasons: list[str | None] = [None] * len(files)
            for at, image in self._images(files):
                if isinstance(image, str):
                    reasons[at[0]] = image
                    continue
                for square, side in zip(squares, sides, strict=True):
                    square[at] = centre_squares(image, side)
            squares = only_good(squares, reasons)
        if self._stream is not None:
            self._stream.synchronize()
        return squares, reasons

    def _images(self, files: Sequence[bytes]) -> Iterator[tuple[list[int], Tensor | str]]:
        """Yield images by size, uint8 (n, 3, H, W), with their indices, and the reason of each that does not decode."""
        shapes = [jpeg_shape(data) for data in files]
        others = [at for at, shape in enumerate(shapes) if shape is None]
        read = self._read([files[at] for at in others])
        for some in _packed([(at, shape[0] * shape[1]) for at, shape in enumerate(shapes) if shape is not None]):
            decoded = self._jpegs([files[at] for at in some])
            sizes: dict[torch.Size, list[int]] = {}
            for index, image in enumerate(decoded):
                if isinstance(image, Tensor):
                    sizes.setdefault(image.shape, []).append(index)
                else:
                    yield from self._one(some[index], image)
            for indices in sizes.values():
                yield [some[index] for index in indices], torch.stack([decoded[index] for index in indices])  # type: ignore[misc]
        for at, image in zip(others, read, strict=True):
            yield from self._one(at, image)

    def _read(self, files: Sequence[bytes]) -> Iterator[Pixels | str]:
        """Decode by Pillow, in order, a few images ahead."""
        begun = (self._files.submit(_by_pillow, data) for data in files)
        waiting = deque(itertools.islice(begun, 2 * DECODERS))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(begun, 1))

    def _one(self, at: int, image: Pixels | str) -> Iterator[tuple[list[int], Tensor | str]]:
        if isinstance(image, str):
            yield [at], image
        else:
            yield [at], send(torch.from_numpy(image).permute(2, 0, 1)[None], self.device)

    def _jpegs(self, files: Sequence[bytes]) -> list[Tensor | Pixels | str]:
        """Decode together; if that fails, which names no file, decode one by one, and by Pillow if that fails, too."""
        if self._stream is not None:
            # The JPEG engine writes without waiting for the stream (torchcodec 0.16), perhaps to memory of images that
            # are still being resized there.
            self._stream.synchronize()
        try:
            return list(self._decode(list(files), mode="RGB", device=self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return [_by_pillow(files[0])] if len(files) == 1 else [self._jpegs([data])[0] for data in files]


class DeviceSquares:
    """Squares on a device that are being filled."""

    def __init__(self, found: Future[Result]) -> None:
        self._found = found

    def result(self) -> Result:
        """Wait for the squares of all files that decode, and the reason of each that does not (None: it does)."""
        return self._found.result()

    def cancel(self) -> None:
        """Cancel the task if it has not begun."""
        self._found.cancel()


def centre_squares(images: Tensor, side: int) -> Tensor:
    """Resize images uint8 (n, 3, H, W) to the shorter side and cut out the centre squares, (n, 3, side, side)."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    top, left = ((length - min(length, LONGEST_SIDE * shorter)) // 2 for length in (height, width))
    images = images[..., top : height - top, left : width - left]
    height, width = images.shape[-2:]
    new = (side * height // shorter, side * width // shorter)
    squares, device = [], images.device
    if shorter > _MOST_SHRUNK * side:
        images = images.cpu()
    for some in images.split(max(1, PIXELS_AT_ONCE // (height * width))):
        resized = F.interpolate(some.float(), size=new, mode="bicubic", antialias=True, align_corners=False)
        square = torch.stack([crop(image, side) for image in resized])
        squares.append(square.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(squares).to(device)


def jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Read height and width of a JPEG that all decoders read alike, 8-bit grey or YCbCr; None for any other file.

    JPEGs whose XMP states an orientation are excluded, too, since Pillow applies it and others do not.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _LONE:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            bits, height, width, colours = struct.unpack_from("!BHHB", data, at + 4)
            names = data[at + 10 : at + 10 + 3 * colours : 3]
            is_plain = bits == 8 and height and width and (colours == 1 or (colours == 3 and names != b"RGB"))
            return (height, width) if is_plain else None
        if marker == _APP1 and b"tiff:Orientation" in data[at + 4 : at + 2 + length]:
            return None
        if marker in (_SCAN, _END) or (marker == _ADOBE and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] == 0):
            return None
        at += 2 + length
    return None


def _packed(images: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Group images, given as index and number of pixels, into lists of indices of at most `PIXELS_AT_ONCE` pixels."""
    some: list[int] = []
    held = 0
    for at, pixels in images:
        if some and held + pixels > PIXELS_AT_ONCE:
            yield some
            some, held = [], 0
        some.append(at)
        held += pixels
    if some:
        yield some


def _by_pillow(data: bytes) -> Pixels | str:
    """Decode to pixels (H, W, 3), or return the reason if that fails."""
    try:
        return np.array(to_rgb(data))
    except UnreadableImageError as error:
        return str(error)
