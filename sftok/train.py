"""What the training of the teacher and of the tokenizer's stages share: images in, held-out figures out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infra.compiler import compile_in_place
from infra.pretrained import PretrainedConfig
from infra.schedule import TrainingConfig
from infra.store import Store
from infra.training import Run
from sftok.config import AugmentConfig
from sftok.data import ImageBatch, ImageRows, ImageSet, TrainImages
from sftok.preprocess import to_float
from sftok.stream import StoredShards, StreamedImages

VALIDATION_IMAGES = 256
PICTURES = 8  # held-out images that a validation shows

Weights = Callable[[PretrainedConfig, str], bytes]  # from what a recipe names, and its name in errors


@dataclass(frozen=True)
class TrainingImages:
    """The images that a stage learns from, and those that it is validated on."""

    train: ImageRows | StoredShards
    val: ImageRows
    augment: AugmentConfig

    @classmethod
    def open(cls, folder: Store, rows: Mapping[str, int], image_size: int, augment: AugmentConfig) -> "TrainingImages":
        """The prepared images of a folder, decoded in memory unless they are many.

        Args:
            folder: image Parquet.
            rows: images by shard, as the manifest states them.
            image_size: side, in pixels.
            augment: changes of training images.
        """
        images = ImageSet.of(folder, rows)
        shards = StoredShards(images, {name: rows[name] for name in images.shards("train")}, image_size)
        train = shards if shards.is_large else images.load("train", image_size, crop=augment.crop)
        return cls(train, first_rows(images, rows, "val", image_size, VALIDATION_IMAGES), augment)

    def stream(self, run: Run, config: TrainingConfig) -> "Stream":
        """Micro-batches as a function of step and part."""
        parts = config.micro_batches
        if isinstance(self.train, StoredShards):
            streamed = StreamedImages(
                self.train, self.augment, seed=run.seed, batch_size=config.batch_size, parts=parts
            )
            return Stream(streamed.batch, run.device)
        images = TrainImages(self.train, self.augment, seed=run.seed, batch_size=config.batch_size)
        return Stream(lambda step, part: images.batch(step, rank=part, ranks=parts), run.device)

    def held_out(self, run: Run) -> Tensor:
        """This rank's share of the images to validate on, float (n, 3, S, S)."""
        images = self.val.images[:VALIDATION_IMAGES]
        ranks = run.ranks
        if len(images) < ranks.size:
            raise ValueError(f"{len(images)} held-out images cannot be shared by {ranks.size} ranks; add some")
        return to_float(images[ranks.rank :: ranks.size]).to(run.device)


@dataclass(frozen=True)
class Stream:
    """Training images on the device: the same for a step and part, whichever rank asks."""

    make: Callable[[int, int], ImageBatch]
    device: str

    def batch(self, step: int, part: int) -> Tensor:
        """Micro-batch `part` of a step, float (b, 3, S, S)."""
        return self.make(step, part).images.to(self.device)


def first_rows(images: ImageSet, rows: Mapping[str, int], split: str, image_size: int, count: int) -> ImageRows:
    """The first `count` images of a split, shard by shard: no more shards are read than hold them."""
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
    """Compile networks in place and let them recompute activations, as the config says."""
    for network in networks:
        for module in network.modules():
            if callable(recompute := getattr(module, "recompute", None)):
                recompute(config.activation_checkpointing)
        if config.compile:
            compile_in_place(network)


def share_used(codes: Tensor, size: int, run: Run) -> float:
    """Share of `size` codes that occur in any rank's codes."""
    counts = torch.bincount(codes.flatten(), minlength=size)
    return (run.ranks.total(counts) > 0).double().mean().item()
