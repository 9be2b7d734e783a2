"""The adversarial game: what each side's step may touch, averages once a step, and runs that resume bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sftok.config import AdversarialConfig
from sftok.losses.adversarial import Adversary, LeCam, hinge_discriminator, hinge_generator
from tests.sftok.losses.test_discriminator import dino_file

KINDS = ["patch", "dino"]
SIDE, BATCH = 32, 4


def adversary(kind: str, **changes: object) -> Adversary:
    values = {"weight": 0.5, "kind": kind, "start_step": 3, "channels": 8, "layers": 2, "lecam_weight": 0.1, **changes}
    torch.manual_seed(0)
    return Adversary(
        AdversarialConfig.model_validate(values),
        steps=10,
        image_size=SIDE,
        micro_batch=BATCH,
        dino=dino_file() if kind == "dino" else None,
    )


def seeded(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(part * 1000**i for i, part in enumerate(parts)))


def reals(step: int = 0) -> Tensor:
    """Stripes."""
    wave = torch.sin(torch.arange(SIDE) * 0.7 + torch.rand(BATCH, 1, generator=seeded(step)) * 6)
    return (0.5 + 0.4 * wave)[:, None, None, :].expand(-1, 3, SIDE, -1).contiguous()


def fakes(step: int = 0) -> Tensor:
    """The stripes under noise."""
    return reals(step) + 0.2 * torch.randn(BATCH, 3, SIDE, SIDE, generator=seeded(step, 1))


def optimizer(made: Adversary) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for _, p in made.named_parameters()], lr=1e-4, betas=(0.9, 0.999))


def train(made: Adversary, learner: torch.optim.AdamW, step: int) -> float:
    """One step of the discriminator, with a generator's step before it as in training."""
    images = fakes(step).requires_grad_()
    made.generator_loss(images, seeded(step, 2)).backward()
    loss, figures = made.discriminator_loss(reals(step), images, seeded(step, 3))
    loss.backward()
    learner.step()
    learner.zero_grad()
    made.end_step()
    return figures["d_loss"]


def test_hinge_losses() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0.5 + 2) / 4 + (1 + 2 + 0.5) / 4))
    assert hinge_generator(fake).item() == pytest.approx(2.5 / 4)
    assert hinge_generator(fake.bfloat16()).dtype == hinge_discriminator(real.bfloat16(), fake).dtype == torch.float32


def test_lecam_is_the_plain_formula() -> None:
    """method.md 1.3: losses see the averages of the steps before, which start at 0."""
    lecam, decay = LeCam(0.9, "cpu"), 0.9
    ema_real = ema_fake = 0.0
    for step in range(12):
        real, fake = torch.randn(2, 4, 9, generator=seeded(step)) + torch.tensor([0.5, -0.5])[:, None, None]
        mean_real, mean_fake = real.double().mean().item(), fake.double().mean().item()
        wanted = max(mean_real - ema_fake, 0) ** 2 + max(ema_real - mean_fake, 0) ** 2
        assert lecam.loss(real, fake).item() == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        lecam.end_step(lambda tensor: tensor)
        ema_real = decay * ema_real + (1 - decay) * mean_real
        ema_fake = decay * ema_fake + (1 - decay) * mean_fake
        assert lecam.averages.tolist() == pytest.approx([ema_real, ema_fake], rel=1e-4)
    assert ema_real > 0 > ema_fake


def test_lecam_pulls_the_logits_towards_the_other_kinds_average() -> None:
    lecam = LeCam(0.5, "cpu")
    lecam.averages.copy_(torch.tensor([0.4, -0.4]))
    real, fake = torch.ones(2, 3, requires_grad=True), -torch.ones(2, 3)
    fake.requires_grad_()
    lecam.loss(real, fake).backward()
    assert (real.grad > 0).all()
    assert (fake.grad < 0).all()


