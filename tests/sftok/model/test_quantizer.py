"""The quantizer: codes that depend on the image alone, and an assignment that balances the codebook."""

import pytest
import torch

from sftok.model.quantizer import Quantizer, sinkhorn
from tests.support.tiny_tokenizer import TOKENIZER


@pytest.fixture
def quantizer() -> Quantizer:
    torch.manual_seed(0)
    made = Quantizer(TOKENIZER)
    made.initialise()
    return made


def vectors(batch: int) -> torch.Tensor:
    return torch.randn(batch, 8, 8, generator=torch.Generator().manual_seed(1))


def test_nearest_codes_do_not_depend_on_batch_mates(quantizer: Quantizer) -> None:
    z = vectors(6)
    together = quantizer(z, "nearest").codes
    alone = torch.cat([quantizer(z[i : i + 1], "nearest").codes for i in range(6)])
    assert torch.equal(together, alone)


def test_sinkhorn_codes_do_depend_on_batch_mates(quantizer: Quantizer) -> None:
    """Guards against taking it for a property of the image, as the published code does at inference."""
    z = vectors(32)
    together = quantizer(z, "sinkhorn").codes
    alone = torch.cat([quantizer(z[i : i + 1], "sinkhorn").codes for i in range(32)])
    assert not torch.equal(together, alone)


def test_nearest_is_the_smallest_distance(quantizer: Quantizer) -> None:
    z = vectors(4)
    distance = torch.cdist(torch.nn.functional.normalize(z, dim=-1).flatten(0, 1), quantizer.codebook())
    assert torch.equal(quantizer(z, "nearest").codes.flatten(), distance.argmin(1))


@pytest.mark.parametrize("assignment", ["nearest", "sinkhorn"])
def test_the_output_is_the_lookup_of_its_own_codes(quantizer: Quantizer, assignment: str) -> None:
    quantized = quantizer(vectors(4), assignment)
    assert torch.allclose(quantized.z_q, quantizer.lookup(quantized.codes), atol=1e-6)


def test_sinkhorn_marginals_are_balanced() -> None:
    plan = sinkhorn(torch.rand(256, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(plan.sum(1), torch.ones(256), atol=1e-4)
    assert torch.allclose(plan.sum(0), torch.full((32,), 256 / 32), rtol=0.05)


def test_sinkhorn_equals_the_published_formula() -> None:
    """Written as method.md 1.1 states it, codes by rows and vectors by columns."""
    d = torch.rand(40, 16, generator=torch.Generator().manual_seed(3))
    q = torch.exp(-10 * (d - d.min())).T
    q /= q.sum() + 1e-8
    for _ in range(5):
        q /= q.sum(1, keepdim=True) + 1e-8
        q /= 16
        q /= q.sum(0, keepdim=True) + 1e-8
        q /= 40
    assert torch.allclose(sinkhorn(d), (q * 40).T, rtol=1e-5)


def test_every_code_gets_gradient_through_the_shared_linear_layer(quantizer: Quantizer) -> None:
    quantized = quantizer(vectors(1), "nearest")
    quantized.loss.backward()
    assert quantizer.shared_linear.weight.grad is not None
    used = quantized.codes.unique()
    before = quantizer.codebook().detach()
    with torch.no_grad():
        quantizer.shared_linear.weight -= quantizer.shared_linear.weight.grad
    moved = (quantizer.codebook() - before).norm(dim=1) > 0
    assert moved.sum() > len(used)


def test_gradients_pass_straight_through(quantizer: Quantizer) -> None:
    z = torch.nn.functional.normalize(vectors(2), dim=-1).requires_grad_()
    weights = torch.randn(2, 8, 8)
    (quantizer(z, "nearest").z_q * weights).sum().backward()
    # Through l2norm at unit length, the gradient is the part of `weights` that is tangent to the sphere.
    tangent = weights - (weights * z).sum(-1, keepdim=True) * z
    assert torch.allclose(z.grad, tangent, atol=1e-5)
