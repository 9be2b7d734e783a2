"""Evaluation: quality of reconstructions and of generated samples, from artifacts of the store.

`inputs.measure` is the stage and `evaluate.evaluate` its computation; `meters` has its inputs and meters.
"""
