"""Dropout whose masks belong to rows: as random as any, and the same however a batch is cut."""

import math

import pytest
import torch
from torch import Tensor

from generator.config import AnyGeneratorConfig, GeneratorConfig, MaskedConfig
from generator.data import space_of
from generator.dropout import draw_keys, drop, lines_of
from generator.kinds import build_generator
from generator.network import GeneratorNetwork
from generator.train import train_generator
from infra.store.store import Store
from infra.training.loop import TrainingRun
from tests.generator.test_train import INFO, config, data
from tests.sftok.training.test_stages import losses
from tests.support.small_generators import spread

ROWS, PLACES, POSITIONS, CHANNELS = 64, 5, 64, 256
KINDS: dict[str, AnyGeneratorConfig] = {
    "autoregressive": GeneratorConfig(width=32, layers=2, heads=2, ffn_width=48, dropout=0.2),
    "masked": MaskedConfig(width=32, layers=2, heads=2, ffn_width=48, dropout=0.2),
}
every_kind = pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)


def keys(rows: int, seed: int = 0) -> Tensor:
    return draw_keys(rows, torch.Generator().manual_seed(seed))


def masks(rate: float, seed: int = 0) -> Tensor:
    """True where dropped, (places, rows, positions, channels)."""
    lines, constants = lines_of(keys(ROWS, seed), PLACES, POSITIONS, CHANNELS)
    ones = torch.ones(ROWS, POSITIONS, CHANNELS)
    return torch.stack([drop(ones, line, constants, rate) == 0 for line in lines])


def deviations(share: float, expected: float, count: int) -> float:
    """By how many standard deviations of a binomial share it differs from what is expected."""
    return abs(share - expected) / math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_kept_in_all_and_in_each_channel_place_and_position(rate: float) -> None:
    dropped = masks(rate)
    assert deviations(dropped.float().mean().item(), rate, dropped.numel()) < 4
    for axis in range(4):
        others = [other for other in range(4) if other != axis]
        shares = dropped.float().mean(others)
        count = dropped.numel() // len(shares)
        assert max(deviations(share, rate, count) for share in shares.tolist()) < 5, axis


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_neighbours_are_independent(rate: float) -> None:
    """Neighbours in channel, position, row and place: two are dropped together as often as by chance, and four."""
    dropped = masks(rate)
    pairs = {
        "channel": dropped[..., 1:] & dropped[..., :-1],
        "second channel": dropped[..., 2:] & dropped[..., :-2],
        "position": dropped[:, :, 1:] & dropped[:, :, :-1],
        "row": dropped[:, 1:] & dropped[:, :-1],
        "place": dropped[1:] & dropped[:-1],
    }
    for name, both in pairs.items():
        assert deviations(both.float().mean().item(), rate**2, both.numel()) < 5, name
    box = pairs["row"][..., 1:] & pairs["row"][..., :-1]
    assert deviations(box.float().mean().item(), rate**4, box.numel()) < 6
    three = pairs["channel"][..., 1:] & dropped[..., :-2]
    assert deviations(three.float().mean().item(), rate**3, three.numel()) < 6


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_as_many_are_dropped_of_a_vector_as_by_chance(rate: float) -> None:
    """Guards against vectors of which none or all are dropped, as of equally spaced numbers."""
    counts = masks(rate).sum(-1).flatten().double()
    z = (counts - CHANNELS * rate) / math.sqrt(CHANNELS * rate * (1 - rate))
    assert z.var().item() == pytest.approx(1, abs=0.06)
    assert (z**4).mean().item() == pytest.approx(3, abs=0.4)
    assert z.abs().max().item() < 6.5


def test_steps_have_masks_of_their_own() -> None:
    one, other = masks(0.5, seed=0), masks(0.5, seed=1)
    assert deviations((one == other).float().mean().item(), 0.5, one.numel()) < 4


def test_no_two_vectors_share_a_line() -> None:
    lines, constants = lines_of(keys(ROWS), PLACES, POSITIONS, CHANNELS)
    both = lines.permute(0, 2, 3, 1).reshape(-1, 2)
    assert len(torch.unique(both, dim=0)) == PLACES * ROWS * POSITIONS
    assert (lines[:, 0] % 2 == 1).all(), "an even slope would leave bits out"
    assert len(torch.unique(constants)) == CHANNELS


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7])
def test_what_is_left_is_scaled_so_that_the_mean_stays(rate: float) -> None:
    lines, constants = lines_of(keys(ROWS), 1, POSITIONS, CHANNELS)
    x = torch.full((ROWS, POSITIONS, CHANNELS), 3.0, requires_grad=True)
    y = drop(x, lines[0], constants, rate)
    assert y[y != 0].unique().tolist() == [pytest.approx(3 / (1 - rate), rel=1e-4)]
    assert y.mean().item() == pytest.approx(3, rel=0.02)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(x.grad * 3, y)


