"""The stage that trains a generator, run as the pipeline runs it, on code artifacts made for the purpose."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

from flows.make import run_stage
from flows.pipeline import graph
from flows.recipes.files import load_recipe
from flows.stage import Work, plan_of
from generator.artifacts import load_generator
from infra.artifacts.manifest import ArtifactPlan, folder_of, manifest_of
from infra.artifacts.shards import put
from infra.codes.contract import CodeRows, to_parquet
from infra.compute.cluster import session
from infra.progress import silent
from infra.store.store import Store
from tests.support.small_codes import OTHER, TINY, TOKENIZER, codes, info, names
from tests.support.small_dataset import Made, Result


@pytest.fixture
def made(store: Store, tmp_path) -> Made:
    return Made(store, tmp_path, *TINY)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_a_generator_is_of_the_tokenizer_of_its_codes(made: Made, tokenizer: str | None) -> None:
    ref = made.run(graph.TRAIN_GENERATOR, codes=codes(made, names(TOKENIZER, TOKENIZER, TOKENIZER), tokenizer))
    _, of = load_generator(folder_of(made.store, ref.kind, ref.digest))
    assert of.tokenizer == TOKENIZER
    metrics = manifest_of(made.store, ref).metrics
    assert {"train_loss", "grad_norm", "val_nll", "val_perplexity", "val_top1", "val_nll/0", "val_nll/3"} <= set(
        metrics
    )
    assert metrics["tokens_per_s"] > 0
    assert 0 < metrics["mfu"] < 1


def test_codes_of_another_tokenizer_than_the_manifest_says_are_refused(made: Made) -> None:
    with pytest.raises(
        ValueError, match=rf"train shards hold codes of tokenizer/{OTHER}, its manifest says .*{TOKENIZER}"
    ):
        made.run(graph.TRAIN_GENERATOR, codes=codes(made, names(OTHER, OTHER, OTHER)))


def test_codes_of_another_tokenizer_are_taken_where_told_to(store: Store, tmp_path) -> None:
    """The same artifact as of codes whose manifest is right: the switch says who is to blame, not what is made."""
    told = Made(store, tmp_path, *TINY, "train_generator.any_tokenizer=true")
    ref = codes(told, names(OTHER, OTHER, OTHER))
    _, of = load_generator(folder_of(store, "generator", told.run(graph.TRAIN_GENERATOR, codes=ref).digest))
    assert of.tokenizer == OTHER
    plans = [plan_of(graph.TRAIN_GENERATOR, made.job, {"codes": ref}) for made in (told, Made(store, tmp_path, *TINY))]
    assert plans[0].digest == plans[1].digest


def test_splits_of_two_tokenizers_are_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=rf"val shards hold codes of tokenizer/{OTHER}.*encode again"):
        made.run(graph.TRAIN_GENERATOR, codes=codes(made, names(TOKENIZER, TOKENIZER, OTHER), None))


def test_shards_of_two_tokenizers_are_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"tokenizer is .* code files of different datasets do not mix"):
        made.run(graph.TRAIN_GENERATOR, codes=codes(made, names(TOKENIZER, OTHER, TOKENIZER)))


def test_no_held_out_rows_are_refused(made: Made) -> None:
    shards = names(TOKENIZER, TOKENIZER, TOKENIZER)
    plan = ArtifactPlan(kind="codes", version=1, config={"empty": True})
    folder = folder_of(made.store, plan.kind, plan.digest)
    none = CodeRows([], np.zeros(0, np.int32), [], np.zeros((0, 4), np.uint16))
    some = CodeRows(["x"], np.zeros(1, np.int32), ["center"], np.zeros((1, 4), np.uint16))
    files = [
        put(folder, name, to_parquet(info(TOKENIZER), none if name.startswith("val") else some), 0) for name in shards
    ]
    with pytest.raises(ValueError, match=r"no held-out rows .* data\.val_fraction"):
        made.run(graph.TRAIN_GENERATOR, codes=made.publish(plan, Result(files, {}, {})))


@pytest.mark.slow
def test_two_ranks_read_the_codes_together_and_train_what_one_does(made: Made) -> None:
    """But for rounding: each rank adds up its micro-batches before they are summed."""
    ref = codes(made, names(TOKENIZER, TOKENIZER, TOKENIZER))
    job = made.job._replace(recipe=load_recipe("digits", overrides=[*TINY, "train_generator.micro_batch=4"]))
    found = {}
    for ranks in (1, 2):
        out = made.store.at(f"ranks-{ranks}")
        plan = plan_of(graph.TRAIN_GENERATOR, job, {"codes": ref})
        with session(num_cpus=2) if ranks > 1 else nullcontext():
            result = run_stage(graph.TRAIN_GENERATOR, Work(job._replace(ranks=ranks), plan, out, silent))
        lines = [json.loads(line) for line in out.read("log.jsonl").decode().splitlines()]
        found[ranks] = [{name: line[name] for name in ("loss", "val_nll", "val_top1", "val_nll/3")} for line in lines]
        assert result.metrics["tokens_per_s"] > 0
    for one, two in zip(found[1], found[2], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
