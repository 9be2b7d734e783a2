"""Training losses of the tokenizer: cross-entropy on proxy codes, LPIPS, and the adversarial loss.

`proxy` and `perceptual` are losses, `adversarial.Adversary` is a discriminator with its losses (of `discriminator`,
`dino` and `diff_augment`), `flops` counts operations.
"""
