"""FID and its kin in the evaluation: features of real images taken once, scores, their protocol and their names."""

import hashlib
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch

from flows.evaluation.features import PassingFeatures, features_of, of_samples
from flows.evaluation.reference import export_statistics, real_images
from flows.evaluation.scores import OTHER_WEIGHTS, ReferenceFile, Scorer, protocol_of, scorer_of
from flows.pipeline import graph
from flows.recipes.files import load_recipe
from flows.recipes.schema import ScoresConfig
from flows.requests.checks import check_scores
from flows.stage import Work, plan_of
from infra.artifacts.inventory import manifests
from infra.artifacts.manifest import folder_of, manifest_of, ref_of
from infra.codes.contract import read_codes
from infra.compute.workers import WorkerOptions
from infra.progress import silent
from infra.store.store import Store
from sftok.coding.decode import ImageDecoder
from sftok.config import INCEPTION_SHA256
from sftok.images.lazy import LazyImages
from sftok.metrics.frechet import Gaussian
from sftok.metrics.functional import FeatureMoments
from sftok.metrics.inception.network import InceptionOutputs
from sftok.metrics.inception.prepared import PreparedInception, prepare_inception
from sftok.metrics.inception.resize import Resize
from sftok.metrics.inception.weights import load_inception
from sftok.metrics.measure import Features, Reference
from sftok.metrics.protocols import TORCH_FIDELITY
from sftok.metrics.reference_file import read_statistics
from sftok.weights.artifacts import load_teacher, load_tokenizer
from tests.support.random_inception import RandomInception, pictures
from tests.support.small_dataset import Made, draw_images

IMAGES = 21  # one more than scores take at least


class Remembering(PreparedInception):
    """Computes the features of an image once: they do not depend on its batch mates."""

    def __init__(self, network: PreparedInception) -> None:
        self.__dict__.update(network.__dict__)
        self.seen: dict[tuple[Resize, bytes], tuple[torch.Tensor, ...]] = {}

    def __call__(self, images: torch.Tensor, how: Resize) -> InceptionOutputs:
        keys = [(how, image.numpy().tobytes()) for image in images]
        if new := [at for at, key in enumerate(keys) if key not in self.seen]:
            rows = zip(*super().__call__(images[new], how), strict=True)
            self.seen.update(zip((keys[at] for at in new), rows, strict=True))
        return InceptionOutputs(*(torch.stack(rows) for rows in zip(*map(self.seen.get, keys), strict=True)))


@pytest.fixture(scope="module")
def network(random_inception: RandomInception):
    return prepare_inception(load_inception(random_inception.path.read_bytes(), random_inception.sha256))


@pytest.fixture(scope="module")
def remembering(network: PreparedInception) -> Remembering:
    return Remembering(network)


@pytest.fixture(scope="module")
def config(random_inception: RandomInception) -> ScoresConfig:
    pretrained = {"uri": str(random_inception.path), "sha256": random_inception.sha256}
    return ScoresConfig(protocol="torch_fidelity", inception=pretrained, num_samples=IMAGES)


@pytest.fixture(scope="module")
def scorer(remembering: Remembering, config: ScoresConfig) -> Scorer:
    protocol = protocol_of(config)
    real = features_of(remembering, pictures(IMAGES, 32, seed=1), "tensorflow_bilinear")
    return Scorer(
        protocol, remembering, "tensorflow_bilinear", lambda: Reference.of(real, protocol, "real ones"), IMAGES
    )


def passed(scorer: Scorer, images: torch.Tensor) -> PassingFeatures:
    """What sees images that pass in two parts."""
    meter = scorer.meter()
    for part in images.split(max(len(images) - 2, 1)):
        meter.add(part)
    return meter


