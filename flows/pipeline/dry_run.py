"""Plan a run without running it: each stage's artifact, its state, what it asks of Ray, time, memory of a GPU and size.

Nothing is written and nothing trained. Arithmetic and memory are counted on networks without contents (torch's meta
device); hours are that arithmetic at an assumed rate, and say so.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from flows.pipeline import graph
from flows.pipeline.gpu_memory import MEMORY_SOURCE, UNKNOWN, Card, Ranked, StageMemory, memory_of, refusal_of
from flows.pipeline.graph import ENCODE, PREPARE, SAMPLE
from flows.pipeline.space import MAX_CLASSES, SIZE_SOURCE, Sizes
from flows.recipes.schema import Recipe
from flows.runs.run_request import RunRequest
from flows.stage import Listing, Stage, StageJob, plan_of, planned_ref
from flows.store.inventory import size_text
from infra.artifacts.manifest import ArtifactRef, find, ref_of
from infra.training.config import or_list

if TYPE_CHECKING:
    from sftok.sources.summary import SourceSummary

RATE = 125e12  # operations per second of one GPU
RATE_SOURCE = "125 TFLOP/s a GPU: assumed, 40 % of an A100's 312 in bf16"
FIRST = "after prepare"


class PlannedStage(NamedTuple):
    """A stage of a planned run."""

    stage: str
    kind: str
    digest: str | None
    """None: known only when prepare has read the images."""
    state: str
    """Cached, to do, or after prepare."""
    resources: str
    gpu_hours: float | None
    hours: float | None
    """with all ranks, or workers, at work."""
    memory: StageMemory | None
    """of each GPU, for what is trained."""
    rank_counts: tuple[int, ...]
    """numbers of ranks that can share a step of a training."""
    bytes: int | None

    def as_row(self) -> tuple[str, ...]:
        """Cells of a table."""
        name = f"{self.kind}/{self.digest[:12]}" if self.digest else self.kind
        size = "" if self.bytes is None else size_text(self.bytes)
        memory = "" if self.memory is None else str(self.memory)
        return (self.stage, self.state, name, self.resources, _told(self.gpu_hours), _told(self.hours), memory, size)

    def told(self) -> str:
        """Say what each rank of a training takes of a GPU, and how many ranks there can be."""
        assert self.memory is not None
        count = self.rank_counts[-1]
        micro_batches = f"{count} micro-batch{'es' if count > 1 else ''} a step"
        return f"{self.stage}: {self.memory.told()}; {micro_batches}, so ranks: {or_list(self.rank_counts)}"

    def as_json(self) -> dict[str, JsonValue]:
        """Return all fields."""
        memory = None if self.memory is None else self.memory.as_json()
        return {**self._asdict(), "memory": memory, "rank_counts": list(self.rank_counts)}


HEAD = ("stage", "state", "artifact", "Ray", "GPU hours", "hours", "GPU memory", "size")


def _told(hours: float | None) -> str:
    return "" if hours is None else f"{hours:,.{0 if hours >= 10 else 2}f}"


class DryRun(NamedTuple):
    """A planned run."""

    recipe: str
    device: str
    store: str
    source: str
    images: int | None
    listing: "SourceSummary"
    stages: tuple[PlannedStage, ...]
    card: Card
    refusal: str | None
    """what of it cannot fit in such a GPU, and what would."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return one object, with the assumptions behind the estimates."""
        return {
            "recipe": self.recipe,
            "device": self.device,
            "store": self.store,
            "source": self.source,
            "images": self.images,
            "listing": self.listing.as_json(),
            "stages": [stage.as_json() for stage in self.stages],
            "gpu_memory": {"bytes": self.card.bytes, "source": self.card.place},
            "estimates": {"gpu_hours": RATE_SOURCE, "memory": MEMORY_SOURCE, "bytes": SIZE_SOURCE},
            **({"error": self.refusal} if self.refusal else {}),
        }

    def notes(self) -> tuple[str, ...]:
        """Return what the source was read as, and the assumptions behind the figures, as lines to print."""
        count = "an unknown number of" if self.images is None else f"{self.images:,}"
        return (
            *self.listing.lines(),
            f"{count} images; GPU hours of what is still to do: {RATE_SOURCE}; none where a CPU is enough",
            "hours: GPU hours by the ranks that train, or the workers that encode",
            *(stage.told() for stage in self.stages if stage.memory is not None),
            f"memory of a GPU: {self.card}; {MEMORY_SOURCE}",
            f"sizes: {SIZE_SOURCE}",
        )


