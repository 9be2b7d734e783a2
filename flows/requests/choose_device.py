"""Which device a run computes on: what was asked for, held against the machine, or the Ray cluster that it joins."""

from flows.recipes.schema import ComputeConfig
from infra.compute.cluster import cluster_gpus
from infra.compute.device import default_device
from infra.compute.rank_count import ONE, RankCount
from infra.settings import Settings


def choose_device(
    compute: ComputeConfig, *, gpus: float | None, settings: Settings, ranks: RankCount = ONE, is_run: bool = True
) -> tuple[str, float]:
    """Choose the device ("cpu" or "cuda") and the GPUs of each worker.

    Args:
        compute: what the recipe asks for.
        gpus: GPUs of each worker that were asked for; None: one on CUDA.
        settings: name the cluster to join, whose machines decide; without one this machine does.
        ranks: training processes, which need a GPU each on CUDA.
        is_run: a run that is only planned does without a cluster that does not answer.

    Raises:
        ValueError: GPUs are asked for where there are none or too few, beside the device cpu, or in a number that no
            worker can use.
    """
    if gpus is not None and not 0 <= gpus <= 1:
        raise ValueError(
            f"gpus_per_worker = {gpus:g}: a worker computes on one GPU, or shares one: give a number from 0 to 1"
        )
    if compute.device == "cuda" and gpus == 0:
        raise ValueError("gpus_per_worker = 0, but compute.device = cuda: leave one of them out")
    if compute.device == "cpu" or (compute.device == "auto" and gpus == 0):
        if gpus:
            raise ValueError(
                f"gpus_per_worker = {gpus:g}, but compute.device = cpu: leave one of them out (--device cuda computes "
                "on GPUs)"
            )
        return "cpu", 0.0
    there = gpus_there(settings, is_run=is_run)
    place = f"the Ray cluster at {settings.ray_address} has" if settings.ray_address else "this machine has"
    if not there:
        if compute.device == "cuda" or gpus:
            asked = "compute.device = cuda" if compute.device == "cuda" else f"gpus_per_worker = {gpus:g}"
            other = "say what it grows to in SFTOK_RAY_MAX_GPUS" if settings.ray_address else "join a Ray cluster"
            raise ValueError(f"{asked}, but {place} no GPU that torch can use: ask for --device cpu, or {other}")
        return "cpu", 0.0
    if ranks.least > there:
        grows = ", or say what it grows to in SFTOK_RAY_MAX_GPUS" if settings.ray_address else ""
        raise ValueError(
            f"--ranks {ranks}, but {place} {there:g} GPUs, one a rank: lower it, or ask for --device cpu{grows}"
        )
    return "cuda", 1.0 if gpus is None else gpus


def gpus_there(settings: Settings, *, is_run: bool) -> float:
    """GPUs of the cluster, now or when it has grown; or of this machine where none is joined."""
    if settings.ray_address:
        try:
            return max(cluster_gpus(settings.ray_address), settings.ray_max_gpus)
        except ValueError:
            if is_run:
                raise
    if default_device() == "cpu":
        return 0.0
    import torch

    return float(torch.cuda.device_count())
