"""Sample shards are balanced, and identical for any number of workers and restarts."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from generator.artifacts import save_generator
from generator.autoregressive import Generator
from generator.config import GeneratorConfig, SampleConfig
from generator.data import space_of
from generator.kinds import prepare_sampler
from generator.samples import SampleJob, SampleSpec, generate, share_changed
from infra.artifacts.shards import write_shard
from infra.codes.contract import read_codes
from infra.compute.cluster import session
from infra.compute.workers import WorkerOptions
from infra.store.store import Store
from tests.support.codes_info import codes_info
from tests.support.small_generators import autoregressive, masked

INFO = codes_info(16, 4)
CONFIG = SampleConfig(per_class=7, micro_batch=4, samples_per_shard=5, cfg_scale=1.5)


@pytest.fixture
def job(store: Store) -> SampleJob:
    torch.manual_seed(0)
    model = Generator(GeneratorConfig(width=16, layers=1, heads=2, ffn_width=16), space_of(INFO))
    model.initialise()
    save_generator(model, INFO, store.at("generator"))
    return SampleJob(generator=store.at("generator"), out=store.at("samples"), config=CONFIG, seed=3, identity="g")


def test_classes_are_exactly_balanced_and_settings_recorded(job: SampleJob) -> None:
    files = generate(job, options=WorkerOptions())
    info, rows = read_codes(job.out, [file.path for file in files])
    assert Counter(rows.class_id.tolist()) == {0: 7, 1: 7}
    assert len(set(rows.image_id)) == 14
    assert info.sampling == {"generator": "g", "seed": 3, **CONFIG.on("cpu").as_json()}


def test_a_restart_does_only_what_is_missing(job: SampleJob) -> None:
    before = {file.path: job.out.read(file.path) for file in generate(job, options=WorkerOptions())}
    lost = sorted(before)[1]
    job.out.delete(lost)
    job.out.delete(f"{lost}.json")
    kept = sorted(before)[0]
    job.out.write(kept, b"not looked at again")
    generate(job, options=WorkerOptions())
    assert job.out.read(lost) == before[lost]
    assert job.out.read(kept) == b"not looked at again"


@pytest.mark.slow
def test_workers_change_no_byte(job: SampleJob, store: Store) -> None:
    """Sample three shards with two workers, and with none."""
    alone = generate(job, options=WorkerOptions())
    with session(None, 2):
        other = dataclasses.replace(job, out=store.at("other"))
        assert generate(other, options=WorkerOptions(workers=2)) == alone
    assert len(alone) == 3
    assert all(job.out.read(file.path) == other.out.read(file.path) for file in alone)


def test_a_shard_of_another_length_is_refused(job: SampleJob) -> None:
    """Applies to the pipeline's stage as well as the command."""
    first, *_ = generate(job, options=WorkerOptions())
    job.out.delete(f"{first.path}.json")
    write_shard(job.out, first.path, job.out.read(first.path), 4)
    with pytest.raises(ValueError, match=rf"{first.path} has 4 samples of 5: delete it and its .json file"):
        generate(job, options=WorkerOptions())


def test_another_seed_draws_other_samples(job: SampleJob, store: Store) -> None:
    first = generate(job, options=WorkerOptions())
    other = SampleJob(generator=job.generator, out=store.at("other"), config=CONFIG, seed=4, identity="g")
    second = generate(other, options=WorkerOptions())
    assert [file.sha256 for file in first] != [file.sha256 for file in second]


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_samples_of_another_micro_batch_are_compared_one_by_one(kind: str) -> None:
    """Equal sizes change nothing; a sampler that depends on the batch size changes exactly the samples it should."""
    model = autoregressive() if kind == "autoregressive" else masked()
    sampler = prepare_sampler(model, SampleConfig(cfg_scale=2.0))
    wanted = [SampleSpec(i % 3, i // 3) for i in range(24)]
    assert share_changed(sampler, wanted, (6, 6), seed=0) == 0
    assert share_changed(sampler, wanted, (6, 5), seed=0) < 0.2  # few draws are so close that rounding decides them

    class Noticing:
        numbers = sampler.numbers

        def __call__(self, class_B: Tensor, uniform: Tensor) -> Tensor:
            codes_BN = sampler(class_B, uniform)
            if len(class_B) == 8:
                codes_BN[class_B == 1, 3] += 1
            return codes_BN

    changed = share_changed(Noticing(), wanted, (6, 8), seed=0)  # type: ignore[arg-type]
    assert changed == pytest.approx(share_changed(sampler, wanted, (6, 8), seed=0) + 1 / 3, abs=0.1)
