"""The screen of the nearest-code search: which groups of codes may hold the nearest one.

Computes: for each row at most three groups of BLOCK_K / 8 consecutive codes, one of which holds the
    code of the least score; or that no such certificate was found.
Numerics: S_k = |c_k|²/2 − ⟨z, c_k⟩ orders the codes as the l2 score does; the dot score leaves out
    the square; cosine is l2 of the normalised vectors. Let t and s be powers of two, t of the
    codebook, s of the row, b = t c and a = s z with norms up to 2^13, and bq, aq these values in
    float16. The screen computes
        L_k = C + u β_k − ⟨aq, bq_k⟩ − A e_k,    u = 2^10 s / t,    β = |b|² / 2^11,
    as one product of packed rows and packed codes, whose last columns hold (u, u, A, C / 2^11) and
    (β high, β low, −e, 2^11): an instruction of the tensor core adds norms and bounds too.
    With θ = (W + 16) 2^-21 for the truncated sums of W columns, A = max(|aq|, |a − aq| / δ) and
    e = (δ + 2θ) |b| + |b − bq| give |⟨a, b⟩ − ⟨aq, bq⟩| + θ |aq| |bq| <= A e. All roundings of e go
    up, those of β go down, by 2θ and more. Hence
        L − θ C <= C + s t S <= L + 2 A e + u g + θ C,    g = (4θ + 2^-20) β + 2^-22.
    A code can win only if L_k <= L_best + 2 A e + u g + 2 θ C, with the largest e and g in the
    group of the best code. C = 1.06 |a| min(|a| t / s, 2^14) / 2 keeps L positive, so that its bits
    order as integers; the low bits of a group minimum give way to its tile, which the limit allows.
    If a float32 D <= 9, a value is two float16 and the product hi·hi + lo·hi + hi·lo, side by side
    in the columns; then A >= 2^10 |lo| and e has 2^-10 |lo| more. Codes that are not finite, and
    those past K, have an infinite β; rows that are not finite, or whose scale lies too far from the
    codes', have C = NaN and no certificate. Values that float32 flushes to zero weigh less than
    2^-24 of a or b, as t and s are 2^96 at most; e has 2^-20 on top, |a − aq| that 2^-24.
Shape of the code: `measure` finds the largest component of the codes, `pack` writes both sides,
    once a call. `screen` keeps a tile of rows in shared memory and streams tiles of codes through a
    ring. Position 8 j + slot of a packed tile is its code slot · BLOCK_K / 8 + j, so a thread holds
    whole groups of a row: their minimum needs no shuffle and chains into three-input minima on
    Hopper. Each of 8 slots a row keeps its two least groups and a third value that only certifies.
    Few rows split the codes over programs, which leave a record each.
"""

import triton
import triton.language as tl

NO_GROUP = tl.constexpr(0x1FFFFF)  # 21 bits a group
NO_GROUPS = tl.constexpr((1 << 63) - 1)
SLOW_ROW = tl.constexpr(-1)
INF = tl.constexpr(0x7F800000)  # the bits of infinity


