"""Read and write reference statistics in .npz files, as ADM, clean-fid and pytorch-fid do; nothing is unpickled.

`mu` and `sigma` are of pool features; ADM's files add `mu_s` and `sigma_s` of spatial ones and `arr_0`, images uint8
(n, H, W, 3) for precision and recall.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sftok.metrics.frechet import Gaussian

IMAGES = "arr_0"
_SYMMETRY = 1e-5  # largest asymmetry relative to the largest entry: float32 files are not exactly symmetric


class Statistics(NamedTuple):
    """Moments of pool features, and of spatial ones if the file has them."""

    pool: Gaussian
    spatial: Gaussian | None = None


def read_statistics(source: Path | bytes, what: str) -> Statistics:
    """Read the statistics of a file.

    Args:
        source: path of the file, or its bytes.
        what: its name in errors.

    Raises:
        ValueError: the file is damaged, lacks `mu` or `sigma`, or these are pickled, misshapen, not finite or not
            symmetric.
    """
    arrays = _read(source, what)
    pool = _gaussian(arrays, "mu", "sigma", what)
    if pool is None:
        raise ValueError(
            f"{what}: holds {', '.join(sorted(arrays)) or 'nothing'}, but no mu and sigma; "
            "take them from its images, or give a file of statistics"
        )
    return Statistics(pool, _gaussian(arrays, "mu_s", "sigma_s", what))


def write_statistics(statistics: Statistics) -> bytes:
    """Write statistics as compressed float64, readable by clean-fid, pytorch-fid and ADM's evaluator."""
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: value.cpu().numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def has_images(source: Path | bytes, what: str) -> bool:
    """Return whether a file has images in addition to its statistics.

    Raises:
        ValueError: it is no .npz file.
    """
    with _open(source, what) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


def read_images(source: Path | bytes, what: str, batch: int = 64) -> Iterator[Tensor]:
    """Read the images of a file in batches uint8 (batch, 3, H, W), since they may not fit in memory.

    Raises:
        ValueError: there are none, or they are not uint8 RGB.
    """
    with _open(source, what) as archive:
        if f"{IMAGES}.npy" not in archive.namelist():
            raise ValueError(f"{what}: has no images ({IMAGES}); precision, recall and KID need a file that has")
        with archive.open(f"{IMAGES}.npy") as file:
            shape = _header(file, what)
            for start in range(0, shape[0], batch):
                count = min(batch, shape[0] - start)
                data = file.read(count * int(np.prod(shape[1:])))
                pixels = np.frombuffer(data, dtype=np.uint8)
                if len(pixels) != count * int(np.prod(shape[1:])):
                    raise ValueError(f"{what}: ends in the middle of its images; fetch it again")
                yield torch.from_numpy(pixels.reshape(count, *shape[1:]).copy()).permute(0, 3, 1, 2).contiguous()


def _header(file: IO[bytes], what: str) -> tuple[int, ...]:
    """Read the shape of the images that follow."""
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = reader(file)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{what}: {IMAGES} cannot be read ({' '.join(str(error).split())})") from error
    if dtype != np.uint8 or is_fortran or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{what}: {IMAGES} is {dtype} {shape}; uint8 (n, H, W, 3) is wanted")
    return tuple(shape)


def _open(source: Path | bytes, what: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{what}: not a readable .npz file ({error}); fetch it again") from error


def _read(source: Path | bytes, what: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file except its images."""
    with _open(source, what) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        wanted = [name for name in names if name in ("mu", "sigma", "mu_s", "sigma_s")]
        found = {name: np.empty(0) for name in names}
        for name in wanted:
            try:
                with archive.open(f"{name}.npy") as file:
                    found[name] = np.lib.format.read_array(file, allow_pickle=False)
            except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{what}: {name} cannot be read ({' '.join(str(error).split())})") from error
    return found


def _gaussian(arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str, what: str) -> Gaussian | None:
    if mean_name not in arrays or covariance_name not in arrays:
        return None
    mean, covariance = arrays[mean_name], arrays[covariance_name]
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(
            f"{what}: {mean_name} and {covariance_name} are {mean.dtype} and {covariance.dtype}, no floats"
        )
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise ValueError(
            f"{what}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} do not fit together"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{what}: {mean_name} or {covariance_name} hold NaN or infinite values; fetch it again")
    covariance = covariance.astype(np.float64)
    if np.abs(covariance - covariance.T).max() > _SYMMETRY * np.abs(covariance).max():
        raise ValueError(f"{what}: {covariance_name} is not symmetric, so no covariance; fetch it again")
    symmetric = torch.from_numpy((covariance + covariance.T) / 2)
    return Gaussian(torch.from_numpy(mean.astype(np.float64)), symmetric)
