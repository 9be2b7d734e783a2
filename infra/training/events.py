"""Write TensorBoard event files to a store: one file per interval between flushes, written whole, as S3 needs it.

They lie beside an artifact and are not part of it: event files contain times, and artifacts must be reproducible.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "events"

Figures = tuple[int, float, dict[str, float]]  # step, time and values
Picture = tuple[int, float, str, "Tensor"]  # step, time, name and pixels


class Events:
    """Buffers figures and pictures, and writes them as an event file on `flush`."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._scalars: list[Figures] = []
        self._pictures: list[Picture] = []

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        self._scalars.append((step, time.time(), dict(figures)))

    def add_picture(self, step: int, name: str, image: "Tensor") -> None:
        """Add a picture, uint8 (3, H, W)."""
        self._pictures.append((step, time.time(), name, image))

    def flush(self, step: int) -> None:
        """Write what was added since the last flush to a file named by `step`; does nothing if nothing was added."""
        self.taken(step)()

    def taken(self, step: int) -> Callable[[], None]:
        """Take what was added since the last flush; return a function that writes it, which a thread may call."""
        scalars, pictures = self._scalars, self._pictures
        self._scalars, self._pictures = [], []

        def write() -> None:
            if scalars or pictures:
                # TensorBoard names files by machine and time: a resumed run would leave two files for the same steps.
                self._folder.write(f"events.out.tfevents.{step:010d}.sftok", _file(scalars, pictures))

        return write


def _file(scalars: list[Figures], pictures: list[Picture]) -> bytes:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for step, at, figures in scalars:
            for name, value in figures.items():
                writer.add_scalar(name, value, step, walltime=at)
        for step, at, name, image in pictures:
            writer.add_image(name, image, step, walltime=at)
        writer.close()
        (path,) = Path(folder).iterdir()
        return path.read_bytes()
