"""Attention of every position to all, one wide head, forward.

Computes: out_i = Σ_j w_ij v_j,  w_ij = exp(scale ⟨q_i, k_j⟩ − lse_i),
          lse_i = log Σ_j exp(scale ⟨q_i, k_j⟩).
Contract: q, k, v [B, H, T, d], last dim contiguous, float16 or bfloat16, d <= 512; out contiguous.
    A row whose scores are all -inf gives zeros and lse = +inf.
Numerics: float32 scores, softmax and sums; the weights are rounded to the input dtype before they
    meet v. Scale and log2(e) enter in the multiply-add of each exponent. One order of sums.
Shape of the code: one block of rows walks all keys. At d = 512 the block's sums are 64 x 512
    float32, 128 KiB, half of the registers of an SM: 128 a thread of 8 warps. 128 rows would be all
    of them. Queries, one tile of keys and one of values stand in shared memory, 64 KiB each at 64
    keys; 32 keys leave room for the next tile on its way.
    So a tile of 64 keys is 128 KiB from L2 for 64 · 64 · 1024 products: 2,048 cycles of the tensor
    cores of Hopper, and at 24 to 32 bytes a cycle and SM twice that for L2. The ceiling of one
    block an SM is near half of the peak; more needs two SMs that share a tile, which Triton cannot
    say. Backward holds dq or dk and dv of that width beside two products: it is left to torch.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import hopper, on_device, power_of_2

_LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows_of(x, start, ROWS: tl.constexpr, row_stride, T, D, COLS: tl.constexpr):
    """[ROWS, COLS] of x from row `start`; rows >= T and cols >= D are zero."""
    row, col = start + tl.arange(0, ROWS), tl.arange(0, COLS)
    at = x + row.to(tl.int64)[:, None] * row_stride + col[None, :]
    return tl.load(at, mask=(row < T)[:, None] & (col < D)[None, :], other=0.0)


@triton.jit
def _forward(
    q, k, v, out, lse,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    H, T, D, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0), tl.program_id(1) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    query = _rows_of(q + b * q_b + h * q_h, first, BLOCK_M, q_t, T, D, BLOCK_D)
    if SIGN != 1:
        query = (query * SIGN).to(query.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, T, BLOCK_N):
        key = _rows_of(k, start, BLOCK_N, k_t, T, D, BLOCK_D)
        score = tl.dot(query, tl.trans(key))  # [M, N]
        there = start + tl.arange(0, BLOCK_N) < T
        score = tl.where(there[None, :], score, float("-inf"))
        new = tl.maximum(high, tl.max(score, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new * scale_log2)
        weight = tl.exp2(score * scale_log2 - base[:, None])
        shrink = tl.exp2(high * scale_log2 - base)
        total = total * shrink + tl.sum(weight, axis=1)
        high = new
        value = _rows_of(v, start, BLOCK_N, v_t, T, D, BLOCK_D)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])
    empty = total == 0.0
    mean = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]
    row, col = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = (head.to(tl.int64) * T + row)[:, None] * D + col[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=(row < T)[:, None] & (col < D)[None, :])
    log_sum = tl.where(empty, float("inf"), (high * scale_log2 + tl.log2(total)) * LN2)
    tl.store(lse + head.to(tl.int64) * T + row, log_sum, mask=row < T)


# widest d: block of rows, block of keys, warps, stages, on Hopper and elsewhere
_TILES = {
    True: {128: (128, 64, 8, 2), 256: (64, 64, 8, 2), 512: (64, 32, 8, 2)},
    False: {128: (64, 32, 4, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
}


def unsupported_full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why these inputs cannot run: dtype, d above 512, T above 2^20, a last dim with gaps."""
    if q.element_size() != 2:
        return f"q is {str(q.dtype).removeprefix('torch.')}, not of half precision"
    if q.shape[3] > 512:
        return f"head dim {q.shape[3]} is above 512"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.shape[3] > 1 and t.stride(3) != 1:  # 512 addresses a row spill
            return f"{name} has strides {t.stride()}, its last dim is not contiguous"
    return f"{q.shape[2]} tokens are above {2**20}" if q.shape[2] > 2**20 else None


def full_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Writes out [B, H, T, d], contiguous, and lse [B, H, T] float32; rows of q, k, v anywhere."""
    B, H, T, d = q.shape
    if q.numel() == 0:
        return
    block_d = power_of_2(d, 16, 512)
    rows, keys, warps, stages = _TILES[hopper(q)][max(128, block_d)]
    scale_log2 = abs(scale) * _LOG2E if scale else 1.0
    with on_device(q):
        _forward[(B * H, triton.cdiv(T, rows))](
            q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            H, T, d, scale_log2,
            BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=block_d, SIGN=(scale > 0) - (scale < 0),
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