@triton.jit
def _load(x, base, real, col, D):
    """[rows, cols] in float32; zero for rows that are not real and columns of D and more."""
    mask = real[:, None] & (col < D)[None, :]
    return tl.load(x + base[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _power(peak, H: tl.constexpr):
    """The power of two p with 2^12 <= p peak 2^H < 2^13, at most 2^96."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.minimum(266 - H - exponent, 223) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row_peaks(x, base, real, D, ROWS: tl.constexpr, STEP: tl.constexpr):
    """The largest |component| of each row, [ROWS]; infinity for one that is not finite."""
    peak = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, STEP):
        size = tl.abs(_load(x, base, real, start + tl.arange(0, STEP), D))
        peak = tl.maximum(peak, tl.max(tl.where(size < float("inf"), size, float("inf")), axis=1))
    return peak


@triton.jit
def measure(codebook, peaks, K, D, PROGRAMS, ROWS: tl.constexpr, STEP: tl.constexpr):
    """peaks[program] = the largest |component| of the finite codes that the program saw."""
    largest = tl.zeros([ROWS], tl.float32)
    for start in range(tl.program_id(0) * ROWS, K, PROGRAMS * ROWS):
        row = start + tl.arange(0, ROWS)
        peak = _row_peaks(codebook, row.to(tl.int64) * D, row < K, D, ROWS, STEP)
        largest = tl.maximum(largest, tl.where(peak < float("inf"), peak, 0.0))
    tl.store(peaks + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def _pack_values(
    x, packed, base, real, at, p, D, E,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, LOW: tl.constexpr, SIGN: tl.constexpr,
    ROWS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Stores float16 of x p (normalised under cosine); -> squares of the norms of x p, of what the
    rounding lost, and of the low parts, [ROWS] each."""
    factor = tl.zeros([ROWS], tl.float32) + 1.0
    if METRIC == 1:
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, D, STEP):
            value = _load(x, base, real, start + tl.arange(0, STEP), D) * p[:, None]
            total += tl.sum(value * value, axis=1)
        factor = 4096.0 / tl.maximum(tl.sqrt(total), 1e-12 * p)
    length = tl.zeros([ROWS], tl.float32)
    lost, low = length, length
    for start in range(0, W, STEP):
        column = start + tl.arange(0, STEP)
        part = column // D if SPLIT else column * 0
        col = tl.where(part < 3, column - part * D, D)  # columns past the third part are zero
        value = _load(x, base, real, col, D) * p[:, None] * factor[:, None]
        high = value.to(tl.float16)
        kept, rest = high, value - high.to(tl.float32)
        if SPLIT:
            small = rest.to(tl.float16)
            kept = tl.where((part == LOW)[None, :], small, high)
            once = (part == 0)[None, :]
            value = tl.where(once, value, 0.0)
            rest = tl.where(once, rest - small.to(tl.float32), 0.0)
            small = tl.where(once, small.to(tl.float32), 0.0)
            low += tl.sum(small * small, axis=1)
        length += tl.sum(value * value, axis=1)
        lost += tl.sum(rest * rest, axis=1)
        mask = (column < E) | ((column >= E + 4) & (column < W))
        place = packed + at[:, None] + column[None, :]
        tl.store(place, kept * SIGN, mask=mask[None, :])
    return length, lost, low


@triton.jit
def _up(x):
    """A float16 not below x, for x in 0 .. 65000."""
    return (x * (1.0 + 2.0**-9) + 2.0**-24).to(tl.float16)


@triton.jit
def _pack_codes(
    codebook, codes, slack, first, t, K, D, E, theta, delta, kappa,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = BLOCK_K // 8
    row = first + tl.arange(0, ROWS)
    base = row.to(tl.int64) * D
    peak = _row_peaks(codebook, base, row < K, D, ROWS, STEP)
    fine = (row < K) & (peak < float("inf"))
    inside = row % BLOCK_K
    at = (row - inside + inside % GROUP * 8 + inside // GROUP).to(tl.int64) * W
    peak = tl.where(fine, peak, 0.0)
    p = _power(peak, H) if METRIC == 1 else t + 0.0 * peak
    length, lost, low = _pack_values(
        codebook, codes, base, fine, at, p, D, E, METRIC, SPLIT, 2, -1.0, ROWS, W, STEP
    )
    e = (delta + kappa + 2.0 * theta) * tl.sqrt(length) + tl.sqrt(lost)
    if SPLIT:
        e += tl.sqrt(low) * (2.0**-10)
    e = tl.where(fine, _up(e * (1.0 + 2.0**-8) + 2.0**-20), 0.0)
    beta = length * (0.0 if METRIC == 2 else 2.0**-11)
    least = beta * (1.0 - 2.0 * theta - 2.0**-21) - (0.0 if METRIC == 2 else 2.0**-24)
    high = least.to(tl.float16)
    tl.store(codes + at + E, tl.where(fine, high, float("inf")))
    low = tl.where(fine, (least - high.to(tl.float32)).to(tl.float16), 0.0)
    tl.store(codes + at + E + 1, low)
    tl.store(codes + at + E + 2, -e)
    tl.store(codes + at + E + 3, tl.full([ROWS], 2048.0, tl.float16))
    gap = tl.where(fine, (4.0 * theta + 2.0**-20) * beta + 2.0**-22, 0.0)
    group = slack + (first // GROUP + tl.arange(0, ROWS // GROUP)) * 2
    tl.store(group, tl.max(tl.reshape(e.to(tl.float32), [ROWS // GROUP, GROUP]), axis=1))
    tl.store(group + 1, tl.max(tl.reshape(gap, [ROWS // GROUP, GROUP]), axis=1))


@triton.jit
def _pack_rows(
    z, rows, first, t, N, D, E, delta,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr,
    ROWS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    base, at = row * D, row * W
    peak = _row_peaks(z, base, row < N, D, ROWS, STEP)
    fine = (row < N) & (peak < float("inf"))
    p = _power(tl.where(fine, peak, 0.0), H)
    unit = 1024.0 + 0.0 * p
    if METRIC != 1:
        p = tl.minimum(p, 32.0 * t)
        unit = 1024.0 * (p / t)
    length, lost, low = _pack_values(
        z, rows, base, fine, at, p, D, E, METRIC, SPLIT, 1, 1.0, ROWS, W, STEP
    )
    lost = tl.sqrt(lost) * (1.0 + 2.0**-11) + 2.0**-24
    norm = tl.sqrt(length) * (1.0 + 2.0**-11)
    spread = tl.maximum(norm + lost, lost / delta)
    if SPLIT:
        spread = tl.maximum(spread, tl.sqrt(low) * 1025.0)
    reach = 16384.0 + 0.0 * norm
    if METRIC != 2:
        reach = tl.minimum(reach, norm * (1024.0 / unit))
    offset = _up(0.53 * norm * reach * (2.0**-11) + 2.0**-10)
    # scales too far apart for float16, or for the certificate
    fine = fine & (unit >= 2.0**-10) & (spread < 60000.0)
    unit = tl.where(fine, unit, 0.0).to(tl.float16)
    tl.store(rows + at + E, unit)
    tl.store(rows + at + E + 1, unit)
    tl.store(rows + at + E + 2, tl.where(fine, _up(spread), 0.0))
    tl.store(rows + at + E + 3, tl.where(fine, offset, float("nan")))


@triton.jit
def pack(
    z, codebook, peaks, rows, codes, slack, counts, N, K, D, E, CODE_PROGRAMS, theta, delta, kappa,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, H: tl.constexpr, PEAKS: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT: also sets counts [K] to zero, for the kernel that decides."""
    first = tl.program_id(0) * ROWS
    t = 4096.0
    if METRIC != 1:
        t = _power(tl.max(tl.load(peaks + tl.arange(0, PEAKS)), axis=0), H)
    if tl.program_id(0) < CODE_PROGRAMS:
        if COUNT:
            code = first + tl.arange(0, ROWS)
            tl.store(counts + code, tl.zeros([ROWS], tl.int64), mask=code < K)
        _pack_codes(
            codebook, codes, slack, first, t, K, D, E, theta, delta, kappa,
            METRIC, SPLIT, H, BLOCK_K, ROWS, W, STEP,
        )  # fmt: skip
    else:
        first -= CODE_PROGRAMS * ROWS
        _pack_rows(z, rows, first, t, N, D, E, delta, METRIC, SPLIT, H, ROWS, W, STEP)


@triton.jit
def _halves(x, N: tl.constexpr):
    """[rows, 8, N] -> two of [rows, 8, N / 2], of even and odd members."""
    return tl.split(tl.reshape(x, [x.shape[0], 8, N // 2, 2]))


@triton.jit
def _chain(least, x, N: tl.constexpr):
    """Minimum of least [rows, 8] and the members of x [rows, 8, N], one after another: a tree would
    not become three-input minima."""
    if N == 2:
        a, b = tl.split(x)
        least = tl.minimum(tl.minimum(least, a), b)
    else:
        a, b = _halves(x, N)
        least = _chain(_chain(least, a, N // 2), b, N // 2)
    return least


@triton.jit
def _least(x, N: tl.constexpr):
    """Minimum over the last axis of [rows, 8, N]."""
    if N == 2:
        a, b = tl.split(x)
        least = tl.minimum(a, b)
    else:
        a, b = _halves(x, N)
        least = _chain(_least(a, N // 2), b, N // 2)
    return least


@triton.jit
def _group_minima(product, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] positive float32 -> the least of each slot as bits, [rows, 8]."""
    bits = product.to(tl.int32, bitcast=True)
    members = tl.permute(tl.reshape(bits, [bits.shape[0], BLOCK_K // 8, 8]), [0, 2, 1])
    return _least(members, BLOCK_K // 8)


@triton.jit
def _next_group(first_in, first_id, second_in, second_id, after):
    """The least group id above `after` among those that are in, [rows]; NO_GROUP if none."""
    a = tl.where(first_in & (first_id > after[:, None]), first_id, NO_GROUP)
    b = tl.where(second_in & (second_id > after[:, None]), second_id, NO_GROUP)
    return tl.min(tl.minimum(a, b), axis=1)


@triton.jit
def screen(
    rows, codes, slack, groups, bounds, N, tiles, tiles_each, keep, E, theta,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = P + Q
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * tiles_each
    code = tl.program_id(1).to(tl.int64) * tiles_each * BLOCK_K + tl.arange(0, BLOCK_K)
    z_at, c_at = rows + (row * W)[:, None], codes + (code * W)[:, None]
    if STEP == 0:
        main, tail = tl.arange(0, P)[None, :], tl.arange(0, Q if Q else 16)[None, :] + P
        z_main, c_main = tl.load(z_at + main), c_at + main
        if Q:
            z_tail, c_tail = tl.load(z_at + tail), c_at + tail
    first = tl.zeros([BLOCK_M, 8], tl.int32) + INF
    second, third = first, first
    for tile in tl.range(0, tl.minimum(tiles_each, tiles - begin), num_stages=STAGES):
        if STEP == 0:
            product = tl.dot(z_main, tl.trans(tl.load(c_main)))
            c_main += BLOCK_K * W
            if Q:
                product = tl.dot(z_tail, tl.trans(tl.load(c_tail)), product)
                c_tail += BLOCK_K * W
        else:
            product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for start in tl.range(0, W, STEP, num_stages=3):
                col = start + tl.arange(0, STEP)[None, :]
                product = tl.dot(tl.load(z_at + col), tl.trans(tl.load(c_at + col)), product)
            c_at += BLOCK_K * W
        least = (_group_minima(product, BLOCK_K) & keep) | tile
        third = tl.minimum(third, tl.maximum(second, least))
        second = tl.minimum(second, tl.maximum(first, least))
        first = tl.minimum(first, least)

    slot = tl.arange(0, 8)[None, :]
    best = tl.min(first, axis=1)  # [BLOCK_M]
    at = tl.min(tl.where(first == best[:, None], slot, 7), axis=1)
    group = (begin + (best & ~keep)) * 8 + at
    unit = tl.load(rows + row * W + E).to(tl.float32)
    spread = tl.load(rows + row * W + E + 2).to(tl.float32)
    offset = tl.load(rows + row * W + E + 3).to(tl.float32) * 2048.0
    limit = 2.0 * spread * tl.load(slack + group * 2) + unit * tl.load(slack + group * 2 + 1)
    limit += (best | ~keep).to(tl.float32, bitcast=True) + 2.0 * theta * offset
    limit *= 1.0 + 2.0**-20  # the rounding of these sums
    sane = (offset == offset) & (best >= 0)
    empty = sane & ((best & keep) >= INF)  # no finite code among these
    first_id, second_id = (
        (begin + (first & ~keep)) * 8 + slot,
        (begin + (second & ~keep)) * 8 + slot,
    )
    first_in = (first & keep).to(tl.float32, bitcast=True) <= limit[:, None]
    second_in = (second & keep).to(tl.float32, bitcast=True) <= limit[:, None]
    none = tl.zeros([BLOCK_M], tl.int32) - 1
    g0 = _next_group(first_in, first_id, second_in, second_id, none)
    g1 = _next_group(first_in, first_id, second_in, second_id, g0)
    g2 = _next_group(first_in, first_id, second_in, second_id, g1)
    g3 = _next_group(first_in, first_id, second_in, second_id, g2)
    least_third = (tl.min(third, axis=1) & keep).to(tl.float32, bitcast=True)
    certain = sane & (least_third > limit) & (g3 == NO_GROUP) & (limit < 1e30)
    packed = g0.to(tl.int64) | (g1.to(tl.int64) << 21) | (g2.to(tl.int64) << 42)
    packed = tl.where(certain, packed, tl.where(empty, NO_GROUPS, SLOW_ROW))
    value = tl.where(sane, (best & keep).to(tl.float32, bitcast=True), -float("inf"))
    limit = tl.where(sane & (limit < 1e30), limit, float("inf"))
    place = tl.program_id(1).to(tl.int64) * N + row
    tl.store(groups + place, packed, mask=row < N)
    tl.store(bounds + place * 2, value, mask=row < N)
    tl.store(bounds + place * 2 + 1, limit, mask=row < N)
