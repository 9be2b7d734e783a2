"""What is checked before a run starts any server or writes anything: a ValueError here is one line for the user."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from flows.prefect_server.temporary import health
from flows.recipes.files import load_recipe
from flows.recipes.schema import Recipe
from flows.requests.devices import choose_device
from flows.requests.precisions import precisions_of, warn_of_slow
from infra.artifacts.pretrained import WEIGHTS_ROOT
from infra.settings import Settings
from infra.store.store import Store
from infra.training.schedule import TrainingConfig
from sftok.config import AdversarialConfig

CONNECT_SECONDS = 5.0


class Request(NamedTuple):
    """A run that can begin."""

    recipe: Recipe
    store: Store
    source: str
    workers: int
    ranks: int
    gpus_per_worker: float
    settings: Settings
    anew: bool = False


def check_request(
    recipe: str,
    *,
    data: str | None,
    store: str | None,
    overrides: Sequence[str],
    workers: int | None,
    ranks: int,
    seed: int | None,
    gpus: float | None = None,
    is_run: bool = True,
    anew: bool = False,
) -> Request:
    """Turn what the user asked for into a request, the store last: checking it writes to it.

    A run that is only planned (`is_run` false) needs neither weights nor servers, and a store that can be read.
    """
    from sftok.sources.sources import check_source

    settings = Settings()
    chosen = load_recipe(recipe, overrides=overrides, seed=seed)
    if is_run:
        check_weights(chosen)
    check_ranks(chosen, ranks)
    chosen, gpus = on_device(chosen, gpus=gpus, ranks=ranks, settings=settings, is_run=is_run)
    if is_run:
        check_decoder(chosen, settings)
        stages = (chosen.teacher, chosen.warm_up, chosen.align, chosen.fine_tune)
        trainings = (*(stage.training for stage in stages), chosen.train_generator)
        is_compiled = any(training.compile for training in trainings) or chosen.encode.compile or compiles_steps(chosen)
        check_compilers(is_compiled, device=chosen.compute.device, settings=settings)
    source = data or chosen.source
    if not source:
        raise ValueError(f"recipe {chosen.name} has no images of its own: give a folder of them with --data")
    check_source(source, chosen.data)
    place = Store(store or settings.store)
    width = min(2, os.cpu_count() or 1) if workers is None else workers
    if is_run:
        _check_places(chosen, place, settings)
        warn_of_slow(precisions_of(chosen), settings, chosen.compute.device)
    return Request(chosen, place, source, width, ranks, gpus, settings, anew)


def on_device(
    recipe: Recipe, *, gpus: float | None, settings: Settings, ranks: int = 1, is_run: bool = True
) -> tuple[Recipe, float]:
    """The recipe with its device chosen and all settled that depends on it, and the GPUs of each worker.

    Raises:
        ValueError: GPUs are asked for where there are none.
    """
    if is_run:
        check_ray(settings.ray_address)
    device, each = choose_device(recipe.compute, gpus=gpus, settings=settings, ranks=ranks, is_run=is_run)
    return recipe.on(device), each


def check_rerun(run: str, *, store: str | None) -> Request:
    """The request that a run was, as its record says: its recipe, images and workers.

    Raises:
        ValueError: there is no such run, it was no whole pipeline, it is of another version, or something that it needs
            is missing now.
    """
    from flows.runs.history import records
    from flows.runs.journal import RunRecord
    from sftok.sources.sources import check_source

    settings = Settings()
    place = Store(store or settings.store)
    (past,) = records(place, [run])
    if past.stages and "teacher" not in past.stages and past.state == "Completed":
        raise ValueError(f"run {run} made {', '.join(past.stages)} alone: run the command that made it again")
    try:
        record = RunRecord.model_validate_json(place.read(f"runs/{run}/run.json"))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(f"run {run} was made by another version ({where} differs): write its recipe anew") from error
    check_weights(record.recipe)
    check_source(record.source, record.recipe.data)
    _check_places(record.recipe, place, settings)
    recipe, gpus = on_device(record.recipe, gpus=None, settings=settings)
    warn_of_slow(precisions_of(recipe), settings, recipe.compute.device)
    return Request(recipe, place, record.source, record.workers, 1, gpus, settings)


def _check_places(chosen: Recipe, place: Store, settings: Settings) -> None:
    """The servers that a run needs, and its store."""
    check_servers(settings)
    place.check()
    check_scores(chosen, place)


def check_servers(settings: Settings) -> None:
    """Refuse a home that cannot be written to, and a Prefect server or Ray cluster that is named and does not answer.

    Raises:
        ValueError: saying which, and the remedy.
    """
    check_home(settings.home)
    if settings.prefect_api_url and (trouble := health(settings.prefect_api_url)) is not None:
        raise ValueError(f"PREFECT_API_URL = {settings.prefect_api_url}: {trouble}; start that server, or unset it")
    check_ray(settings.ray_address)


def compiles_steps(recipe: Recipe) -> bool:
    """Whether sampling compiles: on CUDA the steps of small generators are recorded as they are."""
    if not recipe.sample.compile or recipe.compute.device == "cpu":
        return bool(recipe.sample.compile)
    import torch

    from generator.artifacts import build_generator
    from generator.code_space import CodeSpace
    from generator.sampling.prepared import is_large

    tokenizer = recipe.tokenizer
    with torch.device("meta"):
        space = CodeSpace(tokenizer.codebook_size, tokenizer.num_latent_tokens, 0)
        return is_large(build_generator(recipe.generator, space))


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


def check_weights(recipe: Recipe) -> None:
    """Refuse losses that are asked for without the weights they need: nothing is left out silently."""
    is_imported = recipe.teacher.origin == "imported"
    if is_imported and not recipe.teacher.pretrained.is_given:
        raise ValueError(
            "teacher.origin = imported needs the weights of a MaskGIT-VQGAN: set teacher.pretrained.sha256 and "
            "teacher.pretrained.uri, or teacher.origin=trained to train one on the data"
        )
    stages = (
        {"fine_tune": recipe.fine_tune} if is_imported else {"teacher": recipe.teacher, "fine_tune": recipe.fine_tune}
    )
    for name, stage in stages.items():
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


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuse a number of ranks that cannot share the micro-batches of every stage."""
    training = {} if recipe.align.from_scratch else {"warm_up.training": recipe.warm_up.training}
    training |= {
        "align.training": recipe.align.training,
        "fine_tune.training": recipe.fine_tune.training,
        "train_generator": recipe.train_generator,
    }
    if recipe.teacher.origin == "trained":
        training["teacher.training"] = recipe.teacher.training
    for name, config in training.items():
        check_share(name, config, ranks)


def check_share(name: str, config: TrainingConfig, ranks: int) -> None:
    """Refuse a number of ranks that cannot share a step of one training."""
    if config.micro_batches % ranks:
        raise ValueError(
            f"{name}: {config.micro_batches} micro-batches a step do not divide by --ranks {ranks}; set "
            f"{name}.micro_batch so that batch_size = {config.batch_size} holds a multiple of {ranks} of them"
        )


def check_home(home: Path) -> None:
    """Refuse a home that cannot be written to."""
    folder = home.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"SFTOK_HOME = {home}: {error.strerror}; name a folder that can be written to") from None
    if not writable:
        raise ValueError(f"SFTOK_HOME = {home}: permission denied; name a folder that can be written to")


def check_ray(address: str | None) -> None:
    """Refuse a Ray address that nobody listens at; `auto` and `local` are Ray's to find."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"Ray address {address}: {reason}; start that cluster, or unset it for a local one") from None
