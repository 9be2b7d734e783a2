"""Says in one line that there is no CUDA device: `python -m tests.support.need_cuda`, before what needs one."""

import sys

import torch


def missing_cuda() -> str | None:
    """Why nothing can be computed on CUDA here, and the remedy; None where it can."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    if built is None:
        return f"no CUDA device: torch {torch.__version__} was built without CUDA; install a build that has it"
    return f"no CUDA device: torch {torch.__version__} for CUDA {built} finds none; run this on a machine with a GPU"


if __name__ == "__main__":
    if (missing := missing_cuda()) is not None:
        sys.exit(missing)
