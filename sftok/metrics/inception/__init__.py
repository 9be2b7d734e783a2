"""The Inception network of FID: the published network, a prepared one for speed, and its weights."""
