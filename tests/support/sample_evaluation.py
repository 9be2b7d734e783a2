"""Evaluation inputs without models: real digits, and "reconstructions" that are the originals blurred and noised."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from sftok.evaluation.meters import EvaluationInputs, ProtocolFacts, ReconstructionBatch

NUM_TOKENS, CODEBOOK, PROXY, PROXY_CODES = 16, 64, 64, 32


def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All digits at 32x32 RGB uint8, and their labels, in a fixed random order."""
    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(scans))
    small = torch.from_numpy(scans[order].reshape(-1, 1, 8, 8) / 16)
    large = F.interpolate(small, size=32, mode="bicubic", align_corners=False).clamp(0, 1)
    return (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[order])


def damaged(images: torch.Tensor, strength: float, seed: int = 1) -> torch.Tensor:
    """Images with Gaussian noise of that many grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + strength * noise).clamp(0, 255).round().to(torch.uint8)


def digits_inputs(
    *, train: int = 600, val: int = 100, samples: int = 200, class_names: tuple[str, ...] | None = None
) -> EvaluationInputs:
    """Inputs whose samples are unseen digits, lightly damaged; more decoding steps damage reconstructions less."""
    images, labels = digit_images()
    rng = np.random.default_rng(1)
    codes = rng.integers(0, CODEBOOK, (train + val + samples, NUM_TOKENS)).astype(np.uint16)
    teacher = rng.integers(0, PROXY_CODES, (val, PROXY))
    val_images = images[train : train + val]
    order = train + val + torch.argsort(labels[train + val : train + val + samples], stable=True)

    def reconstruct(num_steps: int, rows: Sequence[int] | None = None) -> Iterator[ReconstructionBatch]:
        draws = np.random.default_rng(num_steps)
        wrong = draws.random(teacher.shape) < 0.4 / num_steps
        proxy = np.where(wrong, (teacher + 1) % PROXY_CODES, teacher)
        whole = (damaged(val_images, 60 / num_steps), torch.from_numpy(proxy), torch.from_numpy(teacher))
        chosen = torch.arange(val) if rows is None else torch.tensor(rows)
        for part in chosen.split(30):
            yield ReconstructionBatch(*(values[part] for values in whole))

    return EvaluationInputs(
        class_names=class_names or tuple("0123456789"),
        train_images=images[:train],
        train_labels=labels[:train],
        val_images=val_images,
        val_labels=labels[train : train + val],
        val_ids=[f"digits/{i:04d}.png" for i in range(val)],
        reconstruct=reconstruct,
        val_codes=codes[train : train + val],
        train_codes=codes[:train],
        sample_codes=np.concatenate([codes[:20], codes[train + val : train + val + samples - 20]]),
        sample_classes=labels[order].numpy(),
        decode_samples=lambda: damaged(images[order], 20, seed=2).split(30),
        facts=ProtocolFacts(
            codebook_size=CODEBOOK,
            num_steps=8,
            cfg_scale=2.0,
            resize="resize-bicubic-antialias-crop/1",
            seeds={"run": 0},
        ),
    )
