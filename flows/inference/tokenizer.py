"""Which tokenizer turns samples into images: that of the generator's codes, and another one only where told to."""

from typing import NamedTuple

from generator.artifacts import GeneratorFile
from infra.artifacts.artifact import Artifact
from infra.artifacts.lineage import find_artifact
from infra.artifacts.manifest import MANIFEST, ArtifactRef, folder_of
from infra.artifacts.weights import load_config
from infra.compute.device import IEEE, default_device, use_numerics
from sftok.coding.decode import ImageDecoder
from sftok.config import DecodingConfig
from sftok.model.prepared import InferencePrecision
from sftok.weights.artifacts import TokenizerFile, load_teacher, load_tokenizer

WITHOUT = "or leave out --images, --grid and --npz"


class Choice(NamedTuple):
    """The tokenizer that was asked for."""

    tokenizer: str | None = None
    """reference of an artifact; None: that of the generator's codes."""
    is_any: bool = False
    """whether it may be another one than that: its codes then mean other images, unless it shares the codebook."""


class DecodingModels(NamedTuple):
    """What turns codes into images."""

    tokenizer: Artifact
    teacher: Artifact | None
    """paints for a tokenizer that ends in proxy codes."""

    def decoder(self, device: str, *, micro_batch: int, seed: int) -> ImageDecoder:
        """The models, loaded."""
        use_numerics(IEEE, device)
        model = load_tokenizer(self.tokenizer.folder).to(device)
        teacher = None if self.teacher is None else load_teacher(self.teacher.folder).to(device)
        return ImageDecoder(model, teacher, micro_batch=micro_batch, seed=seed, precision=decoding_precision(device))


def decoding_device(chosen: str) -> str:
    """Where this machine decodes what was drawn on the device `chosen`: there, if it is here."""
    return "cpu" if chosen == "cpu" else default_device()


def decoding_precision(device: str) -> InferencePrecision:
    """What a device of this machine decodes in."""
    return DecodingConfig().on(device).arithmetic


def decoding_models(generator: Artifact, choice: Choice) -> DecodingModels:
    """The tokenizer for the images of a generator's samples, and the teacher if it does not paint itself.

    Raises:
        ValueError: one of them is not in the store, or the tokenizer is not that of the codes.
    """
    if choice.is_any and choice.tokenizer is None:
        raise ValueError(
            "--any-tokenizer allows another tokenizer but names none: give --tokenizer too, or leave it out"
        )
    tokenizer = _own(generator) if choice.tokenizer is None else _other(generator, choice.tokenizer, choice.is_any)
    if load_config(tokenizer.folder, TokenizerFile).pixels:
        return DecodingModels(tokenizer, None)
    if "teacher" not in tokenizer.inputs:
        raise ValueError(
            f"{tokenizer} ends in proxy codes and names no teacher that would paint them: sample with a generator of "
            f"another tokenizer, {WITHOUT}"
        )
    return DecodingModels(tokenizer, tokenizer.input("teacher"))


def _own(generator: Artifact) -> Artifact:
    store, digest = generator.store, load_config(generator.folder, GeneratorFile).codes.tokenizer
    folder = folder_of(store, "tokenizer", digest)
    if not folder.exists(MANIFEST):
        raise ValueError(
            f"{generator} draws codes of tokenizer/{digest}, which is not in {store.uri}: bring it there, {WITHOUT}"
        )
    return Artifact.load(store, ArtifactRef(kind="tokenizer", digest=digest, uri=folder.uri))


def _other(generator: Artifact, text: str, is_any: bool) -> Artifact:
    found = find_artifact(text, generator.store.uri, "tokenizer")
    codes = load_config(generator.folder, GeneratorFile).codes
    if found.manifest.digest != codes.tokenizer and not is_any:
        raise ValueError(
            f"{generator} draws codes of tokenizer/{codes.tokenizer}, not of {found}, to which they mean other "
            "images: leave out --tokenizer, or add --any-tokenizer if the two share their codebook"
        )
    file = load_config(found.folder, TokenizerFile)
    theirs = file.tokenizer.num_latent_tokens, file.tokenizer.codebook_size, file.image_size
    ours = codes.num_tokens, codes.codebook_size, codes.image_size
    for what, their, our in zip(
        ("codes an image", "codes in the codebook", "pixels a side"), theirs, ours, strict=True
    ):
        if their != our:
            raise ValueError(f"{found} has {their} {what}, {generator} {our}: name a tokenizer that fits")
    return found
