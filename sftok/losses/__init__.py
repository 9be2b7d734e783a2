"""Training losses of the tokenizer: proxy codes, LPIPS, and the adversarial loss with its discriminators."""