def test_a_row_has_the_same_mask_in_any_batch() -> None:
    whole = lines_of(keys(8), PLACES, POSITIONS, CHANNELS).lines
    parts = [lines_of(part, PLACES, POSITIONS, CHANNELS).lines for part in keys(8).split(2)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    wider = lines_of(keys(8), PLACES, POSITIONS, 2 * CHANNELS).constants
    assert torch.equal(wider[:CHANNELS], lines_of(keys(8), PLACES, POSITIONS, CHANNELS).constants)


def network(model: AnyGeneratorConfig) -> GeneratorNetwork:
    torch.manual_seed(0)
    made = build_generator(model, space_of(INFO))
    made.initialise()
    spread(made)
    return made


def loss_of(made: GeneratorNetwork, rows: slice, keys_B: Tensor | None) -> Tensor:
    codes = data().codes.long()[:16]
    view = made.draw_view(16, step=0, generator=torch.Generator().manual_seed(1))
    view = None if view is None else view[rows]
    own = None if keys_B is None else keys_B[rows]
    return made.training_loss(data().classes.long()[:16][rows], codes[rows], view, own, label_smoothing=0.0)


@every_kind
def test_every_place_of_a_network_is_dropped_from(model: AnyGeneratorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = network(model), list[Tensor]()

    def watched(x: Tensor, line: Tensor, constants: Tensor, rate: float) -> Tensor:
        assert rate == model.dropout
        seen.append(line)
        return drop(x, line, constants, rate)

    for module in ("network", "autoregressive", "masked"):
        monkeypatch.setattr(f"generator.{module}.drop", watched)
    plain, dropped = loss_of(made, slice(16), None), loss_of(made, slice(16), keys(16))
    assert plain.item() != dropped.item()
    drawn = sum(line.numel() for line in seen)
    masks = made.masks(keys(16))
    assert masks is not None
    assert drawn == masks.lines.numel(), "each line is used once"
    assert len({line.flatten()[0].item() for line in seen}) == len(seen)


@every_kind
def test_recomputed_and_compiled_blocks_drop_the_same(model: AnyGeneratorConfig) -> None:
    made = network(model)
    plain = loss_of(made, slice(16), keys(16))
    made.recompute(True)
    recomputed = loss_of(made, slice(16), keys(16))
    recomputed.backward()
    assert torch.equal(plain, recomputed)
    for block in made.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    made.recompute(False)
    assert loss_of(made, slice(16), keys(16)).item() == pytest.approx(plain.item(), rel=1e-5)


@every_kind
def test_micro_batches_change_a_training_by_rounding_only(model: AnyGeneratorConfig, store: Store) -> None:
    """With dropout, and for masked codes whose weights differ from row to row."""
    found = {}
    for size in (0, 8, 4, 2):
        folder, settings = store.at(str(size)), config(6, micro_batch=size)
        train_generator(data(), data(seed=1), INFO, model, settings, run=TrainingRun(folder, seed=0))
        found[size] = losses(folder)
        assert settings.identity() == config(6).identity()
    for size in (8, 4, 2):
        assert found[size] == pytest.approx(found[0], rel=1e-4)
    none = model.model_copy(update={"dropout": 0.0})
    train_generator(data(), data(seed=1), INFO, none, config(6), run=TrainingRun(store.at("none"), seed=0))
    assert losses(store.at("none")) != pytest.approx(found[0], rel=1e-3)


@pytest.mark.gpu
@every_kind
def test_a_gpu_drops_what_a_cpu_drops(model: AnyGeneratorConfig) -> None:
    here, there = (lines_of(keys(ROWS).to(device), PLACES, POSITIONS, CHANNELS) for device in ("cpu", "cuda"))
    assert torch.equal(here.lines, there.lines.cpu())
    ones = torch.ones(ROWS, POSITIONS, CHANNELS)
    on_gpu = drop(ones.cuda(), there.lines[0], there.constants, model.dropout).cpu()
    assert torch.equal(drop(ones, here.lines[0], here.constants, model.dropout), on_gpu)
    made = network(model)
    on_cpu = loss_of(made, slice(16), keys(16)).item()
    for block in made.cuda().blocks:
        block.compile(dynamic=False)
    codes, classes = data().codes.long()[:16].cuda(), data().classes.long()[:16].cuda()
    view = made.draw_view(16, step=0, generator=torch.Generator().manual_seed(1))
    view = None if view is None else view.cuda()
    loss = made.training_loss(classes, codes, view, keys(16).cuda(), label_smoothing=0.0)
    assert loss.item() == pytest.approx(on_cpu, rel=1e-3)