def dry_run(request: RunRequest, card: Card = UNKNOWN, *, on_gpus: Recipe | None = None) -> DryRun:
    """Plan all stages of a run; the source is listed once, nothing is written.

    Args:
        request: what was asked for.
        card: memory of the GPUs that it is planned for.
        on_gpus: the recipe before its settings were resolved for this machine; None: the request's.

    Raises:
        ValueError: the source cannot be listed.
    """
    from sftok.sources.summary import summarize

    recipe, listed, trained = request.recipe, Listing(), Ranked.on_gpus(on_gpus or request.recipe, request.ranks.least)
    job = StageJob.of(request, listing=listed)
    store = job.store
    known: dict[str, ArtifactRef] = {}
    planned: list[PlannedStage] = []
    images: int | None = None
    operations: dict[str, float] = {}
    sizes: Mapping[str, int | None] = {}
    for stage in graph.GRAPH.order(recipe):
        needs = stage.inputs(recipe)
        inputs = {need: known[of] for need, of in needs.items() if of in known}
        is_known = len(inputs) == len(needs)
        plan = plan_of(stage, job, inputs) if is_known else None
        found = find(store, plan) if plan else None
        if plan is not None:
            known[stage.name] = ref_of(store, found) if found else planned_ref(job, plan)
        if stage is PREPARE:
            assert plan is not None
            source = listed.take(str(plan.config["listing"]))
            assert source is not None
            listing = summarize(source, recipe.data)
            images = found.counts.get("accepted") if found else listing.images
            operations, sizes = _operations(recipe, images), Sizes.of(recipe, images).artifacts
            if found is None:
                known.pop(stage.name, None)  # what follows depends on what the images hold
        needed = operations.get(stage.name) if found is None else None
        hours = None if needed is None else needed / RATE / 3600
        memory = memory_of(trained, stage.name) if found is None and stage.name in recipe.trainings() else None
        size = sizes.get(stage.name) if found is None else found.num_bytes
        state = "Cached" if found else "to do" if is_known else FIRST
        resources = _resources(stage, request)
        digest = plan.digest if plan else None
        wall = None if hours is None else hours / _width(stage, request)
        counts = tuple(recipe.trainings()[stage.name].rank_counts) if stage.name in recipe.trainings() else ()
        told = stage.name, stage.kind, digest, state, resources, hours, wall, memory, counts, size
        planned.append(PlannedStage(*told))
    refusal = refusal_of(trained, {s.stage: s.memory for s in planned if s.memory is not None}, card)
    place = recipe.compute.device, store.uri, request.source
    return DryRun(recipe.name, *place, images, listing, tuple(planned), card, refusal)


def _width(stage: Stage, request: RunRequest) -> float:
    """Return the GPUs that a stage's work is shared by, if there are as many as were asked for."""
    if stage.is_trained:
        return request.ranks.most
    return max(request.workers * (request.gpus_per_worker or 1), 1) if stage is ENCODE else 1


def _resources(stage: Stage, request: RunRequest) -> str:
    if stage.is_trained:
        each = "a GPU each" if request.gpus_per_worker else "a core each"
        return f"{request.ranks} rank{'s' if request.ranks.most > 1 else ''}, {each}"
    if stage in (PREPARE, ENCODE, SAMPLE):
        gpus = f", {request.gpus_per_worker:g} GPU each" if request.gpus_per_worker and stage is not PREPARE else ""
        return f"{request.workers} workers, 1 core each{gpus}"
    return "this process"


def _operations(recipe: Recipe, images: int | None) -> dict[str, float]:
    """Estimate the operations of each stage that has any to speak of, for a number of images."""
    flops = _arithmetic(recipe)
    # A training step is a forward pass and twice that backwards; the teacher, and self-forcing's guide, forward only.
    guided = flops["encoder"] * 3 + flops["decoder"] * 4 + flops["teacher_encoder"]
    an_image = {
        "teacher": 3 * (flops["teacher_encoder"] + flops["teacher_decoder"]),
        "warm_up": guided - flops["decoder"],
        "align": guided,
        "fine_tune": flops["encoder"] + flops["decoder"] * 4 + flops["teacher_decoder"] * 3,
        "train_generator": _a_sequence(recipe),
    }
    if recipe.second is not None:
        an_image["train_second_generator"] = _a_sequence(recipe.second)
    needed = {"teacher": 0.0}  # where it is imported
    needed |= {name: config.steps * config.batch_size * an_image[name] for name, config in recipe.trainings().items()}
    if images is not None:
        needed["encode"] = images * flops["encoder"] * len(recipe.encode.variants)
    return needed


def _a_sequence(recipe: Recipe) -> float:
    """Count the operations of a generator's training step for one sequence."""
    from generator.flops import training_flops

    return training_flops(recipe.generator, recipe.code_space(MAX_CLASSES))


def _arithmetic(recipe: Recipe) -> dict[str, float]:
    """Count the operations of a forward pass for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sftok.model.decoder import Decoder
    from sftok.model.teacher import Teacher
    from sftok.model.tokenizer import SFTok

    size, tokenizer = recipe.data.image_size, recipe.tokenizer

    def count(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return float(counter.get_total_flops())

    with torch.device("meta"):
        teacher = Teacher(recipe.teacher.model)
        model = SFTok(tokenizer, recipe.teacher.model, size, pixels=False)
        images = torch.empty(1, 3, size, size)
        positions = (size // recipe.teacher.model.downsample_factor) ** 2
        codes = torch.zeros(1, positions, dtype=torch.int64)
        latents = torch.empty(1, tokenizer.num_latent_tokens, tokenizer.code_dim)
        assert isinstance(model.decoder, Decoder)
        return {
            "encoder": count(lambda: model.encoder(images)),
            "decoder": count(lambda: model.decoder(codes, latents)),
            "teacher_encoder": count(lambda: teacher.encoder(images)),
            "teacher_decoder": count(lambda: teacher.decode(codes)),
        }
