"""The Inception network prepared for a machine, and its file: what must not change, and what is refused."""

import hashlib
import io
import zipfile

import pytest
import safetensors.torch
import torch
from torch import Tensor

from infra.artifacts.pretrained import PretrainedConfig
from infra.store.store import Store
from sftok.metrics.inception.network import SPATIAL, Inception
from sftok.metrics.inception.prepared import CPU, Batches, PreparedInception, prepare_inception
from sftok.metrics.inception.resize import resize
from sftok.metrics.inception.weights import load_inception, read_inception
from tests.support.random_inception import RandomInception, pictures


@pytest.fixture(scope="module")
def network(random_inception: RandomInception) -> Inception:
    return load_inception(random_inception.path.read_bytes(), random_inception.sha256)


@pytest.fixture(scope="module")
def prepared(network: Inception) -> PreparedInception:
    return prepare_inception(network)


def saved(state: object) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


class TestPrepared:
    def test_is_the_published_network_in_float64(self, network: Inception, prepared: PreparedInception) -> None:
        """Folding norms and pooling late leave the numbers as they are: to 1e-5 of an exact computation."""
        images = pictures(2, 40, seed=1)
        exact = Inception().double()
        exact.load_state_dict(network.state_dict())
        wanted = exact(resize(images, "tensorflow_bilinear").double())
        for found, value in zip(prepared(images, "tensorflow_bilinear"), wanted, strict=True):
            assert found.dtype == torch.float32
            assert (found - value).norm() < 1e-5 * value.norm()

    def test_outputs_do_not_depend_on_batch_mates(self, prepared: PreparedInception) -> None:
        images = pictures(CPU.whole + 1, 32, seed=2)
        whole = prepared(images, "tensorflow_bilinear")
        alone = prepared(images[-1:], "tensorflow_bilinear")
        assert whole.spatial.shape == (CPU.whole + 1, SPATIAL)
        for many, one in zip(whole, alone, strict=True):
            assert torch.equal(many[-1:], one)

    def test_bf16_is_near_and_not_the_same(self, network: Inception, prepared: PreparedInception) -> None:
        images = pictures(2, 40, seed=3)
        exact = prepared(images, "tensorflow_bilinear").pool
        half = prepare_inception(network, precision="bf16")
        half.batches = Batches(len(images), len(images))  # without padding, which costs seconds where bf16 is slow
        rounded = half(images, "tensorflow_bilinear").pool
        error = (rounded - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.05

    @torch.no_grad()
    def test_logits_are_those_of_the_classifier_without_its_bias(self, network: Inception) -> None:
        outputs = network(torch.full((1, 3, 299, 299), 40.0))
        torch.testing.assert_close(outputs.logits + network.fc.bias, network.fc(outputs.pool))

    def test_refuses_unknown_precisions_and_float_images(self, network: Inception, prepared: PreparedInception) -> None:
        with pytest.raises(ValueError, match="name one of fp32, bf16"):
            prepare_inception(network, precision="fp8")
        with pytest.raises(ValueError, match="give uint8"):
            prepared(torch.rand(1, 3, 8, 8), "tensorflow_bilinear")


class TestResize:
    def test_an_image_of_the_size_stays(self) -> None:
        image = pictures(1, 299, seed=4)
        for how in ("tensorflow_bilinear", "torch_bilinear_antialias", "pillow_bicubic"):
            assert torch.equal(resize(image, how), image.float())  # type: ignore[arg-type]

    def test_tensorflows_lays_pixel_0_on_pixel_0(self) -> None:
        """Its known quirk: half-pixel centres would begin with the first pixel alone, and end with the last."""
        ramp = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 1, 1, 4).expand(1, 3, 4, 4)
        row = resize(ramp, "tensorflow_bilinear")[0, 0, 0]
        assert row[0] == 0
        assert row[1] == pytest.approx(10 * 4 / 299)
        assert (row[-74:] == 30).all()  # beyond the last pixel there is nothing to interpolate with


class TestFile:
    def test_is_read_as_safetensors_and_without_counters(self, network: Inception) -> None:
        weights = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        data = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
        again = load_inception(data, hashlib.sha256(data).hexdigest())
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())

    def test_is_found_by_a_config(self, random_inception: RandomInception, store: Store) -> None:
        config = PretrainedConfig(uri=str(random_inception.path), sha256=random_inception.sha256)
        assert isinstance(read_inception(config, store), Inception)

    def test_of_another_hash_is_refused(self, random_inception: RandomInception) -> None:
        with pytest.raises(ValueError, match="is wanted; fetch it again") as error:
            load_inception(random_inception.path.read_bytes(), "0" * 64)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda state: state.pop("fc.weight"), "missing: fc.weight"),
            (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
            (lambda state: state.update({"fc.weight": torch.zeros(1000, 2048)}), "of another shape: fc.weight"),
            (
                lambda state: state.update({"fc.bias": torch.full((1008,), torch.nan)}),
                "NaN or infinite weights in fc.b",
            ),
        ],
    )
    def test_with_other_weights_is_refused(self, network: Inception, change, reason: str) -> None:
        state = dict(network.state_dict())
        change(state)
        with pytest.raises(ValueError, match=reason) as error:
            load_inception(*saved(state))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "0 bytes that torch cannot read"),
            (b"PK\x03\x04 torn", "bytes that torch cannot read"),
            (saved({"fc.weight": print})[0], "more than tensors"),
            (saved([torch.zeros(2)])[0], "not a state dict"),
            (b"\x10\0\0\0\0\0\0\0{torn", "damaged safetensors"),
        ],
    )
    def test_that_is_damaged_or_something_else_is_refused(self, content: bytes, reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as error:
            load_inception(content, hashlib.sha256(content).hexdigest())
        assert "\n" not in str(error.value)

    def test_that_is_clean_fids_archive_is_named(self) -> None:
        """The likeliest mistake: the same weights as TorchScript, a program that would be run."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("inception/code/__torch__.py", "")
            archive.writestr("inception/data.pkl", "")
        data = buffer.getvalue()
        with pytest.raises(ValueError, match="TorchScript"):
            load_inception(data, hashlib.sha256(data).hexdigest())


def test_pictures_are_what_they_were() -> None:
    """Parity tests compare what two programs make of them: they must not change from run to run."""
    first: Tensor = pictures(1, 16, seed=1)
    assert torch.equal(first, pictures(1, 16, seed=1))
    assert not torch.equal(first, pictures(1, 16, seed=2))
