"""Scores of features against closed forms, against their definitions written out, and against each other."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sftok.metrics.frechet import FeatureRows, Gaussian, distance, frechet
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.resampling import extrapolate, interval
from sftok.metrics.scores import (
    density_coverage,
    equal_splits,
    inception_score,
    kernel_distance,
    precision_recall,
    splits_of,
)


def features(count: int, dims: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=generator, dtype=torch.float64) / math.sqrt(dims)
    return torch.randn(count, dims, generator=generator, dtype=torch.float64) @ mixing + shift


def gaussian(rows: Tensor) -> Gaussian:
    return Gaussian.of(FeatureMoments.of(rows))


def general_distance(a: Tensor, b: Tensor) -> float:
    """The definition, with the general matrix square root."""
    S_a, S_b = (np.atleast_2d(np.cov(side.numpy(), rowvar=False)) for side in (a, b))
    root = np.real(scipy.linalg.sqrtm(S_a @ S_b))
    return float((a.mean(0) - b.mean(0)).square().sum() + np.trace(S_a + S_b - 2 * root))


class TestFrechet:
    @pytest.mark.parity
    @pytest.mark.parametrize(("count", "dims"), [(300, 24), (60, 1)])
    def test_equals_the_general_square_root(self, count: int, dims: int) -> None:
        a, b = features(count, dims, 1), features(count + 50, dims, 2, shift=0.2)
        assert frechet(a, gaussian(b)) == pytest.approx(general_distance(a, b), rel=1e-9)

    @pytest.mark.parametrize("other", ["rows", "moments"])
    def test_of_fewer_samples_than_dimensions_is_that_within_their_space(self, other: str) -> None:
        """Exact: 5 directions of 40, where the covariances have full rank; noise at rounding must not reach a root."""
        a, b = features(30, 5, 5), features(35, 5, 6, shift=0.4)
        directions = torch.linalg.qr(features(40, 40, 7)).Q[:5]
        inside = general_distance(a, b)
        reference = FeatureRows(b @ directions) if other == "rows" else gaussian(b @ directions)
        assert distance(FeatureRows(a @ directions), reference) == pytest.approx(inside, rel=1e-9)
        assert distance(reference, FeatureRows(a @ directions)) == pytest.approx(inside, rel=1e-9)

    def test_forms_agree_where_the_reference_has_full_rank(self) -> None:
        few, many = features(20, 30, 8), features(400, 30, 9, shift=0.1)
        assert distance(FeatureRows(few), gaussian(many)) == pytest.approx(
            distance(gaussian(few), gaussian(many)), rel=1e-9
        )

    def test_rows_merge_in_order(self) -> None:
        rows = features(17, 30, 10)
        merged = FeatureRows(rows[:5]) + FeatureRows(rows[5:])
        assert torch.equal(merged.rows, rows)
        with pytest.raises(ValueError, match="30 and 4 dimensions"):
            merged + FeatureRows(torch.zeros(2, 4))

    def test_of_a_set_with_itself_is_zero(self) -> None:
        rows = features(20, 40, 11, shift=5)
        assert distance(FeatureRows(rows), FeatureRows(rows)) == pytest.approx(0, abs=1e-10)

    def test_refuses_what_has_no_answer(self) -> None:
        with pytest.raises(ValueError, match="4 and of 5 dimensions"):
            frechet(features(9, 4, 0), gaussian(features(9, 5, 0)))
        with pytest.raises(ValueError, match="at least 2 samples"):
            frechet(features(1, 4, 0), gaussian(features(9, 4, 0)))
        with pytest.raises(ValueError, match="NaN"):
            frechet(torch.full((2, 4), math.nan), gaussian(features(9, 4, 0)))


class TestInceptionScore:
    def test_is_the_number_of_classes_where_each_sample_is_sure(self) -> None:
        logits = 60 * torch.eye(7).repeat(6, 1)
        assert inception_score(logits, splits_of(42, 42)).value == pytest.approx(7, rel=1e-6)
        assert inception_score(torch.zeros(42, 7), splits_of(42, 42)).value == pytest.approx(1, rel=1e-12)

    def test_splits_hold_every_sample_once(self) -> None:
        for splits in (equal_splits(23, 4, seed=1), equal_splits(23, 4, seed=None), splits_of(23, 5)):
            assert sorted(torch.cat(splits).tolist()) == list(range(23))
        assert [len(split) for split in splits_of(23, 5)] == [5, 5, 5, 5, 3]
        assert {len(split) for split in equal_splits(23, 4, seed=1)} == {5, 6}
        assert torch.equal(equal_splits(9, 2, seed=3)[0], equal_splits(9, 2, seed=3)[0])

    def test_refuses_empty_splits_and_nan(self) -> None:
        with pytest.raises(ValueError, match="fewer splits"):
            inception_score(torch.zeros(3, 5), equal_splits(3, 4, seed=None))
        with pytest.raises(ValueError, match="NaN"):
            inception_score(torch.full((3, 5), math.nan), splits_of(3, 3))


class TestKernelDistance:
    def test_is_unbiased(self) -> None:
        """Two samples of one distribution are at distance 0 on average: the diagonal must not count."""
        draws = torch.Generator().manual_seed(0)
        pairs = [torch.randn(2, 10, 6, generator=draws).unbind() for _ in range(200)]
        values = [kernel_distance(x, y, subsets=1, subset_size=10, seed=0).value for x, y in pairs]
        assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5

    def test_is_the_definition_written_out(self) -> None:
        x, y = features(4, 3, 1), features(4, 3, 2, shift=0.5)

        def kernel(a: Tensor, b: Tensor) -> float:
            return (float(a @ b) / 3 + 1) ** 3

        within = sum(kernel(side[i], side[j]) for side in (x, y) for i in range(4) for j in range(4) if i != j) / 12
        across = sum(kernel(a, b) for a in x for b in y) / 16
        found = kernel_distance(x, y, subsets=1, subset_size=4, seed=0).value
        assert found == pytest.approx(within - 2 * across, rel=1e-12)

    def test_refuses_subsets_larger_than_the_sets(self) -> None:
        with pytest.raises(ValueError, match="a subset takes 2 to 8"):
            kernel_distance(features(8, 3, 1), features(9, 3, 1), subsets=1, subset_size=9, seed=0)


def neighbour_radii(rows: np.ndarray, k: int) -> np.ndarray:
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    return np.sort(distances, axis=1)[:, k]  # the nearest is the row itself


class TestNeighbourhoods:
    @pytest.fixture
    def sides(self) -> tuple[Tensor, Tensor]:
        return features(70, 4, 1, shift=0.4), features(90, 4, 2)

    @pytest.fixture(params=[2048, 16])
    def _block(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sftok.metrics.scores.BLOCK", request.param)

    @pytest.mark.usefixtures("_block")
    def test_precision_and_recall_are_their_definition(self, sides: tuple[Tensor, Tensor]) -> None:
        samples, references = (side.numpy() for side in sides)
        between = np.linalg.norm(samples[:, None] - references[None], axis=2)
        precision = (between <= neighbour_radii(references, 3)[None]).any(1).mean()
        recall = (between <= neighbour_radii(samples, 3)[:, None]).any(0).mean()
        found = precision_recall(*sides)
        assert (found.precision, found.recall) == pytest.approx((precision, recall))
        assert 0.1 < precision < 0.9

    @pytest.mark.usefixtures("_block")
    def test_density_and_coverage_are_their_definition(self, sides: tuple[Tensor, Tensor]) -> None:
        samples, references = (side.numpy() for side in sides)
        between = np.linalg.norm(samples[:, None] - references[None], axis=2)
        hits = between < neighbour_radii(references, 5)[None]
        found = density_coverage(*sides)
        assert (found.density, found.coverage) == pytest.approx((hits.sum(1).mean() / 5, hits.any(0).mean()))
        assert 0.1 < found.coverage < 0.95

    def test_copies_of_references_are_within_balls_of_no_radius(self) -> None:
        """Rounding must not put a copy outside of a ball of radius 0, which it lies in by `<=` but not by `<`."""
        references = (features(3, 8, 3, shift=100)).repeat(5, 1)
        found = precision_recall(references, references)
        assert (found.precision, found.recall) == (1, 1)
        assert density_coverage(references, references, k=4).density == 0

    def test_of_one_distribution_are_high_and_of_two_are_zero(self) -> None:
        same = precision_recall(features(80, 3, 4), features(80, 3, 4))
        assert (same.precision, same.recall) == (1, 1)
        far = features(80, 3, 4, shift=100)
        apart = precision_recall(far, features(80, 3, 4))
        assert (apart.precision, apart.recall) == (0, 0)
        assert density_coverage(far, features(80, 3, 4)).coverage == 0

    def test_refuse_too_few(self) -> None:
        with pytest.raises(ValueError, match="at least 4"):
            precision_recall(features(3, 2, 0), features(9, 2, 0))
        with pytest.raises(ValueError, match="2 and references of 3"):
            density_coverage(features(9, 2, 0), features(9, 3, 0))


class TestResampling:
    def test_an_interval_covers_the_truth_as_often_as_it_says(self) -> None:
        """Of a mean of normal values the truth is known: 95 % of intervals hold it, here 90 to 99 % of 200."""
        held = 0
        for seed in range(200):
            values = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            of = interval(
                values.mean().item(), lambda rows, v=values: v[rows].mean().item(), 60, replicates=40, seed=seed
            )
            held += of.low < 0 < of.high
        assert 180 <= held <= 198

    def test_an_interval_says_how_it_was_found(self) -> None:
        of = interval(1.0, lambda rows: float(rows[0]), 50, replicates=7, seed=3)
        assert "7 subsamples of 25 of 50 without replacement, seed 3" in of.method
        assert of == interval(1.0, lambda rows: float(rows[0]), 50, replicates=7, seed=3)

    def test_extrapolation_removes_most_of_the_bias(self) -> None:
        """Both of one Gaussian, so the truth is 0, and the distance of N samples is above it by a term in 1/N."""
        reference = Gaussian(torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64))
        rows = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = extrapolate(rows, reference, seed=0)
        plain = frechet(rows, reference)
        assert abs(found.value) < 0.3 * plain
        assert found.slope > 0
        assert found.sizes[0] == 200
        assert found.sizes[-1] == 2000
        assert all(a < b for a, b in pairwise(found.sizes))
        assert "seed 0" in found.method

    def test_refuse_too_few(self) -> None:
        with pytest.raises(ValueError, match="needs 20 samples, there are 19"):
            extrapolate(features(19, 2, 0), gaussian(features(9, 2, 0)), seed=0)
        with pytest.raises(ValueError, match="at least 2, of 4"):
            interval(0.0, lambda rows: 0.0, 3, replicates=5, seed=0)
