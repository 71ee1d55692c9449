"""The launches of the nearest-code search, for `nearest` and `nearest_quantize`.

The largest component of the codebook; both sides in float16, with norms and bounds as columns; the
screen, over (tiles of rows, splits of the codes); the merge of the splits' records, the float64
scores and, if asked for, the lookup, of 8 rows a program; the rows left over.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from vqfast.kernels import _lookup
from vqfast.kernels import _nearest_screen as screen
from vqfast.kernels._nearest_rerank import rescore, score_all
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
_SLOW_ROWS = 16  # rows that a program looks through for those left over
_PEAKS = 512  # programs that look for the largest component, at most
_TILES = 256  # of codes that one program screens, at most: 8 bits of a score


class Lookup(NamedTuple):
    """What is done beyond the search: z_q [N, D] = codes[index], parts [N / 8] and counts
    [K]."""

    x: Tensor  # [N, D]
    codes: Tensor  # [K, D]
    z_q: Tensor
    parts: Tensor
    counts: Tensor


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


def plan(z: Tensor, codebook: Tensor) -> dict:
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


def refusal(z: Tensor, codebook: Tensor) -> str | None:
    """Why these inputs cannot run: dtypes, strides, D above 4000, or K of 2^23 and more."""
    if z.shape[1] > _MAX_D:
        return f"D = {z.shape[1]} is above {_MAX_D}"
    if codebook.shape[0] >= 1 << 23:  # 21 bits for a group of at least 8 codes
        return f"K = {codebook.shape[0]} is not below 2^23"
    return not_floats(z=z, codebook=codebook) or not_contiguous(z=z, codebook=codebook)


def scratch(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    """Packed rows and codes, slack of the groups, records of the splits, peaks; not initialised."""
    p = plan(z, codebook)
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


def search(
    z: Tensor, codebook: Tensor, metric: int, indices: Tensor, distances: Tensor,
    memory: tuple[Tensor, ...], lookup: Lookup | None = None,
) -> None:  # fmt: skip
    """Writes indices [N] int64, scores [N] float32 and what the lookup names, for N >= 1; metric 0
    is l2, 1 cosine, 2 dot; memory is that of `scratch`."""
    (N, D), K = z.shape, codebook.shape[0]
    rows, codes, slack, groups, bounds, peaks = memory
    p = plan(z, codebook)
    W, block_k = p["W"], p["BLOCK_K"]
    theta = (W + 16) * 2.0**-21
    exact = z.dtype != torch.float32 and metric != _COSINE  # in float16, but for the scale
    delta = 2.0**-23 if p["SPLIT"] else 2.0**-24 if exact else 2.0**-12
    kappa = (D + 16) * 2.0**-22 if metric == _COSINE else 0.0
    step = power_of_2(D, 16, 64)
    code_programs = len(codes) // _ROWS
    # what is not looked up is not touched
    found = lookup or Lookup(z, codebook, z, bounds, indices)
    with on_device(z):
        if metric != _COSINE:
            screen.measure[(len(peaks),)](
                codebook, peaks, K, D, len(peaks), ROWS=_ROWS, STEP=step, num_warps=4
            )
        screen.pack[(code_programs + len(rows) // _ROWS,)](
            z, codebook, peaks, rows, codes, slack, found.counts, N, K, D, p["E"], code_programs,
            theta, delta, kappa,
            METRIC=metric, SPLIT=p["SPLIT"], H=(max(1, D) - 1).bit_length() // 2 + 1,
            PEAKS=len(peaks), BLOCK_K=block_k, ROWS=_ROWS, W=W,
            STEP=32 if p["SPLIT"] else step, COUNT=lookup is not None,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        screen.screen[(p["row_tiles"], p["splits"])](
            rows, codes, slack, groups, bounds, N, p["tiles"], p["each"],
            -1 << (p["each"] - 1).bit_length(), p["E"], theta,
            BLOCK_M=p["BLOCK_M"], BLOCK_K=block_k, P=p["P"], Q=p["Q"], STEP=p["STEP"],
            STAGES=p["STAGES"], num_warps=p["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
        # float64 divisions take the registers; with no bound named ptxas spills to use fewer. More
        # than 72 would only unroll the lookup, at the cost of warps that hide its latency
        final = {
            "METRIC": metric, "STEP": 1 if metric == _COSINE else 4,
            "BLOCK_D": 0 if lookup is None else _lookup.columns(D),
            "num_warps": _lookup.WARPS, "num_stages": 1, "enable_fp_fusion": False,
        }  # fmt: skip
        registers = 128 if metric == _COSINE else 72
        rescore[(triton.cdiv(N, _lookup.PART),)](
            z, codebook, groups, bounds, indices, distances, *found, N, K, D, p["splits"],
            ROWS=_lookup.PART, GROUP=block_k // 8, maxnreg=registers, **final,
        )  # fmt: skip
        score_all[(triton.cdiv(N, _SLOW_ROWS),)](
            z, codebook, indices, distances, *found, N, K, D,
            ROWS=_SLOW_ROWS, PART=_lookup.PART, WIDE=256, maxnreg=128, **final,
        )  # fmt: skip
