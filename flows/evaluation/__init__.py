"""Evaluation: quality of reconstructions and of generated samples, from artifacts of the store.

`inputs.measure` is the stage and `evaluate.evaluate` its computation, with the evaluators of `sftok.evaluation`.
"""
