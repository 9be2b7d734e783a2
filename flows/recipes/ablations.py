"""Ablations: arms of one recipe that differ in their overrides and in nothing else.

Held equal in all arms: images, augmentation and teacher; the steps, batches and micro-batches of warming up and of
alignment, and with the same seed the images and augmentations of every step; decoding and evaluation. An arm without
warming up spends the steps of warming up on its alignment, from random weights (`warm_up.replacement` and
`warm_up.from_scratch`), so that its learning rate schedule restarts where that of the other arms does.

`align.from_scratch` would not do: a single long stage sees other batches from the first step of alignment on, where the
other arms, with two stages, restart the order of the images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from flows.recipes.files import load_recipe
from flows.recipes.registry import RECIPES
from flows.recipes.schema import Recipe
from infra.config import Config

# Sections that an arm may change; everything else of a recipe is the same in every arm.
FREE = ("tokenizer", "warm_up", "align")
# Fields of these that must not differ either: they decide the number of steps, and which images a step sees.
HELD = (
    "warm_up.training.steps",
    "warm_up.training.batch_size",
    "warm_up.training.micro_batch",
    "align.training.steps",
    "align.training.batch_size",
    "align.training.micro_batch",
    "align.from_scratch",
)


class Arm(Config):
    """A variant of the base recipe."""

    overrides: tuple[str, ...] = Field((), description="section.field=value, on top of the base recipe")
    published: str = Field("", description="rFID that the paper reports for this arm; empty: none")
    note: str = Field("", description="what the published figure leaves open")


class AblationConfig(Config):
    """Configuration of an ablation: arms, base recipe, seeds."""

    name: str
    description: str = ""
    base: str = Field(description="a recipe's name or TOML file")
    overrides: tuple[str, ...] = Field((), description="section.field=value of the base, for every arm")
    arms: dict[str, Arm] = Field(description="two or more, by their names in tables and charts")
    reference: str = Field(description="the arm that the others are compared with")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="every arm is trained once per seed")
    steps: tuple[PositiveInt, ...] = Field((1, 2, 4, 8, 16), description="numbers of decoding steps to evaluate")


class ResolvedArm(Config):
    """An arm with its whole recipe."""

    name: str
    recipe: Recipe
    overrides: tuple[str, ...]
    published: str
    note: str


class Ablation(Config):
    """An ablation ready to run: whole recipes, checked to differ only where arms may differ."""

    name: str
    description: str
    arms: tuple[ResolvedArm, ...]
    reference: str
    seeds: tuple[int, ...]

    @property
    def base(self) -> Recipe:
        """Return the first arm's recipe under the ablation's name, for what is the same in every arm."""
        return self.arms[0].recipe.model_copy(update={"name": self.name, "description": self.description})

    def on(self, device: str) -> "Ablation":
        """Resolve the device of every arm, and the settings that depend on it."""
        arms = (arm.model_copy(update={"recipe": arm.recipe.on(device)}) for arm in self.arms)
        return self.model_copy(update={"arms": tuple(arms)})

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            given = ",".join(map(str, seeds)) or "none"
            raise ValueError(f"seeds = {given}: name each once and at least one, from 0 on, such as 0,1,2")
        return seeds

    @model_validator(mode="after")
    def _arms_differ_where_they_may(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(names) < 2:
            raise ValueError(f"arms = {', '.join(names) or 'none'}: an ablation compares two at least; add one")
        if self.reference not in names:
            raise ValueError(f"reference = {self.reference!r} is not an arm: name one of {', '.join(names)}")
        first, *others = self.arms
        for at, arm in enumerate(others, 1):
            _check_equal(first, arm)
            for other in self.arms[:at]:
                if other.recipe == arm.recipe:
                    raise ValueError(f"arms {other.name!r} and {arm.name!r} are the same recipe: remove one of them")
        return self


def _check_equal(first: ResolvedArm, arm: ResolvedArm) -> None:
    """Check that an arm trains for as many steps and on the same images as the first one."""
    one, other = _flat(first.recipe.as_json()), _flat(arm.recipe.as_json())
    for path in sorted(one.keys() | other.keys()):
        is_held = path in HELD or path.split(".")[0] not in FREE
        if is_held and one.get(path) != other.get(path):
            remedy = (
                "to train without warming up, set warm_up.replacement as align's and warm_up.from_scratch=true"
                if path == "align.from_scratch"
                else f"change it in every arm, with --set {path}=..."
            )
            raise ValueError(
                f"arm {arm.name!r}: {path} = {other.get(path)}, arm {first.name!r} has {one.get(path)}: arms "
                f"train on the same images for the same number of steps; {remedy}"
            )


def _flat(values: Mapping[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    """Flatten nested values to dotted paths."""
    found: dict[str, JsonValue] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def resolve(config: AblationConfig, *, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Ablation:
    """Resolve the recipes of an ablation's arms, with the user's overrides in every arm.

    Raises:
        ValueError: one line that names the arm, the field and what is wrong.
    """
    common = (*config.overrides, f"evaluate.steps={list(config.steps)}", *overrides)
    load_recipe(config.base, overrides=common)  # an error in the base is not an arm's
    arms = []
    for name, arm in config.arms.items():
        try:
            recipe = load_recipe(config.base, overrides=(*common, *arm.overrides))
        except ValueError as error:
            raise ValueError(f"arm {name!r}: {error}") from error
        values = {"overrides": arm.overrides, "published": arm.published, "note": arm.note}
        arms.append(ResolvedArm.model_validate({"name": name, "recipe": recipe, **values}))
    chosen = config.seeds if seeds is None else tuple(seeds)
    head = {"name": config.name, "description": config.description, "reference": config.reference}
    try:
        return Ablation.model_validate({**head, "arms": arms, "seeds": chosen})
    except ValueError as error:
        raise ValueError(f"ablation {config.name}: {_message(error)}") from None


def _message(error: ValueError) -> str:
    """Return a validator's message, without pydantic's frame."""
    errors = getattr(error, "errors", None)
    return errors()[0]["msg"].removeprefix("Value error, ") if callable(errors) else str(error)


def load_ablation(name: str, *, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Ablation:
    """Load the ablation called `name`, or apply the paper's arms to the recipe or TOML file of that name.

    Raises:
        ValueError: one line that names what is wrong.
    """
    if name in ABLATIONS:
        return resolve(ABLATIONS[name](), overrides=overrides, seeds=seeds)
    if name not in RECIPES and not name.endswith(".toml") and "/" not in name:
        known = ", ".join(sorted(ABLATIONS))
        raise ValueError(f"unknown ablation {name!r}; known: {known}, and any recipe of `sftok recipes` or .toml file")
    return resolve(paper_ablation(name), overrides=overrides, seeds=seeds)


# --- ablations -------------------------------------------------------------------------------------------------------


def paper_arms() -> dict[str, Arm]:
    """Return the arms of the paper's two ablations: SFVR and warming up, and the replacement ratio; both have SFVR.

    The paper does not say whether its vanilla replacement was warmed up; both variants are trained here.
    """
    return {
        "SFVR": Arm(
            overrides=("align.replacement=self_forcing", "align.replace_prob=1.0"),
            published="4.33",
            note="warmed up, ratio 1.0: the whole method",
        ),
        "SFVR without warming up": Arm(
            overrides=(
                "align.replacement=self_forcing",
                "align.replace_prob=1.0",
                "warm_up.replacement=self_forcing",
                "warm_up.replace_prob=1.0",
                "warm_up.from_scratch=true",
            ),
            published="4.40",
        ),
        "SFVR at ratio 0.8": Arm(
            overrides=("align.replacement=self_forcing", "align.replace_prob=0.8"), published="4.59"
        ),
        "SFVR at ratio 0.5": Arm(
            overrides=("align.replacement=self_forcing", "align.replace_prob=0.5"), published="4.96"
        ),
        "vanilla": Arm(
            overrides=("align.replacement=ground_truth",),
            published="6.47",
            note="the paper does not say whether it was warmed up",
        ),
        "vanilla without warming up": Arm(
            overrides=(
                "align.replacement=ground_truth",
                "warm_up.replacement=ground_truth",
                "warm_up.from_scratch=true",
            ),
        ),
    }


def paper_ablation(base: str) -> AblationConfig:
    """Apply the paper's arms to any recipe and data: `sftok ablation small64 --data DIR`."""
    stem = base.rpartition("/")[2].removesuffix(".toml")
    return AblationConfig(
        name=f"{stem}_ablation",
        description=f"replacement, warming up and replacement ratio on {stem}",
        base=base,
        arms=paper_arms(),
        reference="SFVR",
    )


def digits_ablation() -> AblationConfig:
    """The paper's ablations on handwritten digits: `sftok ablation digits_ablation`.

    Six arms with three seeds, under 15 minutes on two cores. Expected: six tokenizers per seed, trained on the same
    batches for the same number of steps, and a page that compares them; which one is best is not claimed.
    """
    return paper_ablation("digits").model_copy(
        update={
            "name": "digits_ablation",
            "description": "replacement, warming up and replacement ratio on scikit-learn's handwritten digits",
            "overrides": ("warm_up.training.steps=250", "align.training.steps=400"),
        }
    )


ABLATIONS: dict[str, Callable[[], AblationConfig]] = {"digits_ablation": digits_ablation}
