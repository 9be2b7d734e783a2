"""Metrics of images and codes, and scores of image sets (FID, KID, precision, recall ...) under named protocols.

A metric is a pure function of tensors (`functional`, `frechet`, `scores`, `step_agreement`, `nearest`); a score is a
metric with its interval and protocol: `protocols` names protocols, `measure.measure` computes the scores of one.
"""
