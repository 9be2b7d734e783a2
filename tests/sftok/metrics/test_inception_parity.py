"""The same images, the same weights: our features and scores beside those of the tools that papers quote.

Tolerances: features 1e-5 of their size (float32, other orders of summation), scores as stated at each.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cleanfid.fid
import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch_fidelity
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from sftok.metrics.frechet import FeatureRows, frechet
from sftok.metrics.inception.network import InceptionOutputs
from sftok.metrics.inception.prepared import Batches, PreparedInception, prepare_inception
from sftok.metrics.inception.resize import Resize
from sftok.metrics.inception.weights import load_inception
from sftok.metrics.scores import equal_splits, inception_score, kernel_distance, precision_recall
from tests.support.random_inception import RandomInception, pictures

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:This DataLoader will create")]
COUNT, SIZE = 15, 48  # images a side
FEW = 9  # of them, where the tool computes its features again
FULL_RANK = 6  # dimensions of which that many images have a covariance that can be inverted
LAYER_CHECKS = 3  # images whose features every tool computes


class Sides(NamedTuple):
    """Samples and references."""

    samples: Tensor
    references: Tensor


@pytest.fixture(scope="module")
def images() -> Sides:
    return Sides(pictures(COUNT, SIZE, seed=1), pictures(COUNT, SIZE, seed=2))


@pytest.fixture(scope="module")
def ours(random_inception: RandomInception) -> PreparedInception:
    network = prepare_inception(load_inception(random_inception.path.read_bytes(), random_inception.sha256))
    network.batches = Batches(LAYER_CHECKS, LAYER_CHECKS)  # all counts are multiples of it: nothing is padded
    return network


@pytest.fixture(scope="module")
def found(ours: PreparedInception, images: Sides) -> tuple[InceptionOutputs, InceptionOutputs]:
    return ours(images.samples, "tensorflow_bilinear"), ours(images.references, "tensorflow_bilinear")


@pytest.fixture(scope="module")
def theirs(random_inception: RandomInception) -> FeatureExtractorInceptionV3:
    return fidelity(random_inception, ["2048", "logits_unbiased"])


def fidelity(weights: RandomInception, features: list[str]) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3("inception-v3-compat", features, str(weights.path))


def assert_features_agree(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of how much features differ between images, which is stricter than of their size."""
    assert ours.shape == theirs.shape
    spread = theirs.std(0).mean()
    assert spread > 0.05 * theirs.abs().mean(), "the images look alike to this network: the test would show nothing"
    assert (ours - theirs).abs().max() < 1e-4 * spread
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def eight(images: Sides) -> Tensor:
    return images.samples[:LAYER_CHECKS]


class TestFeatures:
    def test_are_those_of_torch_fidelity(self, images, ours, theirs) -> None:
        pool, logits = theirs(eight(images))
        outputs = ours(eight(images), "tensorflow_bilinear")
        assert_features_agree(outputs.pool, pool)
        assert_features_agree(outputs.logits, logits)

    def test_spatial_ones_are_the_first_branch_of_tensorflows_mixed_6(self, images, ours, theirs) -> None:
        """ADM reads `mixed_6/conv`, the first branch of the 7th mixed block, in the order h, w, channel."""
        seen: list[Tensor] = []
        handle = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        theirs(eight(images))
        handle.remove()
        maps_BhwC = seen[0].permute(0, 2, 3, 1)[..., :7]
        assert maps_BhwC.shape[1:] == (17, 17, 7)
        assert_features_agree(ours(eight(images), "tensorflow_bilinear").spatial, maps_BhwC.reshape(-1, 2023))

    @pytest.mark.parametrize("antialias", [False, True])
    def test_are_those_of_torchmetrics(self, ours, random_inception, antialias) -> None:
        how: Resize = "torch_bilinear_antialias" if antialias else "tensorflow_bilinear"
        larger = pictures(LAYER_CHECKS, 320, seed=4)  # antialiasing shows in what is made smaller
        metric = FrechetInceptionDistance(
            feature_extractor_weights_path=str(random_inception.path), antialias=antialias
        )
        assert_features_agree(ours(larger, how).pool, metric.inception(larger))

    def test_are_those_of_pytorch_fid(self, images, ours, pytorch_fid_network) -> None:
        theirs = pytorch_fid_network(eight(images).float() / 255)[0].flatten(1)
        assert_features_agree(ours(eight(images), "torch_bilinear").pool, theirs)

    def test_are_those_of_clean_fid(self, images, ours, clean_network, tmp_path: Path) -> None:
        files = write_pngs(eight(images), tmp_path)
        theirs = clean_features(files, clean_network)
        assert_features_agree(ours(eight(images), "pillow_bicubic").pool, theirs)

    def test_differ_where_the_resize_does(self, images, ours) -> None:
        """What the named resizes are for: none of them may stand in for another."""
        ways: list[Resize] = ["tensorflow_bilinear", "torch_bilinear", "pillow_bicubic"]
        pools = [ours(eight(images), how).pool for how in ways]
        for i, pool in enumerate(pools):
            assert all((pool - other).norm() > 1e-3 * pool.norm() for other in pools[i + 1 :])


