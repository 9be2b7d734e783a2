"""Triton kernel for cached attention at one position: rotary positions, cache update and attention in one kernel.

PyTorch's operations take seven kernels for this and read the whole cache; this kernel reads only what was written. It
uses no matrix products, since attention of a single query is bound by bandwidth. Imported only on CUDA, since Triton is
not available everywhere.

Shapes: R rows, N codes per sequence, H heads, D channels per head, S positions at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_AT_ONCE = 64
WARPS = 4


def launch(
    qkv_RC: Tensor,
    position: Tensor,
    tables: tuple[Tensor, Tensor],
    gains: tuple[Tensor, Tensor] | None,
    cache: tuple[Tensor, Tensor],
    epsilon: float,
) -> Tensor:
    """Compute `generator.sampling.fused.attend` on a GPU.

    Raises:
        RuntimeError: Triton cannot compile the kernel for this GPU.
    """
    keys_RHND, values_RHND = cache
    rows, heads, count, dim = keys_RHND.shape
    y_RW = torch.empty(rows, heads * dim, dtype=qkv_RC.dtype, device=qkv_RC.device)
    q_gain, k_gain = (y_RW, y_RW) if gains is None else gains  # any pointer will do: it is not read
    try:
        attend_kernel[(rows * heads,)](
            qkv_RC,
            position,
            *tables,
            q_gain,
            k_gain,
            keys_RHND,
            values_RHND,
            y_RW,
            epsilon,
            HEADS=heads,
            COUNT=count,
            DIM=dim,
            IS_NORMED=gains is not None,
            D=triton.next_power_of_2(dim),
            S=min(MOST_AT_ONCE, triton.next_power_of_2(count)),
            num_warps=WARPS,
        )
    except triton.TritonError as error:
        raise RuntimeError(f"Triton: {error}") from error
    return y_RW


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]  # pointers and constants of Triton
    qkv,
    position,
    cos,
    sin,
    q_gain,
    k_gain,
    keys,
    values,
    y,
    epsilon,
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    IS_NORMED: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
):
    """Attend with one program per head and row; sums, rotation and softmax in float32."""
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    own = (program // HEADS) * (3 * HEADS * DIM) + head * DIM
    place = tl.load(position).to(tl.int32)
    d = tl.arange(0, D)
    is_channel = d < DIM
    is_first = d < DIM // 2
    partner = tl.where(is_first, d + DIM // 2, d - DIM // 2)
    cos_D = tl.load(cos + place * DIM + d, mask=is_channel, other=0.0)
    sin_D = tl.load(sin + place * DIM + d, mask=is_channel, other=0.0)
    sin_D = tl.where(is_first, -sin_D, sin_D)
    q_D = tl.load(qkv + own + d, mask=is_channel, other=0.0).to(tl.float32)
    k_D = tl.load(qkv + own + HEADS * DIM + d, mask=is_channel, other=0.0).to(tl.float32)
    v_D = tl.load(qkv + own + 2 * HEADS * DIM + d, mask=is_channel, other=0.0)
    turned_q_D = tl.load(qkv + own + partner, mask=is_channel, other=0.0).to(tl.float32)
    turned_k_D = tl.load(qkv + own + HEADS * DIM + partner, mask=is_channel, other=0.0).to(tl.float32)
    if IS_NORMED:
        q_size = tl.rsqrt(tl.sum(q_D * q_D, 0) / DIM + epsilon)
        k_size = tl.rsqrt(tl.sum(k_D * k_D, 0) / DIM + epsilon)
        q_D = q_D * q_size * tl.load(q_gain + d, mask=is_channel, other=0.0).to(tl.float32)
        k_D = k_D * k_size * tl.load(k_gain + d, mask=is_channel, other=0.0).to(tl.float32)
        turned_q_D = turned_q_D * q_size * tl.load(q_gain + partner, mask=is_channel, other=0.0).to(tl.float32)
        turned_k_D = turned_k_D * k_size * tl.load(k_gain + partner, mask=is_channel, other=0.0).to(tl.float32)
    q_D = (q_D * cos_D + turned_q_D * sin_D) * (DIM**-0.5)
    k_stored_D = (k_D * cos_D + turned_k_D * sin_D).to(keys.dtype.element_ty)

    base = program * (COUNT * DIM)
    tl.store(keys + base + place * DIM + d, k_stored_D, mask=is_channel)
    tl.store(values + base + place * DIM + d, v_D, mask=is_channel)
    # The position itself comes from registers, earlier ones from the cache, with an online softmax.
    top = tl.sum(q_D * k_stored_D.to(tl.float32), 0)
    total = tl.exp(top - top)
    y_D = v_D.to(tl.float32)
    for start in range(0, place, S):
        n = start + tl.arange(0, S)
        is_seen = n < place
        at_SD = base + n[:, None] * DIM + d[None, :]
        is_there_SD = is_seen[:, None] & is_channel[None, :]
        keys_SD = tl.load(keys + at_SD, mask=is_there_SD, other=0.0).to(tl.float32)
        values_SD = tl.load(values + at_SD, mask=is_there_SD, other=0.0).to(tl.float32)
        score_S = tl.where(is_seen, tl.sum(keys_SD * q_D[None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(score_S, 0))
        kept = tl.exp(top - higher)
        share_S = tl.exp(score_S - higher)
        total = total * kept + tl.sum(share_S, 0)
        y_D = y_D * kept + tl.sum(share_S[:, None] * values_SD, 0)
        top = higher
    tl.store(y + program * DIM + d, (y_D / total).to(y.dtype.element_ty), mask=is_channel)
