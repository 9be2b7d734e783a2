"""Discriminators: DINO equal to timm's, norms equal to torch's, and logits that depend on nothing they should not."""

import io
from functools import cache, partial

import pytest
import timm
import torch
from torch import Tensor, nn

from sftok.losses.dino import Dino, check_dino_size, dino_view, load_dino, shrink
from sftok.losses.discriminator import (
    BatchNormLocal,
    DinoDiscriminator,
    PatchDiscriminator,
    SpectralConv1d,
    check_local_batch,
    check_patch_size,
    iterate_spectral_norms,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def vit() -> nn.Module:
    """timm's ViT-S/16 of random weights, none of which is left at 0 or 1."""
    torch.manual_seed(0)
    gelu = partial(nn.GELU, approximate="tanh")
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, act_layer=gelu).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


@cache
def dino_file() -> bytes:
    """Those weights as DINO's are published: timm took over its names."""
    return saved(vit().state_dict())


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def dino() -> Dino:
    return load_dino(dino_file())


def timm_readouts(images: Tensor) -> list[Tensor]:
    """What enters block 0 and leaves blocks 2, 5, 8, 11 of timm's network."""
    model, seen = vit(), []
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    for index in (2, 5, 8, 11):
        hooks.append(model.blocks[index].register_forward_hook(lambda _, __, output: seen.append(output)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model((images - mean[:, None, None]) / std[:, None, None])
    for hook in hooks:
        hook.remove()
    return [(tokens[:, 1:] + tokens[:, :1]).transpose(1, 2) for tokens in seen]


@pytest.mark.parity
def test_dino_is_timms_vit(dino: Dino) -> None:
    """timm's network has its K-bias here; that softmax cannot see it is part of what is tested."""
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    ours, theirs = dino(images), timm_readouts(images)
    assert [tuple(x.shape) for x in ours] == [(2, 384, 196)] * 5
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-4)
    gaps = [(a - b).abs().max() for i, a in enumerate(theirs) for b in theirs[:i]]
    assert min(gaps) > 0.1  # readouts differ, so that their order is tested


def test_the_key_bias_is_zeroed_and_everything_frozen(dino: Dino) -> None:
    for block in dino.blocks:
        query, key, value = block.attn.qkv.bias.view(3, -1)
        assert not key.any()
        assert query.all()
        assert value.all()
    assert not any(p.requires_grad for p in dino.parameters())
    images = torch.rand(1, 3, 32, 32).requires_grad_()
    sum(x.square().sum() for x in dino(images)).backward()
    assert images.grad.abs().max() > 0


def test_positions_of_smaller_grids_keep_rows_and_columns() -> None:
    """Guards against a grid that is transposed, or that takes the class token along."""
    model = Dino()
    nn.init.zeros_(model.patch_embed.proj.weight)
    nn.init.zeros_(model.patch_embed.proj.bias)
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    model.pos_embed[0, 1:, 0], model.pos_embed[0, 1:, 1] = rows.flatten(), columns.flatten()
    model.pos_embed[0, 0, 2] = 100
    first = model(torch.rand(1, 3, 112, 112))[0][0].unflatten(1, (7, 7))
    middles = torch.arange(7) * 2 + 0.5
    torch.testing.assert_close(first[0, 1:-1, 3], middles[1:-1], atol=0.1, rtol=0)
    torch.testing.assert_close(first[1, 3, 1:-1], middles[1:-1], atol=0.1, rtol=0)
    assert (first[2] == 100).all()


def test_other_files_are_refused_in_one_line() -> None:
    state = vit().state_dict()
    without = {n: v for n, v in state.items() if n != "blocks.3.attn.qkv.bias"}
    with pytest.raises(ValueError, match=r"DINO: other weights .*missing: blocks\.3\.attn\.qkv\.bias"):
        load_dino(saved(without))
    with pytest.raises(ValueError, match=r"another shape: pos_embed"):
        load_dino(saved(state | {"pos_embed": torch.zeros(1, 785, 384)}))
    with pytest.raises(ValueError, match="cannot read"):
        load_dino(dino_file()[:-1000])


@pytest.mark.parametrize(
    ("size", "is_fine"), [(32, True), (224, True), (225, True), (256, True), (16, False), (40, False)]
)
def test_sizes_that_dino_takes(size: int, is_fine: bool) -> None:
    if is_fine:
        check_dino_size(size)
        seen = dino_view(torch.zeros(1, 3, size, size), torch.Generator())
        assert seen.shape[2:] == (min(size, 224),) * 2
    else:
        with pytest.raises(ValueError, match=f"image_size = {size} "):
            check_dino_size(size)


def test_large_images_are_cut_half_of_the_time_and_shrunk_otherwise() -> None:
    images = torch.rand(2, 3, 230, 230, generator=torch.Generator().manual_seed(0))
    windows = {(top, left): images[:, :, top : top + 224, left : left + 224] for top in range(7) for left in range(7)}
    shrunk = nn.functional.adaptive_avg_pool2d(images, 224)
    generator, places = torch.Generator().manual_seed(0), []
    for _ in range(200):
        seen = dino_view(images, generator)
        if torch.equal(seen, shrunk):
            continue
        places += [place for place, window in windows.items() if torch.equal(seen, window)]
    assert 70 < len(places) < 130
    assert {p[0] for p in places} == {p[1] for p in places} == set(range(7))
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(dino_view(images, seed) for seed in seeds))


