"""The evaluate stage on real digits without models: figures where the truth is known."""

import dataclasses

import numpy as np
import pytest
import torch

from flows.evaluation.evaluate import evaluate
from flows.evaluation.gallery import png
from flows.recipes.schema import EvaluateConfig
from flows.results.types import EvaluationReport
from sftok.evaluation.meters import ReconstructionBatch
from sftok.metrics.functional import PSNR_CEILING
from tests.support.sample_evaluation import digits_inputs

CONFIG = EvaluateConfig(steps=(1, 4), class_reader=True)


@pytest.fixture(scope="module")
def evaluated():
    return evaluate(digits_inputs(), CONFIG, seed=0)


@pytest.fixture(scope="module")
def metrics(evaluated):
    return evaluated.report.metrics()


def test_more_steps_that_repair_more_score_better(metrics):
    for name in ("psnr", "ssim", "code_agreement"):
        assert metrics[f"reconstruction.{name}@4"] > metrics[f"reconstruction.{name}@1"]
    assert metrics["reconstruction.fd_random@4"] < metrics["reconstruction.fd_random@1"]


def test_perfect_reconstructions_get_perfect_figures():
    inputs = digits_inputs()
    codes = torch.zeros(len(inputs.val_images), 64, dtype=torch.int64)

    def originals(num_steps, rows=None):
        chosen = slice(None) if rows is None else rows
        yield ReconstructionBatch(inputs.val_images[chosen], codes[chosen], codes[chosen])

    perfect = dataclasses.replace(inputs, reconstruct=originals)
    metrics = evaluate(perfect, CONFIG, seed=0).report.metrics()
    assert metrics["reconstruction.psnr@4"] == PSNR_CEILING
    assert metrics["reconstruction.ssim@4"] == pytest.approx(1)
    assert metrics["reconstruction.code_agreement@4"] == 1
    assert metrics["reconstruction.fd_random@4"] == pytest.approx(0, abs=1e-10)
    assert metrics["reconstruction.class_agreement@4"] == metrics["real.class_agreement"]


def test_class_agreement_and_its_control(evaluated, metrics):
    assert metrics["real.class_agreement"] > 0.9
    assert metrics["generation.class_agreement"] > 0.9
    assert 0.02 < metrics["generation.class_agreement_shuffled"] < 0.25
    counts = np.array(evaluated.report.generation.confusion.counts)
    assert counts.sum() == 200
    assert counts.trace() / 200 == pytest.approx(metrics["generation.class_agreement"])
    real = np.array(evaluated.report.generation.real_confusion.counts)
    assert real.sum(1).tolist() == torch.bincount(digits_inputs().val_labels, minlength=10).tolist()
    assert real.trace() / 100 == pytest.approx(metrics["real.class_agreement"])


def test_the_mean_image_is_a_floor_of_reconstructions(metrics):
    inputs = digits_inputs()
    mean = inputs.train_images.double().mean(0).round()
    errors = (inputs.val_images.double() - mean).square().mean((1, 2, 3))
    assert metrics["real.psnr_mean_image"] == pytest.approx((10 * torch.log10(255**2 / errors)).mean().item(), abs=1e-3)
    assert metrics["real.psnr_mean_image"] < metrics["reconstruction.psnr@4"]


def test_copied_codes_are_counted(metrics):
    """20 of the 200 samples carry codes of training images."""
    assert metrics["generation.verbatim_share"] == pytest.approx(0.1)
    assert metrics["real.verbatim_share"] == 0


def test_copied_pixels_are_found():
    inputs = digits_inputs()
    copied = dataclasses.replace(inputs, decode_samples=lambda: [inputs.train_images[:200]])
    report = evaluate(copied, CONFIG, seed=0).report
    assert report.metrics()["generation.nearest_distance"] == 0
    assert report.metrics()["real.nearest_distance"] > 1
    assert {row.pictures[1].caption for row in report.generation.neighbours.rows} == {"0.00"}


def test_every_figure_states_its_protocol(evaluated):
    for score in evaluated.report.scores():
        protocol = score.protocol
        assert protocol.num_images in (100, 200, 600), score.name
        assert protocol.seeds == {"run": 0, "evaluate": 0, "features": 0}, score.name
        assert protocol.definition, score.name
        if score.name.startswith("generation."):
            assert (protocol.cfg_scale, protocol.sample_temperature, protocol.num_steps) == (2, 1, 8), score.name
        if "fd_random" in score.name:
            assert protocol.extractor.startswith("random-conv/1"), score.name
            assert len(protocol.extractor_sha256) == 64, score.name


