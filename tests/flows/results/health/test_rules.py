"""Rules are silent on runs that went well, and each says what it is for: on real runs that did not, and one by one."""

import re
import shlex
from pathlib import Path

import pytest

from flows.recipes.files import load_recipe
from flows.results.health.codes_and_losses import fitted
from flows.results.health.figures import Figures, Training, reachable
from flows.results.health.rules import RULES, SETTINGS, findings
from flows.results.types import ConfusionMatrix, Finding

RUNS = Path(__file__).parent / "runs"  # what `flows.report.figures.figures_of` collected of real runs, rounded


def figures_of(run: str) -> Figures:
    return Figures.model_validate_json((RUNS / f"{run}.json").read_text())


@pytest.fixture(scope="module")
def healthy() -> Figures:
    return figures_of("digits")


def found_in(figures: Figures) -> set[str]:
    return {one.rule for one in findings(figures)}


@pytest.mark.parametrize("run", ["digits", "digits_maskgit"])
def test_nothing_is_found_in_a_run_that_went_well(run):
    figures = figures_of(run)
    assert findings(figures) == ()
    assert len(figures.trainings) == 6
    assert {"real.psnr_mean_image", "codebook.perplexity_training", "real.class_agreement"} <= figures.metrics.keys()
    assert figures.sweep
    assert figures.real_confusion


@pytest.mark.parametrize(
    ("run", "rules"),
    [
        ("digits_third", ["behind-teacher", "classes-missing"]),
        (
            "digits_tenth",
            [
                "codebook", "reconstructions-blind", "copies", "classes-ignored",
                "behind-teacher", "still-falling", "guidance", "guidance",
            ],
        ),
        (
            "small64_60_steps",
            [
                "teacher-codebook", "codebook", "reconstructions-blind", "copies", "classes-ignored",
                "behind-teacher", "still-falling",
            ],
        ),
    ],
)  # fmt: skip
def test_too_few_steps_are_told_by_what_they_left_undone(run, rules):
    """The run on own images reported one brown square for every picture, and Completed."""
    assert [one.rule for one in findings(figures_of(run))] == rules


def with_metrics(figures: Figures, **values: float) -> Figures:
    named = {name.replace("__", ".", 1).replace("_at_", "@"): value for name, value in values.items()}
    assert named.keys() <= figures.metrics.keys()
    return figures.model_copy(update={"metrics": figures.metrics | named})


def with_training(figures: Figures, stage: str, **changes: object) -> Figures:
    changed = figures.trainings[stage].model_copy(update=changes)
    return figures.model_copy(update={"trainings": figures.trainings | {stage: changed}})


def with_last(figures: Figures, stage: str, **values: float) -> Figures:
    *lines, last = figures.trainings[stage].lines
    return with_training(figures, stage, lines=(*lines, last | values))


def with_losses(figures: Figures, stage: str, losses: list[float]) -> Figures:
    lines = tuple({"step": 10.0 * (at + 1), "loss": loss} for at, loss in enumerate(losses))
    return with_training(figures, stage, lines=lines)


def over_fitted(figures: Figures) -> Figures:
    lines = tuple(
        line | {"val_nll": line["val_nll"] + 0.1 * max(0.0, line["step"] - 300) / 50} if "val_nll" in line else line
        for line in figures.trainings["train_generator"].lines
    )
    return with_training(figures, "train_generator", lines=lines)


def without_guidance(figures: Figures) -> Figures:
    return figures.model_copy(
        update={
            "sweep": tuple(
                point.model_copy(update={"class_accuracy": 0.4}) if point.generator == "masked" else point
                for point in figures.sweep
            )
        }
    )


def without_a_class(figures: Figures) -> Figures:
    assert figures.confusion
    rows = [list(row) for row in figures.confusion.counts]
    rows[7][1] += rows[7][7]
    rows[7][7] = 0
    return figures.model_copy(update={"confusion": ConfusionMatrix(counts=tuple(map(tuple, rows)))})


