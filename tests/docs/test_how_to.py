"""The pages on adding something, followed step by step on toy data."""

import json
import re

import numpy as np
import pytest
import torch

from flows.pipeline.graph import GRAPH
from flows.stage import Graph
from infra.artifacts.manifest import folder_of, manifest_of, shards_of
from infra.codes.contract import load_codes, read_codes
from infra.store.store import Store
from sftok.model.teacher import Teacher
from sftok.sources import sources
from tests.docs.pages import DOCS, ROOT, blocks, follow, name_of, spans
from tests.support import small_codes, tiny_tokenizer
from tests.support.codes_info import codes_info
from tests.support.small_dataset import Made

ROOMS = ("flows", "sftok", "generator", "infra")


def test_add_a_source(tmp_path, monkeypatch):
    random, path = np.random.default_rng(0), tmp_path / "images.npz"
    np.savez(path, images=random.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8), labels=np.arange(30) % 3)
    monkeypatch.setattr(sources, "KINDS", dict(sources.KINDS))
    page = DOCS / "how-to/add-a-source.md"
    first, last = blocks(page, "python")
    scope = {"__name__": "page", "path": str(path), "folder": str(tmp_path / "out")}
    exec(compile(first.text, page.name, "exec"), scope)
    sources.KINDS["arrays"] = scope["list_arrays"]
    exec(compile(last.text, page.name, "exec"), scope)
    counts = scope["prepared"].counts
    assert (counts["accepted"], counts["rejected"], counts["classes"]) == (30, 0, 3)
    assert counts["train"] + counts["val"] == 30


def test_add_a_tokenizer(tmp_path):
    scope = follow("how-to/add-a-tokenizer.md", folder=str(tmp_path))
    store, ref = scope["store"], scope["codes"]
    manifest = manifest_of(store, ref)
    names = [entry.path for entry in shards_of(store, manifest)]
    info, rows = read_codes(folder_of(store, ref.kind, ref.digest), names)
    assert info.num_tokens == 16
    assert rows.codes.shape == (80, 16)


def test_add_a_generator(tmp_path):
    random = torch.Generator().manual_seed(0)
    model = tiny_tokenizer.tokenizer()
    info, folder = _codes_of(model, random, tmp_path / "codes")
    given = {"codes_folder": folder, "codes_names": ["train-00000-of-00001.parquet"], "folder": str(tmp_path / "out")}
    scope = follow("how-to/add-a-generator.md", model=model, teacher=Teacher(tiny_tokenizer.TEACHER).eval(), **given)
    assert scope["images"].shape == (4 * len(info.class_names), 3, tiny_tokenizer.SIZE, tiny_tokenizer.SIZE)
    seen, _ = load_codes(folder, given["codes_names"])
    assert scope["described"].tokenizer == seen.tokenizer


def _codes_of(model, random, path):
    """Code Parquet of a tokenizer with random codes in two classes."""
    from infra.artifacts.shards import put
    from infra.codes.contract import CodeRows, to_parquet

    config = model.config
    info = codes_info(config.codebook_size, config.num_latent_tokens, tokenizer="0" * 32, image_size=model.image_size)
    codes = torch.randint(config.codebook_size, (12, config.num_latent_tokens), generator=random).numpy()
    rows = CodeRows([f"{i:02d}" for i in range(12)], np.arange(12, dtype=np.int32) % 2, ["center"] * 12, codes)
    folder = Store(path)
    put(folder, "train-00000-of-00001.parquet", to_parquet(info, rows), 12)
    return info, folder


def test_add_a_metric():
    scope = follow("how-to/add-a-metric.md")
    assert scope["score"].value > 0
    json.loads(scope["score"].model_dump_json())


def test_add_a_stage(tmp_path):
    made = Made(Store(tmp_path / "store"), tmp_path)
    names = small_codes.names(*[small_codes.TOKENIZER] * 3)
    scope = follow("how-to/add-a-stage.md", job=made.job, codes=small_codes.codes(made, names))
    counts = json.loads(scope["artifact"].folder.read("usage.json"))
    assert sum(counts) == scope["artifact"].manifest.counts["codes"] == 2 * 12 * 4
    assert scope["state"] == "Completed"
    assert scope["make"](scope["USAGE"], made.job, {"codes": scope["codes"]})[1] == "Cached"
    stages = list(GRAPH.values())
    after = stages.index(GRAPH["encode"]) + 1
    order = [stage.name for stage in Graph(*stages[:after], scope["USAGE"], *stages[after:]).order(made.job.recipe)]
    assert order.index("encode") < order.index("usage")


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("add-a-*.md")), ids=lambda page: page.stem)
def test_what_the_pages_name_is_in_the_code(page):
    """Guards against a page that still says what a function was called."""
    code = "".join(path.read_text() for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    code += "".join(block.text for block in blocks(page))
    for span in spans(page):
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span):
            assert re.search(rf"\b{span.removesuffix('()').split('.')[-1]}\b", code), f"{name_of(page)}: {span}"
