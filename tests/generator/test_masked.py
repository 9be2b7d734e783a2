"""The masked generator: parity with BERT, its mask and loss, its sampling loop, the published layout."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generator.artifacts import load_generator, save_generator
from generator.code_space import CodeSpace
from generator.config import MASKED_GENERATORS, SampleConfig
from generator.kinds import prepare_sampler
from generator.masked import MaskedGenerator
from generator.objectives import held_out_losses, masked_loss, random_mask
from generator.sampling.filters import guidance_scales
from generator.sampling.masked import choose, guided, gumbel, hide, kept_hidden
from infra.store.store import Store
from tests.support.plain_sampling import sample_masked
from tests.support.published_masked import from_published, to_published
from tests.support.small_generators import INFO, SPACE, masked, uniform

CODES = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 2, 3])
HIDDEN = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.5


def transcription(weights: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """Compute BERT and its head from weights by published names: token ids (B, S) to logits (B, S, V)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    where = "model.embeddings"
    x = weights[f"{where}.word_embeddings.weight"][ids] + weights[f"{where}.position_embeddings.weight"]
    x = norm(where, x + weights[f"{where}.token_type_embeddings.weight"][0])
    for i in itertools.count():
        where = f"model.encoder.layer.{i}"
        if f"{where}.intermediate.dense.weight" not in weights:
            return linear("model.lm_head", x)
        q, k, v = (
            linear(f"{where}.attention.self.{part}", x).chunk(heads, dim=-1) for part in ("query", "key", "value")
        )
        gathered = [
            (a @ b.transpose(1, 2) / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)
        ]
        x = norm(f"{where}.attention.output", x + linear(f"{where}.attention.output.dense", torch.cat(gathered, -1)))
        inner = linear(f"{where}.intermediate.dense", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(f"{where}.output", x + linear(f"{where}.output.dense", inner))
    raise AssertionError


def token_ids(classes: Tensor, codes: Tensor, hidden: Tensor) -> Tensor:
    """Make token ids as in method.md 1.5: codes, then the mask 11, then classes from 12 on, the null class last."""
    return torch.cat([12 + classes[:, None], torch.where(hidden, 11, codes)], dim=1)


def test_the_published_generator_has_its_size() -> None:
    with torch.device("meta"):
        model = MaskedGenerator(MASKED_GENERATORS["published"], CodeSpace(8192, 64, 1000))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(183.5, abs=0.1)
    assert model.embed.num_embeddings == 9194
    assert model.positions.num_embeddings == 65


def test_it_computes_what_the_layout_says() -> None:
    model = masked()
    wanted = transcription(to_published(model), token_ids(CLASSES, CODES, HIDDEN), heads=2)[:, 1:]
    found = model(CLASSES, CODES.masked_fill(HIDDEN, model.mask_id))
    assert found.std() > 0.3
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parity
def test_it_computes_what_bert_does_with_the_same_weights() -> None:
    from transformers import BertConfig, BertModel

    model = masked()
    config = BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=7,
        layer_norm_eps=1e-12,
    )
    bert, weights = BertModel(config, add_pooling_layer=False).eval(), to_published(model)
    bert.load_state_dict(
        {n.removeprefix("model."): t for n, t in weights.items() if not n.startswith("model.lm_head.")}
    )
    states = bert(input_ids=token_ids(CLASSES, CODES, HIDDEN)).last_hidden_state[:, 1:]
    wanted = F.linear(states, weights["model.lm_head.weight"], weights["model.lm_head.bias"])
    assert torch.allclose(model(CLASSES, CODES.masked_fill(HIDDEN, model.mask_id)), wanted, atol=1e-4)


def test_it_sees_both_ways_and_drops_out_with_keys_only() -> None:
    model = masked()
    changed = CODES.clone()
    changed[:, 3] = (CODES[:, 3] + 1) % 11
    assert ((model(CLASSES, CODES) - model(CLASSES, changed)).abs().amax((0, 2)) > 1e-3).all()
    assert torch.equal(model(CLASSES, CODES), model(CLASSES, CODES))
    one, other = (model(CLASSES, CODES, torch.full((3,), key)) for key in (1, 2))
    assert not torch.allclose(one, other)
    assert torch.equal(one, model(CLASSES, CODES, torch.ones(3, dtype=torch.int64)))