def test_random_features_are_never_called_fid(evaluated):
    for score in evaluated.report.scores():
        assert "fid" not in score.name
        assert "FID" not in score.label
        assert ("FD (random features)" in score.label) == ("fd_random" in score.name)


def test_same_seed_same_report(evaluated):
    again = evaluate(digits_inputs(), CONFIG, seed=0)
    assert again.report == evaluated.report
    assert again.images == evaluated.images
    other = evaluate(digits_inputs(), CONFIG, seed=1).report.metrics()
    assert other["generation.class_agreement"] == evaluated.report.metrics()["generation.class_agreement"]


def test_report_survives_json(evaluated):
    assert EvaluationReport.model_validate_json(evaluated.report.model_dump_json()) == evaluated.report


def test_pictures_are_balanced_and_all_there(evaluated):
    report = evaluated.report
    assert [row.title for row in report.reconstruction.gallery.rows] == list("0123456789")
    assert report.reconstruction.gallery.columns == ("original", "1 step", "4 steps")
    assert all(len(row.pictures) == 10 for row in report.generation.gallery.rows)
    assert {picture.file for picture in report.pictures()} == set(evaluated.images)
    assert all(image.startswith(b"\x89PNG") for image in evaluated.images.values())


def test_a_sample_beside_its_neighbour_takes_no_other_samples_picture():
    """Where only some samples are compared with training images, these are numbered among all, as in the gallery."""
    inputs = digits_inputs()
    samples = torch.cat(list(inputs.decode_samples()))
    made = evaluate(inputs, CONFIG.model_copy(update={"nearest_images": 15}), seed=0)
    names = [name for name in made.images if name.startswith("samples/")]
    assert len(names) > 15
    for name in names:
        assert made.images[name] == png(samples[int(name[len("samples/") : -len(".png")])]), name


def test_progress_is_reported():
    seen = []
    evaluate(digits_inputs(), CONFIG, seed=0, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_without_a_class_reader_and_without_labels():
    """Images without classes have pictures and figures, but no class agreement."""
    inputs = digits_inputs()
    unlabelled = dataclasses.replace(
        inputs,
        class_names=(),
        train_labels=torch.full_like(inputs.train_labels, -1),
        val_labels=torch.full_like(inputs.val_labels, -1),
        sample_classes=np.full(200, -1),
    )
    report = evaluate(unlabelled, EvaluateConfig(steps=(2,)), seed=0).report
    assert report.generation.confusion is None
    assert not any("class_agreement" in name for name in report.metrics())
    assert {row.title for row in report.reconstruction.gallery.rows} == {"no class"}
    with pytest.raises(ValueError, match=r"evaluate\.class_reader=false"):
        evaluate(unlabelled, CONFIG, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"val_codes": np.asarray(i.val_codes)[:-1]}, r"val: .*'codes': 99.* one for one"),
        (lambda i: {"train_images": i.train_images[:1], "train_labels": i.train_labels[:1]}, "too few"),
        (lambda _: {"sample_classes": np.zeros(3)}, "sample: .*one for one"),
        (lambda i: {"decode_samples": lambda: [i.train_images[:3]]}, "3 decoded samples, but 200 sample classes"),
        (
            lambda i: {"reconstruct": lambda _: [ReconstructionBatch(i.val_images[:5], *[torch.zeros(5, 1)] * 2)]},
            "reconstructions have shape",
        ),
        (
            lambda i: {
                "reconstruct": lambda _: [ReconstructionBatch(i.val_images * torch.nan, *[torch.zeros(100, 1)] * 2)]
            },
            "NaN",
        ),
    ],
)
def test_refuses_what_does_not_belong_together(change, message):
    inputs = digits_inputs()
    with pytest.raises(ValueError, match=message):
        evaluate(dataclasses.replace(inputs, **change(inputs)), EvaluateConfig(), seed=0)


@pytest.mark.gpu
def test_figures_on_cuda_are_those_of_the_cpu(metrics):
    """Shares and distances of pixels to the rounding of float64; distances of float32 features to theirs."""
    inputs = digits_inputs()

    def on_cuda(num_steps, rows=None):
        for part in inputs.reconstruct(num_steps, rows):
            yield ReconstructionBatch(*(values.cuda() for values in part))

    there = dataclasses.replace(
        inputs,
        device="cuda",
        reconstruct=on_cuda,
        decode_samples=lambda: (part.cuda() for part in inputs.decode_samples()),
    )
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        found = evaluate(there, CONFIG, seed=0).report.metrics()
    finally:
        torch.backends.cudnn.allow_tf32 = kept
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-3 if "fd_random" in name else 1e-9), name
