"""The exact end of the nearest-code search: float64 scores of the codes that the screen left, and
what a row is replaced by.

Computes: the code of the least float64 score of each row, out of the groups in the screen's records
    or out of all codes where these hold no certificate. Then, for `nearest_quantize`, z_q, the sums
    of squares and the histogram (kernels/_lookup.py).
Numerics: direct differences in float64, in index order, without fused multiply-add; of equal scores
    the lowest code. Counts are integers, so the order of their atomic additions does not matter.
Shape of the code: `rescore` owns 8 rows a program, so that a row and its code are still in the
    first-level cache when they are looked up. `score_all` finds the rows that it left, scores them
    one after another and looks their part of 8 rows up again. (As one kernel they take 104
    registers at D 256 on sm_90, where `rescore` alone takes 48, and 72 with the lookup.)
"""

import triton
import triton.language as tl
from vqfast.kernels._lookup import replace
from vqfast.kernels._nearest_screen import NO_GROUP, NO_GROUPS, SLOW_ROW


@triton.jit
def _norm64(x, base, D, mask):
    """max(|x|, 1e-12), summed in index order."""
    total = tl.zeros(base.shape, tl.float64)
    for d in range(0, D):
        value = tl.load(x + base + d, mask=mask, other=0.0).to(tl.float64)
        total += value * value
    # a plain 1e-12 would become float32 first
    return tl.maximum(tl.sqrt(total), tl.full([], 1e-12, tl.float64))


@triton.jit
def _scores(z, codebook, z_base, c_base, z_norm, mask, D, METRIC: tl.constexpr, STEP: tl.constexpr):
    """(float64 score [R, G], code is finite) of rows z_base [R, 1] and codes c_base [R, G]."""
    total = tl.zeros(c_base.shape, tl.float64)
    finite = mask
    if METRIC == 1:
        c_norm = _norm64(codebook, c_base, D, mask)
    for start in range(0, D, STEP):
        for j in tl.static_range(STEP):
            d = start + j
            a = tl.load(z + z_base + d, mask=z_base * 0 + d < D, other=0.0).to(tl.float64)
            b = tl.load(codebook + c_base + d, mask=mask & (c_base * 0 + d < D), other=0.0).to(
                tl.float64
            )
            finite = finite & (tl.abs(b) < float("inf"))
            if METRIC == 1:
                a = a / z_norm
                b = b / c_norm
            if METRIC == 2:
                total += a * b
            else:
                difference = a - b
                total += difference * difference
    return (-total if METRIC == 2 else total), finite


@triton.jit
def _keep_best(score, valid, k, best, best_k, K):
    """Merges pairs [R, G] into the best of each row; of equal scores the lowest code."""
    score = tl.where(valid, score, float("inf"))
    least = tl.min(score, axis=1)
    at = tl.min(tl.where(valid & (score == least[:, None]), k, K), axis=1)
    # best_k is K until a code is found, whatever its score
    wins = (at < K) & ((least < best) | ((least == best) & (at < best_k)) | (best_k == K))
    return tl.where(wins, least, best), tl.where(wins, at, best_k)


@triton.jit
def _best_of_all(
    z, codebook, z_base, K, D, METRIC: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr
):
    """(least float64 score, its code) of the row at z_base over all codes, [1] each; code K for a
    row that is not finite."""
    bad = 0
    for d in range(0, D):
        size = tl.abs(tl.load(z + z_base + d).to(tl.float32))
        bad += tl.where(size < float("inf"), 0, 1)
    base = tl.zeros([1, 1], tl.int64) + z_base
    norm = tl.full([1, 1], 1.0, tl.float64)
    if METRIC == 1:
        norm = _norm64(z, base, D, base >= 0)
    best, best_k = tl.full([1], float("inf"), tl.float64), tl.zeros([1], tl.int64) + K
    for start in range(0, tl.where(bad == 0, K, 0), WIDE):
        k = (start + tl.arange(0, WIDE)).to(tl.int64)[None, :]
        score, valid = _scores(z, codebook, base, k * D, norm, k < K, D, METRIC, STEP)
        best, best_k = _keep_best(score, valid, k, best, best_k, K)
    return best, best_k


