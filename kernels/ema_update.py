"""One step of a codebook's moving averages, in place.

Computes: with w = 1 − decay and packed[k] = (sum_k, count_k):
          size_k += w (count_k − size_k),   avg_k += w (sum_k − avg_k),
          code_k = avg_k / ((size_k + eps) / (Σ size + K·eps) · Σ size).
          totals = (Σ size after the step, Σ count). Where Σ count is 0 only totals is written.
Contract: all contiguous float32.
Numerics: averages in float32, sums and the smoothed size in float64, in one order; no atomics.
Shape of the code: one program moves the sizes and adds them up, K values, as every code needs their
    sum; then tiles of codes: reads packed and avg, writes avg and code. No host synchronisation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_contiguous, on_device, power_of_2

_TILE = 2048  # values of a tile


@triton.jit
def _move(a, b, w):
    """From a to b by the part w, in the form that is exact at the nearer end."""
    return tl.where(w < 0.5, a + (b - a) * w, b - (b - a) * (1.0 - w))


@triton.jit
def _sizes(cluster_size, packed, totals, K, D, w, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, K, BLOCK):
        k = start + lane
        acc += tl.load(packed + k * (D + 1) + D, mask=k < K, other=0.0).to(tl.float64)
    seen = tl.sum(acc, axis=0)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, K, BLOCK):
        k = start + lane
        count = tl.load(packed + k * (D + 1) + D, mask=k < K, other=0.0)
        size = tl.load(cluster_size + k, mask=k < K, other=0.0)
        size = tl.where(seen != 0.0, _move(size, count, w), size)
        tl.store(cluster_size + k, size, mask=k < K)
        acc += size.to(tl.float64)
    tl.store(totals, tl.sum(acc, axis=0).to(tl.float32))
    tl.store(totals + 1, seen.to(tl.float32))


@triton.jit
def _codes(
    cluster_size, embed_avg, weight, packed, totals, K, D, w, eps,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.load(totals).to(tl.float64)
    seen = tl.load(totals + 1)
    # a batch without rows has no columns to move
    mask = (k < K)[:, None] & (col < tl.where(seen != 0.0, D, 0))[None, :]
    size = tl.load(cluster_size + k, mask=k < K, other=1.0).to(tl.float64)
    smooth = ((size + eps) * (total / (total + K * eps))).to(tl.float32)  # [BLOCK_K]
    at = k[:, None] * D + col[None, :]
    mean = tl.load(embed_avg + at, mask=mask, other=0.0)
    new = tl.load(packed + k[:, None] * (D + 1) + col[None, :], mask=mask, other=0.0)
    mean = _move(mean, new, w)
    tl.store(embed_avg + at, mean, mask=mask)
    tl.store(weight + at, tl.div_rn(mean, tl.broadcast_to(smooth[:, None], mean.shape)), mask=mask)


def unsupported_ema_update(
    cluster_size: Tensor, embed_avg: Tensor, weight: Tensor, packed: Tensor, decay: float,
    eps: float,
) -> str | None:  # fmt: skip
    """Why these inputs cannot run: another dtype than float32, strides, or too many columns."""
    tensors = {
        "cluster_size": cluster_size, "embed_avg": embed_avg, "weight": weight, "packed": packed,
    }  # fmt: skip
    for name, t in tensors.items():
        if t.dtype != torch.float32:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}"
    if triton.cdiv(weight.shape[1], 256) > 65535:  # second axis of the grid
        return f"D = {weight.shape[1]} is too large"
    return not_contiguous(**tensors)


def ema_update(
    cluster_size: Tensor, embed_avg: Tensor, weight: Tensor, packed: Tensor, decay: float,
    eps: float, totals: Tensor,
) -> None:  # fmt: skip
    """Moves cluster_size [K], embed_avg and weight [K, D] by packed [K, D + 1]; writes totals."""
    K, D = weight.shape
    block_d = power_of_2(D, 1, 256)
    block_k = _TILE // block_d
    with on_device(weight):
        options = {"num_warps": 8, "enable_fp_fusion": False}
        w = 1.0 - decay
        _sizes[(1,)](cluster_size, packed, totals, K, D, w, BLOCK=2048, **options)
        _codes[(triton.cdiv(K, block_k), triton.cdiv(D, block_d))](
            cluster_size, embed_avg, weight, packed, totals, K, D, w, eps,
            BLOCK_K=block_k, BLOCK_D=block_d, **options,
        )  # fmt: skip
