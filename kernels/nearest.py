"""Exact nearest code: a screen on the tensor cores with a proved bound, then float64 on what the
bound leaves.

Computes: idx_n = argmin_k score(z_n, c_k), and that score, as vqfast/ops/nearest.py defines it (l2,
    cosine, dot).
Contract: z [N, D], codebook [K, D], contiguous, D <= 4000, K < 2^23. Lowest index on ties of the
    float64 score; a row that is not finite gives 0 and NaN; a code that is not finite never wins.
Numerics: kernels/_nearest_screen.py proves which groups of codes may hold the answer. Their codes
    are scored in float64: direct differences, in index order, without fused multiply-add. Rows
    without a certificate (more than three groups, three in one slot, scales too far apart) are
    scored against all codes.
Shape of the code: five launches. The largest component of the codebook; both sides in float16, with
    norms and bounds as columns; the screen, over (tiles of rows, splits of the codes); the merge of
    the splits' records and the float64 scores of 8 rows a program; the rows left over, one by one.
    Scratch memory: 2 bytes a packed column of rows and codes, 16 bytes a row and split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels import _nearest_screen as screen
from vqfast.kernels._nearest_screen import NO_GROUP, NO_GROUPS, SLOW_ROW
from vqfast.kernels._tuning import (
    hopper,
    not_contiguous,
    not_floats,
    on_device,
    power_of_2,
    processors,
)

_COSINE = 1
_MAX_D = 4000  # keeps the relative terms of e below 2^-7, which the factor of C allows
_ROWS = 32  # rows or codes that a program packs: one group of codes, or two, or four
_PEAKS = 512  # programs that look for the largest component, at most
_TILES = 256  # of codes that one program screens, at most: 8 bits of a score


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
def _rescore(
    z, codebook, groups, bounds, indices, distances, N, K, D, SPLITS,
    METRIC: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The best code of the groups that the screen left, or SLOW_ROW."""
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


