"""Shared by the training of the teacher and of the tokenizer's stages: training images, and held-out metrics."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.artifacts.pretrained import PretrainedConfig
from infra.compute.compiler import compile_in_place
from infra.store.store import Store
from infra.training.config import TrainingConfig
from infra.training.loop import TrainingRun, picture_grid
from sftok.config import AugmentConfig
from sftok.images.dataset import ImageBatch, ImageRows, ImageSet, TrainImages
from sftok.images.decode_ahead import spare_processes
from sftok.images.preprocess import to_float
from sftok.images.stream import SplitShards, StreamedImages

VALIDATION_IMAGES = 256
PICTURES = 8  # held-out images shown by a validation

Weights = Callable[[PretrainedConfig, str], bytes]  # from the weights that a recipe names, and their name in errors


@dataclass(frozen=True)
class TrainingImages:
    """The images that a stage is trained on, and those that it is validated on."""

    train: ImageRows | SplitShards
    val: ImageRows
    augment: AugmentConfig

    @classmethod
    def open(cls, folder: Store, rows: Mapping[str, int], image_size: int, augment: AugmentConfig) -> "TrainingImages":
        """Open the prepared images of a folder, decoded in memory unless they are too large.

        Args:
            folder: image Parquet.
            rows: images per shard, as stated by the manifest.
            image_size: side, in pixels.
            augment: augmentation of training images.
        """
        images = ImageSet.of(folder, rows)
        shards = SplitShards(images, {name: rows[name] for name in images.shards("train")}, image_size)
        train = shards if shards.is_large else images.load("train", image_size, crop=augment.crop)
        return cls(train, first_rows(images, rows, "val", image_size, VALIDATION_IMAGES), augment)

    def stream(self, run: TrainingRun, config: TrainingConfig) -> "Stream":
        """Return this rank's micro-batches as a function of step and part."""
        parts, own = config.micro_batches, run.ranks.share(config.micro_batches)
        if isinstance(self.train, SplitShards):
            streamed = StreamedImages(
                self.train,
                self.augment,
                seed=run.seed,
                batch_size=config.batch_size,
                parts=parts,
                device=run.device,
                decoders=spare_processes(run.ranks.size) if run.device != "cpu" else 0,
            )
            return Stream(streamed.batch, run.device, own)
        images = TrainImages(self.train, self.augment, seed=run.seed, batch_size=config.batch_size)

        def make(step: int, part: int) -> ImageBatch:
            return images.batch(step, rank=part, ranks=parts, device=run.device)

        return Stream(make, run.device, own)

    def held_out(self, run: TrainingRun) -> Tensor:
        """Return this rank's share of the images to validate on, float (n, 3, S, S)."""
        images = self.val.images[:VALIDATION_IMAGES]
        ranks = run.ranks
        if len(images) < ranks.size:
            raise ValueError(f"{len(images)} held-out images cannot be shared by {ranks.size} ranks; add images")
        return to_float(images[ranks.rank :: ranks.size]).to(run.device)


class Stream:
    """Training images on the device, a function of step and part on every rank.

    On a GPU, a thread prepares the next micro-batch meanwhile.
    """

    def __init__(
        self, make: Callable[[int, int], ImageBatch], device: str, parts: range, *, is_ahead: bool | None = None
    ) -> None:
        """Stream the micro-batches that `make` makes on a device; `parts` are this rank's of each step."""
        self.make, self.parts = make, parts
        self.is_ahead = torch.device(device).type == "cuda" if is_ahead is None else is_ahead
        self._maker = ThreadPoolExecutor(1, "stream-ahead")
        self._next: tuple[tuple[int, int], Future[Tensor]] | None = None

    def batch(self, step: int, part: int) -> Tensor:
        """Return micro-batch `part` of a step, float (b, 3, S, S)."""
        if not self.is_ahead:
            return self._made(step, part)
        if self._next is None or self._next[0] != (step, part):
            self._next = (step, part), self._maker.submit(self._made, step, part)
        images = self._next[1].result()
        following = (step, part + 1) if part + 1 in self.parts else (step + 1, self.parts.start)
        self._next = following, self._maker.submit(self._made, *following)
        return images

    def _made(self, step: int, part: int) -> Tensor:
        return self.make(step, part).images


def in_passes(
    work: Callable[[Tensor], tuple[dict[str, Tensor], list[Tensor]]], images: Tensor, at_once: int
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Call `work` on held-out images in passes as large as those of training.

    Args:
        work: from float images (n, 3, S, S) to values by name, and rows of images to show.
        images: all of them.
        at_once: images per call.

    Returns:
        The values by name, one entry per call, and a picture of the first images' rows.
    """
    found: dict[str, list[Tensor]] = {}
    shown: list[list[Tensor]] = []
    for some in images.split(at_once):
        metrics, rows = work(some)
        for name, metric in metrics.items():
            found.setdefault(name, []).append(metric)
        if len(shown) * at_once < PICTURES:
            shown.append(rows)
    return found, picture_grid([torch.cat(row)[:PICTURES] for row in zip(*shown, strict=True)])


def first_rows(images: ImageSet, rows: Mapping[str, int], split: str, image_size: int, count: int) -> ImageRows:
    """Load the first `count` images of a split, shard by shard, reading no more shards than hold them."""
    names, held = [], 0
    for name in images.shards(split):
        if held < count:
            names.append(name)
            held += rows[name]
    parts = [images.read_shard(name, image_size) for name in names]
    image_ids = [image_id for part in parts for image_id in part.image_ids]
    whole = ImageRows(image_ids, torch.cat([p.images for p in parts]), torch.cat([p.class_ids for p in parts]))
    return ImageRows(whole.image_ids[:count], whole.images[:count], whole.class_ids[:count])


def set_up(networks: Iterator[nn.Module] | list[nn.Module], config: TrainingConfig) -> None:
    """Compile networks in place and turn on activation checkpointing, as the config says."""
    for network in networks:
        for module in network.modules():
            if callable(recompute := getattr(module, "recompute", None)):
                recompute(config.activation_checkpointing)
        if config.compile:
            compile_in_place(network)


def share_used(codes: Tensor, size: int, run: TrainingRun) -> float:
    """Return the share of `size` codes that occur in the codes of any rank."""
    counts = torch.bincount(codes.flatten(), minlength=size)
    return (run.ranks.total(counts) > 0).double().mean().item()
