"""Attention of one new token per sequence to the slots of a KV cache that are written.

Computes: out_bh = Σ_{s<length} softmax_s(⟨q_bh, k_bhs⟩ / √d) v_bhs.
Contract: q [B, H, d], caches [B, H, S, d], any strides; slots >= length are never read, so they may
    hold NaN.
Numerics: float32 scores and sums. The order of every sum depends on `length` and d alone, never on
    B or on the place in the batch: the result of a row is equal, bit for bit, in any batch.
Shape of the code: one program per (sequence, head) walks the slots in blocks and reads each cache
    value once, as length · d · 2 values are all there is to move. Every lane of a block keeps its
    own running maximum and sum, merged once at the end: the loop has no reduction over slots. At
    the 256 to 1024 slots of a VQGAN transformer, B · H programs fill a GPU from B = 8 on; a split
    over slots would need scratch memory and a second launch.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_floats, on_device, power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _decode(
    q, k, v, out,
    q_b, q_h, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    H, length, d, scale_log2,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    col = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, BLOCK_S)
    real = col < d
    query = tl.load(q + b * q_b + h * q_h + col * q_d, mask=real, other=0.0).to(tl.float32)
    query *= scale_log2  # [BLOCK_D]
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    high = tl.full([BLOCK_S], float("-inf"), tl.float32)  # per lane, over the blocks
    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_S):
        at = (start + slot).to(tl.int64)  # [BLOCK_S]
        written = at < length
        mask = written[:, None] & real[None, :]
        key = tl.load(k + at[:, None] * k_s + col[None, :] * k_d, mask=mask, other=0.0)
        value = tl.load(v + at[:, None] * v_s + col[None, :] * v_d, mask=mask, other=0.0)
        score = tl.sum(query[None, :] * key.to(tl.float32), axis=1)  # [BLOCK_S], base 2
        score = tl.where(written, score, float("-inf"))
        new = tl.maximum(high, score)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(high - base)
        weight = tl.exp2(score - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)
        high = new
    best = tl.max(high, axis=0)
    share = tl.exp2(high - tl.where(best == float("-inf"), 0.0, best))  # [BLOCK_S]
    total = tl.sum(total * share, axis=0)
    mean = tl.sum(acc * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + pid * d + col, mean.to(out.dtype.element_ty), mask=real)


def unsupported_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int
) -> str | None:
    """Why these inputs cannot run: a dtype other than float32, float16 or bfloat16, or d > 256."""
    if q.shape[-1] > 256:
        return f"head dim {q.shape[-1]} is above 256"
    return not_floats(q=q, k_cache=k_cache, v_cache=v_cache)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, out: Tensor) -> None:
    """Writes out [B, H, d], contiguous, from q and the first `length` slots of the caches."""
    B, H, d = q.shape
    if B * H == 0:
        return
    block_d = power_of_2(d, 16, 256)
    with on_device(q):
        _decode[(B * H,)](
            q, k_cache, v_cache, out,
            *q.stride(), *k_cache.stride(), *v_cache.stride(),
            H, length, d, LOG2E.value / math.sqrt(d),
            BLOCK_S=min(8192 // block_d, 16 if block_d == 256 else 128), BLOCK_D=block_d,
            num_warps=8, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
