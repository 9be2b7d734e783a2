"""TensorBoard event files in a store: one file a stretch of training, written at once, so that any store will do.

Beside an artifact, not part of it: event files hold times, and artifacts are the same bytes whenever they are made.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "events"


class Events:
    """Gathers figures and pictures, and writes them when told to."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._scalars: list[tuple[int, float, dict[str, float]]] = []
        self._pictures: list[tuple[int, float, str, Tensor]] = []

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Note the figures of a step."""
        self._scalars.append((step, time.time(), dict(figures)))

    def picture(self, step: int, name: str, image: "Tensor") -> None:
        """Note a picture, uint8 (3, H, W)."""
        self._pictures.append((step, time.time(), name, image))

    def flush(self, step: int) -> None:
        """Write what was noted since the last flush as the stretch that ends with `step`; nothing if nothing was."""
        if not self._scalars and not self._pictures:
            return
        # TensorBoard's file is named by machine and time: a run that resumes would leave two of one stretch.
        self._folder.write(f"events.out.tfevents.{step:010d}.sftok", self._file())
        self._scalars, self._pictures = [], []

    def _file(self) -> bytes:
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory() as folder:
            writer = SummaryWriter(folder)
            for step, at, figures in self._scalars:
                for name, value in figures.items():
                    writer.add_scalar(name, value, step, walltime=at)
            for step, at, name, image in self._pictures:
                writer.add_image(name, image, step, walltime=at)
            writer.close()
            (path,) = Path(folder).iterdir()
            return path.read_bytes()
