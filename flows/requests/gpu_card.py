"""Find the memory of the GPUs that a run computes on: stated, of this machine, or of the Ray cluster that it joins."""

from flows.pipeline.gpu_memory import Card
from infra.compute.cluster import cluster_gpu_memory
from infra.compute.device import gpu_memory
from infra.settings import Settings

GB = 10**9


def find_card(settings: Settings, stated: float | None = None) -> Card:
    """Return the memory of the smallest GPU.

    Args:
        settings: state it, or name the cluster to join.
        stated: gigabytes that are planned for; None: as the settings say, or else as GPUs have.
    """
    if stated is not None:
        return Card(int(stated * GB), "the GPUs that are planned for")
    if settings.gpu_memory is not None:
        return Card(int(settings.gpu_memory * GB), "the GPUs of SFTOK_GPU_MEMORY")
    if settings.ray_address:
        found = cluster_gpu_memory(settings.ray_address)
        return Card() if found is None else Card(found, f"the GPUs of the Ray cluster at {settings.ray_address}")
    found = gpu_memory()
    return Card() if found is None else Card(found, "this machine's GPUs")
