"""Training: every stage learns, resumes bit for bit, and trains what it should and nothing else."""

import contextlib
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infra.artifacts.pretrained import PretrainedConfig
from infra.store.store import Store
from infra.training.config import OptimizerConfig
from infra.training.learner import Learner
from infra.training.loop import TrainingRun, TrainResult, picture_grid
from sftok.config import NO_ADVERSARY, AdversarialConfig, AlignmentStageConfig, FineTuneStageConfig, TeacherStageConfig
from sftok.model.teacher import Teacher
from sftok.training import alignment as train_alignment_module
from sftok.training.alignment import decoder_inputs, self_prediction, train_alignment
from sftok.training.common import Stream, in_passes
from sftok.training.fine_tune import train_fine_tune
from sftok.training.teacher import CodebookRestart, spread_out, train_teacher
from sftok.weights.artifacts import load_teacher, load_tokenizer
from tests.infra.training.test_loop import NoReading
from tests.support.tiny_tokenizer import SIZE, TEACHER, TOKENIZER, images, tokenizer, training

PLAIN = {"perceptual_weight": 0, "adversarial": NO_ADVERSARY}


RUN = TrainingRun(Store("."), seed=0)


def teacher() -> Teacher:
    torch.manual_seed(3)
    return Teacher(TEACHER).requires_grad_(False).eval()


def no_weights(config: PretrainedConfig, what: str) -> bytes:
    raise AssertionError(f"{what} were asked for")


def run_teacher(run: TrainingRun, steps: int, **changes: object) -> TrainResult:
    config = TeacherStageConfig(model=TEACHER, training=training(steps, **changes), restart_every=2, **PLAIN)
    return train_teacher(images(), config, run=run, weights=no_weights)


def run_align(run: TrainingRun, steps: int, **changes: object) -> TrainResult:
    config = AlignmentStageConfig(training=training(steps, **changes), replacement="self_forcing", from_scratch=True)
    return train_alignment(images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=run)


def run_fine_tune(run: TrainingRun, steps: int, **changes: object) -> TrainResult:
    config = FineTuneStageConfig(training=training(steps, **changes), **PLAIN)
    return train_fine_tune(images(), config, teacher=teacher(), start=tokenizer(), run=run, weights=no_weights)


def run_warm_up(run: TrainingRun, steps: int, **changes: object) -> TrainResult:
    config = AlignmentStageConfig(training=training(steps, **changes), replacement="none")
    return train_alignment(images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=run)


# With a discriminator from the second step on, so that a run resumes in the middle of its game.
GAME = {
    "perceptual_weight": 0,
    "adversarial": AdversarialConfig(
        weight=0.1,
        kind="patch",
        start_step=1,
        channels=8,
        layers=2,
        optimizer=OptimizerConfig(lr=1e-3, end_lr=1e-4, warmup_steps=1),
    ),
}


def run_teacher_game(run: TrainingRun, steps: int, **changes: object) -> TrainResult:
    config = TeacherStageConfig(model=TEACHER, training=training(steps, **changes), restart_every=2, **GAME)
    return train_teacher(images(), config, run=run, weights=no_weights)


def run_fine_tune_game(run: TrainingRun, steps: int, **changes: object) -> TrainResult:
    config = FineTuneStageConfig(training=training(steps, **changes), **GAME)
    return train_fine_tune(images(), config, teacher=teacher(), start=tokenizer(), run=run, weights=no_weights)


STAGES = {
    "teacher": run_teacher,
    "teacher_game": run_teacher_game,
    "warm_up": run_warm_up,
    "align": run_align,
    "fine_tune": run_fine_tune,
    "fine_tune_game": run_fine_tune_game,
}
Stage = Callable[..., TrainResult]


def figures(folder: Store, name: str) -> list[float]:
    return [json.loads(line)[name] for line in folder.read("log.jsonl").decode().splitlines()]


def losses(folder: Store) -> list[float]:
    return figures(folder, "loss")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_learns_its_one_batch(stage: Stage, store: Store) -> None:
    stage(TrainingRun(store, seed=0), 60)
    values = losses(store) if "game" not in stage.__name__ else figures(store, "mse")
    assert values[-1] < 0.7 * values[0]


def test_warming_up_overfits_one_batch_to_the_last_code(store: Store) -> None:
    config = AlignmentStageConfig(training=training(250, log_every=50), replacement="none", quantizer_weight=0.1)
    train_alignment(
        images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=TrainingRun(store, seed=0)
    )
    assert figures(store, "cross_entropy")[-1] < 0.1


def test_alignment_overfits_one_batch_to_the_last_code(store: Store) -> None:
    config = AlignmentStageConfig(
        training=training(400, log_every=50), replacement="self_forcing", from_scratch=True, quantizer_weight=0.1
    )
    train_alignment(
        images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=TrainingRun(store, seed=0)
    )
    assert figures(store, "cross_entropy")[-1] < 0.1


