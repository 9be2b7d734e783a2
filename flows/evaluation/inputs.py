"""Inputs of the evaluate stage, read from artifacts: images, codes, and the models that convert between them.

Training images and codes are streamed from the store; memory holds one class id per image and the thumbnails of at most
`evaluate.classifier_images`. Held-out images are in memory, decoded: 196 KB per image at 256x256, 10 GB for 50,000.
Reconstructions and samples are decoded in batches on the models' device and discarded; scores and features are kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.evaluation.evaluate import evaluate
from flows.evaluation.scores import scorer_of
from flows.evaluation.sweep import sweep
from flows.stage import CPU, Result, Work
from infra.artifacts.pretrained import read_pretrained
from infra.artifacts.shards import put
from infra.codes.contract import CodeRows, CodesInfo, load_codes, read_codes
from infra.store.store import Store
from sftok.coding.decode import ImageDecoder
from sftok.config import DecodingConfig
from sftok.evaluation.agreement import measure_agreement
from sftok.evaluation.meters import EvaluationInputs, ProtocolFacts, ReconstructionBatch
from sftok.images.dataset import ImageRows
from sftok.images.lazy import LazyImages
from sftok.images.preprocess import PREPROCESSING, to_float
from sftok.losses.perceptual import load_lpips
from sftok.metrics.step_agreement import StepAgreement
from sftok.model.prepared_pixels import AT_ONCE
from sftok.model.teacher import Teacher
from sftok.weights.artifacts import load_teacher, load_tokenizer

EVALUATION = "evaluation.json"
PICTURES = "pictures/"
_COMPILED_FROM = 20_000  # images to decode on a GPU from which compiling pays: it takes half a minute
_DECODED = 64  # images per decoded batch, or a micro-batch
_ROWS_READ = 1 << 14  # rows of codes that are counted or looked up at once


class StoredCodes:
    """Codes (n, N) of all variants, read from the store one file at a time."""

    def __init__(self, store: Store, files: Mapping[str, int]) -> None:
        """`files` maps keys of code Parquet files to the number of rows in the manifest."""
        self.store, self.files = store, dict(files)

    def __len__(self) -> int:
        return sum(self.files.values())

    def batches(self) -> Iterator[NDArray[np.integer]]:
        """Yield the codes in batches of some thousand rows.

        Raises:
            ValueError: a file has an unexpected number of rows, or belongs to another dataset than the first.
        """
        first: CodesInfo | None = None
        for key, expected in self.files.items():
            info, arrays = load_codes(self.store, [key])
            first = first or info
            if info != first or len(arrays.codes) != expected:
                raise ValueError(
                    f"{self.store.uri}/{key}: {len(arrays.codes)} rows of tokenizer/{info.tokenizer}, expected "
                    f"{expected} of tokenizer/{first.tokenizer} with equal settings; delete its folder and encode again"
                )
            for at in range(0, len(arrays.codes), _ROWS_READ):
                yield arrays.codes[at : at + _ROWS_READ]


class Codes(NamedTuple):
    """The codes of an evaluation."""

    train: StoredCodes
    val: CodeRows
    samples: CodeRows


def measure(work: Work) -> Result:
    """Evaluate the artifacts of a run; write evaluation.json, the pictures that it names, and the sweep."""
    torch.set_num_threads(work.recipe.threads)
    made = evaluate(_inputs(work), work.recipe.evaluate, seed=work.recipe.seed, progress=work.progress)
    files = [put(work.out, EVALUATION, made.report.model_dump_json(indent=1).encode())]
    files += [put(work.out, PICTURES + name, data) for name, data in sorted(made.images.items())]
    if work.recipe.evaluate.sweep.cfg_scales:
        assert made.reader is not None, "a recipe's sweep needs the class reader"
        files.append(sweep(work, made.reader))
    return Result(files, {"pictures": len(made.images)}, made.report.metrics())


def _inputs(work: Work) -> EvaluationInputs:
    recipe = work.recipe
    store, size = work.job.store, recipe.data.image_size
    train = LazyImages(store, work.input("images").rows("train"), size)
    val = LazyImages(store, work.input("images").rows("val"), size).load()
    info, val_codes = read_codes(store, work.input("codes").keys("val"))
    codes = Codes(
        StoredCodes(store, work.input("codes").rows("train")),
        _in_order(val_codes, val),
        read_codes(store, work.input("samples").keys("sample"))[1],
    )
    device = work.job.device
    teacher, model = (
        load_teacher(work.input("teacher").folder).to(device),
        load_tokenizer(work.input("tokenizer").folder).to(device),
    )
    decoder = ImageDecoder(
        model,
        teacher,
        micro_batch=recipe.encode.micro_batch,
        seed=recipe.seed,
        precision=recipe.decoding.arithmetic,
        compile=device != CPU
        and len(val.image_ids) * len(recipe.evaluate.steps) + len(codes.samples.image_id) >= _COMPILED_FROM,
    )
    val_proxy = _teacher_codes(teacher, val.images, images_at_once(device, recipe.encode.micro_batch))

    def reconstruct(num_steps: int, rows: Sequence[int] | None = None) -> Iterator[ReconstructionBatch]:
        decoding = recipe.decoding.model_copy(update={"num_steps": num_steps})
        chosen = list(range(len(val.image_ids)) if rows is None else rows)
        given, ids = torch.from_numpy(codes.val.codes[chosen]).long(), [val.image_ids[row] for row in chosen]
        at = 0
        for made in decoder.decode_all(given, ids, decoding, at_once=_DECODED):
            part = chosen[at : at + len(made.images)]
            at += len(part)
            yield ReconstructionBatch(made.images, made.proxy_codes, val_proxy[part])

    def decode_samples() -> Iterator[Tensor]:
        given = torch.from_numpy(codes.samples.codes).long()
        for made in decoder.decode_all(given, codes.samples.image_id, recipe.decoding, at_once=_DECODED):
            yield made.images

    def agreement() -> StepAgreement:
        given = torch.from_numpy(codes.val.codes.astype(np.int64))
        return measure_agreement(decoder, recipe.decoding, given, val.image_ids, val_proxy)

    return EvaluationInputs(
        class_names=info.class_names or (),
        train_images=train,
        train_labels=train.labels(),
        val_images=val.images,
        val_labels=val.class_ids,
        val_ids=val.image_ids,
        reconstruct=reconstruct,
        val_codes=codes.val.codes,
        train_codes=codes.train,
        sample_codes=codes.samples.codes,
        sample_classes=codes.samples.class_id,
        decode_samples=decode_samples,
        facts=_facts(work, recipe.decoding),
        agreement=agreement if recipe.decoding.num_steps > 1 else None,
        lpips=_lpips(work),
        scorer=scorer_of(work),
        reader_rows=train.sample(recipe.evaluate.classifier_images, recipe.seed),
        device=device,
    )


def _lpips(work: Work) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return a function that computes LPIPS of image pairs in batches; None if no weights are given."""
    config, size = work.recipe.evaluate.lpips, images_at_once(work.job.device, work.recipe.encode.micro_batch)
    if not config.is_given:
        return None
    model = load_lpips(read_pretrained(config, work.job.store, "evaluate.lpips"), "evaluate.lpips")
    device = work.job.device
    model = model.to(device)

    @torch.no_grad()
    def distances(images: Tensor, originals: Tensor) -> Tensor:
        pairs = zip(images.to(device).split(size), originals.to(device).split(size), strict=True)
        return torch.cat([model(to_float(a), to_float(b)) for a, b in pairs])

    return distances


