"""The stages that judge and show: evaluate and report."""

from pydantic import JsonValue

from flows.recipes.schema import Recipe
from flows.stage import Result, Stage, StageJob, Work, computed, seeded


def _evaluate_what(job: StageJob) -> dict[str, JsonValue]:
    recipe = job.recipe
    return {
        "evaluate": recipe.evaluate.identity(),
        "decoding": recipe.decoding.identity(),
        "image_size": recipe.data.image_size,
        "micro_batch": recipe.encode.micro_batch,
        **seeded(job),
        **computed(recipe.compute),
    }


def _evaluate(work: Work) -> Result:
    from flows.evaluation.inputs import measure

    return measure(work)


def _without_second_generator(recipe: Recipe) -> tuple[str, ...]:
    return () if recipe.second else ("second_generator",)


def _report_what(job: StageJob) -> dict[str, JsonValue]:
    recipe = job.recipe.as_json()
    del recipe["compute"]
    return {"recipe": {**recipe, **computed(job.recipe.compute)}}


def _report(work: Work) -> Result:
    from flows.report.pages import write_pages

    return write_pages(work)


# Version 2: features are summed batch by batch, which changes the last digits of their distances.
EVALUATE = Stage(
    "evaluate",
    "evaluation",
    2,
    _evaluate_what,
    _evaluate,
    is_measured=True,
    needs={
        "images": "prepare",
        "teacher": "teacher",
        "tokenizer": "fine_tune",
        "codes": "encode",
        "samples": "sample",
        "second_generator": "train_second_generator",
    },
    unneeded=_without_second_generator,
)
# Version 3: what rules find in the figures is part of it.
REPORT = Stage("report", "report", 3, _report_what, _report, needs={"evaluation": "evaluate"})
