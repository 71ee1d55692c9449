"""Sums and counts of the finite rows of each code, side by side in one tensor.

Computes: packed[k] = (Σ z[n], how many) over the finite rows n of code k, which are
          order[start[k]] .. order[start[k + 1]).
Contract: all contiguous, D <= 1024; order [N] int64 is sorted by code. A row that holds a NaN or an
    infinity is left out; a code without rows gives 0.
Numerics: float64, as ROWS interleaved sums that are added at the end: one order for a given D, no
    atomics, equal bits in every run. Counts are exact up to 2^24.
Shape of the code: a program owns one code and all columns, as a row is in or out as a whole; ROWS
    rows at a time. Reads z once, writes packed once.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_contiguous, not_floats, on_device, power_of_2

_TILE = 1024  # values of a tile


@triton.jit
def _sums(z, order, start, packed, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, ROWS)
    real = col < D
    begin = tl.load(start + k)
    rows = (tl.load(start + k + 1) - begin).to(tl.int32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float64)
    count = tl.zeros([ROWS], tl.int32)
    for done in range(0, rows, ROWS):
        mine = done + lane < rows
        n = tl.load(order + begin + done + lane, mask=mine, other=0).to(tl.int64)  # [ROWS]
        mask = mine[:, None] & real[None, :]
        x = tl.load(z + n[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        bad = tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1)  # a NaN is not below
        healthy = mine & (bad == 0)
        acc += tl.where(healthy[:, None], x.to(tl.float64), 0.0)
        count += healthy.to(tl.int32)
    out = packed + k * (D + 1)
    tl.store(out + col, tl.sum(acc, axis=0).to(packed.dtype.element_ty), mask=real)
    tl.store(out + D, tl.sum(count, axis=0).to(packed.dtype.element_ty))


def unsupported_ema_stats(z: Tensor, order: Tensor, start: Tensor) -> str | None:
    """Why these inputs cannot run: float64, strides, or D > 1024."""
    if z.shape[1] > _TILE:
        return f"D = {z.shape[1]} is above {_TILE}"
    return not_floats(z=z) or not_contiguous(z=z, order=order, start=start)


def ema_stats(z: Tensor, order: Tensor, start: Tensor, packed: Tensor) -> None:
    """Writes packed [K, D + 1] float32 from z [N, D], order [N] and start [K + 1]."""
    D = z.shape[1]
    block_d = power_of_2(D, 1, _TILE)
    rows = power_of_2(_TILE // block_d, 1, 16)
    with on_device(z):
        _sums[(packed.shape[0],)](
            z, order, start, packed, D, ROWS=rows, BLOCK_D=block_d,
            num_warps=4 if rows * block_d == _TILE else 1,
        )  # fmt: skip