class TestNames:
    def test_of_other_weights_nothing_is_called_fid(self, config: ScoresConfig) -> None:
        protocol = protocol_of(config)
        assert protocol.label("fid") == f"FD ({OTHER_WEIGHTS})"
        assert not any(protocol.label(score).startswith(("FID", "sFID", "KID")) for score in protocol.scores)

    @pytest.mark.parametrize("name", ["torch_fidelity", "clean", "adm"])
    def test_of_the_published_weights_they_are(self, name: str) -> None:
        protocol = protocol_of(ScoresConfig(protocol=name))
        assert protocol.label("fid") == "FID"
        assert (protocol.extractor_sha256, protocol.num_images) == (INCEPTION_SHA256, 50_000)

    def test_of_statistics_alone_what_needs_features_is_left_out(self, tmp_path: Path) -> None:
        statistics, images = tmp_path / "statistics.npz", tmp_path / "adm.npz"
        moments_ = {"mu": np.zeros(4), "sigma": np.eye(4)}
        np.savez(statistics, **moments_)
        np.savez(images, arr_0=np.zeros((2, 8, 8, 3), np.uint8), **moments_)
        config = ScoresConfig(protocol="adm")
        assert protocol_of(config, ReferenceFile.read(str(statistics))).scores == ("fid", "sfid", "inception_score")
        assert protocol_of(config, ReferenceFile.read(str(images))).scores == protocol_of(config).scores


class TestScores:
    def test_reconstructions_are_held_against_their_originals(self, scorer: Scorer) -> None:
        images = pictures(IMAGES, 32, seed=1)
        made = scorer.reconstruction(passed(scorer, images), images, 8, {"temperature": 0.0})
        found = {score.name: score for score in made}
        fid = found["reconstruction.torch_fidelity.fid@8"]
        assert fid.value == pytest.approx(0, abs=1e-6)
        assert fid.protocol.num_steps == 8
        assert (fid.protocol.num_images, fid.protocol.num_reference) == (IMAGES, IMAGES)
        assert fid.label == f"FD ({OTHER_WEIGHTS}), torch_fidelity/{IMAGES}"
        assert f"protocol torch_fidelity/{IMAGES}" in fid.protocol.definition
        assert "interval:" in fid.protocol.definition
        assert "reconstruction.torch_fidelity.fid_infinity@8" in found
        worse = scorer.reconstruction(passed(scorer, images.flip(1)), images, 8, {})
        assert next(m for m in worse if m.name == fid.name).value > 1e-3

    def test_samples_are_held_against_the_reference(self, scorer: Scorer) -> None:
        seen = passed(scorer, pictures(IMAGES + 3, 32, seed=2))
        made = {m.name: m for m in scorer.generation(seen, {"cfg_scale": 2.0})}
        assert made["generation.torch_fidelity.fid"].protocol.num_images == IMAGES, "of more, the first N"
        assert made["generation.torch_fidelity.fid"].protocol.cfg_scale == 2.0
        low, high = made["generation.torch_fidelity.inception_score"].interval
        assert low <= made["generation.torch_fidelity.inception_score"].value <= high
        assert {name.rpartition(".")[2] for name in made} == {
            "fid", "fid_infinity", "inception_score", "kid", "precision", "recall", "density", "coverage",
        }  # fmt: skip

    def test_too_few_images_are_refused(self, scorer: Scorer) -> None:
        with pytest.raises(
            ValueError, match=rf"torch_fidelity/{IMAGES} takes {IMAGES} images, there are 20: make more"
        ):
            scorer.generation(passed(scorer, pictures(20, 32, seed=2)), {})
        few = pictures(3, 32, seed=2)
        with pytest.raises(ValueError, match="torch_fidelity scores 20 images at least, there are 3"):
            scorer.reconstruction(passed(scorer, few), few, 1, {})

    def test_too_few_samples_are_refused_when_the_recipe_is_read(self) -> None:
        with pytest.raises(ValueError, match=r"scores\.num_samples = 19: input should be greater than or equal to 20"):
            load_recipe("digits", overrides=["evaluate.scores.num_samples=19"])

    def test_a_file_of_adm_is_a_reference(self, remembering: Remembering, config: ScoresConfig, tmp_path: Path) -> None:
        """With images beside its statistics it also serves precision and recall."""
        images = pictures(IMAGES, 32, seed=1)
        features = features_of(remembering, images, "tensorflow_bilinear")
        gaussians = [Gaussian.of(FeatureMoments.of(part)) for part in (features.pool, features.spatial)]
        named = {"mu": 0, "mu_s": 1}
        arrays = {name: gaussians[at].mean.numpy() for name, at in named.items()}
        arrays |= {name.replace("mu", "sigma"): gaussians[at].covariance.numpy() for name, at in named.items()}
        file = tmp_path / "reference.npz"
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
        given = ReferenceFile.read(str(file))
        protocol = protocol_of(config.model_copy(update={"protocol": "adm"}), given)
        scorer = Scorer(
            protocol, remembering, "tensorflow_bilinear", lambda: given.reference(protocol, remembering), IMAGES
        )
        found = {m.name.rpartition(".")[2]: m.value for m in scorer.generation(passed(scorer, images), {})}
        assert found["fid"] == pytest.approx(0, abs=1e-4)
        assert found["sfid"] == pytest.approx(0, abs=1e-4)
        assert (found["precision"], found["recall"]) == (1.0, 1.0)
        with pytest.raises(ValueError, match=r"evaluate\.scores\.reference = '/none\.npz': there is no such file"):
            ReferenceFile.read("/none.npz")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, random_inception: RandomInception) -> Made:
    place = tmp_path_factory.mktemp("made")
    draw_images(place / "source", 13)
    scores = [
        "evaluate.scores.protocol=clean",
        f"evaluate.scores.inception.sha256={random_inception.sha256}",
        f"evaluate.scores.inception.uri={random_inception.path}",
        "evaluate.scores.reference_features=5",
    ]
    return Made(Store(place / "store"), place / "source", *scores)


