"""Sample codes from generators: autoregressive and masked, eager, compiled, and as CUDA graphs.

`autoregressive` and `masked` define the samplers, `prepared` computes their steps, `shards` writes datasets of samples.
"""