def test_the_spectral_norm_is_torchs() -> None:
    torch.manual_seed(0)
    ours = SpectralConv1d(12, 10, 9)
    theirs = nn.Conv1d(12, 10, 9, padding=4, padding_mode="circular")
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    theirs = nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=200)
    for _ in range(200):
        ours.iterate()
    x = noise(2, 12, 20)
    weights = noise(2, 10, 20, seed=1)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    wanted = theirs.parametrizations.weight.original.grad
    torch.testing.assert_close(ours.weight.grad, wanted, atol=1e-4, rtol=1e-4)


def test_calling_does_not_iterate_and_iterating_follows_the_weights() -> None:
    """Guards against vectors that move with the number of forward passes, which differs between ranks."""
    torch.manual_seed(0)
    conv = SpectralConv1d(12, 10, 1)
    before = {n: t.clone() for n, t in conv.named_buffers()}
    conv.train()(noise(2, 12, 20)).sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in conv.named_buffers())
    nn.init.normal_(conv.weight)
    for _ in range(50):
        iterate_spectral_norms(nn.Sequential(conv))
    norm = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
    assert (conv.u @ conv.weight.flatten(1) @ conv.v).item() == pytest.approx(norm.item(), rel=1e-3)
    assert {"u", "v"} < conv.state_dict().keys()


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (8, 1), (10, 2), (16, 2), (24, 3)])
def test_local_norm_is_batch_norm_of_each_group(batch: int, groups: int) -> None:
    norm = BatchNormLocal(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 * noise(batch, 6, 5) + 1
    wanted = [
        nn.functional.batch_norm(part, None, None, norm.weight, norm.bias, training=True, eps=1e-6)
        for part in x.chunk(groups)
    ]
    torch.testing.assert_close(norm(x), torch.cat(wanted), atol=1e-5, rtol=1e-5)
    assert torch.equal(norm.eval()(x), norm.train()(x))
    assert check_local_batch(batch) == groups


@pytest.mark.parametrize("batch", [9, 11, 17, 19])
def test_batches_without_equal_groups_are_refused(batch: int) -> None:
    with pytest.raises(ValueError, match=f"micro-batch of {batch} images"):
        check_local_batch(batch)
    with pytest.raises(ValueError, match=f"micro-batch of {batch} images"):
        BatchNormLocal(4)(torch.zeros(batch, 4, 5))


def test_dino_logits_have_five_depths_and_train_the_heads_alone(dino: Dino) -> None:
    torch.manual_seed(0)
    model = DinoDiscriminator(dino)
    logits = model(torch.rand(2, 3, 64, 48 + 16))
    assert logits.shape == (2, 5 * 16)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("heads.")}
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in trained)


