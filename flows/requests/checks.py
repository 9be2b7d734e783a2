"""Check requests before a run starts any server or writes anything: a ValueError is one line for the user."""

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from flows.pipeline.gpu_memory import Ranked, check_memory
from flows.pipeline.graph import GRAPH
from flows.prefect_server.environment import check_environment
from flows.prefect_server.temporary import health
from flows.recipes.schema import Recipe
from flows.requests.choose_device import choose_device, gpus_there
from flows.requests.gpu_card import find_card
from flows.requests.precisions import precisions_of, warn_of_slow
from flows.results.health.rules import SETTINGS
from flows.runs.journal import read_record
from flows.runs.run_request import RunArguments, RunRequest
from infra.artifacts.artifact import Artifact
from infra.artifacts.pretrained import WEIGHTS_ROOT, PretrainedConfig, check_pretrained
from infra.compute.cluster import check_reachable
from infra.compute.rank_count import RankCount
from infra.environment import named
from infra.settings import Settings
from infra.store.store import Store
from infra.training.config import TrainingConfig, divisors, or_list
from sftok.config import AdversarialConfig

ROOM_BYTES = 2**23  # a new database and what is written while it is made
NO_FLAGS: Mapping[str, str] = MappingProxyType({})


def check_request(asked: RunArguments, *, is_run: bool = True) -> RunRequest:
    """Turn what the user asked for into a request that can begin; see `checked`."""
    return checked(asked.request(), is_run=is_run)


def check_rerun(run: str, *, store: str | None, anew: bool = False) -> RunRequest:
    """Return the request that a run was, as its record says, if it can begin again.

    Raises:
        ValueError: there is no such run, its record does not say what it was asked for, or something that it needs is
            missing now.
    """
    place = Store.usual(store)
    record = read_record(place, run)
    if record.is_partial_of_before:
        raise ValueError(f"run {run} made {', '.join(record.stages)} alone: run the command that made it again")
    prepared = record.stages.get("prepare")
    images = prepared.ref.content_digest if prepared and prepared.ref else record.images
    return checked(record.request.changed(store=place.uri, anew=anew or record.anew, images=images))


def checked(request: RunRequest, *, is_run: bool = True, flags: Mapping[str, str] = NO_FLAGS) -> RunRequest:
    """Check what a request's stages need, and choose its device; the store comes last, as checking it writes to it.

    Args:
        request: what was asked for.
        is_run: a run that is only planned needs neither weights nor servers, and a store that can be read.
        flags: settings that the user knows by the name of an option.

    Raises:
        ValueError: one line that names what is wrong and the remedy.
    """
    from sftok.sources.sources import check_source

    settings = Settings()
    stages = {stage.name for stage in GRAPH.order(request.recipe, last=request.last, given=request.given)}
    if is_run:
        check_weights(request.recipe, stages)
        check_reachable(settings.ray_address)  # before it is asked for its GPUs
    check_ranks(request.recipe, request.ranks, stages)
    check_views(request.recipe, stages)
    compute, gpus = request.recipe.compute, request.gpus_per_worker
    request = request.on(*choose_device(compute, gpus=gpus, settings=settings, ranks=request.ranks, is_run=is_run))
    if is_run:
        _check_tools(request.recipe, stages, settings)
        _check_gpu_memory(request, stages, settings)
    if "prepare" in stages:
        check_source(request.source, request.recipe.data)
    if is_run:
        store = Store(request.store)
        check_prefect(settings)
        store.check()
        check_files(request.recipe, store, stages)
        if "evaluate" in stages:
            check_scores(request.recipe, store)
        chosen = precisions_of(request.recipe, stages | ({"decoding"} if request.ablation else set()))
        warn_of_slow({flags.get(name, name): value for name, value in chosen.items()}, settings, request.device)
    return request


def check_prefect(settings: Settings) -> None:
    """Refuse a home that cannot be written to, what Prefect cannot read, and a named server that does not answer.

    Raises:
        ValueError: saying which, and the remedy.
    """
    check_home(settings.home)
    check_environment(settings.prefect_api_url)
    if settings.prefect_api_url and (trouble := health(settings.prefect_api_url)) is not None:
        raise ValueError(f"{named('PREFECT_API_URL')}: {trouble}; start that server, correct the URL, or unset it")


def compiles_steps(recipe: Recipe) -> bool:
    """Return whether sampling compiles: on CUDA the steps of small generators are recorded as they are."""
    if not recipe.sample.compile or recipe.compute.device == "cpu":
        return bool(recipe.sample.compile)
    import torch

    from generator.kinds import build_generator
    from generator.sampling.prepared import is_large

    with torch.device("meta"):
        return is_large(build_generator(recipe.generator, recipe.code_space(0)))