@triton.jit
def _score_all(
    z, codebook, indices, distances, N, K, D,
    METRIC: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The rows that `_rescore` left, one after another, against all codes."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(N, begin + ROWS)
    row = begin + tl.arange(0, ROWS)
    left = tl.load(indices + row, mask=row < N, other=0)
    if tl.min(left, axis=0) < 0:
        for at in range(begin, last):
            if tl.load(indices + at) < 0:
                bad = 0
                for d in range(0, D):
                    size = tl.abs(tl.load(z + at * D + d).to(tl.float32))
                    bad += tl.where(size < float("inf"), 0, 1)
                z_base = tl.zeros([1, 1], tl.int64) + at * D
                z_norm = tl.full([1, 1], 1.0, tl.float64)
                if METRIC == 1:
                    z_norm = _norm64(z, z_base, D, z_base >= 0)
                best, best_k = tl.full([1], float("inf"), tl.float64), tl.zeros([1], tl.int64) + K
                for start in range(0, tl.where(bad == 0, K, 0), WIDE):
                    k = (start + tl.arange(0, WIDE)).to(tl.int64)[None, :]
                    score, valid = _scores(
                        z, codebook, z_base, k * D, z_norm, k < K, D, METRIC, STEP
                    )
                    best, best_k = _keep_best(score, valid, k, best, best_k, K)
                place = at + tl.arange(0, 1)
                found = best_k < K
                best = tl.where(found, best, float("nan")).to(tl.float32)
                tl.store(indices + place, tl.where(found, best_k, 0))
                tl.store(distances + place, best)


def _columns(n: int, wgmma: bool) -> tuple[int, int, int]:
    """(P, Q, STEP): n columns as a product over P and one over Q, or P of them STEP at a time."""
    if n > 288:
        return triton.cdiv(n, 64) * 64, 0, 64
    main = max(16, 1 << (n.bit_length() - 1))
    tail = 0 if n <= main else power_of_2(n - main, 16, 256)
    main, tail = (2 * main, 0) if tail == main else (main, tail)
    if (
        not wgmma and not tail
    ):  # of two products mma.sync keeps whole rows in a warp, of one it does not
        main, tail = max(16, main // 2), max(16, main // 2)
    return main, tail, 0


def _plan(z: Tensor, codebook: Tensor) -> dict:
    """Tiles, columns and how the work is cut."""
    (N, D), K = z.shape, codebook.shape[0]
    split = D <= 9 and torch.float32 in (z.dtype, codebook.dtype)
    last = 3 * D if split else D
    main, tail, step = _columns(last + 4, hopper(z))
    width = main + tail
    large = hopper(z) and width <= 144  # two or three tiles of 256 codes fit shared memory
    block_m, block_k = 128, 256 if large else 128 if hopper(z) else 64
    tiles = triton.cdiv(K, block_k)
    row_tiles = triton.cdiv(N, block_m)
    splits = max(triton.cdiv(tiles, _TILES), min(tiles, 2 * processors(z) // max(1, row_tiles)))
    each = triton.cdiv(tiles, splits)
    return {
        "SPLIT": split, "E": last, "P": main, "Q": tail, "STEP": step, "W": width,
        "BLOCK_M": block_m, "BLOCK_K": block_k, "tiles": tiles, "row_tiles": row_tiles,
        "each": each, "splits": triton.cdiv(tiles, each),
        "STAGES": 1 if step else 3 if width <= 96 else 2,
        "num_warps": 8 if hopper(z) else 4,
    }  # fmt: skip


def unsupported_nearest(z: Tensor, codebook: Tensor, metric: int) -> str | None:
    """Why these inputs cannot run: dtypes, strides, D above 4000, or K of 2^23 and more."""
    if z.shape[1] > _MAX_D:
        return f"D = {z.shape[1]} is above {_MAX_D}"
    if codebook.shape[0] >= 1 << 23:  # 21 bits for a group of at least 8 codes
        return f"K = {codebook.shape[0]} is not below 2^23"
    return not_floats(z=z, codebook=codebook) or not_contiguous(z=z, codebook=codebook)


def scratch_nearest(z: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, ...]:
    """Packed rows and codes, slack of the groups, records of the splits, peaks; not initialised."""
    p = _plan(z, codebook)
    codes, N = p["tiles"] * p["BLOCK_K"], z.shape[0]
    return (
        z.new_empty(p["row_tiles"] * p["BLOCK_M"], p["W"], dtype=torch.float16),
        z.new_empty(codes, p["W"], dtype=torch.float16),
        z.new_empty(codes * 8 // p["BLOCK_K"], 2, dtype=torch.float32),
        z.new_empty(p["splits"], N, dtype=torch.int64),
        z.new_empty(p["splits"], N, 2, dtype=torch.float32),
        z.new_empty(_peaks(codebook), dtype=torch.float32),
    )


def _peaks(codebook: Tensor) -> int:
    return power_of_2(triton.cdiv(codebook.shape[0], _ROWS), 1, _PEAKS)


def nearest(
    z: Tensor, codebook: Tensor, metric: int, indices: Tensor, distances: Tensor, *scratch: Tensor
) -> None:
    """Writes indices [N] int64 and scores [N] float32; metric 0 is l2, 1 cosine, 2 dot."""
    (N, D), K = z.shape, codebook.shape[0]
    if N == 0:
        return
    rows, codes, slack, groups, bounds, peaks = scratch
    p = _plan(z, codebook)
    W, block_k = p["W"], p["BLOCK_K"]
    theta = (W + 16) * 2.0**-21
    exact = z.dtype != torch.float32 and metric != _COSINE  # in float16, but for the scale
    delta = 2.0**-23 if p["SPLIT"] else 2.0**-24 if exact else 2.0**-12
    kappa = (D + 16) * 2.0**-22 if metric == _COSINE else 0.0
    step = power_of_2(D, 16, 64)
    code_programs = len(codes) // _ROWS
    with on_device(z):
        if metric != _COSINE:
            screen.measure[(len(peaks),)](
                codebook, peaks, K, D, len(peaks), ROWS=_ROWS, STEP=step, num_warps=4
            )
        screen.pack[(code_programs + len(rows) // _ROWS,)](
            z, codebook, peaks, rows, codes, slack, N, K, D, p["E"], code_programs,
            theta, delta, kappa,
            METRIC=metric, SPLIT=p["SPLIT"], H=(max(1, D) - 1).bit_length() // 2 + 1,
            PEAKS=len(peaks), BLOCK_K=block_k, ROWS=_ROWS, W=W,
            STEP=32 if p["SPLIT"] else step, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        screen.screen[(p["row_tiles"], p["splits"])](
            rows, codes, slack, groups, bounds, N, p["tiles"], p["each"],
            -1 << (p["each"] - 1).bit_length(), p["E"], theta,
            BLOCK_M=p["BLOCK_M"], BLOCK_K=block_k, P=p["P"], Q=p["Q"], STEP=p["STEP"],
            STAGES=p["STAGES"], num_warps=p["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
        # float64 divisions take the registers; with no bound named ptxas spills to use fewer
        final = {"METRIC": metric, "STEP": 1 if metric == _COSINE else 4, "maxnreg": 128}
        final["enable_fp_fusion"] = False
        _rescore[(triton.cdiv(N, 8),)](
            z, codebook, groups, bounds, indices, distances, N, K, D, p["splits"],
            ROWS=8, GROUP=block_k // 8, num_warps=4, num_stages=1, **final,
        )  # fmt: skip
        _score_all[(triton.cdiv(N, 32),)](
            z, codebook, indices, distances, N, K, D,
            ROWS=32, WIDE=256, num_warps=8, num_stages=1, **final,
        )  # fmt: skip
