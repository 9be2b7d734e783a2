"""Write a training run's log, pictures, TensorBoard events and checkpoints."""

import io
import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from infra.artifacts.shards import FileEntry, put
from infra.training.checkpoint import Checkpoints
from infra.training.events import FOLDER as EVENTS
from infra.training.events import Events
from infra.training.speed import Clock, Effort, peak_flops

if TYPE_CHECKING:
    from infra.training.loop import TrainingRun

log = logging.getLogger(__name__)

LOG, PICTURES = "log.jsonl", "pictures"


class TrainingLog:
    """Writer of a training run's outputs; only the first rank writes, except for checkpoints."""

    def __init__(self, run: "TrainingRun", lines: list[dict[str, float]], first: int, effort: Effort) -> None:
        self.run, self.lines, self.first = run, lines, first
        is_measured = effort.flops > 0 and run.ranks.is_first
        is_tf32 = run.numerics.fp32 == "tf32"
        peak = peak_flops(run.device, effort.precision, is_tf32=is_tf32) if is_measured else None
        self.clock = Clock(effort, None if peak is None else peak * run.ranks.size)
        self._events = Events(run.out.at(EVENTS))
        self._pictures: dict[str, bytes] = {}
        self._began = time.perf_counter()

    def log_step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self.lines.append({"step": float(done), **figures})
        if not self.run.ranks.is_first:
            return
        # Figures per position, such as val_nll/07, go to the files only: a terminal line has no room for them.
        shown = {name: value for name, value in figures.items() if "/" not in name}
        log.info("%s", json.dumps({"event": "step", "step": done, **{k: round(v, 6) for k, v in shown.items()}}))
        speed = {"steps_per_s": (done - self.first) / (time.perf_counter() - self._began)}
        self._events.add_figures(done, {**figures, **speed, **self.clock.figures()})
        self.run.progress(done, total, {**shown, **speed})

    def add_pictures(self, done: int, pictures: Mapping[str, Tensor]) -> None:
        """Write the pictures of a validation beside the artifact, and keep the latest ones to become part of it."""
        if not self.run.ranks.is_first:
            return
        for name, image in pictures.items():
            self._pictures[name] = _png(image)
            self._events.add_picture(done, name, image)
            self.run.out.at(PICTURES).write(f"{name}-{done:09d}.png", self._pictures[name])

    def save_checkpoint(self, done: int, checkpoints: Checkpoints, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a checkpoint, with all ranks, and the log so far, so that it can be watched."""
        lines, events = [dict(line) for line in self.lines], self._events.taken(done)

        def write() -> None:
            self.run.out.write(LOG, _text(lines))
            events()

        checkpoints.save(done, tensors, {"lines": [{**line} for line in lines]}, beside=write)

    def close(self, done: int) -> list[FileEntry]:
        """Write the log and the latest pictures as files of the artifact."""
        if not self.run.ranks.is_first:
            return []
        self._events.flush(done)
        pictures = [put(self.run.out, f"{name}.png", data) for name, data in sorted(self._pictures.items())]
        return [put(self.run.out, LOG, _text(self.lines)), *pictures]


def _text(lines: list[dict[str, float]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()