def check_compilers(is_compiled: bool | None, *, device: str, settings: Settings) -> None:
    """Refuse what is to be compiled where there is no compiler, before hours of other stages.

    The machines of a cluster that is joined are not looked at: what is missing there, their workers say.
    """
    if is_compiled and not settings.ray_address:
        import torch

        from infra.compute.compiler import check_compiler

        check_compiler(torch.device(device))


def check_decoder(recipe: Recipe, settings: Settings) -> None:
    """Refuse a decoder that is not installed, before anything is trained; machines of a cluster say so themselves."""
    if recipe.encode.decoder == "torchcodec" and not settings.ray_address:
        from sftok.images.decode_on_device import torchcodec_decoder

        torchcodec_decoder()


def _check_tools(recipe: Recipe, stages: Collection[str], settings: Settings) -> None:
    """Refuse a decoder or a compiler that is asked for and missing."""
    if "encode" in stages:
        check_decoder(recipe, settings)
    is_compiled = any(training.compile for training in trainings_of(recipe, stages).values())
    is_compiled |= "encode" in stages and bool(recipe.encode.compile)
    is_compiled |= "sample" in stages and compiles_steps(recipe)
    check_compilers(is_compiled, device=recipe.compute.device, settings=settings)


def _check_gpu_memory(request: RunRequest, stages: Collection[str], settings: Settings) -> None:
    """Refuse a training that cannot fit in the GPUs that it runs on, if their memory is known."""
    if request.device != "cuda" or not trainings_of(request.recipe, stages):
        return
    if (card := find_card(settings)).bytes is not None:
        asked = Ranked.on_gpus(_with_vocabulary(request), request.ranks.least)
        check_memory(asked, card, stages, most_ranks=int(gpus_there(settings, is_run=True)))


def _with_vocabulary(request: RunRequest) -> Recipe:
    """Return the recipe with the vocabulary and the length of the codes that are given, if any are."""
    from infra.codes.contract import load_info

    recipe = request.recipe
    if (given := request.given.get("encode")) is None:
        return recipe
    codes = Artifact.load(Store(request.store), given)
    info = load_info(codes.store, codes.keys("train")[0])
    sizes = {"codebook_size": info.codebook_size, "num_latent_tokens": info.num_tokens}
    return recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update=sizes)})


def check_weights(recipe: Recipe, stages: Collection[str] = GRAPH) -> None:
    """Refuse losses of these stages that are asked for without the weights they need: nothing is left out silently."""
    is_imported = recipe.teacher.origin == "imported"
    if "teacher" in stages and is_imported and not recipe.teacher.pretrained.is_given:
        raise ValueError(
            "teacher.origin = imported needs the weights of a MaskGIT-VQGAN: set teacher.pretrained.sha256 and "
            "teacher.pretrained.uri, or teacher.origin=trained to train one on the data"
        )
    trained = {"fine_tune": recipe.fine_tune} | ({} if is_imported else {"teacher": recipe.teacher})
    for name, stage in trained.items():
        if name not in stages:
            continue
        adversarial = stage.adversarial
        if stage.perceptual_weight and not stage.lpips.is_given:
            raise ValueError(
                f"{name}.perceptual_weight = {stage.perceptual_weight:g} needs the weights of LPIPS: set "
                f"{name}.lpips.sha256 and {name}.lpips.uri, or {name}.perceptual_weight=0 to go without"
            )
        if adversarial.weight and adversarial.kind == "dino" and not adversarial.dino.is_given:
            raise ValueError(
                f"{name}.adversarial.weight = {adversarial.weight:g} needs the weights of DINO: set {name}.adversarial"
                f".dino.sha256 and .uri, or {name}.adversarial.kind=patch, or {name}.adversarial.weight=0"
            )
        if adversarial.weight:
            _check_image_size(name, adversarial, recipe.data.image_size)


def check_views(recipe: Recipe, stages: Collection[str] = GRAPH) -> None:
    """Refuse views of held-out images without the one that is evaluated."""
    views = recipe.encode.val_variants
    if "evaluate" in stages and "center" not in views:
        raise ValueError(
            f"encode.val_variants = {', '.join(views)} lacks center, the view of held-out images that evaluate "
            f"compares: give --set 'encode.val_variants={json.dumps(['center', *views])}'"
        )


def check_files(recipe: Recipe, store: Store, stages: Collection[str] = GRAPH) -> None:
    """Refuse weights and statistics of these stages whose files are not there; their contents are checked at use."""
    reference = recipe.evaluate.scores.reference
    if "evaluate" in stages and recipe.evaluate.scores.protocol != "none" and reference:
        folder, name = Store.beside(reference)
        if not folder.exists(name):
            raise ValueError(
                f"evaluate.scores.reference = {reference!r}: there is no such file; correct it, or leave it empty to "
                "compare with the training images"
            )
    for name, weights in weights_of(recipe, stages).items():
        check_pretrained(weights, store, name)


