"""Exact nearest code: a screen on the tensor cores with a proved bound, then float64 on what the
bound leaves.

Computes: idx_n = argmin_k score(z_n, c_k), and that score, as vqfast/ops/nearest.py defines it (l2,
    cosine, dot).
Contract: z [N, D], codebook [K, D], contiguous, D <= 4000. Lowest index on ties of the float64
    score; a row that is not finite gives 0 and NaN; a code that is not finite never wins.
Numerics: S_k = |c_k|²/2 − ⟨z, c_k⟩ orders the codes as the l2 score does. Both sides are scaled by
    powers of two (z per block of rows, codes one by one) into float16, multiplied, and summed in
    float32. With Z the largest norm of the block, |computed S_k − S_k| <= E_k = α Z |c_k| + γ
    (|c_k|²/2 + Z²), where α is the rounding to float16 (2^-11 a side) plus the truncating sums of
    the tensor core, (D + 16) 2^-21, and γ = (D + 16) 2^-22 is float32. E_k depends on the column
    alone, so it is taken off at no cost: the screen orders lower bounds L_k. A code can win only if
    L_k <= L_best + 2 E_best; E_best needs |c_best|, for which S_best itself gives a bound. What
    survives is scored in float64: direct differences, in index order, without fused multiply-add.
    Rows without a certificate (values too large or small for the screen, more than three groups of
    survivors, zero codes under cosine) are scored against all codes. D <= 10 in float32 splits each
    value into two float16 and multiplies hi·hi + hi·lo + lo·hi, as columns of one product.
Shape of the code: the screen keeps z in shared memory and walks the codes. A thread holds whole
    groups of BLOCK_K / 8 codes of a row, so the minimum of a group needs no shuffle. For l2 and
    cosine a constant makes L_k positive, whose bits compare as integers: a three-input minimum on
    Hopper. Each of 8 slots a row keeps the least two groups and a third value that only certifies.
    Up to three groups pass to the second kernel in the 64 bits of the row's index. No scratch
    memory: the codes are packed again by every program, about D / BLOCK_M · 4 instructions a pair.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import hopper, not_contiguous, not_floats, on_device, power_of_2

_COSINE = 1
_MAX_D = 4000  # keeps α below 2^-8 and γ below 2^-10, which the bound on |c_best| uses

TINY = tl.constexpr(2.0**-54)  # norms are safe from squares that underflow
NO_GROUP = tl.constexpr(0x1FFFFF)  # 21 bits a group
SLOW_ROW = tl.constexpr(-1)
BAD_ROW = tl.constexpr(-2)


@triton.jit
def _power(x):
    """The power of two p with 2^12 <= p x < 2^13, for x in 2^-54 .. 2^50."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    return ((266 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _half(x, scale, part, LOW: tl.constexpr, SPLIT: tl.constexpr):
    """x * scale in float16; with SPLIT, columns of part LOW hold what rounding lost."""
    scaled = x * scale
    high = scaled.to(tl.float16)
    if SPLIT:
        low = (scaled - high.to(tl.float32)).to(tl.float16)
        high = tl.where(part[None, :] == LOW, low, high)
    return high


