"""Evaluation: quality of reconstructions and of generated samples, from artifacts of the store.

`evaluate.evaluate` is the stage; `inputs` gathers what it reads, `meters` what it measures with.
"""
