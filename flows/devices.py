"""Which device a run computes on: what was asked for, held against the machine, or the Ray cluster that it joins."""

from flows.recipes import ComputeConfig
from infra.cluster import cluster_gpus
from infra.device import default_device


def choose_device(
    compute: ComputeConfig, *, gpus: float | None, ray_address: str | None, ranks: int = 1, is_run: bool = True
) -> tuple[str, float]:
    """Choose the device ("cpu" or "cuda") and the GPUs of each worker.

    Args:
        compute: what the recipe asks for.
        gpus: GPUs of each worker that were asked for; None: one on CUDA.
        ray_address: a cluster to join, whose machines decide; None: this machine does.
        ranks: training processes, which need a GPU each on CUDA.
        is_run: a run that is only planned does without a cluster that does not answer.

    Raises:
        ValueError: GPUs are asked for where there are none or too few, or beside the device cpu.
    """
    if compute.device == "cpu" or (compute.device == "auto" and gpus == 0):
        if gpus:
            raise ValueError(
                f"gpus_per_worker = {gpus:g}, but compute.device = cpu: leave one of them out (--device cuda computes "
                "on GPUs)"
            )
        return "cpu", 0.0
    there = _gpus_there(ray_address, is_run=is_run)
    place = f"the Ray cluster at {ray_address} has" if ray_address else "this machine has"
    if not there:
        if compute.device == "cuda" or gpus:
            asked = "compute.device = cuda" if compute.device == "cuda" else f"gpus_per_worker = {gpus:g}"
            raise ValueError(
                f"{asked}, but {place} no GPU that torch can use: ask for --device cpu, or name a cluster with GPUs in "
                "SFTOK_RAY_ADDRESS"
            )
        return "cpu", 0.0
    if ranks > there:
        raise ValueError(f"--ranks {ranks}, but {place} {there:g} GPUs: give one rank a GPU, or --device cpu")
    return "cuda", 1.0 if gpus is None else gpus


def _gpus_there(ray_address: str | None, *, is_run: bool) -> float:
    """GPUs of the cluster, or of this machine where none is joined."""
    if ray_address:
        try:
            return cluster_gpus(ray_address)
        except ValueError:
            if is_run:
                raise
    if default_device() == "cpu":
        return 0.0
    import torch

    return float(torch.cuda.device_count())
