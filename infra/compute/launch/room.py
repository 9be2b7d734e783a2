"""Wait for the cores and GPUs that ranks need, which an autoscaler may have to bring."""

import logging
import time
from typing import NamedTuple

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from infra.compute.cluster import interruptible
from infra.compute.rank_count import RankCount
from infra.progress import Progress

log = logging.getLogger(__name__)

QUIET_SECONDS = 5.0  # after which it is said what is waited for
POLL_SECONDS = 1.0


class Room(NamedTuple):
    """What ranks need of a Ray cluster, and how long it is waited for."""

    ranks: RankCount
    gpus: float
    seconds: float
    is_joined: bool

    @property
    def each(self) -> dict[str, float]:
        """The resources of a rank."""
        return {"CPU": 1.0, "GPU": self.gpus} if self.gpus else {"CPU": 1.0}

    @property
    def needed(self) -> str:
        """What there must be at least, in words."""
        one = f"{self.gpus:g} GPU and 1 core each" if self.gpus else "1 core each"
        return f"{self.ranks.least} rank{'s' if self.ranks.least > 1 else ''} of {one}"

    @property
    def refusal(self) -> str:
        """Why no ranks train, and what helps."""
        there = ray.cluster_resources()
        what = ", ".join(f"{there.get(name, 0):g} {name}s" for name in self.each)
        return (
            f"no room for {self.needed} within SFTOK_RAY_WAIT = {self.seconds:g} s: the Ray cluster has {what}, some "
            "perhaps in use; lower --ranks, or add machines"
        )

    def wait(self, progress: Progress) -> None:
        """Return when there is room for the least number of ranks; a reservation asks the autoscaler for it meanwhile.

        Args:
            progress: told what is waited for.

        Raises:
            ValueError: there is no room in time.
        """
        began, is_told = time.monotonic(), False
        asked = placement_group([self.each] * self.ranks.least)
        try:
            while True:
                with interruptible():
                    if asked.wait(POLL_SECONDS):
                        return
                waited = time.monotonic() - began
                if waited >= self.seconds:
                    raise ValueError(self.refusal)
                if waited >= QUIET_SECONDS:
                    if not is_told:
                        log.warning("waiting up to %g s for room for %s", self.seconds, self.needed)
                        is_told = True
                    there = ray.cluster_resources().get("GPU" if self.gpus else "CPU", 0)
                    wanted = self.ranks.least * (self.gpus or 1)
                    what = "gpus" if self.gpus else "cores"
                    progress(0, 1, {f"{what}_needed": wanted, f"{what}_there": there, "waited_s": waited})
        finally:
            remove_placement_group(asked)