def _facts(work: Work, decoding: DecodingConfig) -> ProtocolFacts:
    sample = work.recipe.sample
    return ProtocolFacts(
        codebook_size=work.recipe.tokenizer.codebook_size,
        num_steps=decoding.num_steps,
        temperature=decoding.temperature,
        sample_temperature=sample.temperature,
        cfg_scale=sample.cfg_scale,
        resize=f"{PREPROCESSING} to {work.recipe.data.image_size}",
        seeds={"recipe": work.recipe.seed},
    )


def _in_order(rows: CodeRows, images: ImageRows) -> CodeRows:
    """Return the codes of the centre view of every image, in the order of `images`."""
    keys = zip(rows.image_id, rows.variant, strict=True)
    place = {key: row for row, key in enumerate(keys)}
    missing = [image_id for image_id in images.image_ids if (image_id, "center") not in place]
    if missing:
        raise ValueError(f"the codes lack the view center of {len(missing)} held-out images, such as {missing[0]!r}")
    order = [place[image_id, "center"] for image_id in images.image_ids]
    return CodeRows(images.image_ids, rows.class_id[order], ["center"] * len(order), rows.codes[order])


def images_at_once(device: str, micro_batch: int) -> int:
    """Return the batch size of the teacher and LPIPS; on CUDA, at most that of a pixel decoder."""
    return micro_batch if device == CPU else min(micro_batch, AT_ONCE)


@torch.no_grad()
def _teacher_codes(teacher: Teacher, images: Tensor, at_once: int) -> Tensor:
    device = teacher.codebook.weight.device
    return torch.cat([teacher.encode(to_float(part).to(device)).cpu() for part in images.split(at_once)])