def test_lpips_is_measured_where_weights_are_given(made: Made, tmp_path: Path) -> None:
    from flows.evaluation.inputs import _lpips

    torch.manual_seed(0)
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    file = tmp_path / "lpips.pth"
    torch.save(network.state_dict(), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()

    def distances(*overrides: str):
        recipe = load_recipe("digits", overrides=overrides)
        return _lpips(Work(made.job._replace(recipe=recipe), None, made.store, silent))

    given = f"evaluate.lpips.uri={file}"
    found = distances(given, f"evaluate.lpips.sha256={sha256}")
    assert found is not None
    a, b = pictures(5, 32, seed=1), pictures(5, 32, seed=2)
    with torch.no_grad():
        expected = network(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(found(a, b), expected, rtol=1e-4, atol=1e-5)
    assert found(a, a).max() < 1e-6
    assert distances() is None
    with pytest.raises(ValueError, match=r"evaluate\.lpips: .* is wanted"):
        distances(given, f"evaluate.lpips.sha256={'0' * 64}")


class TestReference:
    def work_of(self, made: Made) -> Work:
        images = made.run(graph.PREPARE)
        plan = plan_of(graph.EVALUATE, made.job, {"images": images})
        return Work(made.job, plan, folder_of(made.store, plan.kind, plan.digest), silent)

    def test_real_images_are_looked_at_once(self, made: Made, tmp_path: Path) -> None:
        """By two workers and by none: the same files, and found by every evaluation after the first."""
        work = self.work_of(made)
        config = work.recipe.evaluate.scores
        protocol = protocol_of(config)
        first = real_images(work, config, protocol, seed=0)
        (manifest,) = manifests(made.store, "features").values()
        count = manifest_of(made.store, work.ref("images")).counts["train"]
        assert first.num_images == manifest.counts["images"] == count
        assert first.features.shape == (5, 2048)
        before = {
            path: path.stat().st_mtime_ns for path in folder_of(made.store, "features", manifest.digest).path.iterdir()
        }
        again = real_images(work, config, protocol, seed=0)
        assert torch.equal(again.pool.covariance, first.pool.covariance)
        assert torch.equal(again.features, first.features)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        scorer = scorer_of(work)
        assert scorer is not None
        assert scorer.resize == "pillow_bicubic"
        assert ref_of(made.store, manifest).kind == "features"
        exported = tmp_path / "reference.npz"
        assert export_statistics(f"features/{manifest.digest}", str(exported), store=made.store.uri) == count
        assert torch.equal(read_statistics(exported, "x").pool.covariance, first.pool.covariance)
        with pytest.raises(ValueError, match="exists: name another file"):
            export_statistics(f"features/{manifest.digest}", str(exported), store=made.store.uri)
        made.store.at("artifacts", "features").delete_tree()
        wide = Work(work.job._replace(workers=WorkerOptions(workers=2)), work.plan, work.out, silent)
        real_images(wide, config, protocol, seed=0)
        (theirs,) = manifests(made.store, "features").values()
        assert theirs.files == manifest.files

    def test_features_are_measured_in_ieee_arithmetic_whatever_trains(
        self, made: Made, network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Real images in TF32 beside samples in full would be an error of every score."""
        work, asked = self.work_of(made), []
        compute = work.recipe.compute.model_copy(update={"fp32": "tf32"})
        work = replace(work, job=work.job._replace(recipe=work.recipe.model_copy(update={"compute": compute})))
        monkeypatch.setattr("flows.evaluation.features.use_numerics", lambda numerics, _: asked.append(numerics.fp32))
        monkeypatch.setattr(
            "flows.evaluation.features.device_facts", lambda _, numerics: asked.append(numerics.fp32) or {"kind": "any"}
        )
        made.store.at("artifacts", "features").delete_tree()
        config = work.recipe.evaluate.scores
        real_images(work, config, protocol_of(config), seed=0)
        made.store.at("artifacts", "features").delete_tree()
        plan = plan_of(
            graph.EVALUATE, made.job, {each: work.ref("images") for each in ("samples", "tokenizer", "teacher")}
        )
        of_samples(replace(work, plan=plan), config, protocol_of(config), network)
        assert asked == ["ieee"] * 3

    def test_features_of_samples_are_taken_once_and_kept_by_shards(self, made: Made, network) -> None:
        tokenizer, teacher = made.tokenizer(0), made.teacher()
        codes = made.run(graph.ENCODE, images=made.run(graph.PREPARE), tokenizer=tokenizer)
        samples = made.run(graph.SAMPLE, generator=made.generator(codes))
        plan = plan_of(graph.EVALUATE, made.job, {"samples": samples, "tokenizer": tokenizer, "teacher": teacher})
        work = Work(made.job, plan, folder_of(made.store, plan.kind, plan.digest), silent)
        config = work.recipe.evaluate.scores
        _, rows = read_codes(made.store, work.input("samples").keys("sample"))
        images = self.decoder(work)(
            torch.from_numpy(rows.codes.astype("int64")), rows.image_id, work.recipe.decoding
        ).images
        expected = features_of(network, images, "pillow_bicubic")
        meter = of_samples(work, config, protocol_of(config), network)
        for part in images.split(4):
            meter.add(part)
        found = meter.features()
        assert len(found) == manifest_of(made.store, samples).counts["samples"] > 4, "more than a shard holds"
        assert torch.equal(found.pool, expected.pool)
        assert torch.equal(found.logits, expected.logits)
        again = of_samples(work, config, protocol_of(config), network)
        again.add(pictures(3, 32, seed=9))  # pass unseen: the features are there
        assert torch.equal(again.features().pool, found.pool)
        self.anew_discards_unfinished_features_alone(work, network, images, found)
        made.store.at("artifacts", "features").delete_tree()
        with pytest.raises(ValueError, match=r"0 images passed, of \d+"):
            of_samples(work, config, protocol_of(config), network)._write(found.first(0), made.store.at("few"))

    def anew_discards_unfinished_features_alone(
        self, work: Work, network, images: torch.Tensor, found: Features
    ) -> None:
        """Guards against --anew deleting what is published, and what other artifacts name as their input."""
        config = work.recipe.evaluate.scores
        anew = replace(work, job=work.job._replace(anew=True))
        out = work.job.store.at(*of_samples(work, config, protocol_of(config), network).plan.prefix.split("/"))
        out.write("made-on/kind.json", b'{"kind": "cuda sm90x132"}')
        assert torch.equal(of_samples(anew, config, protocol_of(config), network).features().pool, found.pool)
        out.delete("manifest.json")
        for this, refused in ((work, True), (anew, False)):
            meter = of_samples(this, config, protocol_of(config), network)
            meter.add(images)
            with pytest.raises(ValueError, match="begun on cuda sm90x132") if refused else nullcontext():
                assert torch.equal(meter.features().pool, found.pool)

    def test_features_of_reconstructions_lie_in_the_order_of_shards(self, made: Made) -> None:
        """Taken in the order of ids, without the views besides the center."""
        tokenizer, teacher = made.tokenizer(0), made.teacher()
        images = made.run(graph.PREPARE)
        inputs = {"images": images, "codes": made.run(graph.ENCODE, images=images, tokenizer=tokenizer)}
        plan = plan_of(graph.EVALUATE, made.job, {**inputs, "tokenizer": tokenizer, "teacher": teacher})
        work = Work(made.job, plan, folder_of(made.store, plan.kind, plan.digest), silent)
        scorer = scorer_of(work)
        assert scorer is not None
        assert scorer.originals is not None
        _, rows = read_codes(made.store, work.input("codes").keys("val"))
        chosen = [at for at, variant in enumerate(rows.variant) if variant == "center"]
        codes, ids = torch.from_numpy(rows.codes.astype("int64"))[chosen], [rows.image_id[at] for at in chosen]
        assert ids != sorted(ids)
        by_id = sorted(range(len(ids)), key=ids.__getitem__)
        originals = LazyImages(made.store, work.input("images").rows("val"), work.recipe.data.image_size).load().images
        for num_steps in (1, 3):
            decoding = work.recipe.decoding.model_copy(update={"num_steps": num_steps})
            decoded, meter = self.decoder(work)(codes, ids, decoding).images, scorer.meter(num_steps)
            for at in range(0, len(by_id), 2):
                meter.add(decoded[by_id[at : at + 2]])
            assert torch.equal(meter.features().pool, features_of(scorer.network, decoded, scorer.resize).pool)
        real = scorer.originals()
        alone = features_of(scorer.network, originals, scorer.resize).pool  # in another order than by shards
        torch.testing.assert_close(real.pool[real.pool[:, 0].argsort()], alone[alone[:, 0].argsort()])
        few = PassingFeatures(scorer.network, scorer.resize)
        few.add(originals[:1])
        many = pictures(30, 32, seed=0)
        with pytest.raises(ValueError, match=r"features of 1 reconstructions and \d originals, of 30 images: delete"):
            scorer.reconstruction(few, many, 1, {})

    def decoder(self, work: Work) -> ImageDecoder:
        return ImageDecoder(
            load_tokenizer(work.input("tokenizer").folder),
            load_teacher(work.input("teacher").folder),
            micro_batch=work.recipe.encode.micro_batch,
            seed=work.recipe.seed,
        )

    def test_missing_weights_are_told_before_anything_is_trained(self, store: Store) -> None:
        recipe = load_recipe("digits", overrides=["evaluate.scores.protocol=torch_fidelity"])
        told = (
            "evaluate.scores.protocol = torch_fidelity: the weights inception-2015 "
            f"(weights-inception-2015-12-05-6726825d.pth) are not in {store.uri}: `sftok weights fetch inception-2015`"
        )
        with pytest.raises(ValueError, match=re.escape(told)):
            check_scores(recipe, store)
        check_scores(load_recipe("digits"), store)

    def test_scores_that_are_not_asked_for_change_no_digest(self) -> None:
        what = graph.EVALUATE.what(_job("digits"))
        assert what["evaluate"]["scores"] == {"protocol": "none"}
        elsewhere = _job("digits", "evaluate.scores.inception.uri=/elsewhere", "evaluate.scores.protocol=clean")
        here = _job("digits", "evaluate.scores.inception.uri=/here", "evaluate.scores.protocol=clean")
        assert graph.EVALUATE.what(elsewhere) == graph.EVALUATE.what(here)
        assert TORCH_FIDELITY.num_images == 50_000


def _job(name: str, *overrides: str):
    from flows.stage import StageJob

    return StageJob(load_recipe(name, overrides=overrides), Store("/nowhere"), "x", WorkerOptions())
