"""Memory of the tokenizer's trainings, counted from their configs: beside a pass on the CPU, and by part."""

import pytest
import torch

from flows.recipes.registry import RECIPES
from flows.recipes.schema import Recipe
from infra.compute.dry_pass import Allocations, backward
from infra.training.memory import MemoryNeed
from sftok.config import AdversarialConfig
from sftok.model.teacher import Teacher
from sftok.model.tokenizer import SFTok
from sftok.training.alignment import alignment_losses, teacher_codes
from sftok.training.fine_tune import fine_tune_pass, give_gradients_to_decoders
from sftok.training.memory import alignment_memory, fine_tune_memory, teacher_memory


def digits() -> Recipe:
    return RECIPES["digits"]()


def millions(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def aligned(recipe: Recipe, **changes: object) -> MemoryNeed:
    config = recipe.align.model_copy(update={"training": recipe.align.training.model_copy(update=changes)})
    return alignment_memory(config, recipe.tokenizer, recipe.teacher.model, recipe.data.image_size)


def tuned(recipe: Recipe, ranks: int = 1, **changes: object) -> MemoryNeed:
    config = recipe.fine_tune.model_copy(update=changes)
    return fine_tune_memory(config, recipe.tokenizer, recipe.teacher.model, recipe.data.image_size, ranks=ranks)


def test_alignment_takes_what_its_pass_allocates_on_a_cpu() -> None:
    recipe = digits()
    size, batch = recipe.data.image_size, recipe.align.training.batch_size
    model = SFTok(recipe.tokenizer, recipe.teacher.model, size, pixels=False)
    model.initialise()
    teacher = Teacher(recipe.teacher.model).requires_grad_(False)
    images = torch.rand(batch, 3, size, size)
    given = [*model.parameters(), *model.buffers(), *teacher.parameters(), images]
    with Allocations(given) as measured:
        proxy_BP = teacher_codes(teacher, images, recipe.align)
        losses = alignment_losses(model, proxy_BP, images, config=recipe.align, generator=torch.Generator())
        backward(losses["loss"])
    need = aligned(recipe)
    assert need.activations + need.gradients == pytest.approx(measured.peak, rel=0.05)
    assert need.weights == 4 * millions(model, teacher)
    assert need.moments == 2 * need.gradients == 2 * 4 * millions(model)


def test_fine_tuning_takes_what_its_pass_allocates_on_a_cpu() -> None:
    recipe = digits()
    size, batch = recipe.data.image_size, recipe.fine_tune.training.batch_size
    model = SFTok(recipe.tokenizer, recipe.teacher.model, size, pixels=True)
    model.initialise()
    give_gradients_to_decoders(model)
    images = torch.rand(batch, 3, size, size)
    with Allocations([*model.parameters(), *model.buffers(), images]) as measured:
        made = fine_tune_pass(model, images, config=recipe.fine_tune, masks=torch.Generator())
        backward((made - images).square().mean())
    need = tuned(recipe)
    assert need.activations + need.gradients == pytest.approx(measured.peak, rel=0.1)
    trained = millions(model.decoder, model.pixel_decoder, model.pixel_codebook)  # type: ignore[arg-type]
    assert need.gradients == 4 * trained
    assert need.weights == 4 * millions(model)


def test_losses_on_pixels_count_with_their_networks() -> None:
    recipe = digits()
    patch = AdversarialConfig(weight=0.1, kind="patch", start_step=1, channels=16, layers=2)
    plain, judged = tuned(recipe), tuned(recipe, adversarial=patch)
    assert judged.moments > plain.moments
    assert judged.activations + judged.gradients > plain.activations + plain.gradients
    perceived = tuned(recipe, perceptual_weight=1.0)
    assert perceived.weights - plain.weights == pytest.approx(4 * 14.7e6, rel=0.01), "VGG16, frozen"
    assert perceived.moments == plain.moments
    assert perceived.activations > plain.activations
    taught = teacher_memory(recipe.teacher, recipe.data.image_size)
    assert taught.moments == 8 * millions(Teacher(recipe.teacher.model))


def test_precision_recomputation_and_ranks_change_what_they_should() -> None:
    recipe = RECIPES["imagenet256_sftok_l"]()
    half, full = aligned(recipe), aligned(recipe, precision="fp32")
    assert half.activations < full.activations
    assert aligned(recipe, activation_checkpointing=True).activations < half.activations
    dino, four = tuned(recipe), tuned(recipe, ranks=4)
    assert four.inputs < dino.inputs, "held-out images are shared"
    assert four.moments == dino.moments, "replicas share nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_allocates_as_much_as_is_counted(precision: str) -> None:
    recipe = RECIPES["imagenet256_sftok_b"]()
    config = recipe.align.model_copy(
        update={"training": recipe.align.training.model_copy(update={"precision": precision, "compile": False})}
    )
    size, batch = recipe.data.image_size, config.training.at_once
    need = alignment_memory(config, recipe.tokenizer, recipe.teacher.model, size)
    with torch.device("cuda"):
        model = SFTok(recipe.tokenizer, recipe.teacher.model, size, pixels=False)
        teacher = Teacher(recipe.teacher.model).requires_grad_(False)
        images = torch.rand(batch, 3, size, size)
    model.initialise()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def work() -> None:
        proxy_BP = teacher_codes(teacher, images, config)
        losses = alignment_losses(model, proxy_BP, images, config=config, generator=torch.Generator())
        losses["loss"].backward()

    work()  # chooses kernels, whose workspaces are not counted
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(need.activations, rel=0.15)
