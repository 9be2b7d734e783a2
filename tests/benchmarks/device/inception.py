"""Inception features of images of 256 pixels (random weights), beside torch-fidelity's extractor."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sftok.metrics.inception.prepared import PRECISIONS, prepare_inception
from sftok.metrics.inception.weights import load_inception
from tests.benchmarks.device.bench import Bench, operations
from tests.support.random_inception import pictures, write

BATCH, QUICK_BATCH, SIZE, DISTINCT = 256, 2, 256, 16
HOW = "tensorflow_bilinear"


def run(bench: Bench) -> None:
    """From images on the device and from the host's memory; the difference of features from those in fp32."""
    batch = QUICK_BATCH if bench.is_quick else BATCH
    few = pictures(min(batch, DISTINCT), SIZE, seed=1)
    images = few.repeat(-(-batch // len(few)), 1, 1, 1)[:batch]
    on_device = images.to(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = write(Path(folder))
        network = load_inception(weights.path.read_bytes(), weights.sha256)
        theirs: dict[str, Callable[[], object]] = {}
        bench.attempt(
            "torch-fidelity", lambda: theirs.update({"torch-fidelity": reference(bench, weights.path, on_device)})
        )
    flops = operations(lambda: network.to(bench.device)(torch.zeros(1, 3, 299, 299, device=bench.device)))
    features: dict[str, torch.Tensor] = {}
    for precision in ("fp32",) if bench.is_quick else PRECISIONS:
        extract = prepare_inception(network, precision=precision, device=bench.device)
        ways = {**(theirs if precision == "fp32" else {}), "ours": lambda extract=extract: extract(on_device, HOW)}
        title = f"{precision}, batch {batch}"
        bench.race(title, ways, items=batch, unit="images/s", flops=flops, precision=precision, rounds=3, warm=1)
        host = {"ours, images on the host": lambda extract=extract: extract(images, HOW)}
        bench.race(title, host, items=batch, unit="images/s", rounds=3, warm=1)
        features[precision] = extract(on_device[:DISTINCT], HOW).pool.double()
    if len(features) < 2:
        return
    difference = (features["bf16"] - features["fp32"]).norm() / features["fp32"].norm()
    bench.put("bf16: relative difference of features from fp32", float(difference), "")


def reference(bench: Bench, path: Path, images: torch.Tensor) -> Callable[[], object]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).to(bench.device)
    return torch.inference_mode()(lambda: extractor(images))
