"""Results as data: scores with their protocols, comparisons of two runs, and the regression gate.

`types.EvaluationReport` holds an evaluation, `comparison` compares two, `gate.judge` checks one against thresholds.
"""