def test_pixels_overfit_one_batch(store: Store) -> None:
    """The teacher, then fine-tuning of a tokenizer that knows the teacher's codes: above 30 dB, both."""
    config = TeacherStageConfig(model=TEACHER, training=training(350, log_every=100), restart_every=10, **PLAIN)
    taught = train_teacher(images(), config, run=TrainingRun(store.at("t"), seed=0), weights=no_weights)
    assert taught.metrics["val_psnr"] > 30
    model = load_teacher(store.at("t"))
    warm = AlignmentStageConfig(training=training(150, log_every=100), replacement="none", quantizer_weight=0.1)
    run = TrainingRun(store.at("w"), seed=0)
    train_alignment(images(), warm, teacher=model, start=TOKENIZER, image_size=SIZE, run=run)
    tuned = train_fine_tune(
        images(),
        FineTuneStageConfig(training=training(250, log_every=100), assignment="nearest", **PLAIN),
        teacher=model,
        start=load_tokenizer(store.at("w")),
        run=TrainingRun(store.at("f"), seed=0),
        weights=no_weights,
    )
    assert tuned.metrics["val_psnr"] > 30


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_two_and_two_steps_equal_four(stage: Stage, store: Store) -> None:
    whole, parts = store.at("whole"), store.at("parts")
    stage(TrainingRun(whole, seed=0), 4)

    def stop(done: int, total: int, figures: object) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        stage(TrainingRun(parts, seed=0, progress=stop), 4, checkpoint_every=2)
    assert not parts.exists("model.safetensors")
    stage(TrainingRun(parts, seed=0), 4, checkpoint_every=2)
    assert parts.read("model.safetensors") == whole.read("model.safetensors")
    assert parts.read("log.jsonl") == whole.read("log.jsonl")


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_states_how_fast_it_learnt_and_its_log_does_not(stage: Stage, store: Store) -> None:
    metrics = stage(TrainingRun(store, seed=0), 3).metrics
    assert metrics["images_per_s"] > 0
    assert metrics["model_flops_per_s"] > 0
    assert 0 < metrics["mfu"] < 1
    assert "per_s" not in store.read("log.jsonl").decode()


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_no_step_between_two_logged_lines_reads_anything_back(
    stage: Stage, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the update of step 3 to that of step 5, when no restart of the teacher's codes is due."""
    refused, update = contextlib.ExitStack(), Learner.update
    seen = []

    def watched(self: Learner, step: int) -> dict[str, Tensor | float]:
        made = update(self, step)
        if step == 3 and step not in seen:
            refused.enter_context(NoReading())
        if step == 5:
            refused.close()
        seen.append(step)
        return made

    monkeypatch.setattr(Learner, "update", watched)
    with refused:
        stage(TrainingRun(store, seed=0), 7, micro_batch=6, log_every=1000)
    assert 5 in seen


def test_another_seed_gives_another_model(store: Store) -> None:
    run_align(TrainingRun(store.at("0"), seed=0), 2)
    run_align(TrainingRun(store.at("1"), seed=1), 2)
    assert store.at("0").read("model.safetensors") != store.at("1").read("model.safetensors")


def test_fine_tuning_leaves_encoder_and_quantizer_alone(store: Store) -> None:
    run_fine_tune(TrainingRun(store, seed=0), 3)
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
    restart, batch = CodebookRestart(model, config, RUN), images().held_out(RUN)
    used = torch.arange(32) % 2 == 0
    restart.count(used.nonzero().T)
    before = model.codebook.weight.clone()
    assert [step for step in range(20) if restart.is_due(step)] == [0, 4, 8]
    restart.replace(4, batch)
    moved = (model.codebook.weight != before).any(1)
    assert torch.equal(moved, ~used)


def inputs(replacement: str, replace_prob: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    model, proxy = tokenizer(), torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(5))
    z_q = torch.nn.functional.normalize(torch.randn(64, 8, 8, generator=torch.Generator().manual_seed(6)), dim=-1)
    config = AlignmentStageConfig(training=training(1), replacement=replacement, replace_prob=replace_prob)
    ids = decoder_inputs(model.decoder, z_q, proxy, config, torch.Generator().manual_seed(0))
    return ids, proxy, self_prediction(model.decoder, z_q)


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


def test_a_prediction_of_more_steps_can_be_the_guide() -> None:
    model, z_q = tokenizer(), torch.nn.functional.normalize(torch.randn(16, 8, 8), dim=-1)
    first, fourth = self_prediction(model.decoder, z_q), self_prediction(model.decoder, z_q, 4)
    assert torch.equal(first, model.decoder(model.decoder.all_masked(z_q), z_q).argmax(-1))
    assert not torch.equal(first, fourth)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "quadratic", "cubic", "exponential"])