@pytest.fixture(scope="module")
def pytorch_fid_network(random_inception: RandomInception) -> Iterator[nn.Module]:
    """Through its own loader of a URL, which finds the file in torch's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(random_inception.folder))
        yield pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()


class CleanLayers(nn.Module):
    """What clean-fid calls `layers`: normalised pixels of 299 x 299 to pool features, by torch-fidelity's modules."""

    def __init__(self, network: FeatureExtractorInceptionV3) -> None:
        super().__init__()
        names = [name for name, _ in network.named_children() if name not in ("fc",)]
        self.layers = nn.Sequential(*(network.get_submodule(name) for name in names))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CleanBase(nn.Module):
    """The archive that clean-fid downloads, with weights of ours."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="module")
def clean_network(theirs: FeatureExtractorInceptionV3, tmp_path_factory: pytest.TempPathFactory) -> InceptionV3W:
    folder = tmp_path_factory.mktemp("clean")
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # torch would have all of TorchScript replaced
        traced = torch.jit.trace(CleanLayers(theirs).eval(), torch.zeros(1, 3, 299, 299))
        torch.jit.script(CleanBase(traced)).save(str(folder / "inception-2015-12-05.pt"))
        return InceptionV3W(str(folder), download=False, resize_inside=False).eval()


def write_pngs(images: Tensor, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    files = [str(folder / f"{i:03d}.png") for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return files


def clean_features(files: list[str], network: InceptionV3W) -> Tensor:
    with warnings.catch_warnings(action="ignore"):
        rows = cleanfid.fid.get_files_features(
            files, model=network, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
        )
    return torch.from_numpy(rows)


class Pictures(torch.utils.data.Dataset[Tensor]):
    """As torch-fidelity takes images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class TestScores:
    def test_are_those_of_torch_fidelity(self, images, found, random_inception) -> None:
        """FID (theirs takes roots of rounding, of singular covariances), IS and KID to 1e-4; the others alike."""
        samples, references = found
        theirs = torch_fidelity.calculate_metrics(
            input1=Pictures(images.samples),
            input2=Pictures(images.references),
            cuda=False,
            fid=True,
            isc=True,
            kid=True,
            prc=True,
            isc_splits=3,
            kid_subsets=5,
            kid_subset_size=11,
            prc_neighborhood=1,
            feature_extractor="inception-v3-compat",  # of itself it would take VGG-16 for precision and recall
            feature_extractor_weights_path=str(random_inception.path),
            cache=False,
            save_cpu_ram=True,  # no worker processes: forked from a process with threads, they may die
            verbose=False,
        )
        fid = frechet(samples.pool, FeatureRows(references.pool))
        assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
        score = inception_score(samples.logits, equal_splits(COUNT, 3, seed=2020))
        assert score.value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
        assert score.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-3)
        kid = kernel_distance(samples.pool, references.pool, subsets=5, subset_size=11, seed=2020)
        assert kid.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
        assert kid.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
        near = precision_recall(samples.pool, references.pool, k=1)
        assert near.precision == pytest.approx(theirs["precision"], abs=1e-6)
        assert near.recall == pytest.approx(theirs["recall"], abs=1e-6)
        assert 0 < near.precision + near.recall < 2, "all or nothing: the test would show little"

    def test_inception_score_and_kid_are_those_of_torchmetrics(self, images, found, random_inception) -> None:
        """Its draws are torch's: those of the score are repeated, KID takes all images in each subset. To 1e-4."""
        samples, references = (side.pool[:FEW] for side in found)
        logits = found[0].logits[:FEW]
        network = NoTrainInceptionV3("inception-v3-compat", ["logits_unbiased"], str(random_inception.path), False)
        with warnings.catch_warnings(action="ignore"):
            score = InceptionScore(feature=network, splits=3)
            score.update(images.samples[:FEW])
            torch.manual_seed(3)
            mean, deviation = score.compute()
        torch.manual_seed(3)
        order = torch.randperm(FEW)
        mine = inception_score(logits[order], equal_splits(FEW, 3, seed=None))
        assert mine.value == pytest.approx(mean.item(), rel=1e-4)
        assert mine.deviation * (3 / 2) ** 0.5 == pytest.approx(deviation.item(), rel=1e-3)  # theirs is unbiased
        pool = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(random_inception.path), False)
        with warnings.catch_warnings(action="ignore"):
            kid = KernelInceptionDistance(feature=pool, subsets=2, subset_size=FEW)
        kid.update(images.references[:FEW], real=True)
        kid.update(images.samples[:FEW], real=False)
        mine = kernel_distance(samples, references, subsets=1, subset_size=FEW, seed=0)
        assert mine.value == pytest.approx(kid.compute()[0].item(), rel=1e-4)

    def test_fid_and_kid_are_those_of_clean_fid(self, images, ours, clean_network, tmp_path: Path) -> None:
        """Both to 1e-4. KID is drawn as clean-fid draws, from NumPy's global generator.

        clean-fid refuses the FID of fewer images than dimensions ("imaginary component"): it is that of the first few.
        """
        sides = [
            clean_features(write_pngs(side[:FEW], tmp_path / name), clean_network).numpy()
            for name, side in zip(("samples", "references"), images, strict=True)
        ]
        samples, references = (ours(side[:FEW], "pillow_bicubic").pool for side in images)
        state = np.random.get_state()
        np.random.seed(5)
        kid = cleanfid.fid.kernel_distance(*sides, num_subsets=4, max_subset_size=FEW - 2)
        np.random.set_state(state)
        # It draws from its second argument first, and calls that the samples or the references as the caller does.
        drawn = kernel_distance(samples, references, subsets=4, subset_size=FEW - 2, seed=5, reference_first=True)
        turned = kernel_distance(references, samples, subsets=4, subset_size=FEW - 2, seed=5)
        assert (drawn.value, turned.value) == pytest.approx((kid, kid), rel=1e-4)
        with warnings.catch_warnings(action="ignore"):
            fid = cleanfid.fid.fid_from_feats(*(side[:, :FULL_RANK] for side in sides))
        few = FeatureRows(references[:, :FULL_RANK])
        assert frechet(samples[:, :FULL_RANK], few) == pytest.approx(fid, rel=1e-4)

    @pytest.mark.slow
    def test_fid_is_that_of_torchmetrics(self, images, found, random_inception) -> None:
        """To 1e-4: theirs takes eigenvalues of a product of singular covariances."""
        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(random_inception.path), antialias=False)
        metric.update(images.references, real=True)
        metric.update(images.samples, real=False)
        samples, references = found
        assert frechet(samples.pool, FeatureRows(references.pool)) == pytest.approx(metric.compute().item(), rel=1e-4)

    @pytest.mark.slow
    def test_fid_is_that_of_pytorch_fid(self, images, ours, random_inception, tmp_path: Path, monkeypatch) -> None:
        """Through its own entry point, from files; to 1e-4.

        But for scipy's root: of the product of singular covariances it may have imaginary parts, which theirs refuses.
        The trace is all that is asked of it, and is that of the eigenvalues' roots.
        """

        def root(product: np.ndarray, *, disp: bool) -> tuple[np.ndarray, float]:
            assert not disp
            return np.diag(np.linalg.eigvals(product).real.clip(min=0) ** 0.5), 0.0

        monkeypatch.setattr("pytorch_fid.fid_score.linalg.sqrtm", root)
        monkeypatch.setenv("TORCH_HOME", str(random_inception.folder))
        folders = [str(tmp_path / name) for name in ("samples", "references")]
        for folder, side in zip(folders, images, strict=True):
            write_pngs(side, Path(folder))
        with warnings.catch_warnings(action="ignore"):
            theirs = pytorch_fid.fid_score.calculate_fid_given_paths(folders, 8, torch.device("cpu"), 2048, 0)
        samples, references = (ours(side, "torch_bilinear").pool for side in images)
        assert frechet(samples, FeatureRows(references)) == pytest.approx(theirs, rel=1e-4)
