"""Rows replaced by codes of given indices, and the loss of that: what a search ends with.

Computes: z_q[n] = codes[k_n];  parts[i] = Σ (codes[k_n] − x[n])² over the PART rows of part i;
          partial[b] = Σ of the parts of block b;  loss = weight · Σ partial / (N·D).
Numerics: differences and squares in float64; the sum of a part, those of its block in order, and
    those of all blocks: one order for a given N and D, no atomics. Whoever calls `replace` for the
    same rows with the same warps gets the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import power_of_2

BLOCK = 64  # rows of a partial sum; BLOCK in vqfast/ops/straight_through.py
PART = 8  # rows of a part of it
WARPS = 4  # of a program that replaces rows
_BLOCKS = 1024  # partial sums that are added side by side


def columns(D: int) -> int:
    """Columns that `replace` takes at a time."""
    return power_of_2(D, 1, 64)


@triton.jit
def replace(x, codes, z_q, n, code, N, K, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """z_q[n] = codes[code] for rows n [ROWS] int64 below N; -> Σ (codes[code] − x[n])², float64.

    A code outside of 0..K-1 reads nothing; its row is 0.
    """
    known = (code >= 0) & (code < K)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float64)
    for left in range(0, D, BLOCK_D):
        col = left + tl.arange(0, BLOCK_D)
        real = (n < N)[:, None] & (col < D)[None, :]
        at = codes + code[:, None] * D + col[None, :]
        c = tl.load(at, mask=real & known[:, None], other=0.0)
        v = tl.load(x + n[:, None] * D + col[None, :], mask=real, other=0.0)
        tl.store(z_q + n[:, None] * D + col[None, :], c.to(z_q.dtype.element_ty), mask=real)
        d = c.to(tl.float64) - v.to(tl.float64)
        acc += d * d
    return tl.sum(tl.sum(acc, axis=1), axis=0)


@triton.jit
def _merge(
    parts, partial, loss, n_parts, blocks, count, weight, EACH: tl.constexpr, WIDE: tl.constexpr
):
    """By one program: partial[b] = Σ of its EACH parts; loss = weight · Σ partial / count."""
    acc = tl.zeros([WIDE], tl.float64)
    for start in range(0, blocks, WIDE):
        b = start + tl.arange(0, WIDE)
        total = tl.zeros([WIDE], tl.float64)
        for j in tl.static_range(EACH):
            at = b * EACH + j
            total += tl.load(parts + at, mask=at < n_parts, other=0.0)
        if EACH > 1:
            tl.store(partial + b, total, mask=b < blocks)
        acc += total
    mean = tl.sum(acc, axis=0) / count
    tl.store(loss, (mean * weight).to(loss.dtype.element_ty))


def merge(parts: Tensor, partial: Tensor, loss: Tensor, count: int, weight: float) -> None:
    """Writes partial [blocks], unless it is `parts` itself, and loss []; 0 without blocks."""
    each = 1 if parts is partial else BLOCK // PART
    _merge[(1,)](
        parts, partial, loss, parts.shape[0], partial.shape[0], max(1, count), weight,
        EACH=each, WIDE=_BLOCKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
