"""All stages of the pipeline.

Here and in the stages_* beside it is the only place that knows the libraries' argument lists. Heavy imports happen
inside the calls, so that the command line starts fast.
"""

from flows.pipeline.generator import SAMPLE, TRAIN_GENERATOR
from flows.pipeline.images import ENCODE, PREPARE
from flows.pipeline.judge import EVALUATE, REPORT
from flows.pipeline.tokenizer import ALIGN, FINE_TUNE, TEACHER, WARM_UP

__all__ = [
    "ALIGN",
    "ENCODE",
    "EVALUATE",
    "FINE_TUNE",
    "PREPARE",
    "REPORT",
    "SAMPLE",
    "STAGES",
    "TEACHER",
    "TRAIN_GENERATOR",
    "WARM_UP",
]

STAGES = {
    stage.name: stage
    for stage in (PREPARE, TEACHER, WARM_UP, ALIGN, FINE_TUNE, ENCODE, TRAIN_GENERATOR, SAMPLE, EVALUATE, REPORT)
}
