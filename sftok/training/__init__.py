"""Training of the teacher and of the tokenizer's stages: warm-up, alignment and fine-tuning on pixels.

`teacher.train_teacher`, `alignment.train_alignment` (warm-up, too) and `fine_tune.train_fine_tune` train.
"""
