"""Classify images with a small classifier trained on real images, to check that they show the intended class.

A support-vector machine on 8x8 grey thumbnails reads handwritten digits about as well as they can be read. On other
data it may be poor, so its accuracy on real held-out images is reported with every metric that it gives.
"""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

THUMBNAIL = 8  # side, in pixels
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class ClassReader:
    """Reads class ids from uint8 images (n, 3, S, S); made by `ClassReader.fit`."""

    name = f"SVC (RBF, C=10) on {THUMBNAIL}x{THUMBNAIL} grey"

    def __init__(self, classifier: SVC) -> None:
        self._classifier = classifier

    @classmethod
    def fit(cls, images: Tensor, labels: Tensor) -> Self:
        """Train on real training images and their class ids; deterministic."""
        return cls.fit_thumbnails(thumbnails(images), labels)

    @classmethod
    def fit_thumbnails(cls, rows: np.ndarray, labels: Tensor) -> Self:
        """Train on thumbnails of real training images, of which more fit in memory."""
        ids = np.asarray(labels)
        if len(rows) != len(ids):
            raise ValueError(f"{len(rows)} images but {len(ids)} labels")
        if len(np.unique(ids)) < 2 or ids.min() < 0:
            raise ValueError(
                "the class reader needs labelled images of 2 classes or more; set evaluate.class_reader=false"
            )
        return cls(SVC(kernel="rbf", C=10.0, gamma="scale").fit(rows, ids))

    def read(self, images: Tensor) -> Tensor:
        """Predict the class id of each image, (n) int64."""
        return self.read_thumbnails(thumbnails(images))

    def read_thumbnails(self, rows: np.ndarray) -> Tensor:
        """Predict the class id of each thumbnail, (n) int64."""
        return torch.from_numpy(self._classifier.predict(rows).astype(np.int64))


def accuracy(read: Tensor, intended: Tensor) -> float:
    """Compute the share of images read as the intended class, in [0, 1]."""
    if read.shape != intended.shape or not len(read):
        raise ValueError(f"cannot compare {len(read)} read with {len(intended)} intended classes")
    return (read == intended).double().mean().item()


def confusion_matrix(read: Tensor, intended: Tensor, num_classes: int) -> Tensor:
    """Count (num_classes, num_classes) int64: row = intended class, column = class read."""
    if read.shape != intended.shape:
        raise ValueError(f"cannot compare {len(read)} read with {len(intended)} intended classes")
    both = torch.cat([read, intended])
    if len(both) and (both.min() < 0 or both.max() >= num_classes):
        raise ValueError(f"class ids from {int(both.min())} to {int(both.max())} do not fit {num_classes} classes")
    cells = torch.bincount(intended.long() * num_classes + read.long(), minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def thumbnails(images: Tensor) -> np.ndarray:
    """Make grey thumbnails in [0, 1], (n, 64) float64, by area averaging."""
    return thumbnail_rows(images).cpu().numpy()


def thumbnail_rows(images: Tensor) -> Tensor:
    """Make the same thumbnails as a tensor on the images' device."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 (n, 3, S, S)")
    batches, luma = [], torch.tensor(_LUMA, dtype=torch.float64, device=images.device)
    for batch in torch.split(images, 256):
        grey = torch.einsum("bchw,c->bhw", batch.double() / 255, luma)
        batches.append(F.adaptive_avg_pool2d(grey.unsqueeze(1), THUMBNAIL).flatten(1))
    return torch.cat(batches)