def test_averages_change_once_a_step_whatever_the_micro_batches_and_ranks() -> None:
    parts = [(torch.randn(2, 3, generator=seeded(i)), torch.randn(2, 3, generator=seeded(i, 1))) for i in range(4)]

    def averages(share: list[int], total: Callable[[Tensor], Tensor]) -> Tensor:
        lecam = LeCam(0.9, "cpu")
        for index in share:
            lecam.loss(*parts[index])
            assert lecam.averages.tolist() == [0, 0]
        lecam.end_step(total)
        return lecam.averages

    alone = averages([0, 1, 2, 3], lambda tensor: tensor)
    wanted = 0.1 * torch.stack([torch.stack([part[kind] for part in parts]).mean() for kind in (0, 1)])
    torch.testing.assert_close(alone, wanted)

    shares, sums = [[0, 1], [2, 3]], []
    for share in shares:
        averages(share, lambda tensor: sums.append(tensor.clone()) or tensor)
    for share in shares:
        torch.testing.assert_close(averages(share, lambda _: sums[0] + sums[1]), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_step_leaves_the_discriminator_alone(kind: str) -> None:
    """Guards against the published loop, whose discriminator collects gradients in the generator's step."""
    made = adversary(kind)
    before = {n: t.clone() for n, t in [*made.tensors().items(), *made.named_parameters()]}
    images = fakes().requires_grad_()
    made.generator_loss(images, seeded(1)).backward()
    assert all(p.grad is None for p in made.discriminator.parameters())
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(torch.equal(t, before[n]) for n, t in [*made.tensors().items(), *made.named_parameters()])
    assert all(p.requires_grad for _, p in made.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_step_trains_all_it_names_and_not_the_images(kind: str) -> None:
    made, images = adversary(kind), fakes().requires_grad_()
    loss, _ = made.discriminator_loss(reals(), images, seeded(1))
    loss.backward()
    assert images.grad is None
    named = dict(made.named_parameters())
    assert all(p.grad is not None for p in named.values())
    assert all(p.grad is None for n, p in made.discriminator.named_parameters() if n not in named)
    if kind == "dino":
        assert all(name.startswith("heads.") for name in named)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_lowers_the_discriminators_loss_on_the_same_batch(kind: str) -> None:
    made = adversary(kind)
    learner = optimizer(made)
    losses = []
    for _ in range(2):
        loss, figures = made.discriminator_loss(reals(), fakes(), seeded(1))
        losses.append(loss.item())
        assert figures["d_loss"] == pytest.approx(loss.item())
        loss.backward()
        learner.step()
        learner.zero_grad()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_along_the_gradient_makes_images_more_real(kind: str) -> None:
    made, images = adversary(kind, augment=False), fakes().requires_grad_()
    before = made.generator_loss(images, seeded(1))
    before.backward()
    after = made.generator_loss(images.detach() - 0.01 * images.grad / images.grad.norm(), seeded(1))
    assert after < before


def test_the_generators_loss_is_weighted() -> None:
    single, double = (adversary("patch", weight=weight).generator_loss(fakes(), seeded(1)) for weight in (1, 2))
    assert double.item() == pytest.approx(2 * single.item())


def test_figures_say_what_the_loss_is_made_of() -> None:
    made = adversary("patch", augment=False)
    loss, figures = made.discriminator_loss(reals(), fakes(), seeded(1))
    real, fake = made.discriminator(reals()), made.discriminator(fakes())
    lecam = max(real.mean().item(), 0) ** 2 + max(-fake.mean().item(), 0) ** 2
    assert loss.item() == pytest.approx(hinge_discriminator(real, fake).item() + 0.1 * lecam, rel=1e-5)
    wanted = {"d_loss": loss.item(), "d_real": real.mean().item(), "d_fake": fake.mean().item(), "lecam": lecam}
    assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_and_two_after_loading_are_four_bit_for_bit(kind: str) -> None:
    whole = adversary(kind)
    learner = optimizer(whole)
    for step in range(4):
        train(whole, learner, step)

    first = adversary(kind)
    learner = optimizer(first)
    for step in range(2):
        train(first, learner, step)
    torch.manual_seed(99)
    second = adversary(kind)
    state = {n: t.clone() for n, t in first.tensors().items()}
    torch.nn.init.zeros_(second.lecam.averages)
    second.load(state)
    with torch.no_grad():
        for (_, new), (_, old) in zip(second.named_parameters(), first.named_parameters(), strict=True):
            new.copy_(old)
    resumed = optimizer(second)
    resumed.load_state_dict(learner.state_dict())
    for step in range(2, 4):
        train(second, resumed, step)

    for (name, got), (_, wanted) in zip(second.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name
    for name, wanted in whole.tensors().items():
        assert torch.equal(second.tensors()[name], wanted), name


def test_the_state_is_what_training_moves_and_no_weights() -> None:
    assert adversary("patch").tensors().keys() == {"lecam"}
    made = adversary("dino")
    before = {n: t.clone() for n, t in made.tensors().items()}
    assert len(before) == 1 + 5 * 3 * 2
    train(made, optimizer(made), 0)
    moved = {n for n, t in made.tensors().items() if not torch.equal(t, before[n])}
    # conv_out has one output: its u is 1 forever.
    assert moved == {n for n in before if not n.endswith("conv_out.u")}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_in_float32_whatever_the_autocast(kind: str) -> None:
    made = adversary(kind, augment=False)  # whose draws would be float32

    def losses() -> list[float]:
        loss, _ = made.discriminator_loss(reals(), fakes(), seeded(1))
        return [made.generator_loss(fakes(), seeded(1)).item(), loss.item()]

    plain = losses()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses() == plain
        rounded = fakes().bfloat16()  # as a decoder under autocast gives them
        assert made.generator_loss(rounded, seeded(1)).item() == pytest.approx(plain[0], abs=0.05)
        assert made.discriminator_loss(reals(), rounded, seeded(1))[0].dtype == torch.float32


def test_augmentation_is_drawn_from_the_generator_and_can_be_left_out() -> None:
    made = adversary("patch")
    assert made.generator_loss(fakes(), seeded(1)) == made.generator_loss(fakes(), seeded(1))
    assert made.generator_loss(fakes(), seeded(1)) != made.generator_loss(fakes(), seeded(2))
    plain = adversary("patch", augment=False)
    assert plain.generator_loss(fakes(), seeded(1)) == plain.generator_loss(fakes(), seeded(2))


def test_large_images_reach_dino_at_224_pixels() -> None:
    made, images = adversary("dino"), torch.rand(1, 3, 256, 256)
    shapes: list[torch.Size] = []
    made.discriminator.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    made.generator_loss(images, seeded(1))
    assert shapes == [torch.Size([1, 3, 224, 224])]


def test_it_begins_at_its_first_step() -> None:
    made = adversary("patch")
    assert [made.is_active(step) for step in range(5)] == [False, False, False, True, True]
    assert made.steps == 7


def build(kind: str = "patch", *, size: int = SIDE, batch: int = BATCH, **changes: object) -> Callable[[], Adversary]:
    config = AdversarialConfig.model_validate({"weight": 1, "kind": kind, "start_step": 0, **changes})
    file = dino_file() if kind == "dino" else None
    return lambda: Adversary(config, steps=10, image_size=size, micro_batch=batch, dino=file)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (build(start_step=10), "adversarial.start_step = 10 is not below training.steps = 10"),
        (build(size=16), "image_size = 16 is too small for adversarial.layers = 3"),
        (build("dino", size=40), "image_size = 40 does not suit the DINO discriminator"),
        (build("dino", batch=9), "micro-batch of 9 images"),
    ],
    ids=["start", "patch size", "dino size", "batch"],
)
def test_what_would_fail_at_the_first_step_is_refused_at_once(made: Callable[[], Adversary], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        made()
    assert "\n" not in str(caught.value)
