"""Launch: ranks by Ray Train, with interrupts, progress and errors that reach the caller. Surface: `train`."""