@triton.jit
def _rows(x, start, ROWS: tl.constexpr, count, col, width, D):
    """[ROWS, cols] in float32 from row `start`; zero outside. Offsets inside a block are int32."""
    row = tl.arange(0, ROWS)
    mask = (start + row < count)[:, None] & (width < D)[None, :]
    x += tl.cast(start, tl.int64) * D
    return tl.load(x + row[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _square_sum(x, start, ROWS: tl.constexpr, count, D, DP: tl.constexpr):
    """[ROWS] sums of squares over all columns, DP at a time."""
    total = tl.zeros([ROWS], tl.float32)
    for at in range(0, D, DP):
        col = at + tl.arange(0, DP)
        value = _rows(x, start, ROWS, count, col, col, D)
        total += tl.sum(value * value, axis=1)
    return total


@triton.jit
def _column_terms(norm2, inside, Z, C, alpha, gamma, METRIC: tl.constexpr):
    """(lower bound without the product, norm, usable, unsafe) of each code of a tile."""
    usable = inside & (norm2 <= 1.2676506002282294e30)  # 2^100; false for NaN
    norm = tl.sqrt(tl.where(usable, norm2, 0.0)) * (1.0 + gamma) + TINY
    if METRIC == 0:
        # beyond 2^100 a code is farther than any that a sane row may take
        unsafe = inside & (norm2 != norm2) & (norm2 == norm2)
        lower = 0.5 * norm2 * (1.0 - gamma) + C - gamma * Z * Z - alpha * Z * norm - 7.9e-31
    elif METRIC == 1:
        unsafe = inside & ((norm2 < 1e-20) | (norm2 > 1.2676506002282294e30))
        lower = tl.zeros_like(norm2) + (C - alpha * Z)
    else:
        unsafe = inside & (norm2 > 1.2676506002282294e30)
        lower = -alpha * Z * norm - 7.9e-31
    return tl.where(usable, lower, float("inf")), norm, usable, unsafe


@triton.jit
def _insert(least, tile, first, first_at, second, second_at, third):
    """Sorts the group minima of a tile into the best three of each slot."""
    wins, follows = least < first, least < second
    third = tl.minimum(third, tl.maximum(second, least))
    second_at = tl.where(wins, first_at, tl.where(follows, tile, second_at))
    second = tl.minimum(second, tl.maximum(first, least))
    first_at = tl.where(wins, tile, first_at)
    first = tl.minimum(first, least)
    return first, first_at, second, second_at, third


@triton.jit
def _next_group(first_in, first_id, second_in, second_id, after):
    """The least group id above `after` among those that are in, [rows]; NO_GROUP if none."""
    a = tl.where(first_in & (first_id > after[:, None]), first_id, NO_GROUP)
    b = tl.where(second_in & (second_id > after[:, None]), second_id, NO_GROUP)
    return tl.min(tl.minimum(a, b), axis=1)


@triton.jit
def _screen(
    z, codebook, packed, N, K, D, alpha, gamma,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * BLOCK_M
    lane = tl.arange(0, DP)
    part = lane // D if SPLIT else lane * 0
    col = lane - part * D if SPLIT else lane
    width = tl.where(part < 3, col, D) if SPLIT else col  # columns past the third part are zero

    # norms of the rows, and the scale of the block
    norm2 = _square_sum(z, begin, BLOCK_M, N, D, 16 if SPLIT else min(DP, 64))
    floor: tl.constexpr = 1e-20 if METRIC == 1 else 0.0
    sane = (norm2 >= floor) & (norm2 <= 1.2089258196146292e24)  # 2^80; false for NaN
    Z = tl.sqrt(tl.max(tl.where(sane, norm2, 0.0), axis=0)) * (1.0 + gamma) + TINY
    z_scale = _power(Z)
    C = 0.525 * Z * Z if METRIC == 0 else (1.05 * Z if METRIC == 1 else 0.0)
    if RESIDENT:
        value = tl.where(sane[:, None], _rows(z, begin, BLOCK_M, N, col, width, D), 0.0)
        z_half = _half(value, z_scale, part, 2, SPLIT)

    integer: tl.constexpr = METRIC != 2
    slots = tl.zeros([BLOCK_M, 8], tl.int32)
    # infinity, or its bits
    first = slots + 0x7F800000 if integer else slots.to(tl.float32) + float("inf")
    second, third = first, first
    first_at, second_at = slots, slots
    longest = TINY * 1.0
    unsafe_codes = 0
    for tile in range(0, tl.cdiv(K, BLOCK_K)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = k < K
        if RESIDENT:
            code = _rows(codebook, tile * BLOCK_K, BLOCK_K, K, col, width, D)
            counted = tl.where(part[None, :] == 0, code * code, 0.0) if SPLIT else code * code
            code_norm2 = tl.sum(counted, axis=1)
        else:
            code_norm2 = _square_sum(codebook, tile * BLOCK_K, BLOCK_K, K, D, DP)
        lower, norm, usable, unsafe = _column_terms(code_norm2, inside, Z, C, alpha, gamma, METRIC)
        longest = tl.maximum(longest, tl.max(tl.where(usable, norm, 0.0), axis=0))
        unsafe_codes += tl.max(unsafe.to(tl.int32), axis=0)
        c_scale = _power(norm)
        if RESIDENT:
            clean = tl.where(usable[:, None], code, 0.0)
            c_half = _half(clean, c_scale[:, None], part, 1, SPLIT)
            product = tl.dot(z_half, tl.trans(c_half))
        else:
            product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for start in range(0, D, DP):
                at = start + lane
                value = _rows(z, begin, BLOCK_M, N, at, at, D)
                value = tl.where(sane[:, None], value, 0.0)
                code = _rows(codebook, tile * BLOCK_K, BLOCK_K, K, at, at, D)
                code = tl.where(usable[:, None], code, 0.0)
                c_half = _half(code, c_scale[:, None], part, 1, False)
                product = tl.dot(_half(value, z_scale, part, 2, False), tl.trans(c_half), product)
        factor = 1.0 / (z_scale * c_scale)
        if METRIC == 1:
            factor = factor / norm
        bound = lower[None, :] - product * factor[None, :]  # [BLOCK_M, BLOCK_K]
        if integer:
            bound = bound.to(tl.int32, bitcast=True)
        least = tl.min(tl.reshape(bound, [BLOCK_M, BLOCK_K // 8, 8]), axis=1)
        first, first_at, second, second_at, third = _insert(
            least, tile, first, first_at, second, second_at, third
        )

    if integer:
        first = first.to(tl.float32, bitcast=True)
        second = second.to(tl.float32, bitcast=True)
        third = third.to(tl.float32, bitcast=True)
    best = tl.min(first, axis=1)  # [BLOCK_M]
    if METRIC == 0:
        own = tl.sqrt(tl.where(sane, norm2, 0.0))
        reach = own + tl.sqrt(own * own + 2.0 * tl.maximum(best - C, 0.0))
        reach = tl.minimum(longest, 1.13 * reach + 0.13 * Z)
        slack = alpha * Z * reach + gamma * (0.5 * reach * reach + Z * Z) + 7.9e-31
    elif METRIC == 1:
        slack = alpha * Z + 0.0 * best
    else:
        slack = alpha * Z * longest + 7.9e-31 + 0.0 * best
    limit = (best + 2.0 * slack) + 2e-7 * tl.abs(best)  # and the rounding of this sum
    first_in, second_in = first <= limit[:, None], second <= limit[:, None]
    slot = tl.arange(0, 8)[None, :]
    first_id, second_id = first_at * 8 + slot, second_at * 8 + slot
    none = tl.zeros([BLOCK_M], tl.int32) - 1
    g0 = _next_group(first_in, first_id, second_in, second_id, none)
    g1 = _next_group(first_in, first_id, second_in, second_id, g0)
    g2 = _next_group(first_in, first_id, second_in, second_id, g1)
    g3 = _next_group(first_in, first_id, second_in, second_id, g2)
    certain = sane & (tl.min(third, axis=1) > limit) & (g3 == NO_GROUP) & (tl.abs(limit) < 1e27)
    certain = certain & (unsafe_codes == 0)
    groups = g0.to(tl.int64) | (g1.to(tl.int64) << 21) | (g2.to(tl.int64) << 42)
    row = begin.to(tl.int64) + tl.arange(0, BLOCK_M)
    tl.store(packed + row, tl.where(certain, groups, SLOW_ROW), mask=row < N)


@triton.jit
def _norm64(x, base, D, mask):
    """max(|x|, 1e-12), summed in index order."""
    total = tl.zeros(base.shape, tl.float64)
    for d in range(0, D):
        value = tl.load(x + base + d, mask=mask, other=0.0).to(tl.float64)
        total += value * value
    return tl.maximum(tl.sqrt(total), 1e-12)


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
def _rescore(
    z, codebook, indices, distances, N, K, D,
    METRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < N
    packed = tl.load(indices + row, mask=real, other=0)
    z_base = tl.where(real, row, 0)[:, None] * D  # [ROWS, 1]
    finite_row = real
    for d in range(0, D):
        finite_row = finite_row & (
            tl.abs(tl.load(z + row * D + d, mask=real, other=0.0).to(tl.float32)) < float("inf")
        )
    z_norm = tl.full([ROWS, 1], 1.0, tl.float64)
    if METRIC == 1:
        z_norm = _norm64(z, z_base, D, z_base >= 0)
    slow = finite_row & (packed == SLOW_ROW)
    best = tl.full([ROWS], float("inf"), tl.float64)
    best_k = tl.zeros([ROWS], tl.int64) + K
    for j in tl.static_range(3):
        group = (packed >> (21 * j)) & NO_GROUP  # [ROWS]
        live = finite_row & (packed != SLOW_ROW) & (group != NO_GROUP)
        if tl.max(live.to(tl.int32), axis=0) > 0:
            member = tl.arange(0, BLOCK_K // 8).to(tl.int64)[None, :] * 8
            k = (group // 8 * BLOCK_K + group % 8)[:, None] + member
            mask = live[:, None] & (k < K)
            score, valid = _scores(z, codebook, z_base, k * D, z_norm, mask, D, METRIC, STEP)
            best, best_k = _keep_best(score, valid, k, best, best_k, K)
    if tl.max(slow.to(tl.int32), axis=0) > 0:
        for start in range(0, K, WIDE):
            k = (start + tl.arange(0, WIDE)).to(tl.int64)[None, :] + tl.zeros([ROWS, 1], tl.int64)
            mask = slow[:, None] & (k < K)
            score, valid = _scores(z, codebook, z_base, k * D, z_norm, mask, D, METRIC, STEP)
            best, best_k = _keep_best(score, valid, k, best, best_k, K)
    found = finite_row & (best_k < K)
    tl.store(indices + row, tl.where(found, best_k, 0), mask=real)
    distance = tl.where(found, best, float("nan")).to(tl.float32)
    tl.store(distances + row, distance, mask=real)


def _plan(z: Tensor, codebook: Tensor, metric: int) -> tuple[dict, float, float]:
    """Constants of the screen, and α and γ of its bound."""
    N, D = z.shape
    split = D <= 10 and torch.float32 in (z.dtype, codebook.dtype)
    columns = 3 * D if split else D
    width = power_of_2(columns, 16, 256)
    resident = columns <= width
    rounded = sum(t.dtype == torch.float32 for t in (z, codebook))
    relative = 3.1 * 2.0**-22 if split else 1.01 * rounded * 2.0**-11
    alpha = relative + (columns + 16) * 2.0**-21 + 2.0**-28
    small = N <= 128 * 64  # too few blocks of 128 rows for a large GPU
    narrow = hopper(z) and width <= 128  # tiles of 128 codes fit the registers
    plan = {
        "METRIC": metric,
        "SPLIT": split,
        "RESIDENT": resident,
        "BLOCK_M": 128 if resident and hopper(z) and not small else 64,
        "BLOCK_K": 128 if resident and narrow else 64 if resident and width < 256 else 32,
        "DP": width if resident else 64,
        "num_warps": 4 if small and narrow else 8,
        "num_stages": 2 if resident and width < 256 else 1,
        "enable_fp_fusion": True,
    }
    return plan, alpha, (D + 16) * 2.0**-22


def unsupported_nearest(z: Tensor, codebook: Tensor, metric: int) -> str | None:
    """Why these inputs cannot run: dtypes, strides, D above 4000, or K of 2^23 and more."""
    if z.shape[1] > _MAX_D:
        return f"D = {z.shape[1]} is above {_MAX_D}"
    if codebook.shape[0] >= 1 << 23:  # 21 bits for a group of at least 4 codes
        return f"K = {codebook.shape[0]} is not below 2^23"
    return not_floats(z=z, codebook=codebook) or not_contiguous(z=z, codebook=codebook)


def nearest(z: Tensor, codebook: Tensor, metric: int, indices: Tensor, distances: Tensor) -> None:
    """Writes indices [N] int64 and scores [N] float32; metric 0 is l2, 1 cosine, 2 dot."""
    N, D = z.shape
    K = codebook.shape[0]
    if N == 0:
        return
    plan, alpha, gamma = _plan(z, codebook, metric)
    with on_device(z):
        _screen[(triton.cdiv(N, plan["BLOCK_M"]),)](
            z, codebook, indices, N, K, D, alpha, gamma, **plan
        )
        _rescore[(triton.cdiv(N, 8),)](
            z, codebook, indices, distances, N, K, D,
            METRIC=metric, ROWS=8, BLOCK_K=plan["BLOCK_K"], WIDE=32,
            STEP=1 if metric == _COSINE else 4,  # float64 divisions take the registers
            num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