AILING = {
    "teacher-codebook": lambda f: with_last(f, "teacher", val_code_usage=0.2),
    "teacher-blind": lambda f: with_last(f, "teacher", val_psnr=13.0),
    "codebook": lambda f: with_metrics(f, codebook__perplexity_training=63.0),
    "reconstructions-blind": lambda f: with_metrics(f, reconstruction__psnr_at_8=13.0),
    "behind-teacher": lambda f: with_last(f, "fine_tune", val_psnr=19.5),
    "still-falling": lambda f: with_losses(f, "align", [2 - 0.02 * at + 0.01 * (at % 2) for at in range(40)]),
    "over-fitting": over_fitted,
    "generator-blind": lambda f: with_training(f, "train_generator", metrics={"val_nll": 3.48, "frequency_nll": 3.49}),
    "copies": lambda f: with_metrics(f, generation__verbatim_share=0.06),
    "classes-ignored": lambda f: with_metrics(f, generation__class_agreement=0.3),
    "guidance": without_guidance,
    "classes-missing": without_a_class,
}


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_rule_says_what_it_is_for_and_nothing_else(rule, healthy):
    (finding,) = findings(AILING[rule](healthy))
    assert finding.rule == rule
    assert finding.severity == next(one.severity for one in RULES if one.name == rule)
    assert finding.evidence
    assert finding.remedies


def test_nothing_is_said_of_what_was_not_measured():
    assert findings(Figures()) == ()
    assert findings(Figures(metrics={"reconstruction.psnr@8": 3.0}, class_names=("a",))) == ()


def test_serious_findings_come_first(healthy):
    figures = with_metrics(without_guidance(healthy), generation__verbatim_share=0.5)
    assert [one.severity for one in findings(figures)] == ["serious", "minor"]


def test_a_codebook_is_not_blamed_for_few_images():
    """Of 10 images of 32 codes, not more than 320 of 8,192 can be in use."""
    assert reachable(8192, 320) == pytest.approx(320 / 8192, rel=0.03)
    assert reachable(256, 10**6) == 1
    lines = ({"step": 10.0, "val_code_usage": 0.03},)
    few = Figures(trainings={"align": Training(lines=lines, steps=10, reachable=reachable(8192, 320))})
    assert findings(few) == ()
    assert found_in(Figures(trainings={"align": Training(lines=lines, steps=10)})) == {"codebook"}
    assert findings(with_metrics(figures_of("digits"), codebook__perplexity_training=65.0)) == ()


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 0.5, 0.25, *[0.2, 0.21, 0.19] * 10],  # flat
        [1.0 - 0.001 * (at % 7) for at in range(60)],  # noise
        [1.0, 0.9, 0.8],  # too few lines
        [0.5 + 0.01 * at for at in range(40)],  # rising
    ],
)
def test_a_loss_that_does_not_fall_surely_is_not_falling(losses, healthy):
    assert findings(with_losses(healthy, "align", losses)) == ()


def test_a_fitted_line_has_the_standard_error_of_textbooks():
    fall, noise, end = fitted([5.0, 4.0, 3.0, 2.0])
    assert (fall, noise, end) == pytest.approx((3, 0, 2))
    fall, noise, _ = fitted([5.0, 4.5, 3.0, 2.0])
    assert (fall, noise) == pytest.approx((3.15, 3 * 0.13229), rel=1e-3)


def test_weights_that_are_kept_are_named(healthy):
    (finding,) = findings(over_fitted(healthy))
    assert finding.stage == "train_generator"
    assert "val_nll of held-out images was best at step 300" in finding.sentence
    assert "kept are those of step 300" in finding.sentence
    assert "stop there with `--set train_generator.steps=300`" in finding.remedies


def test_classes_that_the_reader_does_not_know_are_not_missed(healthy):
    figures = without_a_class(healthy)
    assert found_in(figures) == {"classes-missing"}
    rows = [list(row) for row in figures.real_confusion.counts]
    rows[7][1], rows[7][7] = rows[7][1] + rows[7][7], 0
    unknown = ConfusionMatrix(counts=tuple(map(tuple, rows)))
    assert findings(figures.model_copy(update={"real_confusion": unknown})) == ()


def test_guidance_is_not_judged_by_too_few_samples(healthy):
    few = tuple(point.model_copy(update={"samples": 4}) for point in without_guidance(healthy).sweep)
    assert findings(healthy.model_copy(update={"sweep": few})) == ()


def settings_in(found: tuple[Finding, ...]) -> list[str]:
    code = [part for one in found for text in one.remedies for part in re.findall(r"`(--set [^`]*)`", text)]
    return [word for part in code for word in shlex.split(part) if word != "--set"]


def test_remedies_are_settings_that_recipes_take(healthy):
    every = [one for change in AILING.values() for one in findings(change(healthy))]
    settings = settings_in(tuple(every))
    assert "warm_up.training.steps=1600" in settings
    assert (
        "train_generator.class_dropout=0.2" not in settings
    )  # of the second generator, whose guidance is without effect
    assert "evaluate.sweep.train_generator.class_dropout=0.2" in settings
    for setting in settings:
        load_recipe("digits", overrides=[setting])
    for section in SETTINGS.values():
        load_recipe("digits", overrides=[f"{section}.keep=best"])
