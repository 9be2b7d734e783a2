"""Code artifacts made for the purpose: random codes in two classes, of the tokenizers that are wanted."""

import numpy as np

from flows.stage import Result
from infra.artifacts.manifest import ArtifactPlan, ArtifactRef, folder_of
from infra.artifacts.shards import put
from infra.codes.contract import CodeRows, CodesInfo, to_parquet
from tests.support.codes_info import codes_info
from tests.support.small_dataset import Made

TINY = [
    "generator.width=16", "generator.layers=1", "generator.heads=2", "generator.ffn_width=16",
    "train_generator.steps=3", "train_generator.batch_size=8", "train_generator.optimizer.warmup_steps=1",
    "train_generator.validate_every=1", "train_generator.log_every=1",
]  # fmt: skip
TOKENIZER, OTHER = "a" * 32, "b" * 32


def info(tokenizer: str) -> CodesInfo:
    return codes_info(16, 4, tokenizer=tokenizer)


def codes(made: Made, shards: dict[str, str], tokenizer: str | None = TOKENIZER) -> ArtifactRef:
    """A code artifact whose shards say that they are of the tokenizers given, and its manifest of `tokenizer`."""
    inputs = {} if tokenizer is None else {"tokenizer": ArtifactRef(kind="tokenizer", digest=tokenizer, uri="")}
    plan = ArtifactPlan(kind="codes", version=1, config={"shards": dict(shards)}, inputs=inputs)
    folder = folder_of(made.store, plan.kind, plan.digest)
    random, files = np.random.default_rng(0), []
    for name, of in shards.items():
        values = random.integers(0, 16, (12, 4)).astype(np.uint16)
        rows = CodeRows(
            [f"{name}-{i:02d}" for i in range(12)], np.arange(12, dtype=np.int32) % 2, ["center"] * 12, values
        )
        files.append(put(folder, name, to_parquet(info(of), rows), 12))
    return made.publish(plan, Result(files, {}, {}))


def names(train: str, second: str, val: str) -> dict[str, str]:
    train_names = [f"train-{i:05d}-of-00002.parquet" for i in range(2)]
    return {train_names[0]: train, train_names[1]: second, "val-00000-of-00001.parquet": val}