@triton.jit
def rescore(
    z, codebook, groups, bounds, indices, distances, x, codes, z_q, parts, counts,
    N, K, D, SPLITS,
    METRIC: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best code of the groups that the screen left, or SLOW_ROW. BLOCK_D: columns of x and
    codes at a time; 0 leaves the lookup out."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < N
    z_base = tl.where(real, row, 0)[:, None] * D  # [ROWS, 1]
    z_norm = tl.full([ROWS, 1], 1.0, tl.float64)
    if METRIC == 1:
        z_norm = _norm64(z, z_base, D, z_base >= 0)
    limit = tl.full([ROWS], float("inf"), tl.float32)
    for split in range(0, SPLITS):
        place = (tl.cast(split, tl.int64) * N + row) * 2 + 1
        limit = tl.minimum(limit, tl.load(bounds + place, mask=real, other=float("inf")))
    slow = row < 0
    best = tl.full([ROWS], float("inf"), tl.float64)
    best_k = tl.zeros([ROWS], tl.int64) + K
    for split in range(0, SPLITS):
        place = tl.cast(split, tl.int64) * N + row
        near = real & (tl.load(bounds + place * 2, mask=real, other=float("inf")) <= limit)
        packed = tl.load(groups + place, mask=real, other=NO_GROUPS)
        slow = slow | (near & (packed == SLOW_ROW))
        for j in range(0, 3):
            group = (packed >> (21 * j)) & NO_GROUP  # [ROWS]
            live = near & (packed != SLOW_ROW) & (group != NO_GROUP)
            if tl.max(live.to(tl.int32), axis=0) > 0:
                k = (group * GROUP)[:, None] + tl.arange(0, GROUP).to(tl.int64)[None, :]
                mask = live[:, None] & (k < K)
                score, valid = _scores(z, codebook, z_base, k * D, z_norm, mask, D, METRIC, STEP)
                best, best_k = _keep_best(score, valid, k, best, best_k, K)
    found = best_k < K
    best_k = tl.where(slow, SLOW_ROW, tl.where(found, best_k, 0))
    tl.store(indices + row, best_k, mask=real)
    tl.store(distances + row, tl.where(found, best, float("nan")).to(tl.float32), mask=real)
    if BLOCK_D:
        total = replace(x, codes, z_q, row, best_k, N, K, D, ROWS, BLOCK_D)
        tl.store(parts + tl.program_id(0), total)
        tl.atomic_add(counts + best_k, 1, mask=real & (best_k >= 0), sem="relaxed")


@triton.jit
def score_all(
    z, codebook, indices, distances, x, codes, z_q, parts, counts, N, K, D,
    METRIC: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr,
    STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows that `rescore` left, one after another, against all codes."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    looked_at = begin + tl.arange(0, ROWS)
    left = tl.load(indices + looked_at, mask=looked_at < N, other=0)
    if tl.min(left, axis=0) < 0:
        for first in range(begin, tl.minimum(N, begin + ROWS), PART):
            lane = tl.arange(0, PART)
            row = first + lane
            code = tl.load(indices + row, mask=row < N, other=0)  # [PART]
            slow = code < 0
            if tl.max(slow.to(tl.int32), axis=0) > 0:
                for j in range(0, PART):
                    mine = lane == j
                    if tl.max((mine & slow).to(tl.int32), axis=0) > 0:
                        best, k = _best_of_all(
                            z, codebook, (first + j) * D, K, D, METRIC, WIDE, STEP
                        )
                        found = k < K
                        k = tl.where(found, k, 0)
                        code = tl.where(mine, k, code)
                        place = first + j + tl.arange(0, 1)
                        best = tl.where(found, best, float("nan")).to(tl.float32)
                        tl.store(indices + place, k)
                        tl.store(distances + place, best)
                if BLOCK_D:
                    total = replace(x, codes, z_q, row, code, N, K, D, PART, BLOCK_D)
                    tl.store(parts + first // PART, total)
                    tl.atomic_add(counts + code, 1, mask=slow, sem="relaxed")
