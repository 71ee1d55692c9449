"""How many rows chose each code, and their sum: the EMA update and the codebook gradient.

Computes: counts_k = #{n: i_n = k},   sums_kd = Σ_{n: i_n = k} z_nd.
Contract: indices [N] int64, z [N, D] any strides, counts [K] int64, sums [K, D]. Indices outside
    0..K-1 are left out. A row that is not finite shows in the sum of its own code alone.
Numerics: float64 sums in ascending n, rounded once: the bits of every other backend. No atomics.
Shape of the code: a program owns a few codes and a slab of columns, scans all indices (8 · N bytes
    from L2, N · K / BLOCK_K comparisons in all), and takes the rows that hit, ROWS loads at a time,
    one addition after another. It needs no scratch memory, which a counting sort does; that wins
    once N · K exceeds about 10^10 (estimate).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import FLOATS, not_contiguous, on_device, power_of_2

_CHUNK = 512  # indices compared at a time
_CELLS = 1024  # accumulators of a program


@triton.jit
def _stats(
    indices, z, counts, sums, z_n, z_d, N, K, D,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_K
    code = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = tl.arange(0, CHUNK).to(tl.int64)
    lane = tl.arange(0, ROWS)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    count = tl.zeros([BLOCK_K], tl.int64)
    for start in range(0, N, CHUNK):
        n = start + at
        local = tl.load(indices + n, mask=n < N, other=-1) - first
        hit = (local >= 0) & (local < BLOCK_K)
        local = local.to(tl.int32)
        rank = tl.cumsum(hit.to(tl.int32), axis=0)  # 1 for the first hit
        hits = tl.max(rank, axis=0)
        for done in range(0, hits, ROWS):
            want = done + 1 + lane
            this = hit[None, :] & (rank[None, :] == want[:, None])  # [ROWS, CHUNK], one True a row
            rows = tl.sum(tl.where(this, at[None, :], 0), axis=1)  # [ROWS]
            owners = tl.sum(tl.where(this, local[None, :] + 1, 0), axis=1) - 1  # -1 past the last
            for j in tl.static_range(ROWS):
                owner = tl.max(tl.where(lane == j, owners, -1), axis=0)
                row = start + tl.max(tl.where(lane == j, rows, 0), axis=0)
                real = (col < D) & (col * 0 + owner >= 0)
                value = tl.load(z + row * z_n + col.to(tl.int64) * z_d, mask=real, other=0.0)
                mine = code == owner  # [BLOCK_K]
                # a select and not a product: 0 · NaN would reach the other codes
                acc = tl.where(mine[:, None], acc + value.to(tl.float64)[None, :], acc)
                count += mine.to(tl.int64)
    k = first + code
    if tl.program_id(1) == 0:
        tl.store(counts + k, count, mask=k < K)
    mask = (k < K)[:, None] & (col < D)[None, :]
    tl.store(sums + k[:, None] * D + col[None, :], acc.to(sums.dtype.element_ty), mask=mask)


def unsupported_code_stats(indices: Tensor, z: Tensor, K: int) -> str | None:
    """Why these inputs cannot run: not int64 and floating point, or strided indices."""
    if z.dtype not in (*FLOATS, torch.float64) or indices.dtype != torch.int64:
        return f"indices are {indices.dtype}, z is {z.dtype}"
    if triton.cdiv(z.shape[1], 64) > 65535:  # second axis of the grid
        return f"D = {z.shape[1]} is too large"
    return not_contiguous(indices=indices)


def code_stats(indices: Tensor, z: Tensor, K: int, counts: Tensor, sums: Tensor) -> None:
    """Writes counts [K] int64 and sums [K, D] from indices [N] int64 and z [N, D]."""
    N, D = z.shape
    if K * D == 0:
        counts.zero_()
        return
    block_d = power_of_2(D, 1, 64)
    block_k = power_of_2(K, 1, _CELLS // block_d)
    with on_device(z):
        _stats[(triton.cdiv(K, block_k), triton.cdiv(D, block_d))](
            indices, z, counts, sums, z.stride(0), z.stride(1), N, K, D,
            CHUNK=_CHUNK, ROWS=4, BLOCK_K=block_k, BLOCK_D=block_d,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
