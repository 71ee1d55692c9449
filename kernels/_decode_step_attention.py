"""Attention of the rows of a step over their sequences' key-value cache, split over slots.

Computes: out[r, h] = Σ_{s <= position} softmax_s(⟨q[r, h], k[slot, h, s]⟩ / √d) v[slot, h, s].
Shape of the code: one program per (row, head, SPLIT slots); those past the row's position end at
    once. The positions are on the device, so the grid is that of a full cache. A row with more than
    one split writes each split's sum, maximum and total, and the program that finds itself the
    last, by an integer counter, merges them in the order of the slots and sets the counter back.
Numerics: float32. Every sum has one order, fixed by the position and d: bits of a row do not depend
    on the rows beside it, nor on which program comes last.
"""

import triton
import triton.language as tl


@triton.jit
def _split(k, v, base, query, col, first, length, DIM: tl.constexpr, D: tl.constexpr,
           SPLIT: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Unnormalised mean [D] of the values of slots first .. first + SPLIT, maximum, total."""
    lane = tl.arange(0, SLOTS)
    real = col < DIM
    high = tl.full([SLOTS], float("-inf"), tl.float32)  # per lane, over the blocks
    total = tl.zeros([SLOTS], tl.float32)
    acc = tl.zeros([SLOTS, D], tl.float32)
    for start in tl.range(first, tl.minimum(first + SPLIT, length), SLOTS, num_stages=STAGES):
        slot = start + lane
        written = slot < length
        at = base + slot.to(tl.int64)[:, None] * DIM + col[None, :]
        mask = written[:, None] & real[None, :]
        key = tl.load(k + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(written, tl.sum(query[None, :] * key, axis=1), float("-inf"))
        new = tl.maximum(high, score)
        # a lane that has seen no slot: 2^-inf is a weight of nothing
        level = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(high - level)
        weight = tl.exp2(score - level)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value
        high = new
    best = tl.max(high, axis=0)
    share = tl.exp2(high - tl.where(best == float("-inf"), 0.0, best))
    return tl.sum(acc * share[:, None], axis=0), best, tl.sum(total * share, axis=0)


@triton.jit
def decode_step_attention(
    q, k, v, slots, positions, out, sums, levels, arrived, q_stride, out_stride, H, S, splits,
    scale_log2,
    DIM: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, SLOTS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r, h·DIM + j]; sums [R, H, splits, D], levels [R, H, 2, splits] and arrived [R, H], zero
    before and after, are scratch."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first = split * SPLIT
    length = (tl.load(positions + row) + 1).to(tl.int32)
    if first < length:
        col = tl.arange(0, D)
        real = col < DIM
        query = tl.load(q + row * q_stride + head * DIM + col, mask=real, other=0.0) * scale_log2
        base = ((tl.load(slots + row) * H + head) * S) * DIM
        acc, best, total = _split(
            k, v, base, query, col, first, length, DIM, D, SPLIT, SLOTS, STAGES
        )
        pair = row * H + head
        goal = out + row * out_stride + head * DIM + col
        n = (length + SPLIT - 1) // SPLIT
        if n == 1:
            tl.store(goal, tl.math.div_rn(acc, total).to(out.dtype.element_ty), mask=real)
        else:
            tl.store(sums + (pair * splits + split) * D + col, acc)
            tl.store(levels + pair * 2 * splits + split, best)
            tl.store(levels + (pair * 2 + 1) * splits + split, total)
            tl.debug_barrier()  # the sums of all threads come before the one that counts
            if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == n - 1:
                merged = tl.zeros([D], tl.float32)
                level, weight = -float("inf"), 0.0
                for s in range(n):
                    best = tl.load(levels + pair * 2 * splits + s, cache_modifier=".cg")
                    total = tl.load(levels + (pair * 2 + 1) * splits + s, cache_modifier=".cg")
                    acc = tl.load(sums + (pair * splits + s) * D + col, cache_modifier=".cg")
                    new = tl.maximum(level, best)
                    floor = tl.where(new == float("-inf"), 0.0, new)
                    shrink, share = tl.exp2(level - floor), tl.exp2(best - floor)
                    merged = merged * shrink + acc * share
                    weight = weight * shrink + total * share
                    level = new
                tl.store(goal, tl.math.div_rn(merged, weight).to(out.dtype.element_ty), mask=real)
                tl.store(arrived + pair, 0)
