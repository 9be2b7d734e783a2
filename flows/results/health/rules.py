"""Rules that say that a run learnt nothing, or less than it could: limits and remedies as data, in one table.

`findings` walks `RULES`, whose order is that of causes: what comes first may be why the rest is as it is. A rule whose
figures were not measured says nothing. Limits were held against the runs in `tests/flows/results/health/runs`.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from flows.results.health.cases import Case, Limits
from flows.results.health.codes_and_losses import (
    codes,
    no_better_than_frequencies,
    over_fitted,
    still_falling,
    teacher_codes,
)
from flows.results.health.figures import Figures
from flows.results.health.images_and_samples import (
    behind_teacher,
    blind,
    blind_teacher,
    classes_ignored,
    classes_missing,
    copies,
    guidance_without_effect,
)
from flows.results.types import Finding

SETTINGS = {  # where a recipe holds each training
    "teacher": "teacher.training",
    "warm_up": "warm_up.training",
    "align": "align.training",
    "fine_tune": "fine_tune.training",
    "train_generator": "train_generator",
    "train_second_generator": "evaluate.sweep.train_generator",
}
LONGER = {"serious": 4, "minor": 2}  # times the steps that a training had


class Limit(NamedTuple):
    """A threshold of a rule."""

    value: float
    meaning: str
    source: str
    """where the value comes from: measured runs, or reasoning."""


class Rule(NamedTuple):
    """A rule: what it says, from which limits on, and what to try."""

    name: str
    severity: Literal["serious", "minor"]
    says: str
    limits: dict[str, Limit]
    judge: Callable[[Figures, Limits], Iterator[Case]]
    remedies: tuple[str, ...]
    """Markdown. {longer}: settings of more steps; {section}: where the training's settings are; {best}: the step of its
    best validation; {fewer}: a quarter of the codes."""
    live_from: float | None = None
    """share of a training from which on its validations are judged; None: only once it has ended."""


# From half of the steps on: while it warms up, digits uses 0.07 of the codes after a fifth, 0.4 after a quarter, 0.9
# after half, and the teacher's unused codes are replaced until then.
_SETTLED = 0.5
_CODES = Limit(
    0.25,
    "of the codes that would be in use if all were equally likely",
    "two bits less in every code; digits 0.98, a third of its steps 0.66, a tenth 0.08, small64_60_steps 0.02; "
    "teachers 0.75, 0.81, 0.47, 0.09",
)
_GAIN = Limit(
    1.0,
    "dB of PSNR above the mean training image",
    "a fifth less error; digits 9.8, a third of its steps 2.6, a tenth -0.2, small64_60_steps 0; teachers 4.5 to 15.1",
)
_SHOWN = Limit(
    0.25,
    "of the way from guessing to the accuracy on real images",
    "three of four samples may show any class; digits 0.98, digits_maskgit 1.02, a third of the steps 0.54, a tenth 0, "
    "small64_60_steps 0",
)

RULES = (
    Rule(
        "teacher-codebook",
        "serious",
        "The teacher uses few of its codes.",
        {"share": _CODES},
        teacher_codes,
        (
            "train the teacher longer with `{longer}`",
            "replace unused codes more often with `--set teacher.restart_every=20`",
        ),
        live_from=_SETTLED,
    ),
    Rule(
        "teacher-blind",
        "serious",
        "The teacher's reconstructions hardly depend on the image.",
        {"gain": _GAIN},
        blind_teacher,
        (
            "train the teacher longer with `{longer}`",
            "look at reconstructions.png of the teacher's artifact",
        ),
    ),
    Rule(
        "codebook",
        "serious",
        "The tokenizer uses few of its codes.",
        {"share": _CODES},
        codes,
        (
            "train the tokenizer longer with `{longer}`",
            "take fewer codes with `--set tokenizer.codebook_size={fewer}`",
            "start narrow transformers from larger weights with `--set tokenizer.encoder.init_std=0.08`",
        ),
        live_from=_SETTLED,
    ),
    Rule(
        "reconstructions-blind",
        "serious",
        "Reconstructions hardly depend on the image.",
        {"gain": _GAIN},
        blind,
        ("train the tokenizer longer with `{longer}`", "see to the findings before this one first, if there are any"),
    ),
    Rule(
        "behind-teacher",
        "minor",
        "The tokenizer keeps little of what its teacher gains over the mean image.",
        {
            "kept": Limit(
                0.5,
                "of the teacher's gain in dB over the mean training image",
                "half of the decibels; digits 0.65, a third of its steps 0.25, a tenth below 0, small64_60_steps 0",
            )
        },
        behind_teacher,
        ("align longer with `{longer}`", "give an image more codes with `--set tokenizer.num_latent_tokens=64`"),
    ),
    Rule(
        "still-falling",
        "minor",
        "A loss is still falling when its training ends.",
        {
            "part": Limit(
                0.25, "of the log is its last part", "the learning rate is low there: most of the fall is over"
            ),
            "speed": Limit(
                0.4,
                "of its mean speed over the whole log at which the loss falls there",
                "digits 0.20 at most, the teacher of small64_60_steps 0.52",
            ),
            "noise": Limit(
                3.0,
                "standard errors of that fall",
                "noise reaches it in one long log of 700; digits 2.4 at most, the teacher of small64_60_steps 6.8",
            ),
        },
        still_falling,
        ("train longer with `{longer}`",),
    ),
    Rule(
        "over-fitting",
        "minor",
        "Held-out images got worse while the training's loss fell.",
        {
            "dB": Limit(0.5, "dB of PSNR", "what the gate of digits allows"),
            "%": Limit(0.02, "of the codes that agree with the teacher's", "what the gate of digits allows of a share"),
            "nats": Limit(0.05, "nats a code", "5 % of the perplexity; in digits it never rises"),
        },
        over_fitted,
        (
            "stop there with `--set {section}.steps={best}`",
            "keep the best weights with `--set {section}.keep=best`",
            'show a generator more views of an image with `--set \'encode.variants=["center","flip"]\'`',
        ),
        live_from=0.0,
    ),
    Rule(
        "generator-blind",
        "serious",
        "A generator predicts held-out codes no better than class-and-position frequencies.",
        {
            "margin": Limit(
                0.025,
                "nats a code below the frequencies",
                "the standard error over digits' 347 held-out images; digits 0.67 below, its masked generator 0.12",
            )
        },
        no_better_than_frequencies,
        ("train the generator longer with `{longer}`", "see to the findings before this one first, if there are any"),
    ),
    Rule(
        "copies",
        "serious",
        "Samples repeat the codes of training images.",
        {
            "share": Limit(
                0.05,
                "of the samples",
                "one of twenty; digits, digits_maskgit and a third of the steps 0 of 1,000, a tenth 0.80, "
                "small64_60_steps 0.31",
            )
        },
        copies,
        (
            "see to the findings before this one first, if there are any",
            'train on more images, or show the generator more views with `--set \'encode.variants=["center","flip"]\'`',
            "train the generator for fewer steps, or with `--set generator.dropout=0.2`",
        ),
    ),
    Rule(
        "classes-ignored",
        "serious",
        "Samples hardly show the class that is meant.",
        {"shown": _SHOWN},
        classes_ignored,
        ("train the generator longer with `{longer}`", "guide more strongly with `--set sample.cfg_scale=4`"),
    ),
    Rule(
        "guidance",
        "minor",
        "Guidance does not make samples more accurate.",
        {
            "noise": Limit(
                2.0,
                "standard errors that the accuracy gains over a sweep, where there is room for twice that",
                "noise reaches it in one sweep of 40; digits 4.6 and 5.5, a tenth of its steps 0",
            )
        },
        guidance_without_effect,
        (
            "let the generator see more rows without a class with `--set {section}.class_dropout=0.2`",
            "train the generator longer with `{longer}`",
        ),
    ),
    Rule(
        "classes-missing",
        "minor",
        "Some classes are never drawn right, though the class reader knows them on real images.",
        {
            "right": Limit(
                0.05,
                "of a class's samples that are read as that class",
                "one of twenty; digits 0.89 at least, the 7 of a third of its steps 0.01",
            ),
            "fewest": Limit(
                5, "samples of a class", "of a class that is right half of the time, none of 5 is 3 % likely"
            ),
            "shown": _SHOWN,
        },
        classes_missing,
        ("guide more strongly with `--set sample.cfg_scale=4`", "train the generator longer with `{longer}`"),
    ),
)


def findings(figures: Figures, *, done: float | None = None) -> tuple[Finding, ...]:
    """Judge figures by all rules, or those of a training that has `done` a share of its steps by the live ones.

    Returns:
        Serious findings before minor ones, each in the order of the rules.
    """
    rules = [rule for rule in RULES if done is None or (rule.live_from is not None and done >= rule.live_from)]
    found = [_finding(rule, case, figures) for rule in rules for case in judged(rule, figures)]
    return tuple(sorted(found, key=lambda one: one.severity != "serious"))


def judged(rule: Rule, figures: Figures) -> Iterator[Case]:
    """Yield what a rule finds in figures."""
    return rule.judge(figures, {name: limit.value for name, limit in rule.limits.items()})


def _finding(rule: Rule, case: Case, figures: Figures) -> Finding:
    fewer = max(figures.codebook_size // 4, 2)
    words = {"section": SETTINGS.get(case.stage, "SECTION"), "best": case.best, "fewer": fewer}
    words["longer"] = "` `".join(
        f"--set {SETTINGS[stage]}.steps={LONGER[rule.severity] * figures.trainings[stage].steps}"
        for stage in case.longer
        if stage in figures.trainings
    )
    return Finding(
        rule=rule.name,
        severity=rule.severity,
        stage=case.stage,
        sentence=case.sentence,
        evidence=case.evidence,
        remedies=tuple(text.format(**words) for text in rule.remedies if words["longer"] or "{longer}" not in text),
    )
