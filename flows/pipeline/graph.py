"""The graph of stages.

A new stage is one object, named in GRAPH: flows, dry runs and reports walk the graph by what stages need. Stages alone
know the libraries' argument lists; heavy imports happen inside their calls, so that the command line starts fast.
"""

from flows.pipeline.generator import SAMPLE, TRAIN_GENERATOR, TRAIN_SECOND_GENERATOR
from flows.pipeline.images import ENCODE, PREPARE
from flows.pipeline.judge import EVALUATE, REPORT
from flows.pipeline.tokenizer import ALIGN, FINE_TUNE, TEACHER, WARM_UP
from flows.stage import Graph

__all__ = [
    "ALIGN",
    "ENCODE",
    "EVALUATE",
    "FINE_TUNE",
    "GRAPH",
    "PREPARE",
    "REPORT",
    "SAMPLE",
    "TEACHER",
    "TRAIN_GENERATOR",
    "TRAIN_SECOND_GENERATOR",
    "WARM_UP",
]

GRAPH = Graph(
    PREPARE,
    TEACHER,
    WARM_UP,
    ALIGN,
    FINE_TUNE,
    ENCODE,
    TRAIN_GENERATOR,
    SAMPLE,
    TRAIN_SECOND_GENERATOR,
    EVALUATE,
    REPORT,
)
