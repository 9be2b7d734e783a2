"""Protocols: they say what was measured, refuse what they do not allow, and `adm` is ADM's formulas."""

import io
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sftok.metrics.frechet import Gaussian, summary
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.measure import Features, ImageScore, Reference, measure
from sftok.metrics.protocols import ADM, CLEAN, PROTOCOLS, TORCH_FIDELITY, ScoreProtocol, random_features
from sftok.metrics.reference_file import Statistics, read_images, read_statistics, write_statistics

COUNT, POOL, SPATIAL, CLASSES = 120, 16, 14, 9


def features(count: int, seed: int, shift: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(count, POOL, generator=generator) + shift
    weights = torch.randn(POOL, CLASSES, generator=torch.Generator().manual_seed(99))
    return Features(pool, torch.randn(count, SPATIAL, generator=generator) - shift, pool @ weights)


def by_name(scores: tuple[ImageScore, ...]) -> dict[str, ImageScore]:
    return {score.name: score for score in scores}


def small(protocol: ScoreProtocol, **changes: object) -> ScoreProtocol:
    return protocol.at(COUNT, replicates=4, points=4, **changes)


class AdmTranscription:
    """The formulas of ADM's evaluator in NumPy: a general square root, splits in order, squared distances."""

    @staticmethod
    def frechet(a: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
        own = np.cov(a, rowvar=False)
        root = scipy.linalg.sqrtm(own.dot(sigma))
        difference = a.mean(0) - mu
        return float(difference.dot(difference) + np.trace(own) + np.trace(sigma) - 2 * np.trace(root.real))

    @staticmethod
    def inception_score(logits: np.ndarray, split_size: int) -> float:
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        scores = []
        for start in range(0, len(shares), split_size):
            part = shares[start : start + split_size]
            divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
            scores.append(np.exp(divergence.sum(1).mean()))
        return float(np.mean(scores))

    @staticmethod
    def squares(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.maximum((u**2).sum(1)[:, None] - 2 * u @ v.T + (v**2).sum(1)[None], 0)

    @classmethod
    def precision_recall(cls, references: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
        radii = [np.partition(cls.squares(side, side), 3, axis=1)[:, 3] for side in (references, samples)]
        between = cls.squares(samples, references)
        return float((between <= radii[0][None]).any(1).mean()), float((between <= radii[1][:, None]).any(0).mean())


@pytest.mark.parity
def test_adm_is_its_formulas_written_out() -> None:
    """From a file of its layout: statistics of one set of images, features of a part of them."""
    samples, whole = features(COUNT, 1, shift=0.4), features(150, 2)
    arrays = {"mu": whole.pool, "mu_s": whole.spatial}
    arrays |= {"sigma": torch.cov(whole.pool.double().T), "sigma_s": torch.cov(whole.spatial.double().T)}
    buffer = io.BytesIO()
    np.savez(buffer, **{n: (v.double().mean(0) if n.startswith("mu") else v).numpy() for n, v in arrays.items()})
    statistics = read_statistics(buffer.getvalue(), "reference.npz")
    reference = Reference("ADM's file", statistics.pool, statistics.spatial, whole.pool[:90])
    scores = by_name(measure(small(ADM, score_split_size=50), samples, reference))
    pool, spatial, logits = (part.double().numpy() for part in (samples.pool, samples.spatial, samples.logits))
    adm = AdmTranscription
    fid = adm.frechet(pool, whole.pool.double().mean(0).numpy(), arrays["sigma"].numpy())
    sfid = adm.frechet(spatial, whole.spatial.double().mean(0).numpy(), arrays["sigma_s"].numpy())
    assert scores["fid"].value == pytest.approx(fid, rel=1e-9)
    assert scores["sfid"].value == pytest.approx(sfid, rel=1e-9)
    assert scores["inception_score"].value == pytest.approx(adm.inception_score(logits, 50), rel=1e-9)
    precision, recall = adm.precision_recall(whole.pool[:90].double().numpy(), pool)
    assert (scores["precision"].value, scores["recall"].value) == pytest.approx((precision, recall))
    assert 0 < precision < 1
    assert list(scores) == list(ADM.scores)


class TestProtocols:
    def test_each_states_all_that_a_score_depends_on(self) -> None:
        for name, protocol in PROTOCOLS.items():
            assert protocol.name == name
            assert protocol.num_images == 50_000
            assert len(protocol.extractor_sha256) == 64
            assert protocol.label("fid") == "FID"
            assert all(protocol.definition(score) for score in protocol.scores)
        assert len({protocol.model_dump_json(exclude={"name"}) for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)

    def test_another_number_of_images_is_another_name(self) -> None:
        fewer = CLEAN.at(500)
        assert (fewer.name, fewer.num_images, fewer.kid_subset_size) == ("clean/500", 500, 500)
        assert fewer.at(900).name == "clean/900"

    def test_random_features_are_never_called_fid(self) -> None:
        protocol = random_features("random-conv/1", "0" * 64, 100)
        labels = [protocol.label(score) for score in protocol.scores]
        assert labels[:2] == ["FD (random features)", "Kernel distance (random features)"]
        assert not any("FID" in label or "KID" in label for label in labels)
        assert not any("FID" in protocol.definition(score) for score in protocol.scores)
        with pytest.raises(ValueError, match="name the features"):
            ScoreProtocol.model_validate(dict(protocol) | {"features": ""})

    def test_are_frozen_and_refuse_unknown_fields(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            ADM.num_images = 5
        with pytest.raises(ValueError, match="Extra inputs"):
            ADM.at(500, splits=3)


@pytest.fixture(scope="module")
def scores() -> dict[str, ImageScore]:
    protocol = small(TORCH_FIDELITY, kid_subsets=5, kid_subset_size=30)
    reference = Reference.of(features(110, 3), protocol, "110 made-up images")
    return by_name(measure(protocol, features(COUNT, 4, shift=0.3), reference))


class TestMeasure:
    def test_every_value_has_interval_method_and_protocol(self, scores: dict[str, ImageScore]) -> None:
        assert list(scores) == list(TORCH_FIDELITY.scores)
        for score in scores.values():
            low, high = score.interval
            assert low < score.value < high
            assert "without replacement" in score.interval_method
            assert (score.num_images, score.num_reference) == (COUNT, 110)
            assert score.protocol.name == f"torch_fidelity/{COUNT}"
            assert ImageScore.model_validate_json(score.model_dump_json()) == score

    def test_distances_have_their_value_at_infinity(self, scores: dict[str, ImageScore]) -> None:
        at_infinity = scores["fid"].at_infinity
        assert at_infinity is not None
        assert at_infinity.value < scores["fid"].value
        assert "1/N" in at_infinity.method
        assert scores["kid"].at_infinity is None

    def test_of_more_images_the_first_count(self) -> None:
        protocol = small(CLEAN, kid_subsets=2)
        samples, reference = features(COUNT + 30, 5), Reference.of(features(130, 6), protocol, "reference")
        whole, cut = (measure(protocol, part, reference) for part in (samples, samples.first(COUNT)))
        assert whole == cut

    def test_shards_merge_in_order(self) -> None:
        whole = features(COUNT, 7)
        parts = [
            Features(p, s, logits) for p, s, logits in zip(*(x.split(50) for x in whole_parts(whole)), strict=True)
        ]
        merged = parts[0] + parts[1] + parts[2]
        assert all(torch.equal(a, b) for a, b in zip(whole_parts(merged), whole_parts(whole), strict=True))
        with pytest.raises(ValueError, match="only some"):
            merged + Features(whole.pool)

    def test_fewer_images_than_n_are_refused(self) -> None:
        protocol = small(CLEAN)
        with pytest.raises(ValueError, match=r"clean/120 takes 120 images, there are 119: .*at\(119\)"):
            measure(protocol, features(COUNT - 1, 0), Reference.of(features(COUNT, 1), protocol, "reference"))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"extractor_sha256": "1" * 64}, "its extractor's sha256 is 1111"),
            ({"resize": "pillow_bicubic"}, "its resize is pillow_bicubic, torch_fidelity/120 has tensorflow_bilinear"),
            ({"num_images": 90}, "takes 100 reference images at least, digits has 90"),
            ({"num_images": None}, "has an unknown number"),
            ({"features": None}, "digits has statistics only, KID needs its features"),
            ({"pool": summary(torch.eye(50, 7))}, "dimensions cannot be compared"),
        ],
    )
    def test_a_wrong_reference_is_refused(self, change: dict[str, object], reason: str) -> None:
        protocol = small(TORCH_FIDELITY, num_reference=100, scores=("kid", "fid"), kid_subset_size=100)
        given = dict(vars(Reference.of(features(110, 1), protocol, "digits"))) | change
        with pytest.raises(ValueError, match=reason) as error:
            measure(protocol, features(COUNT, 0), Reference(**given))
        assert "\n" not in str(error.value)

    def test_missing_features_and_nan_are_refused(self) -> None:
        protocol = small(ADM)
        pool = features(COUNT, 0).pool
        reference = Reference.of(Features(pool), protocol, "digits")
        with pytest.raises(ValueError, match="the samples have no spatial features"):
            measure(protocol, Features(pool), reference)
        with pytest.raises(ValueError, match="digits has no spatial statistics"):
            measure(protocol, features(COUNT, 0), reference)
        with pytest.raises(ValueError, match="NaN"):
            measure(protocol, Features(torch.full_like(pool, math.nan)), reference)


def whole_parts(whole: Features) -> tuple[Tensor, Tensor, Tensor]:
    assert whole.spatial is not None
    assert whole.logits is not None
    return whole.pool, whole.spatial, whole.logits


class TestReferenceFile:
    def test_statistics_come_back_as_they_were(self, tmp_path: Path) -> None:
        whole = features(60, 8)
        assert whole.spatial is not None
        statistics = Statistics(
            Gaussian.of(FeatureMoments.of(whole.pool)), Gaussian.of(FeatureMoments.of(whole.spatial))
        )
        path = tmp_path / "reference.npz"
        path.write_bytes(write_statistics(statistics))
        again = read_statistics(path, "reference.npz")
        assert again.spatial is not None
        assert torch.equal(again.pool.mean, statistics.pool.mean)
        assert torch.equal(again.spatial.mean, statistics.spatial.mean)  # type: ignore[union-attr]
        torch.testing.assert_close(again.pool.covariance, statistics.pool.covariance, rtol=1e-15, atol=1e-15)
        with np.load(path, allow_pickle=False) as arrays:
            assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s"}

    def test_images_are_streamed(self, tmp_path: Path) -> None:
        images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        path = tmp_path / "images.npz"
        np.savez_compressed(path, arr_0=images.permute(0, 2, 3, 1).numpy(), mu=np.zeros(1), sigma=np.zeros((1, 1)))
        batches = list(read_images(path, "images.npz", batch=3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert torch.equal(torch.cat(batches), images)

    @pytest.mark.parametrize(
        ("arrays", "reason"),
        [
            ({"other": np.zeros(2)}, "holds other, but no mu and sigma"),
            ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "do not fit together"),
            ({"mu": np.zeros(2, dtype=int), "sigma": np.zeros((2, 2))}, "no floats"),
            ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "NaN or infinite"),
            ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "is not symmetric"),
            ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((1, 1))}, "mu cannot be read"),
        ],
    )
    def test_wrong_statistics_are_refused(self, arrays: dict[str, np.ndarray], reason: str) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=reason) as error:
            read_statistics(buffer.getvalue(), "reference.npz")
        assert str(error.value).startswith("reference.npz: ")
        assert "\n" not in str(error.value)

    def test_nothing_is_unpickled(self) -> None:
        """A pickle under an array's name would run code."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("mu.npy", pickle.dumps({"mu": 1}))
            archive.writestr("sigma.npy", b"")
        with pytest.raises(ValueError, match="mu cannot be read"):
            read_statistics(buffer.getvalue(), "reference.npz")

    @pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04"])
    def test_damaged_files_are_refused(self, data: bytes) -> None:
        with pytest.raises(ValueError, match="not a readable"):
            read_statistics(data, "reference.npz")
        with pytest.raises(ValueError, match="not a readable"):
            next(read_images(data, "reference.npz"))

    def test_files_without_images_and_of_other_types_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "reference.npz"
        np.savez(path, mu=np.zeros(2))
        with pytest.raises(ValueError, match="has no images"):
            next(read_images(path, "reference.npz"))
        np.savez(path, arr_0=np.zeros((2, 4, 4, 3), dtype=np.float32))
        with pytest.raises(ValueError, match=r"uint8 \(n, H, W, 3\) is wanted"):
            next(read_images(path, "reference.npz"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY torn")
        with pytest.raises(ValueError, match=r"reference.npz: arr_0 cannot be read"):
            next(read_images(path, "reference.npz"))
        np.savez(path, arr_0=np.array([{}], dtype=object))
        with pytest.raises(ValueError, match=r"uint8 \(n, H, W, 3\) is wanted"):
            next(read_images(path, "reference.npz"))
