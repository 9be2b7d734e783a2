"""Reference of samples under a protocol: statistics of real images, and features of some of them."""

from pathlib import Path

import torch
from torch import Tensor

from flows.evaluation.features import feature_shards, of_real_images
from flows.recipes.schema import ScoresConfig
from flows.stage import CPU, Work
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import resolve
from infra.store.store import Store
from sftok.metrics.frechet import Gaussian
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.measure import Reference
from sftok.metrics.protocols import ScoreProtocol
from sftok.metrics.reference_file import Statistics, write_statistics


def real_images(work: Work, config: ScoresConfig, protocol: ScoreProtocol, seed: int) -> Reference:
    """Build the reference from the training images: statistics of all, features of a seeded subset.

    Raises:
        ValueError: the weights are missing, or are not the expected ones.
    """
    made = of_real_images(work, config, protocol)
    pool, spatial = _statistics(made, work.job.device)
    return Reference(
        description=f"the real training images of images/{work.ref('images').digest[:12]}",
        pool=pool,
        spatial=spatial,
        features=_chosen(made, config.reference_features, seed),
        num_images=pool.count,
        extractor_sha256=protocol.extractor_sha256,
        resize=protocol.resize,
    )


def export_statistics(text: str, file: str, *, store: str | None) -> int:
    """Write the statistics of a `features` artifact as an .npz that clean-fid, pytorch-fid and ADM's evaluator read.

    Returns:
        The number of images behind them.

    Raises:
        ValueError: there is no such artifact, it is of another kind, or the file is there or cannot be written.
    """
    place, path = Store.usual(store), Path(file).expanduser()
    made = Artifact(place, resolve(place, text))
    if made.manifest.kind != "features":
        raise ValueError(f"{text!r} is {made}, but features are needed: see `sftok ls`")
    if path.exists():
        raise ValueError(f"{path} exists: name another file, or remove it")
    pool, spatial = _statistics(made)
    try:
        path.write_bytes(write_statistics(Statistics(pool, spatial)))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}): name another file") from error
    return made.manifest.counts["images"]


def _statistics(made: Artifact, device: str = CPU) -> tuple[Gaussian, Gaussian]:
    """Fit Gaussians to pool and spatial features, one shard in memory, and on the device, at a time."""
    pool = spatial = None
    for features in feature_shards(made):
        assert features.spatial is not None
        pool = _added(pool, features.pool.to(device))
        spatial = _added(spatial, features.spatial.to(device))
    assert pool is not None, "a split without images is refused by prepare"
    assert spatial is not None
    return Gaussian.of(pool.to(CPU)), Gaussian.of(spatial.to(CPU))


def _chosen(made: Artifact, most: int, seed: int) -> Tensor:
    """Return pool features of at most `most` images, drawn at random by the seed."""
    count = made.manifest.counts["images"]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:most].sort().values
    parts, before = [], 0
    for features in feature_shards(made):
        here = chosen[(chosen >= before) & (chosen < before + len(features))] - before
        parts.append(features.pool[here])
        before += len(features)
    return torch.cat(parts)


def _added(total: FeatureMoments | None, rows: Tensor) -> FeatureMoments:
    found = FeatureMoments.of(rows)
    return found if total is None else total + found
