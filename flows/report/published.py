"""Published results on ImageNet-1k at 256x256, shown apart from ours and never among them."""

from typing import NamedTuple

PAPER = "SFTok, arXiv 2512.16910"
CONDITIONS = (
    "ImageNet-1k at 256x256. rFID: Inception FID of 50,000 reconstructed validation images. "
    "gFID: 50,000 generated images by the ADM protocol."
)


class PublishedTokenizer(NamedTuple):
    """A tokenizer and its reconstruction FID."""

    name: str
    tokens: int
    codes: int
    rfid: str


class PublishedGenerator(NamedTuple):
    """A generator and its generation FID."""

    name: str
    gfid: str


TOKENIZERS = (
    PublishedTokenizer("ViT-VQGAN", 1024, 8192, "1.28"),
    PublishedTokenizer("Mo-VQGAN", 1024, 1024, "1.12"),
    PublishedTokenizer("ImageFolder", 572, 4096, "0.80"),
    PublishedTokenizer("VQGAN", 256, 16384, "3.64"),
    PublishedTokenizer("MaskGIT", 256, 1024, "2.28"),
    PublishedTokenizer("RQ-VAE", 256, 16384, "3.20"),
    PublishedTokenizer("MaskBit", 256, 4096, "1.61"),
    PublishedTokenizer("COSMOS", 256, 64000, "2.52"),
    PublishedTokenizer("VQGAN-LC", 256, 100000, "2.62"),
    PublishedTokenizer("LlamaGen", 256, 16384, "2.19"),
    PublishedTokenizer("TiTok-B", 64, 4096, "1.70"),
    PublishedTokenizer("TiTok-BL", 64, 8192, "2.06"),
    PublishedTokenizer("One-D-Piece-B", 64, 4096, "2.39"),
    PublishedTokenizer("One-D-Piece-L", 64, 4096, "2.10"),
    PublishedTokenizer("SFTok-B", 64, 8192, "1.44"),
    PublishedTokenizer("SFTok-L", 64, 8192, "1.21"),
)

GENERATORS = (
    PublishedGenerator("LDM-4 (diffusion)", "3.60"),
    PublishedGenerator("DC-AE (diffusion)", "1.88"),
    PublishedGenerator("Open-MAGVIT2-B", "3.08"),
    PublishedGenerator("LlamaGen-L", "3.80"),
    PublishedGenerator("MaskGIT", "6.18"),
    PublishedGenerator("TiTok-B-64 + MaskGIT", "2.48"),
    PublishedGenerator("SFTok-B + MaskGIT", "2.32"),
    PublishedGenerator("SFTok-L + MaskGIT", "2.29"),
)

STEPS = ((1, "1.67", "159.4"), (2, "1.50", "165.6"), (4, "1.48", "166.4"), (8, "1.44", "167.2"), (16, "1.44", "167.3"))
"""SFTok-B after fine-tuning: decoding steps, rFID, Inception Score."""

STEP_AGREEMENT = (
    ("truth", "10.11", "0.09"),
    ("1", "1.04", "0.78"),
    ("2", "0.85", "0.77"),
    ("3", "0.67", "0.74"),
    ("4", "0.49", "0.78"),
    ("5", "0.32", "0.85"),
    ("6", "0.16", "0.88"),
    ("7", "0.05", "0.89"),
)
"""Figure 4a: prediction, KL to the final one of 8 steps (direction and base unstated), top-1 agreement with it."""
