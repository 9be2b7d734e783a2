"""Write TensorBoard event files to a store: one file per interval between flushes, written whole, as S3 needs it.

They lie beside an artifact and are not part of it: event files contain times, and artifacts must be reproducible.
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
    """Buffers figures and pictures, and writes them as an event file on `flush`."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._scalars: list[tuple[int, float, dict[str, float]]] = []
        self._pictures: list[tuple[int, float, str, Tensor]] = []

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        self._scalars.append((step, time.time(), dict(figures)))

    def add_picture(self, step: int, name: str, image: "Tensor") -> None:
        """Add a picture, uint8 (3, H, W)."""
        self._pictures.append((step, time.time(), name, image))

    def flush(self, step: int) -> None:
        """Write what was added since the last flush to a file named by `step`; does nothing if nothing was added."""
        if not self._scalars and not self._pictures:
            return
        # TensorBoard names files by machine and time: a resumed run would leave two files for the same steps.
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
