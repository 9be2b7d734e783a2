"""Launch ranks with Ray Train V2: it places them, joins them in a process group, and restarts them after a loss.

What is added to a plain `TorchTrainer`: the caller's thread waits and can be interrupted, and whatever happens, nothing
runs on; an error of the work ends the training at once, instead of being retried; progress reaches the caller; nothing
is kept on any disk (checkpoints are the work's own); no rank sees another one's GPU.

Its controller is made here and not by `fit`, which would keep its handle to itself, handle SIGINT, and choose a policy
that retries every error.
"""

import contextlib
import logging
from typing import Any, TypeVar

import fsspec
import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import cloudpickle
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.compute.cluster import interruptible, one_line
from infra.compute.launch.controller import (
    NO_ROOM,
    GroupConfig,
    Policy,
    Tidy,
    describe_loss,
    is_loss,
    own_error,
    remote,
)
from infra.compute.launch.messenger import Messenger, News
from infra.compute.launch.rank import RankWork, Work
from infra.compute.launch.room import Room
from infra.errors import TransientError
from infra.progress import Progress

log = logging.getLogger(__name__)

R = TypeVar("R")

RESTARTS = 3  # of all ranks, after one of them was lost
WAIT_SECONDS = 0.5  # between polls of the first rank's progress
START_SECONDS = 600.0  # for ranks to load the code and join, once they are placed
END_SECONDS = 5.0  # for the controller to end
RESIZE_SECONDS = 300.0  # between looks for room for more ranks, which cost the steps since the last checkpoint
COLLECTIVE_SECONDS = 1800  # of a sum that somebody does not join; the first rank may be writing results


def train(work: Work[R], room: Room, *, progress: Progress, patience: float) -> R:
    """Call `work` in ranks and return the first one's result; see `run_ranks`.

    Args:
        work: what each rank does.
        room: how many ranks, and what each needs.
        progress: called with the first rank's reports.
        patience: seconds after which a rank that does not respond counts as lost.
    """
    if room.is_joined:
        room.wait(progress)
    count = room.ranks
    messenger = remote(num_cpus=0, scheduling_strategy=_here())(Messenger).remote()
    try:
        trainer = _Trainer(
            RankWork(work, messenger),
            torch_config=GroupConfig(
                # One rank has nothing to sum. Checkpoints talk over CPUs.
                backend="cpu:gloo,cuda:nccl" if room.gpus and count.most > 1 else "gloo",
                timeout_s=COLLECTIVE_SECONDS,
            ),
            scaling_config=ScalingConfig(
                num_workers=(count.least, count.most) if count.is_elastic else count.most,
                use_gpu=bool(room.gpus),
                resources_per_worker=room.each,
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=RunConfig(
                name="ranks",
                storage_path="/ranks",
                storage_filesystem=PyFileSystem(FSSpecHandler(fsspec.filesystem("memory"))),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        trainer.messenger, trainer.progress, trainer.patience, trainer.room = messenger, progress, patience, room
        result: R = cloudpickle.loads(trainer.fit().return_value)  # type: ignore[attr-defined]
        return result
    except TrainingFailedError as error:
        _raise_cause(error, room)
    except RayError as error:
        raise TransientError(f"lost the process that supervises training ({one_line(error)})") from error
    finally:
        ray.kill(messenger)
    raise AssertionError("unreachable")


def _raise_cause(error: TrainingFailedError, room: Room) -> None:
    own = own_error(error)
    if own is not None:
        raise own.original() from None
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, NO_ROOM):
        raise ValueError(room.refusal) from None
    if is_loss(error):
        raise TransientError(f"lost a training process {RESTARTS + 1} times ({describe_loss(error)})") from error
    raise TransientError(f"Ray Train cannot supervise the training ({one_line(error)})") from error


class _Trainer(TorchTrainer):
    """Trainer whose controller the caller's thread waits for, and ends."""

    messenger: Any
    progress: Progress
    patience: float
    room: Room

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out two processes: one for data sets of Ray's, and one that releases what `_end` does."""
        made = super()._create_default_callbacks()
        kept = [each for each in made if not isinstance(each, DatasetsCallback | PlacementGroupCleanerCallback)]
        return [Tidy(self.room.seconds, self.messenger), *kept]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = Policy(FailureConfig(max_failures=RESTARTS), self.messenger)
        patience = {constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR: f"{self.patience:g}"}
        environment = {"env_vars": constants.get_env_vars_to_propagate() | patience}
        actor = remote(num_cpus=0, scheduling_strategy=_here(), runtime_env=environment)(TrainController)
        controller = actor.remote(**arguments)
        try:
            self._wait_for(controller.run.remote())
            with interruptible():
                return ray.get(controller.get_result.remote())
        finally:
            _end(controller)

    def _wait_for(self, call: Any) -> None:
        """Wait for the controller to finish, and pass on news meanwhile."""
        taking, is_done = self.messenger.take.remote(), False
        while not is_done:
            with interruptible():
                is_done = bool(ray.wait([call], timeout=WAIT_SECONDS)[0])
            if self._pass_on(taking):
                taking = self.messenger.take.remote()
        with interruptible():
            ray.get(call)
        for last in (taking, self.messenger.take.remote()):
            self._pass_on(last, seconds=None)

    def _pass_on(self, taking: Any, *, seconds: float | None = 0.0) -> bool:
        """Pass on news unless they do not arrive in so many seconds; whether they did."""
        with interruptible():
            if not ray.wait([taking], timeout=seconds)[0]:
                return False
            news: News = ray.get(taking)
        for warning in news.warnings:
            log.warning(warning)
        for report in news.reports:
            self.progress(*report)
        if news.starting > START_SECONDS:  # Ray Train itself would wait for ever
            raise TransientError(f"the training processes did not start within {START_SECONDS:g} s; look at the nodes")
        return True


def _here() -> NodeAffinitySchedulingStrategy:
    """Place an actor on this machine."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _end(controller: Any) -> None:
    """End a controller, and so its ranks; Ray leaves their reservation to the end of this process."""
    ray.kill(controller)
    with contextlib.suppress(RayError):
        ray.get(controller.__ray_ready__.remote(), timeout=END_SECONDS)  # it may be reserving still
    actor = controller._actor_id.binary()
    for row in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        if group.creator_actor_id == actor and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
