"""Count the memory that each training of a run takes on its GPUs, and refuse one that cannot fit, with what would.

A training whose blocks are compiled keeps less than is counted, by an amount that the compiler decides: it is refused
only if it would not fit with half of the activations.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from pydantic import JsonValue

from flows.pipeline.space import MAX_CLASSES
from flows.recipes.files import with_overrides
from flows.recipes.schema import Recipe
from flows.results.health.rules import SETTINGS
from flows.store.inventory import size_text
from infra.training.config import divisors
from infra.training.memory import RESERVED, MemoryNeed

RANKS_PER_NODE = 8  # assumed
NAMED = 3  # parts of a need that an error names
# What compiled blocks keep at least, of what plain ones keep: torch's partitioner kept 56 to 100 % of it, measured on a
# CPU for the blocks of all networks.
COMPILED = 0.5
MEMORY_SOURCE = (
    "a GPU's memory of a training is counted: tensors of a pass, without workspaces of libraries; compiled, it is less"
)


class Card(NamedTuple):
    """The memory of the GPUs that a run computes on."""

    bytes: int | None = None
    """of the smallest one; None: unknown."""
    place: str = "unknown"
    """whose GPUs they are."""

    def __str__(self) -> str:
        """Say how much, and of what."""
        return "unknown" if self.bytes is None else f"{size_text(self.bytes)}, {self.place}"


UNKNOWN = Card()


class Ranked(NamedTuple):
    """A recipe with the ranks that train it."""

    recipe: Recipe
    """with the settings that a GPU decides."""
    ranks: int = 1

    @classmethod
    def on_gpus(cls, recipe: Recipe, ranks: int) -> "Ranked":
        """Return a recipe as GPUs would train it."""
        return cls(recipe.on("cuda"), ranks)

    def changed(self, *overrides: str, ranks: int | None = None) -> "Ranked":
        """Return it with settings changed.

        Raises:
            ValueError: a setting does not fit.
        """
        recipe = with_overrides(self.recipe, overrides) if overrides else self.recipe
        return self._replace(recipe=recipe, ranks=ranks or self.ranks)


class Remedy(NamedTuple):
    """A change with which a training fits."""

    overrides: tuple[str, ...]
    ranks: int | None = None
    """None: as many as before."""

    def __str__(self) -> str:
        """Say what to set."""
        settings = " and ".join(self.overrides)
        return settings if self.ranks is None else f"{settings} with --ranks {self.ranks}"


class StageMemory(NamedTuple):
    """What a training takes on a GPU."""

    need: MemoryNeed
    least: MemoryNeed
    """where its blocks are compiled, what it takes in any case; else the same."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return all parts, with their sum."""
        return {"total": self.need.total, "least": self.least.total, **self.need.parts()}

    def __str__(self) -> str:
        """Say how much."""
        return f"{'' if self.need == self.least else 'at most '}{size_text(self.need.total)}"

    def told(self) -> str:
        """Say how much, and by what part."""
        return f"{self} of a GPU: {', '.join(f'{name} {size_text(size)}' for name, size in self.need.parts().items())}"


def memory_of(asked: Ranked, stage: str) -> StageMemory:
    """Count what a training takes on each of its GPUs."""
    need = _need(asked, stage)
    if not asked.recipe.trainings()[stage].compile:
        return StageMemory(need, need)
    return StageMemory(need, need._replace(activations=int(COMPILED * need.activations)))


def _need(asked: Ranked, stage: str) -> MemoryNeed:
    from sftok.training.memory import alignment_memory, fine_tune_memory, teacher_memory

    recipe, size = asked.recipe, asked.recipe.data.image_size
    teacher, tokenizer = recipe.teacher, recipe.tokenizer
    ranks, fused = asked.ranks, not recipe.compute.deterministic  # deterministic algorithms have no fused attention
    if stage == "teacher":
        return teacher_memory(teacher, size, ranks=ranks, fused_attention=fused)
    if stage == "fine_tune":
        tuned = recipe.fine_tune
        return fine_tune_memory(tuned, tokenizer, teacher.model, size, ranks=ranks, fused_attention=fused)
    if stage in ("warm_up", "align"):
        aligned = getattr(recipe, stage)
        return alignment_memory(aligned, tokenizer, teacher.model, size, ranks=ranks, fused_attention=fused)
    trained = recipe.second if stage == "train_second_generator" else recipe
    assert trained is not None
    return _generator_need(trained, asked)


def _generator_need(recipe: Recipe, asked: Ranked) -> MemoryNeed:
    from generator.memory import training_memory

    return training_memory(
        recipe.generator,
        recipe.train_generator,
        recipe.code_space(MAX_CLASSES),
        ranks=asked.ranks,
        ranks_per_node=RANKS_PER_NODE,
        fused_attention=not asked.recipe.compute.deterministic,
    )


