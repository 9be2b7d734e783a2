"""Evaluators of tokenizers and generators: they take batches of images and codes, and yield scores with protocols.

`meters` holds what is evaluated and is shared by all scores; `reconstruction`, `samples` and `generation` score in one
pass each; `alignment` measures a tokenizer before fine-tuning; `agreement` compares decoding steps.
"""
