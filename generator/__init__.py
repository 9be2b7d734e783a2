"""Class-conditional generators of codes, trained on what the tokenizer encodes."""