def check_memory(asked: Ranked, card: Card, stages: Collection[str], *, most_ranks: int | None = None) -> None:
    """Refuse a training of these stages that cannot fit in a GPU whose memory is known.

    Args:
        asked: recipe and ranks.
        card: memory of each GPU.
        stages: that will run.
        most_ranks: GPUs that there are; None: any number.

    Raises:
        ValueError: one line with the stage, what it needs by part, what a GPU has, and what would fit.
    """
    if card.bytes is None:
        return
    needs = {stage: memory_of(asked, stage) for stage in asked.recipe.trainings() if stage in stages}
    if refusal := refusal_of(asked, needs, card, most_ranks=most_ranks):
        raise ValueError(refusal)


def refusal_of(
    asked: Ranked, needs: Mapping[str, StageMemory], card: Card, *, most_ranks: int | None = None
) -> str | None:
    """Say in one line which training cannot fit, and what would; None if all can, or it is not known."""
    for stage, memory in needs.items():
        if card.bytes is not None and not memory.least.fits(card.bytes):
            return _refusal(stage, memory.least, card, remedies(asked, stage, card.bytes, most_ranks))
    return None


def _refusal(stage: str, need: MemoryNeed, card: Card, found: list[Remedy]) -> str:
    assert card.bytes is not None
    largest = ", ".join(f"{name} {size_text(size)}" for name, size in list(need.parts().items())[:NAMED])
    more = ", or more of them" if stage.endswith("generator") else ""  # only they are sharded
    remedy = f"set {', or '.join(map(str, found))}" if found else f"use GPUs with more memory{more}"
    return (
        f"{stage} needs at least {size_text(need.total)} of a GPU's memory (above all {largest}) beside "
        f"{size_text(RESERVED)} for CUDA, and {card.place} have {size_text(card.bytes)}: {remedy}"
    )


def remedies(asked: Ranked, stage: str, card: int, most_ranks: int | None = None) -> list[Remedy]:
    """Return the changes with which a training fits: each alone if any is enough, else all that help together."""
    fits: Callable[[Ranked], bool] = partial(_fits, stage=stage, card=card)
    recompute = Remedy((f"{SETTINGS[stage]}.activation_checkpointing=true",))
    sharded = list(_sharded(asked, stage, most_ranks))
    found = [remedy for remedy in (_smaller(asked, stage, fits), recompute) if remedy and fits(_with(asked, remedy))]
    found += [remedy for remedy in sharded if fits(_with(asked, remedy))][:1]
    if found:
        return found
    both = [Remedy((*remedy.overrides, *recompute.overrides), remedy.ranks) for remedy in (Remedy(()), *sharded)]
    if enough := [remedy for remedy in both if fits(_with(asked, remedy))]:
        return enough[:1]
    for remedy in both:
        if (smaller := _smaller(_with(asked, remedy), stage, fits)) is not None:
            return [Remedy((*remedy.overrides, *smaller.overrides), remedy.ranks)]
    return []


def _with(asked: Ranked, remedy: Remedy) -> Ranked:
    return asked.changed(*remedy.overrides, ranks=remedy.ranks)


def _fits(asked: Ranked, *, stage: str, card: int) -> bool:
    return _need(asked, stage).fits(card)


def _smaller(asked: Ranked, stage: str, fits: Callable[[Ranked], bool]) -> Remedy | None:
    """Find the largest micro-batch with which a training fits; None if none does."""
    training = asked.recipe.trainings()[stage]
    sizes = [size for size in divisors(training.batch_size) if size < training.at_once]
    candidates = []
    for size in sizes:
        remedy = Remedy((f"{SETTINGS[stage]}.micro_batch={size}",))
        try:
            changed = _with(asked, remedy)
        except ValueError:  # a discriminator cannot divide it
            continue
        if not changed.recipe.trainings()[stage].micro_batches % asked.ranks:
            candidates.append((remedy, changed))
    low, high = 0, len(candidates)  # the smaller, the less: below low all fit, from high on none does
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(candidates[middle][1]) else (low, middle)
    return candidates[low - 1][0] if low else None


def _sharded(asked: Ranked, stage: str, most_ranks: int | None) -> Iterator[Remedy]:
    """Yield numbers of ranks over which a generator's parameters could be sharded, from as many as are asked for on."""
    training = asked.recipe.trainings()[stage]
    if not stage.endswith("generator") or training.precision == "fp16":
        return
    for ranks in training.rank_counts:
        if max(2, asked.ranks) <= ranks <= (most_ranks or ranks):
            yield Remedy((f"{SETTINGS[stage]}.parallel=fsdp",), ranks if ranks != asked.ranks else None)