def test_masks_follow_the_arccos_schedule_and_hide_one_code_at_least() -> None:
    mask = random_mask(20_000, 64, torch.Generator().manual_seed(0))
    share = mask.float().mean(1)
    assert mask.sum(1).min() == 1
    assert share.mean().item() == pytest.approx(2 / math.pi, abs=0.01)  # the mean of arccos(t) / (pi / 2)
    # P(ratio <= r) = 1 - cos(r pi / 2)
    assert (share <= 0.5).float().mean().item() == pytest.approx(1 - math.cos(math.pi / 4), abs=0.02)
    by_position = mask.float().mean(0)
    assert (by_position.max() - by_position.min()).item() < 0.03
    assert torch.equal(mask, random_mask(20_000, 64, torch.Generator().manual_seed(0)))


def test_the_loss_is_the_weighted_mean_of_smoothed_cross_entropies() -> None:
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0))
    total, weights = 0.0, 0.0
    for b, n in itertools.product(range(3), range(6)):
        log_p = logits[b, n].log_softmax(-1)
        smoothed = 0.9 * -log_p[CODES[b, n]] + 0.1 * -log_p.mean()
        weight = 1.0 if HIDDEN[b, n] else 0.1
        total, weights = total + weight * smoothed.item(), weights + weight
    found = masked_loss(logits, CODES, HIDDEN, unmasked_weight=0.1, label_smoothing=0.1)
    assert found.item() == pytest.approx(total / weights, rel=1e-5)


def test_one_batch_is_learnt_by_heart() -> None:
    model = masked(dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(150):
        view = model.draw_view(3, step=step, generator=torch.Generator().manual_seed(step))
        loss = model.training_loss(CLASSES, CODES, view, label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    found = held_out_losses(model.eval(), CLASSES, CODES, generator, len(CODES))
    hidden = random_mask(3, 6, torch.Generator().manual_seed(0))
    assert torch.equal(found.counted, hidden)  # hidden codes alone
    assert (found.losses[~hidden] == 0).all()
    assert found.losses.sum().item() / hidden.sum() < 0.1
    assert torch.equal(found.right, hidden)


def test_recomputing_blocks_changes_no_gradient() -> None:
    model, found = masked().train(), []
    for on in (False, True):
        model.recompute(on)
        model.zero_grad()
        model.training_loss(CLASSES, CODES, HIDDEN, CLASSES, label_smoothing=0.1).backward()  # with dropout
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_published_counts_of_hidden_codes() -> None:
    assert [kept_hidden(64, (step + 1) / 8) for step in range(7)] == [58, 53, 48, 42, 36, 29, 20]


def test_the_least_confident_are_hidden_and_given_codes_never() -> None:
    confidence = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0]])
    hidden = torch.tensor([[False, True, True, True, True], [True] * 5, [True] * 5])
    assert hide(confidence, hidden, 2).tolist() == [
        [False, True, True, False, False],
        [False, False, False, True, True],
        [True, True, False, False, False],  # ties do not hide more
    ]
    assert hide(confidence, hidden, 9).sum(1).tolist() == [3, 4, 4]  # one a step is given away at least
    assert hide(confidence, hidden, 0).sum(1).tolist() == [1, 1, 1]


def test_codes_once_given_stay_and_counts_follow_the_schedule() -> None:
    model, seen = masked(space=SPACE._replace(num_tokens=16)), []

    class Watched:
        config, space, mask_id, device = model.config, model.space, model.mask_id, model.device

        def __call__(self, class_B: Tensor, ids_BN: Tensor) -> Tensor:
            seen.append(ids_BN)
            return model(class_B, ids_BN)

    config = SampleConfig(num_steps=4, temperature=3.0)
    codes = sample_masked(Watched(), CLASSES, uniform(3, 4, 2, 16), config)
    assert [int((ids[0] == 11).sum()) for ids in seen] == [16, *(kept_hidden(16, s / 4) for s in (1, 2, 3))]
    for before, after in itertools.pairwise([*seen, codes]):
        assert torch.equal(after[before != 11], before[before != 11])
    assert (codes < 11).all()


