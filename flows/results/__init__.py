"""Results as data: metrics with their protocols, comparisons of two runs, and the regression gate.

`types.EvaluationReport` holds an evaluation, `comparison` compares two, `gate.judge` decides whether one may pass.
"""
