"""Sample codes from generators: autoregressive and masked, eager, compiled, and as CUDA graphs.

`autoregressive` and `masked` define the samplers, with what they share in `sampler`; `prepared` computes their steps.
"""
