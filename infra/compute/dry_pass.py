"""Count the memory of a pass on a GPU without making it: on the meta device, whose tensors have shapes but no contents.

Shapes, types and lifetimes are torch's own, those of autograd and of activation checkpointing included. Where kernels
for the meta device would keep other tensors than those of CUDA, `_AsOnCuda` chooses as CUDA does. Workspaces of cuDNN
and cuBLAS, and what the allocator cannot use, are not counted; compiled blocks keep less than is counted.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = "meta"
AUTOCAST_AS = "cpu"  # whose autocast state stands for CUDA's: tensors on the meta device are not cast by it

# Functions that compute in half precision under CUDA's autocast, and in float32, by name.
HALF = {"linear", "matmul", "__matmul__", "bmm", "conv1d", "conv2d", "scaled_dot_product_attention"}
FULL = {"layer_norm", "group_norm", "softmax", "log_softmax", "mse_loss", "normalize"}
ALIGNED = 8  # elements of a head, to a multiple of which fused attention in half precision pads


def peak_bytes(*works: Callable[[], None], given: Iterable[Tensor] = (), fused_attention: bool = True) -> list[int]:
    """Return the most bytes that are allocated at a time during each of `works`, on the meta device as on CUDA.

    Args:
        works: called one after the other; pass forward and, by `backward`, backward.
        given: tensors that are there before, and are not counted.
        fused_attention: whether fused kernels may be used, as they may unless algorithms have to be deterministic.
    """
    peaks = []
    with Allocations(given) as allocations, _AsOnCuda(fused_attention=fused_attention):
        for work in works:
            allocations.peak = allocations.bytes
            work()
            peaks.append(allocations.peak)
    return peaks


def backward(loss: Tensor) -> None:
    """Compute gradients; blocks that are recomputed meanwhile are counted, too, as they are not by `loss.backward`."""
    # A mode is suspended within the functions that it sees, and it does not see this one without a tensor of a graph.
    torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss, requires_grad=False))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, on any device, and the most there were."""

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._given = tuple(given)  # kept, so that no other storage gets the address of one of them
        self._known = {tensor.untyped_storage()._cdata for tensor in self._given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operation, and count what it allocates."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


class _AsOnCuda(TorchFunctionMode):
    """Casts as CUDA's autocast does, and keeps what CUDA's fused kernels keep."""

    def __init__(self, *, fused_attention: bool) -> None:
        super().__init__()
        self._casts: dict[tuple[int, bool], Tensor] = {}  # of weights, as autocast caches them
        self._clear_torchs = torch.clear_autocast_cache
        self._kernels: dict[str, Callable[..., Tensor]] = {"dropout": _dropout, "rms_norm": _rms_norm}
        if fused_attention:
            self._kernels["scaled_dot_product_attention"] = _attention

    def __enter__(self) -> Self:
        """Begin; until the end, torch forgets our casts when it forgets its own, at the end of each autocast."""
        torch.clear_autocast_cache = self._clear
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """End."""
        super().__exit__(*raised)
        torch.clear_autocast_cache = self._clear_torchs

    def _clear(self) -> None:
        self._casts.clear()
        self._clear_torchs()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function with arguments of the types, and in the way, of CUDA."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled(AUTOCAST_AS) and (name in HALF or name in FULL):
            dtype = torch.get_autocast_dtype(AUTOCAST_AS) if name in HALF else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {key: self._cast(value, dtype) for key, value in kwargs.items()}
        return self._kernels.get(name, func)(*args, **kwargs)

    def _cast(self, value: object, dtype: torch.dtype) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if dtype is torch.float32 or value.dtype is not torch.float32 or not isinstance(value, nn.Parameter):
            return value.to(dtype)
        key = id(value), torch.is_grad_enabled()
        if key not in self._casts:
            self._casts[key] = value.to(dtype)
        return self._casts[key]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: ARG001
    """Keep the mask, a byte for each element."""
    if not training or not p:
        return input
    dropped: Tensor = torch.ops.aten.native_dropout(input, p, True)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> Tensor:
    """Keep inputs, outputs and sums, and no scores."""
    assert attn_mask is None
    if query.dtype is torch.float32:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        found: Tensor = kernel(query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal)[0]
        return found
    width = query.shape[-1]
    if excess := width % ALIGNED:
        query, key, value = (F.pad(each, (0, ALIGNED - excess)) for each in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    return found[..., :width]


def _rms_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Keep the input and its inverse deviations; not if types differ, as CUDA has no fused kernel for that."""
    if weight is None or weight.dtype is not input.dtype:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that it is not fused
            return torch.rms_norm(input, normalized_shape, weight, eps)
    normed: Tensor = _FusedRmsNorm.apply(input, weight)
    return normed


class _FusedRmsNorm(torch.autograd.Function):
    """What CUDA's fused norm allocates and keeps; on the meta device torch takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Allocate the output."""
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the gradients."""
        x, weight, _rest = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
