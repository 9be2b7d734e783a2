"""Agreement of decoding steps with the last one: against a direct transcription, merged, and on a real decoder."""

import math

import numpy as np
import pytest
import torch

from sftok.metrics.step_agreement import StepAgreement, decode_logits, kl_of_truth
from sftok.model.iterative_decoding import decode_steps
from tests.support.tiny_tokenizer import tokenizer

B, P, V = 3, 16, 32


def steps(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(B, P, V, generator=generator) for _ in range(count)]


def truth() -> torch.Tensor:
    return torch.randint(0, V, (B, P), generator=torch.Generator().manual_seed(2))


def probabilities(logits: torch.Tensor) -> np.ndarray:
    values = np.exp(logits.double().numpy())
    return values / values.sum(-1, keepdims=True)


def test_equals_the_definition_written_out() -> None:
    """KL(step || final), not KL(final || step), in nats, the mean over images and positions."""
    logits, codes = steps(), truth()
    found, final = StepAgreement.of(logits, codes), probabilities(logits[-1])
    smoothed = np.full((B, P, V), 1e-6 / V)
    np.put_along_axis(smoothed, codes.numpy()[..., None], 1 - 1e-6 + 1e-6 / V, axis=-1)
    for kl, top1, p in zip(found.kl, found.top1, [smoothed, *map(probabilities, logits[:-1])], strict=True):
        assert kl == pytest.approx((p * np.log(p / final)).sum(-1).mean(), rel=1e-5)
        assert top1 == (p.argmax(-1) == final.argmax(-1)).mean()


def test_a_step_that_is_the_last_one_agrees_wholly() -> None:
    same = steps(1)[0]
    found = StepAgreement.of([same, same.clone()], same.argmax(-1))
    assert found.kl[1] == 0
    assert found.top1 == [1.0, 1.0]
    assert found.kl[0] > 0  # the truth is surer than the prediction


def test_the_truth_keeps_its_digits() -> None:
    """A final prediction that is the smoothed truth itself has KL 0; float32 would miss it by more than 1e-6."""
    codes = truth()
    p = torch.full((B, P, V), 1e-6 / V, dtype=torch.float64).scatter_(-1, codes[..., None], 1 - 1e-6 + 1e-6 / V)
    assert kl_of_truth(codes, p.log()).max() < 1e-12
    sure = torch.full((B, P, V), -40.0).scatter_(-1, codes[..., None], 0.0)
    expected = 1e-6 * (V - 1) / V * (math.log(1e-6 / V) + 40) - 1e-6 * (V - 1) / V
    assert kl_of_truth(codes, sure).mean().item() == pytest.approx(expected, rel=1e-3)


def test_parts_merge_to_the_whole() -> None:
    logits, codes = steps(), truth()
    whole = StepAgreement.of(logits, codes)
    parts = [StepAgreement.of([one[rows] for one in logits], codes[rows]) for rows in (slice(0, 1), slice(1, 3))]
    merged = parts[1] + parts[0]
    assert merged.positions == whole.positions == B * P
    assert merged.kl == pytest.approx(whole.kl, rel=1e-12)
    assert merged.top1 == whole.top1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        StepAgreement.of([], truth())
    with pytest.raises(ValueError, match="nothing fits"):
        StepAgreement.of(steps(), truth()[:2])
    with pytest.raises(ValueError, match="4 and 3 decoding steps"):
        StepAgreement.of(steps(4), truth()) + StepAgreement.of(steps(3), truth())


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@torch.no_grad()
def test_the_logits_are_those_that_decoding_goes_by(temperature: float) -> None:
    model = tokenizer()
    z_q = model.quantizer.lookup(torch.arange(24).view(3, 8))
    first = model.decoder.all_masked(z_q)

    given = {"num_steps": 4, "temperature": temperature, "keys_B": torch.arange(3)}
    logits = decode_logits(model.decoder, first, z_q, **given)
    _, last = decode_steps(model.decoder, first, z_q, **given)
    assert len(logits) == 4
    assert torch.equal(logits[-1], last)
    assert torch.equal(logits[0], model.decoder(first, z_q))
    assert not torch.equal(logits[1], logits[0])  # later steps see what earlier ones kept