def test_choosing_follows_noisy_argmax() -> None:
    """Drawing from softmax(logits / noise) has the distribution of the argmax of logits + noise * Gumbel."""
    logits, count, noise = torch.tensor([0.0, 1.0, -0.5, 2.0]), 40_000, 1.7
    drawn = choose(logits.expand(1, count, 4), uniform(1, count), noise)
    noisy = (logits + noise * gumbel(uniform(count, 4, seed=9))).argmax(-1)
    for codes in (drawn[0], noisy):
        share = torch.bincount(codes, minlength=4) / count
        assert torch.allclose(share, (logits / noise).softmax(0), atol=0.01)


def test_two_tokens_are_sampled_as_enumerated() -> None:
    """In two steps on two tokens, the more confident code is kept, and the other is the argmax given it."""
    model, config = masked(space=CodeSpace(3, 2, 1)), SampleConfig(num_steps=2, temperature=2.0)
    count, noise = 4096, 1.0  # of the first of two steps
    codes = sample_masked(model, torch.zeros(count, dtype=torch.long), uniform(count, 2, 2, 2), config)
    logits = model(torch.zeros(1, dtype=torch.long), torch.full((1, 2), 3))[0]
    wanted: Counter[tuple[int, ...]] = Counter()
    for first, second in itertools.product(range(3), range(3)):
        probability = ((logits[0] / noise).softmax(0)[first] * (logits[1] / noise).softmax(0)[second]).item()
        # The difference of two Gumbel variables is logistic.
        stays = torch.sigmoid((logits[0, first] - logits[1, second]) / noise).item()
        for kept, share in ((0, stays), (1, 1 - stays)):
            ids = [3, 3]
            ids[kept] = (first, second)[kept]
            again = model(torch.zeros(1, dtype=torch.long), torch.tensor([ids]))[0]
            ids[1 - kept] = int(again[1 - kept].argmax())
            wanted[tuple(ids)] += probability * share
    found = Counter(map(tuple, codes.tolist()))
    assert set(found) <= set(wanted)
    statistic = sum((found[k] - count * p) ** 2 / (count * p) for k, p in wanted.items())
    assert statistic < 3 * len(wanted)


def test_annealing_divides_the_logits() -> None:
    model = masked()
    config = SampleConfig(num_steps=1, temperature=0.0)
    halved = SampleConfig(num_steps=3, annealing=(2.0, 0.0), temperature=1.0)
    for changed in (halved, halved.model_copy(update={"annealing": (0.5, 0.8)})):
        plain = sample_masked(model, CLASSES, uniform(3, 3, 2, 6), changed.model_copy(update={"annealing": None}))
        assert not torch.equal(plain, sample_masked(model, CLASSES, uniform(3, 3, 2, 6), changed))
    # Half the logits at half the noise: the same codes.
    twice = halved.model_copy(update={"annealing": None, "temperature": 2.0})
    assert torch.equal(
        sample_masked(model, CLASSES, uniform(3, 3, 2, 6), halved),
        sample_masked(model, CLASSES, uniform(3, 3, 2, 6), twice),
    )
    assert torch.equal(
        sample_masked(model, CLASSES, uniform(3, 1, 2, 6), config),
        model(CLASSES, torch.full((3, 6), 11)).argmax(-1),
    )


def test_guidance_is_one_batch_of_both_and_none_at_scale_one() -> None:
    model, ids = masked(), CODES.masked_fill(HIDDEN, 11)
    cond, uncond = model(CLASSES, ids), model(torch.full((3,), 3), ids)
    assert torch.allclose(guided(model, CLASSES, ids, 5.5), uncond + 5.5 * (cond - uncond), atol=1e-4)
    assert torch.equal(guided(model, CLASSES, ids, 1.0), cond)


