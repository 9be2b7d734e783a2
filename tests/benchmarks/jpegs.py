"""JPEGs as ImageNet has them, drawn at random."""

import io

import numpy as np
from PIL import Image

SIZE = (500, 375)  # the commonest of ImageNet
DISTINCT = 60  # images that are copied under other names


def jpeg(number: int) -> bytes:
    """Smooth colours with grain, of about 100 kB, as a photograph has."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        SIZE, Image.Resampling.BICUBIC
    )
    grain = random.normal(0, 9, (SIZE[1], SIZE[0], 3))
    file = io.BytesIO()
    pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
