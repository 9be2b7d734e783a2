"""The Inception network of FID: as published (`network`), prepared for speed (`prepared`, `cpu`), and its weights."""
