"""Decide in Ray Train's controller: when ranks restart, what a loss is called, how they are joined and ended."""

import contextlib
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.compute.cluster import one_line
from infra.compute.launch.messenger import kill_process
from infra.compute.launch.rank import GroupBrokenError, WorkError

remote: Any = ray.remote  # its types know a few resources only

REST_SECONDS = 0.5  # between looks for room
KILL_SECONDS = 30.0  # for a node to kill a process

# Parts of Ray's messages that say nothing of this loss.
DEAD = "The actor is dead because its worker process has died. "
ADVICE = " Some common causes include"


class Policy(FailurePolicy):
    """Restarts all ranks after losses, and ends the training after an error of the work."""

    def __init__(self, failure_config: FailureConfig, messenger: Any) -> None:
        super().__init__(failure_config)
        self._messenger, self._losses = messenger, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide whether to restart; called by the controller."""
        if isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY  # there is no room; Tidy says how long
        if not is_loss(training_failed_error) or self._losses == self.failure_config.max_failures:
            return FailureDecision.RAISE
        self._losses += 1
        loss = describe_loss(training_failed_error)
        self._messenger.warn.remote(f"a training process was lost ({loss}); all resume from the last checkpoint")
        return FailureDecision.RETRY


def is_loss(error: TrainingFailedError) -> bool:
    """Tell whether processes were lost; an error of the work beside them may follow from that."""
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, WorkerGroupStartupFailedError | RayError)
    return own_error(error) is None


def own_error(error: TrainingFailedError) -> WorkError | None:
    """Return the work's own error, unless a process was lost."""
    if not isinstance(error, WorkerGroupError):
        return None
    failures = error.worker_failures.values()
    if any(not isinstance(failure, WorkError | GroupBrokenError) for failure in failures):
        return None
    return next((failure for failure in failures if isinstance(failure, WorkError)), None)


def describe_loss(error: TrainingFailedError) -> str:
    """Name what was lost, in one line; a broken group follows from another loss."""
    if not isinstance(error, WorkerGroupError):
        return _short(error)
    lost = {rank: failure for rank, failure in error.worker_failures.items() if not isinstance(failure, WorkError)}
    rank, failure = min(lost.items(), key=lambda item: (isinstance(item[1], GroupBrokenError), item[0]))
    if isinstance(failure, WorkerHealthCheckTimeoutError):
        return f"rank {rank}: it did not respond within SFTOK_RANK_PATIENCE"
    if isinstance(failure, WorkerHealthCheckFailedError):
        failure = failure.health_check_failure
    return f"rank {rank}: {_short(failure)}"


def _short(error: BaseException) -> str:
    return one_line(error).partition(ADVICE)[0].removeprefix(DEAD)


class Group(_TorchBackend):
    """The process group of all ranks."""

    share_cuda_visible_devices = False  # each rank's GPU is cuda:0 to all of its threads

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the group by ending: leaving it properly is collective, and waits for ranks that hang."""


class GroupConfig(TorchConfig):
    """Settings of the process group."""

    @property
    def backend_cls(self) -> type[Group]:
        """Return the class that makes the group."""
        return Group


class NoRoomError(Exception):
    """There was no room for ranks in time."""


NO_ROOM = (NoRoomError, InsufficientClusterResourcesError)


class Tidy(ControllerCallback, WorkerGroupCallback):
    """Ends what the controller would leave behind, and its waits."""

    def __init__(self, seconds: float, messenger: Any) -> None:
        """Let ranks wait for room for so many seconds."""
        self._seconds, self._messenger = seconds, messenger
        self._group: Any = None
        self._since: float | None = None  # when no ranks trained any more
        self._count: int | None = None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Rest while the controller waits for room, since it looks again at once; and end the wait in time."""
        if isinstance(current_state, RunningState):
            self._since = None
        elif isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
            began, self._since = self._since, self._since or time.monotonic()
            waited = 0.0 if began is None else time.monotonic() - began
            if waited > self._seconds:
                raise NoRoomError(f"no room within {self._seconds:g} s")
            if isinstance(current_state, ReschedulingState):
                self._messenger.start.remote(is_done=True)  # nothing starts: it waits for room
            if type(previous_state) is type(current_state):
                time.sleep(REST_SECONDS)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Tell how many ranks train, where that changes."""
        count, self._count = self._count, resize_decision.num_workers
        if count not in (None, self._count):
            self._messenger.warn.remote(
                f"the number of ranks is {self._count} from the last checkpoint on, instead of {count}"
            )

    def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002
        """End ranks that were placed and did not start, which the controller forgets, but not their reservation."""
        if self._group is not None and self._group.has_started():
            self._group.shutdown()
        self._messenger.start.remote(is_done=False)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the ranks."""
        self._group = worker_group

    def after_worker_group_training_start(self, worker_group: Any) -> None:  # noqa: ARG002
        """Tell that the ranks work."""
        self._messenger.start.remote(is_done=True)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Kill ranks that do not respond: Ray asks a process to end, and waits for it with the rank's resources."""
        status = worker_group.get_latest_poll_status()
        for rank, error in (status.errors if status else {}).items():
            if isinstance(error, WorkerHealthCheckTimeoutError):
                place = worker_group.get_workers()[rank].metadata
                there = NodeAffinitySchedulingStrategy(place.node_id, soft=True)
                kill = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(kill_process)
                with contextlib.suppress(RayError):
                    ray.get(kill.remote(place.node_id, place.pid), timeout=KILL_SECONDS)
