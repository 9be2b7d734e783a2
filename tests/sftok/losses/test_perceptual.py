"""LPIPS: equal to its authors' package, with gradients that stay finite, from files that are what they should be."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable

import lpips
import pytest
import torch
from torch import Tensor, nn

from sftok.losses.perceptual import Lpips, load_lpips

State = dict[str, Tensor]


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def pair(height: int = 48, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, height, width, generator=generator), torch.rand(3, 3, height, width, generator=generator)


@pytest.fixture(scope="module")
def reference() -> lpips.LPIPS:
    """The authors' network with its own linear layers on a VGG16 of random weights; biases are given some too."""
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # it asks torchvision in an old way
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    for name, parameter in model.net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def vgg(reference: lpips.LPIPS) -> State:
    """The same VGG16 as torchvision publishes it."""
    state = {re.sub(r"slice\d", "features", name): value for name, value in reference.net.state_dict().items()}
    return state | {"classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)}


@pytest.fixture(scope="module")
def model(vgg: State) -> Lpips:
    return load_lpips(saved(vgg))


def value_and_gradient(distance: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    images, targets = pair()
    images.requires_grad_()
    values = distance(images, targets)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    return values.detach(), gradient


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["torchvision", "lpips"])
def test_values_and_gradients_are_those_of_the_lpips_package(reference: lpips.LPIPS, vgg: State, layout: str) -> None:
    model = load_lpips(saved(vgg if layout == "torchvision" else reference.state_dict()))
    wanted, wanted_gradient = value_and_gradient(lambda x, y: reference(x * 2 - 1, y * 2 - 1).flatten())
    values, gradient = value_and_gradient(model)
    assert values.shape == (3,)
    assert (wanted > 1e-3).all()
    torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-5 * wanted_gradient.abs().max().item(), rtol=1e-4)


def test_an_image_is_at_no_distance_from_itself(model: Lpips) -> None:
    images, targets = pair()
    assert model(images, images).tolist() == [0, 0, 0]
    torch.testing.assert_close(model(images, targets), model(targets, images))


def test_a_distance_does_not_depend_on_batch_mates(model: Lpips) -> None:
    images, targets = pair()
    torch.testing.assert_close(model(images, targets)[1:2], model(images[1:2], targets[1:2]))


def test_gradients_are_finite_where_no_channel_is_active(vgg: State) -> None:
    silent = {n: v.clone().fill_(-100) if n == "features.28.bias" else v for n, v in vgg.items()}
    values, gradient = value_and_gradient(load_lpips(saved(silent)))
    assert (values > 0).all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_gradients_are_bounded_where_all_channels_are_next_to_zero(reference: lpips.LPIPS, vgg: State) -> None:
    """One such position may drown the gradient of a batch; the published norm lets it, and is the counterexample."""
    images, _ = pair()
    published = copy.deepcopy(reference)
    before_relu = load_lpips(saved(vgg)).features[:-1](published.scaling_layer(images * 2 - 1))[0, :, 1, 1]
    barely = 1e-6 * torch.rand(len(before_relu), generator=torch.Generator().manual_seed(0))
    published.net.slice5[-2].bias.data += barely - before_relu
    _, unbounded = value_and_gradient(lambda x, y: published(x * 2 - 1, y * 2 - 1).flatten())
    _, bounded = value_and_gradient(load_lpips(saved(published.state_dict())))
    assert bounded.norm() < 0.2 * unbounded.norm()


def test_it_is_frozen_and_autocast_does_not_reach_it(model: Lpips) -> None:
    images, targets = pair()
    assert not any(p.requires_grad for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images, targets), model(images.clone(), targets.clone()))
        inside = model(images, targets)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, model(images, targets))


def test_images_too_small_are_refused(model: Lpips) -> None:
    assert model(*pair(16, 16)).shape == (3,)
    with pytest.raises(ValueError, match=r"\(12, 32\) pixels: needs at least 16"):
        model(*pair(12, 32))


class Payload:
    """What a pickle could do if it were trusted."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


WRONG: dict[str, tuple[Callable[[State], bytes], str]] = {
    "empty": (lambda vgg: b"", "0 bytes"),
    "truncated": (lambda vgg: saved(vgg)[:5_000_000], "cannot read"),
    "not torch's": (lambda vgg: b"<html>Not found</html>" * 40, "LPIPS"),
    "code": (lambda vgg: saved({"features.0.weight": Payload()}), "could run code"),
    "plain pickle": (lambda vgg: pickle.dumps(Payload(), protocol=2), "could run code"),
    "a list": (lambda vgg: saved([torch.zeros(1)]), "not a state dict"),
    "integers": (lambda vgg: saved({"features.0.weight": torch.zeros(1, dtype=torch.int64)}), "not a state dict"),
    "missing": (
        lambda vgg: saved({n: v for n, v in vgg.items() if n != "features.5.bias"}),
        r"missing: features\.5\.b",
    ),
    "unexpected": (lambda vgg: saved(vgg | {"features.30.weight": torch.zeros(1)}), r"unexpected: features\.30"),
    "misshapen": (lambda vgg: saved(vgg | {"features.0.bias": torch.zeros(3)}), r"another shape: features\.0\.bias"),
    "another network": (lambda vgg: saved({"conv1.weight": torch.zeros(1)}), "and 2[0-9] more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_in_one_line(vgg: State, name: str) -> None:
    make, reason = WRONG[name]
    with pytest.raises(ValueError, match=reason) as caught:
        load_lpips(make(vgg), "LPIPS (fine_tune.lpips)")
    assert str(caught.value).startswith("LPIPS (fine_tune.lpips): ")
    assert "\n" not in str(caught.value)
