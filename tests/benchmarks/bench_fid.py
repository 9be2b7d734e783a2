"""FID: the distance beside scipy's square root, features beside torch-fidelity's, moments beside NumPy's covariance."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sftok.metrics.frechet import FeatureRows, Gaussian, distance, frechet, summary
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.inception.prepared import PRECISIONS, prepare_inception
from sftok.metrics.inception.weights import load_inception
from tests.benchmarks import machine
from tests.benchmarks.table import seconds, show, times
from tests.support.random_inception import pictures, write

DIMS, COUNT, FEW, INNER = 2048, 4096, 500, 400
IMAGES, SIZE = (16, 64), 256  # batches given to torch-fidelity: where it is fastest, and its default
ROUNDS, FEATURE_ROUNDS = 4, 3
REFERENCE = "torch-fidelity"


def main() -> None:
    torch.set_num_threads(machine.THREADS)
    compare_distances()
    compare_moments()
    compare_features()


def features(count: int, seed: int, dims: int = DIMS) -> Tensor:
    """Correlated, of variances that fall off as Inception's do, and never negative as its features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99)) / dims**0.5
    scales = torch.arange(1, dims + 1).float().pow(-0.7)
    return (torch.randn(count, dims, generator=generator) * scales @ mixing + 0.02 * seed).relu() + 0.01


def general_root(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook way: covariances and the square root of their product."""
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(S_a + S_b - 2 * scipy.linalg.sqrtm(S_a @ S_b).real))


def timed(way: Callable[[], float]) -> tuple[float, float]:
    started = time.perf_counter()
    value = way()
    return value, time.perf_counter() - started


def compare_distances() -> None:
    a, b = features(COUNT, 1).double(), features(COUNT, 2).double()
    # Moments are the same work for both sides; what is compared begins with them.
    side_a, side_b = Gaussian.of(FeatureMoments.of(a)), Gaussian.of(FeatureMoments.of(b))
    S_a, S_b = side_a.covariance.numpy(), side_b.covariance.numpy()
    variance, between = np.trace(S_a) + np.trace(S_b), (side_a.mean - side_b.mean).square().sum().item()
    wanted, slow = timed(lambda: between + variance - 2 * np.trace(scipy.linalg.sqrtm(S_a @ S_b).real))
    ways = {"ours": lambda: distance(side_a, side_b)}
    taken = seconds(ways, rounds=ROUNDS)
    rows = [[f"scipy sqrtm, N = {COUNT}", f"{slow:.2f}", "", ""]]
    for name, way in ways.items():
        error = abs(way() - wanted) / wanted
        rows.append([f"{name}, N = {COUNT}", f"{taken[name]:.2f}", times(slow / taken[name]), f"{error:.1e}"])
    rows += few_samples(b)
    show("Frechet distance at 2,048 dimensions", ["", "seconds", "of sqrtm", "relative difference"], rows)


def few_samples(reference: Tensor) -> list[list[str]]:
    """Fewer samples than dimensions: in a subspace the distance is known, of full rank within it."""
    inner = [features(FEW, seed, INNER).double() for seed in (3, 4)]
    directions = torch.linalg.qr(torch.randn(DIMS, INNER, dtype=torch.float64)).Q.T
    outer = [side @ directions for side in inner]
    wanted = general_root(*(side.numpy() for side in inner))
    _, slow = timed(lambda: general_root(*(side.numpy() for side in outer)))
    known = Gaussian.of(FeatureMoments.of(reference))
    known.root  # noqa: B018  (computed once for all samples)
    ways = {
        "rows beside rows": lambda: distance(FeatureRows(outer[0]), FeatureRows(outer[1])),
        "rows beside a known reference": lambda: frechet(outer[0], known),
    }
    taken = seconds(ways, rounds=ROUNDS)
    error = abs(ways["rows beside rows"]() - wanted) / wanted
    return [
        [f"scipy sqrtm, N = {FEW}", f"{slow:.2f}", "", ""],
        *(
            [f"{name}, N = {FEW}", f"{taken[name]:.2f}", times(slow / taken[name]), f"{error:.1e}" if not i else ""]
            for i, name in enumerate(ways)
        ),
    ]


def compare_features() -> None:
    # One thread, as each of the workers has that extract features side by side.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        weights = write(Path(folder))
        network = load_inception(weights.path.read_bytes(), weights.sha256)
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights.path))
    ways: dict[str, Callable[[Tensor], Tensor]] = {REFERENCE: lambda images: theirs(images)[0]}
    for precision in PRECISIONS:
        extractor = prepare_inception(network, precision=precision)
        ways[f"ours {precision}"] = lambda images, extractor=extractor: extractor(images, "tensorflow_bilinear").pool
    samples, references = pictures(max(IMAGES), SIZE, seed=1), pictures(min(IMAGES), SIZE, seed=2)
    rows = []
    with torch.inference_mode():
        for count in IMAGES:
            taken = seconds({name: partial(way, samples[:count]) for name, way in ways.items()}, rounds=FEATURE_ROUNDS)
            rows += [
                [f"batch {count}: {name}", f"{count / taken[name]:.2f}", times(taken[REFERENCE] / taken[name])]
                for name in ways
            ]
        pools = {name: (way(samples), way(references)) for name, way in ways.items()}
    show("Inception features, one thread", [f"{SIZE} px", "img/s", "of torch-fidelity"], rows)
    compare_values(pools)


def compare_values(pools: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The distances that the features lead to, all by our distance."""
    exact = pools[REFERENCE]
    wanted = frechet(exact[0], summary(exact[1]))
    rows = []
    for name, (own, other) in pools.items():
        fid = frechet(own, summary(other))
        error = (own - exact[0]).norm() / exact[0].norm()
        rows.append([name, f"{error:.1e}", f"{fid:.4f}", f"{abs(fid - wanted) / wanted:.1e}"])
    columns = ["", "feature error", "FID", "relative difference"]
    show(f"FID of {max(IMAGES)} images against {min(IMAGES)} (random weights, whose scale is their own)", columns, rows)


def compare_moments() -> None:
    rows_ND = features(2 * COUNT, 1)
    shards = rows_ND.split(1000)
    as_numpy = rows_ND.numpy()
    ways: dict[str, Callable[[], object]] = {
        "NumPy mean and cov": lambda: (as_numpy.mean(0), np.cov(as_numpy, rowvar=False)),
        "ours, one pass": lambda: FeatureMoments.of(rows_ND),
        "ours, shards merged": lambda: sum(
            (FeatureMoments.of(shard) for shard in shards[1:]), start=FeatureMoments.of(shards[0])
        ),
    }
    taken = seconds(ways, rounds=2)
    whole = FeatureMoments.of(rows_ND)
    merged = sum((FeatureMoments.of(shard) for shard in shards[1:]), start=FeatureMoments.of(shards[0]))
    exact = np.cov(as_numpy.astype(np.float64), rowvar=False)
    errors = {
        "ours, one pass": np.abs(whole.covariance.numpy() - exact).max() / np.abs(exact).max(),
        "ours, shards merged": float((merged.outer - whole.outer).abs().max() / whole.outer.abs().max()),
    }
    table = [
        [
            name,
            f"{len(rows_ND) / taken[name]:.0f}",
            times(taken["NumPy mean and cov"] / taken[name]),
            f"{errors[name]:.1e}" if name in errors else "",
        ]
        for name in ways
    ]
    columns = [
        f"{len(rows_ND)} rows of {DIMS}",
        "rows/s",
        "of NumPy",
        "relative difference (from NumPy; from one pass)",
    ]
    show("moments in float64", columns, table)


if __name__ == "__main__":
    main()
