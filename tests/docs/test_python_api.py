"""The examples of the Python API, run on toy artifacts."""

import numpy as np
import torch

from generator.artifacts import save_generator
from generator.autoregressive import Generator
from generator.config import GeneratorConfig
from generator.data import space_of
from infra.artifacts.manifest import ArtifactPlan, folder_of, publish
from infra.artifacts.shards import put
from infra.codes.contract import CodeRows, CodesInfo, to_parquet
from infra.store.store import Store
from sftok.config import TransformerConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.weights.artifacts import save_teacher, save_tokenizer
from sftok.weights.convert import to_published
from tests.docs.pages import follow
from tests.support import tiny_tokenizer
from tests.support.codes_info import codes_info

TOKENIZER, TEACHER, GENERATOR = "1" * 32, "2" * 32, "3" * 32


def publish_codes(store: Store, info: CodesInfo) -> str:
    codes = np.random.default_rng(0).integers(0, info.codebook_size, (12, info.num_tokens))
    rows = CodeRows([f"{i:02d}" for i in range(12)], np.arange(12, dtype=np.int32) % 2, ["center"] * 12, codes)
    plan = ArtifactPlan(kind="codes", version=1, config={})
    file = put(folder_of(store, "codes", plan.digest), "train-00000-of-00001.parquet", to_parquet(info, rows), 12)
    return publish(store, plan, files=[file], counts={}, metrics={}, seconds=0).digest


def save_published() -> None:
    """A tokenizer with heads of 64 channels, as all published ones have."""
    width = TransformerConfig(width=64, layers=1, heads=1)
    config = tiny_tokenizer.TOKENIZER.model_copy(update={"encoder": width, "decoder": width, "legacy_layout": True})
    model = SFTok(config, tiny_tokenizer.TEACHER, tiny_tokenizer.SIZE, pixels=True)
    model.initialise()
    torch.save(to_published(model), "pytorch_model.bin")


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store, model = Store("store"), tiny_tokenizer.tokenizer()
    config = model.config
    info = codes_info(config.codebook_size, config.num_latent_tokens, tokenizer=TOKENIZER, image_size=model.image_size)
    save_tokenizer(model, folder_of(store, "tokenizer", TOKENIZER))
    save_teacher(Teacher(tiny_tokenizer.TEACHER), folder_of(store, "teacher", TEACHER))
    generator = Generator(GeneratorConfig(width=16, layers=1, heads=2, ffn_width=16), space_of(info))
    generator.initialise()
    save_generator(generator, info, folder_of(store, "generator", GENERATOR))
    save_published()
    digests = {"tokenizer_digest": TOKENIZER, "teacher_digest": TEACHER, "generator_digest": GENERATOR}
    images = torch.rand(3, 3, tiny_tokenizer.SIZE, tiny_tokenizer.SIZE)
    scope = follow("reference/python.md", codes_digest=publish_codes(store, info), images=images, **digests)
    assert scope["reconstructions"].shape == images.shape
    assert scope["arrays"].codes.shape == (12, config.num_latent_tokens)
    assert isinstance(scope["published"], SFTok)
    assert scope["recipe"].sample.cfg_scale == 3
    assert "train-00000-of-00001.parquet 12" in capsys.readouterr().out
