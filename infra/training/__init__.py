"""Training loops: optimizer state, schedule, checkpoints, logs, and throughput.

`loop.train_loop` is the loop, `learner.Learner` the parameters with their optimizer and EMA, `best.BestWeights` the
weights of the best validation.
"""