def test_a_head_is_the_formula_on_its_readout(dino: Dino) -> None:
    """method.md 1.3, written with torch's own layers: circular convolutions, batch norm, (f(x) + x) / sqrt(2)."""
    torch.manual_seed(0)
    model, images = DinoDiscriminator(dino), torch.rand(4, 3, 48, 48)
    head = model.heads[1]
    for norm in (head.norm_1, head.norm_2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def layer(x: Tensor, conv: SpectralConv1d, norm: BatchNormLocal) -> Tensor:
        y = as_torchs(conv)(x)
        y = nn.functional.batch_norm(y, None, None, norm.weight, norm.bias, training=True, eps=1e-6)
        return nn.functional.leaky_relu(y, 0.2)

    x = layer(dino(images)[1], head.conv_1, head.norm_1)
    x = (layer(x, head.conv_2, head.norm_2) + x) / 2**0.5
    wanted = as_torchs(head.conv_out)(x).flatten(1)
    torch.testing.assert_close(model(images)[:, 9:18], wanted, atol=1e-4, rtol=1e-4)


def as_torchs(conv: SpectralConv1d) -> nn.Conv1d:
    """torch's convolution with the same vectors for the spectral norm, in evaluation mode, where they stay."""
    size = conv.kernel_size[0]
    made = nn.Conv1d(conv.in_channels, conv.out_channels, size, padding=size // 2, padding_mode="circular")
    made.load_state_dict({"weight": conv.weight, "bias": conv.bias})
    made = nn.utils.parametrizations.spectral_norm(made).eval()
    norm = made.parametrizations.weight[0]
    norm._u.copy_(conv.u)
    norm._v.copy_(conv.v)
    return made


def test_each_head_reads_its_own_depth(dino: Dino) -> None:
    torch.manual_seed(0)
    model = DinoDiscriminator(dino)
    images = torch.rand(2, 3, 32, 32)
    before = model(images).unflatten(1, (5, 4))
    nn.init.zeros_(model.heads[3].conv_out.bias)
    with torch.no_grad():
        model.heads[3].conv_out.bias += 7
    changed = (model(images).unflatten(1, (5, 4)) - before).abs().amax((0, 2)) > 1
    assert changed.tolist() == [False, False, False, True, False]


def test_a_small_image_for_dino_is_refused(dino: Dino) -> None:
    with pytest.raises(ValueError, match="image_size = 40 "):
        DinoDiscriminator(dino)(torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize(("layers", "size", "side"), [(3, 256, 30), (3, 24, 1), (2, 16, 2), (1, 8, 2)])
def test_patch_logits(layers: int, size: int, side: int) -> None:
    assert PatchDiscriminator(8, layers)(torch.rand(2, 3, size, size)).shape == (2, side * side)


def test_a_patch_logit_sees_70_pixels_but_for_the_norms() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(4, 3)
    for index, module in enumerate(model.net):
        if isinstance(module, nn.GroupNorm):
            model.net[index] = nn.Identity()
    images = torch.rand(1, 3, 128, 128).requires_grad_()
    model(images).unflatten(1, (14, 14))[0, 7, 7].backward()
    seen = images.grad.abs().sum((0, 1)) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (70, 70)


def test_a_patch_logit_does_not_depend_on_batch_mates() -> None:
    """Guards against batch norm: ranks and micro-batches would change what an image is worth."""
    torch.manual_seed(0)
    model, images = PatchDiscriminator(8, 2).train(), torch.rand(6, 3, 16, 16)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), atol=1e-6, rtol=1e-5)
    assert not list(model.buffers())


def test_images_too_small_for_the_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size = 16 .*layers = 3: choose at least 24"):
        PatchDiscriminator(8, 3)(torch.rand(1, 3, 16, 32))
    check_patch_size(24, 3)


@pytest.mark.parametrize("size", [225, 256, 300, 448])
def test_shrinking_by_products_is_the_mean_of_the_pixels_covered(size: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shrink(images, by_products=True), shrink(images, by_products=False), atol=1e-6)