def test_the_published_scale_is_one_less() -> None:
    """method.md 1.5: published constant guidance is cond + s (cond - uncond); its 4.5 is 5.5 here."""
    model, ids = masked(), CODES.masked_fill(HIDDEN, 11)
    cond, uncond = model(CLASSES, ids), model(torch.full((3,), 3), ids)
    (scale,) = guidance_scales(SampleConfig(cfg_scale=5.5), 1)
    assert torch.allclose(guided(model, CLASSES, ids, scale), cond + 4.5 * (cond - uncond), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_prepared_sampler_draws_the_same(precision: str) -> None:
    model = masked()
    config = SampleConfig(cfg_scale=3.0, cfg_schedule="linear", num_steps=4, precision=precision)
    found = prepare_sampler(model, config)(CLASSES, uniform(3, 4, 2, 6))
    wanted = sample_masked(model, CLASSES, uniform(3, 4, 2, 6), config)
    assert (found == wanted).float().mean() >= (1.0 if precision == "fp32" else 0.5)


@pytest.mark.slow
def test_the_compiled_sampler_draws_the_same() -> None:
    model = masked()
    config = SampleConfig(cfg_scale=3.0, cfg_schedule="linear", num_steps=4)
    found = prepare_sampler(model, config.model_copy(update={"compile": True}))(CLASSES, uniform(3, 4, 2, 6))
    assert torch.equal(found, sample_masked(model, CLASSES, uniform(3, 4, 2, 6), config))


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    config, numbers = SampleConfig(cfg_scale=2.0, num_steps=3), uniform(4, 3, 2, 6)
    sampler, classes = prepare_sampler(masked(), config), torch.tensor([0, 1, 2, 0])
    together, order = sampler(classes, numbers), torch.tensor([2, 0, 3, 1])
    assert torch.equal(sampler(classes[order], numbers[order]), together[order])
    others = numbers.clone()
    others[1:] = uniform(3, 3, 2, 6, seed=8)
    assert torch.equal(sampler(torch.tensor([0, 3, 1, 1]), others)[0], together[0])


def test_without_classes_everything_is_of_the_null_class() -> None:
    model = masked(space=SPACE._replace(num_classes=0))
    assert sample_masked(model, torch.tensor([0, 0]), uniform(2, 8, 2, 6), SampleConfig()).shape == (2, 6)
    with pytest.raises(ValueError, match=r"class id 1 is not in \[0, 0\]"):
        sample_masked(model, torch.tensor([1]), uniform(1, 8, 2, 6), SampleConfig())


def test_settings_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^top_k = 3 has no effect on a generator that is masked: leave it 0$"):
        prepare_sampler(masked(), SampleConfig(top_k=3))
    with pytest.raises(ValueError, match=r"annealing = \(0.0, 1.0\) divides by 0"):
        SampleConfig(annealing=(0.0, 1.0))


def test_numbers_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 6\), not \(1, 8, 2, 6\)"):
        sample_masked(masked(), torch.tensor([0]), uniform(1, 6), SampleConfig())


def test_a_saved_generator_comes_back(store: Store) -> None:
    save_generator(masked(), INFO, store)
    loaded, _ = load_generator(store)
    assert isinstance(loaded, MaskedGenerator)
    assert torch.equal(loaded(CLASSES, CODES), masked()(CLASSES, CODES))


def test_published_weights_come_and_go_bit_for_bit() -> None:
    weights = to_published(masked())
    assert "model.encoder.layer.1.attention.self.key.bias" in weights
    model = from_published(weights | {"model.embeddings.position_ids": torch.arange(7)[None]}, heads=2)
    assert (model.space, model.config.layers, model.config.ffn_width) == (SPACE, 2, 24)
    again = to_published(model)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert torch.equal(model(CLASSES, CODES), masked()(CLASSES, CODES))


def test_weights_that_are_not_a_published_generators_are_refused() -> None:
    weights = to_published(masked())
    lost = {n: t for n, t in weights.items() if n != "model.lm_head.bias"} | {"model.pooler.dense.bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 missing \(model.lm_head.bias\), 1 unexpected \(model.pooler.dense.bias\)"):
        from_published(lost, heads=2)
    name = "model.encoder.layer.0.output.dense.weight"
    with pytest.raises(ValueError, match=rf"1 misshapen \({name} is \[1\], not \[16, 24\]\)"):
        from_published(weights | {name: torch.ones(1)}, heads=2)
    with pytest.raises(ValueError, match=r"no model.lm_head.weight with 2 axes"):
        from_published({n: t for n, t in weights.items() if "lm_head" not in n}, heads=2)
    with pytest.raises(ValueError, match=r"5 embeddings and 7 positions fit no generator of 11 codes"):
        from_published(weights | {"model.embeddings.word_embeddings.weight": torch.ones(5, 16)}, heads=2)
    with pytest.raises(ValueError, match=r"width = 16 is not a multiple of heads = 3"):
        from_published(weights, heads=3)