def weights_of(recipe: Recipe, stages: Collection[str]) -> dict[str, PretrainedConfig]:
    """Return the pretrained weights that these stages read, by their names in a recipe."""
    found: dict[str, PretrainedConfig] = {}
    is_imported = recipe.teacher.origin == "imported"
    if "teacher" in stages and is_imported:
        found["teacher.pretrained"] = recipe.teacher.pretrained
    for name, stage in {"fine_tune": recipe.fine_tune, "teacher": recipe.teacher}.items():
        if name not in stages or (name == "teacher" and is_imported):
            continue
        if stage.perceptual_weight:
            found[f"{name}.lpips"] = stage.lpips
        if stage.adversarial.weight and stage.adversarial.kind == "dino":
            found[f"{name}.adversarial.dino"] = stage.adversarial.dino
    if "evaluate" in stages and recipe.evaluate.lpips.is_given:
        found["evaluate.lpips"] = recipe.evaluate.lpips
    return found


def _check_image_size(stage: str, adversarial: AdversarialConfig, image_size: int) -> None:
    from sftok.losses.adversarial import check_image_size

    try:
        check_image_size(adversarial, image_size)
    except ValueError as error:
        raise ValueError(f"{stage}.adversarial: {error}") from error


def check_scores(recipe: Recipe, store: Store) -> None:
    """Refuse scores that are asked for without the network's weights, before hours of training."""
    scores = recipe.evaluate.scores
    if scores.protocol == "none" or scores.inception.uri:
        return
    if not scores.inception.is_given:
        raise ValueError("evaluate.scores.inception.sha256 is empty: name the hash of the network's weights")
    if not store.at(WEIGHTS_ROOT, scores.inception.sha256).list():
        from flows.requests.weights_catalogue import missing

        raise ValueError(
            f"evaluate.scores.protocol = {scores.protocol}: {missing('inception-2015', store)}; or set "
            "evaluate.scores.inception.uri"
        )


def check_ranks(recipe: Recipe, ranks: RankCount, stages: Collection[str] = GRAPH) -> None:
    """Refuse a number of ranks that cannot share the micro-batches of every training of these stages."""
    for name, config in trainings_of(recipe, stages).items():
        check_share(name, config, ranks)
    check_nodes(recipe, ranks)


def check_nodes(recipe: Recipe, ranks: RankCount) -> None:
    """Refuse a range of ranks for shards by machine, which may then have unequally many."""
    generators = {"train_generator": recipe, "evaluate.sweep.train_generator": recipe.second}
    for name, part in generators.items():
        if ranks.is_elastic and part is not None and part.train_generator.parallel == "hsdp":
            raise ValueError(
                f"{name}.parallel = hsdp needs equally many ranks on each machine, which --ranks {ranks} does not "
                f"promise: give a number, or set {name}.parallel=fsdp"
            )


def trainings_of(recipe: Recipe, stages: Collection[str]) -> dict[str, TrainingConfig]:
    """Return the trainings of these stages, by the section of the recipe that describes them."""
    wanted = {stage.name for stage in GRAPH.order(recipe)} & set(stages)
    return {SETTINGS[stage]: training for stage, training in recipe.trainings().items() if stage in wanted}


def check_share(name: str, config: TrainingConfig, ranks: RankCount) -> None:
    """Refuse a number of ranks that cannot share a step of one training equally; of a range, too many of them."""
    parts, whole = config.micro_batches, config.batch_size
    if _are_shared(parts, ranks):
        return
    fewer = f"a range up to {parts}" if ranks.is_elastic and parts > 1 else or_list(config.rank_counts)
    sizes = [size for size in divisors(whole) if _are_shared(whole // size, ranks)]
    cut = f"{name}.micro_batch={sizes[-1]}, or " if sizes else ""
    steps = f"{parts} micro-batch{'es' * (parts > 1)} a step"
    raise ValueError(f"{name}: {steps} cannot be shared by --ranks {ranks}: set {cut}--ranks to {fewer}")


def _are_shared(micro_batches: int, ranks: RankCount) -> bool:
    """Tell whether ranks can share micro-batches: equally, or, if their number may change, one each at least."""
    return micro_batches >= ranks.most if ranks.is_elastic else micro_batches % ranks.most == 0


def check_home(home: Path) -> None:
    """Refuse a home that the files of a Prefect server cannot be written to."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(bytes(ROOM_BYTES))
    except OSError as error:
        remedy = "a folder that can be written to, on a disk with some space"
        raise ValueError(f"SFTOK_HOME = {home}: {os.strerror(error.errno or 0).lower()}; name {remedy}") from None
