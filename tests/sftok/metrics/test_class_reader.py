"""The class reader: reads real digits, knows real training images only, and fits any number of classes."""

import pytest
import torch
from sklearn.datasets import load_digits

from sftok.metrics.class_reader import ClassReader, accuracy, confusion_matrix


@pytest.fixture(scope="module")
def digits():
    scans, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(scans.reshape(-1, 1, 8, 8) / 16 * 255).round().to(torch.uint8)
    large = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).expand(-1, 3, -1, -1).contiguous()
    return large, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def reader(digits):
    images, labels = digits
    return ClassReader.fit(images[:1000], labels[:1000])


def test_reads_unseen_digits(reader, digits):
    images, labels = digits
    assert accuracy(reader.read(images[1000:]), labels[1000:]) > 0.93


def test_wrong_classes_are_not_read(reader, digits):
    """Guards against a reader whose agreement is high whatever it is shown."""
    images, labels = digits
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert accuracy(reader.read(images[1000:]), shuffled[1000:]) < 0.2
    assert accuracy(reader.read(255 - images[1000:]), labels[1000:]) < 0.5


def test_reading_does_not_depend_on_neighbours(reader, digits):
    images, _ = digits
    assert torch.equal(reader.read(images[:300])[299:], reader.read(images[299:300]))


def test_any_classes(digits):
    """Two classes whose ids are neither 0 and 1 nor next to each other."""
    images, labels = digits
    kept = (labels == 3) | (labels == 7)
    reader = ClassReader.fit(images[kept][:200], labels[kept][:200])
    read = reader.read(images[kept][200:])
    assert set(read.tolist()) == {3, 7}
    assert accuracy(read, labels[kept][200:]) > 0.95


def test_confusion_matrix_counts_intended_by_row():
    intended, read = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 1, 1, 2])
    assert confusion_matrix(read, intended, 3).tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="do not fit 2 classes"):
        confusion_matrix(read, intended, 2)
    with pytest.raises(ValueError, match="4 intended"):
        accuracy(read[:3], intended)


def test_refuses_what_cannot_be_learnt(digits):
    images, labels = digits
    with pytest.raises(ValueError, match="2 classes or more"):
        ClassReader.fit(images[:5], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 classes or more"):
        ClassReader.fit(images[:5], torch.tensor([0, 1, -1, 2, 3]))
    with pytest.raises(ValueError, match="5 images but 4 labels"):
        ClassReader.fit(images[:5], labels[:4])
    with pytest.raises(ValueError, match="give uint8"):
        ClassReader.fit(images[:5].float(), labels[:5])
