"""Training the tokenizer: the teacher, warm-up and alignment, and fine-tuning towards pixels."""
