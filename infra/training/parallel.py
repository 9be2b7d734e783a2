"""Spread the training of a network over ranks: replicas by DistributedDataParallel, or shards by FSDP2.

A replica holds all of the weights, gradients and optimizer state of a rank's network; their gradients are summed bucket
by bucket while the backward pass goes on. With shards, each rank holds its part of them, and gathers the weights of one
block at a time.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from infra.compute.ranks import Ranks
from infra.config import Precision
from infra.training.config import Parallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SHARDED_FROM = 500_000_000
"""Parameters from which "auto" shards: a replica's weights, gradients, moments and EMA take 20 bytes for each."""


class _Call(nn.Module):
    """A function of a network as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        return self.call(*args, **options)


def replicate(network: nn.Module, call: Callable[..., Any]) -> nn.parallel.DistributedDataParallel:
    """Wrap a function of a network: gradients of what it returns are averaged over ranks in the backward pass.

    Args:
        network: the same on every rank.
        call: computes the tensors of which the loss is made; tensors, or tuples and dicts of them.
    """
    # Buckets must not be arranged anew after the first step: sums over more than two ranks round as they are arranged,
    # and a resumed training would begin with the first arrangement again. They stay if unused parameters are sought.
    options: dict[str, Any] = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False  # torch < 2.14
    return nn.parallel.DistributedDataParallel(_Call(network, call), **options)


def choose_parallel(asked: Parallel, network: nn.Module, precision: Precision) -> Literal["ddp", "fsdp", "hsdp"]:
    """Resolve "auto" by the number of parameters; losses that are scaled, as for fp16, need replicas."""
    if asked != "auto":
        return asked
    if precision == "fp16":
        return "ddp"
    return "fsdp" if sum(p.numel() for p in network.parameters()) >= SHARDED_FROM else "ddp"


def shard(
    network: nn.Module,
    blocks: Iterable[nn.Module],
    ranks: Ranks,
    *,
    device: str,
    param_dtype: torch.dtype | None = None,
    by_node: bool = False,
) -> None:
    """Shard the parameters of a network over all ranks, in place.

    Args:
        network: the same on every rank, on its device.
        blocks: its parts that are gathered one at a time.
        ranks: all ranks; a process group must be there.
        device: type of the device.
        param_dtype: type in which parameters are gathered and used; gradients are reduced in float32.
        by_node: shard over the ranks of a node, and replicate over nodes (HSDP).

    Raises:
        ValueError: nodes have different numbers of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = torch.device(device).type
    inner = _on_node(ranks, device) if by_node else ranks.size
    outer = (ranks.size // inner,) if by_node else ()
    mesh = init_device_mesh(kind, (*outer, inner), mesh_dim_names=("nodes", "ranks")[-1 - len(outer) :])
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _on_node(ranks: Ranks, device: str) -> int:
    """Return the number of ranks on each node."""
    counts = ranks.all_of(int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), device)
    if min(counts) != max(counts):
        raise ValueError(
            f'parallel = "hsdp": nodes have {min(counts)} to {max(counts)} ranks; set it to "fsdp", or --ranks to a '
            "multiple of the GPUs of a node"
        )
    return counts[0]


def is_sharded(network: nn.Module) -> bool:
    """Tell whether `shard` was called: all ranks then have to make their passes together."""
    return _sharded(next(network.parameters())) is not None


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds, sharing its memory; any other tensor itself."""
    sharded = _sharded(tensor)
    return tensor if sharded is None else cast("DTensor", sharded.detach()).to_local()


def as_part_of(whole: Tensor, part: Tensor) -> Tensor:
    """Return a tensor like `whole` of which this rank holds `part`; `part` itself if `whole` is not sharded."""
    if (sharded := _sharded(whole)) is None:
        return part
    mesh, placements = sharded.device_mesh, sharded.placements
    return type(sharded).from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def takes_turn(tensor: Tensor, turn: int) -> bool | None:
    """Tell whether this rank, of those that hold the same part of a sharded tensor, has a turn; None if all hold it."""
    if (sharded := _sharded(tensor)) is None:
        return None
    mesh, coordinates = sharded.device_mesh, sharded.device_mesh.get_coordinate()
    assert coordinates is not None
    along = [axis for axis, placement in enumerate(sharded.placements) if placement.is_replicate()]
    return all(coordinates[axis] == turn % mesh.size(axis) for axis in along)


def shard_group(parameter: Tensor) -> Any:
    """Return the process group over which a parameter is sharded; None if it is not."""
    if (sharded := _sharded(parameter)) is None:
        return None
    return sharded.device_mesh.get_group(sharded.device_mesh.ndim - 1)


def _sharded(tensor: Tensor) -> "DTensor | None":
    """Return the tensor if it is sharded; does not load torch's module for that, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """Gather the weights of a network on the CPU of the first rank; the others, which must call it too, get none."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return cast(
        dict[str, Tensor],
        get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)),
    )
