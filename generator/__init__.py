"""Classes to codes: the generators that are trained on the tokenizer's codes."""
