"""Training loops: optimizer state, schedule, checkpoints, logs, and figures of speed.

`loop.train_loop` is the loop, `learner.Learner` the parameters with their optimizer and average.
"""
