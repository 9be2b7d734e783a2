"""Metrics against other implementations, against closed forms, and against what they must never do."""

import math
import random

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sftok.metrics import functional
from sftok.metrics.frechet import frechet_distance
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.nearest import nearest_distances


def features(n: int, dims: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=generator, dtype=torch.float64) / math.sqrt(dims)
    return torch.randn(n, dims, generator=generator, dtype=torch.float64) @ mixing + shift


def images(n: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def sqrtm_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The textbook formula, with the general matrix square root."""
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


class TestFrechetDistance:
    @pytest.mark.parity
    @pytest.mark.parametrize("dims", [1, 5, 64])
    def test_equals_sqrtm_on_full_rank(self, dims):
        a, b = features(4 * dims + 50, dims, 0), features(6 * dims + 50, dims, 1, shift=0.3)
        ours = frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b))
        expected = sqrtm_distance(a.reshape(-1, dims), b) if dims > 1 else None
        if expected is None:
            expected = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
        assert ours == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("n", [10, 500])  # fewer samples than dimensions, and more
    def test_a_set_with_itself_is_zero(self, n):
        moments = FeatureMoments.of(features(n, 40, 2, shift=5))
        assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-10)

    def test_singular_covariances_lose_no_digits(self):
        """Features in a 6-dimensional subspace of 50: the distance is that within the subspace, which has full rank."""
        a, b = features(300, 6, 3), features(200, 6, 4, shift=0.5)
        directions = torch.linalg.qr(features(50, 50, 5)).Q[:6]
        inside = frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b))
        embedded = frechet_distance(FeatureMoments.of(a @ directions), FeatureMoments.of(b @ directions))
        assert embedded == pytest.approx(inside, rel=1e-9)

    def test_one_singular_side_equals_sqrtm_limit(self):
        """A point mass against a Gaussian: |difference|^2 + trace of the covariance."""
        spread = features(400, 8, 6)
        point = torch.ones(5, 8, dtype=torch.float64)
        expected = ((spread.mean(0) - 1) ** 2).sum() + torch.cov(spread.T).trace()
        ours = frechet_distance(FeatureMoments.of(spread), FeatureMoments.of(point))
        assert ours == pytest.approx(expected.item(), rel=1e-9)
        assert frechet_distance(FeatureMoments.of(point), FeatureMoments.of(spread)) == pytest.approx(ours, rel=1e-9)

    def test_either_side_may_be_singular(self):
        """Full rank against rank 6 of 50: eigenvalues at rounding level, negative ones too, must not reach a root."""
        full = FeatureMoments.of(features(300, 50, 10))
        flat = FeatureMoments.of(features(200, 6, 11) @ torch.linalg.qr(features(50, 50, 12)).Q[:6])
        root = scipy.linalg.sqrtm(full.covariance.numpy())
        inner = np.linalg.eigvalsh(root @ flat.covariance.numpy() @ root)[-6:]
        between = (full.mean - flat.mean).square().sum() + full.covariance.trace() + flat.covariance.trace()
        expected = float(between) - 2 * np.sqrt(inner).sum()
        assert frechet_distance(full, flat) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(flat, full) == pytest.approx(expected, rel=1e-9)

    def test_is_symmetric_and_grows_with_the_shift(self):
        base = FeatureMoments.of(features(300, 12, 7))
        moved = [FeatureMoments.of(features(300, 12, 7, shift=s)) for s in (0.1, 0.5, 1.0)]
        distances = [frechet_distance(base, other) for other in moved]
        assert distances == sorted(distances)
        assert distances[1] == pytest.approx(12 * 0.25, rel=1e-9)
        assert frechet_distance(moved[1], base) == pytest.approx(distances[1], rel=1e-9)

    def test_refuses_what_has_no_answer(self):
        with pytest.raises(ValueError, match="at least 2 samples"):
            frechet_distance(FeatureMoments.of(features(1, 4, 0)), FeatureMoments.of(features(9, 4, 0)))
        with pytest.raises(ValueError, match="4 and of 5 dimensions"):
            frechet_distance(FeatureMoments.of(features(9, 4, 0)), FeatureMoments.of(features(9, 5, 0)))
        with pytest.raises(ValueError, match="NaN"):
            FeatureMoments.of(torch.full((3, 3), torch.nan))


class TestFeatureMoments:
    @settings(max_examples=25, deadline=None)
    @given(sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=5), order=st.integers(0, 10**6))
    def test_shards_merge_in_any_order(self, sizes, order):
        rows = features(sum(sizes), 7, 8, shift=2)
        shards = [FeatureMoments.of(shard) for shard in rows.split(sizes)]
        random.Random(order).shuffle(shards)
        merged = shards[0]
        for shard in shards[1:]:
            merged = merged + shard
        whole = FeatureMoments.of(rows)
        assert merged.count == whole.count
        for part, wanted in ((merged.sum, whole.sum), (merged.outer, whole.outer)):
            assert (part - wanted).abs().max() <= 1e-12 * wanted.abs().max()

    def test_equal_numpy(self):
        rows = features(100, 6, 9, shift=3)
        moments = FeatureMoments.of(rows.float())
        np.testing.assert_allclose(moments.covariance, np.cov(rows.float().double().numpy(), rowvar=False), rtol=1e-9)
        np.testing.assert_allclose(moments.mean, rows.float().double().mean(0), rtol=1e-12)

    def test_refuse_no_features(self):
        with pytest.raises(ValueError, match="at least one"):
            FeatureMoments.of(torch.zeros(0, 4))

    def test_refuse_to_merge_other_dimensions(self):
        with pytest.raises(ValueError, match="cannot be merged"):
            FeatureMoments.of(features(3, 4, 0)) + FeatureMoments.of(features(3, 5, 0))


class TestPixels:
    def test_one_rounding_rule(self):
        given = torch.tensor([-1.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 0.9999, 7.0], dtype=torch.float64)
        assert functional.to_uint8(given).tolist() == [0, 0, 2, 2, 255, 255]
        every = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(functional.to_uint8(every.float() / 255), every)
        with pytest.raises(ValueError, match="NaN"):
            functional.to_uint8(torch.tensor([torch.nan]))
        with pytest.raises(ValueError, match="int64"):
            functional.to_uint8(torch.tensor([3]))

    @pytest.mark.parity
    def test_psnr_equals_torchmetrics_image_by_image(self):
        a, b = images(70, 16, 0), images(70, 16, 1)
        expected = [
            peak_signal_noise_ratio(x.double() / 255, y.double() / 255, data_range=1.0).item()
            for x, y in zip(a, b, strict=True)
        ]
        np.testing.assert_allclose(functional.psnr(a, b), expected, rtol=1e-6)  # its constants are float32

    def test_l1_and_l2_are_means_over_pixels_of_each_image(self):
        a, b = images(70, 16, 0), images(70, 16, 1)
        difference = (a.double() - b.double()).flatten(1) / 255
        np.testing.assert_allclose(functional.l1(a, b), difference.abs().mean(1), rtol=1e-12)
        np.testing.assert_allclose(functional.l2(a, b), difference.square().mean(1), rtol=1e-12)
        np.testing.assert_allclose(10 * np.log10(1 / functional.l2(a, b)), functional.psnr(a, b), rtol=1e-12)
        assert functional.l1(a, a).max() == 0

    def test_psnr_sees_every_channel(self):
        """The published evaluation looks at red alone: a changed blue would go unseen."""
        a = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8)
        b = a.clone()
        b[:, 2] += 30
        assert functional.psnr(a, b).item() == pytest.approx(10 * math.log10(255**2 / 300))
        assert functional.psnr(a, a).item() == functional.PSNR_CEILING

    @pytest.mark.parity
    @pytest.mark.parametrize("size", [11, 32])
    def test_ssim_equals_torchmetrics_inside_its_border(self, size):
        a = images(70, size, 2)
        b = (a.float() * 0.7 + images(70, size, 3).float() * 0.3).round().to(torch.uint8)
        _, padded = structural_similarity_index_measure(
            a.double() / 255, b.double() / 255, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
        )
        expected = padded[..., 5:-5, 5:-5].flatten(1).mean(1)
        torch.testing.assert_close(functional.ssim(a, b), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parity
    def test_ssim_equals_its_formula(self):
        """Wang et al. 2004, equation 13, window by window in NumPy."""
        a, b = images(1, 13, 8), images(1, 13, 9)
        offsets = np.arange(11) - 5
        window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
        window /= window.sum()
        values = []
        for x, y in zip(a[0].numpy() / 255, b[0].numpy() / 255, strict=True):
            for top in range(3):
                for left in range(3):
                    u, v = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                    mu, mv = (window * u).sum(), (window * v).sum()
                    su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                    both = (window * (u - mu) * (v - mv)).sum()
                    upper = (2 * mu * mv + 0.01**2) * (2 * both + 0.03**2)
                    values.append(upper / ((mu**2 + mv**2 + 0.01**2) * (su + sv + 0.03**2)))
        assert functional.ssim(a, b).item() == pytest.approx(np.mean(values), rel=1e-9)

    def test_ssim_of_equal_and_of_small_images(self):
        a = images(2, 16, 4)
        torch.testing.assert_close(functional.ssim(a, a), torch.ones(2).double())
        with pytest.raises(ValueError, match="smaller than the 11-pixel"):
            functional.ssim(images(1, 8, 0), images(1, 8, 0))

    def test_shapes_must_agree(self):
        for measure in (functional.psnr, functional.ssim):
            with pytest.raises(ValueError, match="shapes must be equal"):
                measure(images(2, 16, 0), images(3, 16, 0))


class TestCodes:
    def test_codebook_statistics(self):
        uniform = functional.code_counts(torch.arange(8).repeat(5).reshape(10, 4), 16)
        assert functional.codebook_usage(uniform) == 0.5
        assert functional.entropy_bits(uniform) == pytest.approx(3)
        assert functional.perplexity(uniform) == pytest.approx(8)
        assert functional.entropy_bits(functional.code_counts(torch.zeros(3, 4), 16)) == 0
        skewed = functional.code_counts(torch.tensor([[0, 0, 0, 1]]), 2)
        assert functional.entropy_bits(skewed) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)

    @pytest.mark.parametrize("codes", [[[0, 16]], [[-1, 0]], [[]]])
    def test_refuses_codes_outside_the_codebook(self, codes):
        with pytest.raises(ValueError, match="codes"):
            functional.code_counts(torch.tensor(codes), 16)

    def test_agreement_is_counted_an_image(self):
        a = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        b = torch.tensor([[1, 2, 3, 0], [0, 0, 0, 0]])
        assert functional.code_agreement(a, b).tolist() == [0.75, 0.0]

    def test_verbatim_means_the_whole_row(self):
        training = torch.tensor([[1, 2, 3], [4, 5, 6], [4, 5, 6]])
        codes = torch.tensor([[4, 5, 6], [1, 2, 6], [3, 2, 1], [1, 2, 3]])
        assert functional.verbatim_shares([codes], [training]) == [0.5]
        assert functional.distinct_share(training) == pytest.approx(2 / 3)
        with pytest.raises(ValueError, match="cannot look for"):
            functional.verbatim_shares([codes], [training[:, :2]])


class TestNearest:
    def test_equals_brute_force(self):
        queries, references = images(70, 6, 5), images(30, 6, 6)
        (found,) = nearest_distances([queries], references)
        differences = queries.double().flatten(1).unsqueeze(1) - references.double().flatten(1)
        expected = differences.square().sum(-1).sqrt() / 255
        torch.testing.assert_close(found.distances, expected.min(1).values, rtol=1e-12, atol=0)
        assert torch.equal(found.indices, expected.argmin(1))

    def test_a_copy_is_at_exactly_zero(self):
        """Not at the rounding of large sums, by which a copy would pass for a close relative."""
        references = images(40, 16, 7)
        (found,) = nearest_distances([references[[31, 4]]], references)
        assert found.distances.tolist() == [0, 0]
        assert found.indices.tolist() == [31, 4]
        with pytest.raises(ValueError, match="cannot look for"):
            nearest_distances([references], references[:0])