def test_the_mask_schedule_is_the_configs(schedule: str) -> None:
    """Cubic hides a quarter on average, arccos a half and more: the mask follows what is asked for."""
    model, proxy = tokenizer(), torch.zeros(512, 16, dtype=torch.int64)
    z_q = torch.zeros(512, 8, 8)
    shares = {}
    for name in (schedule, "arccos"):
        config = AlignmentStageConfig(training=training(1), replacement="ground_truth", mask_schedule=name)
        ids = decoder_inputs(model.decoder, z_q, proxy, config, torch.Generator().manual_seed(0))
        shares[name] = (ids == 32).float().mean().item()
    assert shares["arccos"] == pytest.approx(2 / torch.pi, abs=0.03)
    expected = {"cosine": 1 / 2, "linear": 1 / 2, "quadratic": 1 / 2, "cubic": 1 / 4, "exponential": 1 - 1 / torch.e}
    assert shares[schedule] == pytest.approx(expected[schedule], abs=0.03)


def test_alignment_without_a_start_has_to_be_asked_for(store: Store) -> None:
    config = AlignmentStageConfig(training=training(1), replacement="self_forcing")
    with pytest.raises(ValueError, match="run warm_up first, or set from_scratch"):
        train_alignment(
            images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=TrainingRun(store, 0)
        )


@pytest.mark.parametrize("stage", ["align", "fine_tune"])
def test_computing_activations_again_changes_nothing(stage: str, store: Store) -> None:
    for name, again in (("kept", False), ("again", True)):
        STAGES[stage](TrainingRun(store.at(name), seed=0), 3, activation_checkpointing=again)
    assert store.at("kept").read("model.safetensors") == store.at("again").read("model.safetensors")


@pytest.mark.parametrize("least", [0.0, 1.1])
def test_a_teacher_in_half_precision_has_to_give_the_codes_of_fp32(
    least: float, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_alignment_module, "TEACHER_AGREEMENT", least)
    config = AlignmentStageConfig(training=training(1, micro_batch=4), replacement="none", teacher_precision="bf16")

    def train() -> TrainResult:
        return train_alignment(
            images(), config, teacher=teacher(), start=TOKENIZER, image_size=SIZE, run=TrainingRun(store, seed=0)
        )

    if least > 1:
        with pytest.raises(ValueError, match=r'teacher_precision = "bf16": [\d.]+ % of the teacher\'s codes are those'):
            train()
        assert not store.list()
    else:
        assert 0.5 < train().metrics["teacher_agreement"] <= 1


def test_a_teachers_distances_are_fp32_in_half_precision_too() -> None:
    model, shown = teacher(), images().held_out(RUN)
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(shown)
        latents = model.encoder(shown.contiguous(memory_format=torch.channels_last))
        trained = model(shown)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(codes, model.nearest(latents))
    assert torch.equal(trained.codes, model.nearest(trained.latents))


@pytest.mark.slow
def test_a_compiled_stage_learns_the_same(store: Store) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        run_align(TrainingRun(store.at(name), seed=0), 2, compile=compiled)
    assert losses(store.at("compiled")) == pytest.approx(losses(store.at("eager")), rel=1e-3)
    load_tokenizer(store.at("compiled"))  # its weights have their own names


@pytest.mark.slow
def test_neither_a_validation_nor_a_step_after_the_first_compiles_anything(store: Store) -> None:
    """Twelve held-out images and micro-batches of nine: the validation has batches of nine and of three."""
    from torch._dynamo.utils import counters

    graphs = []

    def note(done: int, total: int, figures: object) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    run = TrainingRun(store, seed=0, progress=note)
    run_align(run, 4, compile=True, validate_every=2, batch_size=18, micro_batch=9)
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 4


def test_micro_batches_made_ahead_are_those_that_are_asked_for() -> None:
    """Also where part 0 is asked for once more, as a restart of the teacher's codes does, or the loop begins late."""
    shown, run, config = images(), RUN, training(9, micro_batch=3)
    plain = shown.stream(run, config)
    ahead = Stream(plain.make, "cpu", range(2, 4), is_ahead=True)
    for step, part in [(5, 0), (5, 2), (5, 3), (6, 2), (6, 3), (7, 0), (7, 2)]:
        assert torch.equal(ahead.batch(step, part), plain.batch(step, part))


def test_a_validation_sees_no_more_at_once_than_a_pass_of_the_training() -> None:
    sizes = []

    def work(some: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        sizes.append(len(some))
        return {"mean": some.mean((1, 2, 3))}, [some, 1 - some]

    held_out = images().held_out(RUN)
    found, picture = in_passes(work, held_out, 5)
    assert sizes == [5, 5, 2]
    assert torch.equal(torch.cat(found["mean"]), held_out.mean((1, 2, 3)))
    assert torch.equal(picture, picture_grid([held_out[:8], 1 - held_out[:8]]))


def test_bf16_learns_too(store: Store) -> None:
    run_align(TrainingRun(store, seed=0), 40, precision="bf16")
    values = losses(store)
    assert values[-1] < 0.8 * values[0]
