"""Training: every stage learns, resumes bit for bit, and trains what it should and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infra.store import Store
from infra.training import Run, TrainResult
from sftok.artifacts import load_tokenizer
from sftok.config import NO_ADVERSARY, AlignmentStageConfig, FineTuneStageConfig, TeacherStageConfig
from sftok.proxy import Teacher
from sftok.train import (
    CodebookRestart,
    decoder_inputs,
    first_step_prediction,
    spread_out,
    train_alignment,
    train_fine_tune,
    train_teacher,
)
from tests.sftok.tiny import SIZE, TEACHER, TOKENIZER, images, tokenizer, training

PLAIN = {"perceptual_weight": 0, "adversarial": NO_ADVERSARY}


def teacher() -> Teacher:
    torch.manual_seed(3)
    return Teacher(TEACHER).requires_grad_(False).eval()


def run_teacher(run: Run, steps: int, **changes: object) -> TrainResult:
    config = TeacherStageConfig(model=TEACHER, training=training(steps, **changes), restart_every=2, **PLAIN)
    return train_teacher(images(), config, run=run)


def run_align(run: Run, steps: int, **changes: object) -> TrainResult:
    config = AlignmentStageConfig(training=training(steps, **changes), replacement="self_forcing")
    return train_alignment(images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=run)


def run_fine_tune(run: Run, steps: int, **changes: object) -> TrainResult:
    config = FineTuneStageConfig(training=training(steps, **changes), **PLAIN)
    return train_fine_tune(images(), config, teacher=teacher(), start=tokenizer(), run=run)


STAGES = {"teacher": run_teacher, "align": run_align, "fine_tune": run_fine_tune}
Stage = Callable[..., TrainResult]


def losses(folder: Store) -> list[float]:
    import json

    return [json.loads(line)["loss"] for line in folder.read("log.jsonl").decode().splitlines()]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_learns_its_one_batch(stage: Stage, store: Store) -> None:
    stage(Run(store, seed=0), 60)
    values = losses(store)
    assert values[-1] < 0.7 * values[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_two_and_two_steps_equal_four(stage: Stage, store: Store) -> None:
    whole, parts = store.at("whole"), store.at("parts")
    stage(Run(whole, seed=0), 4)

    def stop(done: int, total: int, figures: object) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        stage(Run(parts, seed=0, progress=stop), 4, checkpoint_every=2)
    assert not parts.exists("model.safetensors")
    stage(Run(parts, seed=0), 4, checkpoint_every=2)
    assert parts.read("model.safetensors") == whole.read("model.safetensors")
    assert parts.read("log.jsonl") == whole.read("log.jsonl")


def test_another_seed_gives_another_model(store: Store) -> None:
    run_align(Run(store.at("0"), seed=0), 2)
    run_align(Run(store.at("1"), seed=1), 2)
    assert store.at("0").read("model.safetensors") != store.at("1").read("model.safetensors")


def test_fine_tuning_leaves_encoder_and_quantizer_alone(store: Store) -> None:
    run_fine_tune(Run(store, seed=0), 3)
    before, after = tokenizer().state_dict(), load_tokenizer(store).state_dict()
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"decoder"}
    pixels = {n: p for n, p in teacher().state_dict().items() if n.startswith("decoder.")}
    assert any(not torch.equal(p, after[f"pixel_{n}"]) for n, p in pixels.items())


def test_codes_are_spread_out_rather_than_crowded_on_the_background() -> None:
    """Ninety-seven of a hundred latents are equal: uniform picks would make them nearly all of the codebook."""
    latents = torch.cat([torch.zeros(97, 4), torch.eye(4)[:3]])
    picked = spread_out(latents, torch.empty(0, 4), 4, torch.Generator().manual_seed(0))
    assert len(picked.unique(dim=0)) == 4
    around_kept = spread_out(latents, torch.zeros(1, 4), 3, torch.Generator().manual_seed(0))
    assert (around_kept.norm(dim=1) > 0).all()


def test_a_restart_moves_only_codes_that_nothing_used() -> None:
    model, config = teacher(), TeacherStageConfig(model=TEACHER, training=training(20), restart_every=4, **PLAIN)
    restart, batch = CodebookRestart(model, config, seed=0), images().held_out(Run(Store("."), 0))
    used = torch.arange(32) % 2 == 0
    restart.count(used.nonzero().T)
    before = model.codebook.weight.clone()
    restart.before(3, batch)  # not due
    assert torch.equal(model.codebook.weight, before)
    restart.before(4, batch)
    moved = (model.codebook.weight != before).any(1)
    assert torch.equal(moved, ~used)


def inputs(replacement: str, replace_prob: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    model, proxy = tokenizer(), torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(5))
    z_q = torch.nn.functional.normalize(torch.randn(64, 8, 8, generator=torch.Generator().manual_seed(6)), dim=-1)
    config = AlignmentStageConfig(training=training(1), replacement=replacement, replace_prob=replace_prob)
    ids = decoder_inputs(model.decoder, z_q, proxy, config, torch.Generator().manual_seed(0))
    return ids, proxy, first_step_prediction(model.decoder, z_q)


def test_warming_up_hides_everything() -> None:
    ids, _, _ = inputs("none")
    assert (ids == 32).all()


def test_vanilla_replacement_gives_the_teachers_codes() -> None:
    ids, proxy, _ = inputs("ground_truth")
    given = ids != 32
    assert given.any()
    assert torch.equal(ids[given], proxy[given])


def test_self_forcing_gives_the_models_own_first_step() -> None:
    ids, proxy, guide = inputs("self_forcing")
    given = ids != 32
    assert torch.equal(ids[given], guide[given])
    assert not torch.equal(guide, proxy)


def test_half_replacement_mixes_both() -> None:
    ids, proxy, guide = inputs("self_forcing", replace_prob=0.5)
    differ = (ids != 32) & (proxy != guide)
    share = (ids == guide)[differ].float().mean().item()
    assert share == pytest.approx(0.5, abs=0.1)
