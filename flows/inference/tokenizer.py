"""Choose the tokenizer that decodes samples: that of the generator's codes, or another one only on request."""

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
    """The requested tokenizer."""

    tokenizer: str | None = None
    """reference of an artifact; None: the tokenizer of the generator's codes."""
    is_any: bool = False
    """whether it may be another tokenizer, to which the codes mean other images unless it shares the codebook."""


class DecodingModels(NamedTuple):
    """The models that decode codes to images."""

    tokenizer: Artifact
    teacher: Artifact | None
    """pixel decoder for a tokenizer that ends in proxy codes."""

    def decoder(self, device: str, *, micro_batch: int, seed: int) -> ImageDecoder:
        """Load the models."""
        use_numerics(IEEE, device)
        model = load_tokenizer(self.tokenizer.folder).to(device)
        teacher = None if self.teacher is None else load_teacher(self.teacher.folder).to(device)
        return ImageDecoder(model, teacher, micro_batch=micro_batch, seed=seed, precision=decoding_precision(device))


def decoding_device(chosen: str) -> str:
    """Return the device that decodes samples of the device `chosen`: the same kind, if this machine has it."""
    return "cpu" if chosen == "cpu" else default_device()


def decoding_precision(device: str) -> InferencePrecision:
    """Return the precision in which a device of this machine decodes."""
    return DecodingConfig().on(device).arithmetic


def decoding_models(generator: Artifact, choice: Choice) -> DecodingModels:
    """Find the tokenizer that decodes a generator's samples, and the teacher if it has no pixel decoder.

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
            f"{tokenizer} ends in proxy codes and names no teacher to decode them: sample with a generator of "
            f"another tokenizer, {WITHOUT}"
        )
    return DecodingModels(tokenizer, tokenizer.input("teacher"))


def _own(generator: Artifact) -> Artifact:
    store, digest = generator.store, load_config(generator.folder, GeneratorFile).codes.tokenizer
    folder = folder_of(store, "tokenizer", digest)
    if not folder.exists(MANIFEST):
        raise ValueError(
            f"{generator} draws codes of tokenizer/{digest}, which is not in {store.uri}: copy it there, {WITHOUT}"
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
        ("codes per image", "codes in the codebook", "pixels per side"), theirs, ours, strict=True
    ):
        if their != our:
            raise ValueError(f"{found} has {their} {what}, {generator} {our}: name a tokenizer that fits")
    return found
