"""A packed matrix times the rows of a step: the part that all products of `decode_step` share.

Computes: y[r, n] = Σ_k W[n, k] · x[r, k],  x either as stored or LayerNorm of the residual stream.
Shape of the code: a program owns 16·P rows of W, as P panels, and up to BLOCK_R rows of x. W stands
    on M of the tensor core and x on N, so that few rows waste little. The sum runs over k in steps
    of 16 columns whatever BLOCK_R is, and P is chosen by the matrix alone: bits of y do not depend
    on R. LayerNorm's mean and variance come from moments of 16 columns each, which whoever wrote
    the stream left behind, so that nobody reads a row twice.
Numerics: float32 sums; bfloat16 operands for weights of 16 bits and less (int4 values times their
    scale are rounded to it), float32 ones with fused multiply-adds for 32 bits. The interpreter
    multiplies in float32 always.
"""

import triton
import triton.language as tl

PANEL = tl.constexpr(16)
GROUP = tl.constexpr(32)  # columns that share an int4 scale
_GROUP_BYTES = tl.constexpr(288)  # 16 bfloat16 scales and 256 bytes of nibbles


# ---- the packed layout: all its address arithmetic -----------------------------------------------


@triton.jit
def _flat(w, element: tl.constexpr, panel, panels, panel_bytes, skip, SIZE: tl.constexpr,
          P: tl.constexpr):  # fmt: skip
    """[P, SIZE] elements that lie side by side in each of P panels, from byte `skip` on; panels
    that the matrix lacks are zero."""
    which = panel + tl.arange(0, P)
    w += which.to(tl.int64)[:, None] * panel_bytes + skip
    w = w.to(tl.pointer_type(element), bitcast=True)
    mask = (which < panels)[:, None]
    return tl.load(w + tl.arange(0, SIZE)[None, :], mask=mask, other=0)


@triton.jit
def _weights(w, panel, panels, panel_bytes, k, BITS: tl.constexpr, P: tl.constexpr,
             K: tl.constexpr, OPERAND: tl.constexpr):  # fmt: skip
    """[16·P, K] of a packed matrix from column k on, a multiple of K; int8 without its scales."""
    M: tl.constexpr = PANEL * P
    if BITS == 32:
        flat = _flat(w, tl.float32, panel, panels, panel_bytes, k * 64, K * PANEL, P)
        x = tl.permute(tl.reshape(flat, [P, K, PANEL]), 0, 2, 1)
        return tl.reshape(x, [M, K]).to(OPERAND)
    elif BITS == 16:
        flat = _flat(w, tl.bfloat16, panel, panels, panel_bytes, k * 32, K * PANEL, P)
        x = tl.permute(tl.reshape(flat, [P, K // 2, PANEL, 2]), 0, 2, 1, 3)
        return tl.reshape(x, [M, K]).to(OPERAND)
    elif BITS == 8:
        flat = _flat(w, tl.uint8, panel, panels, panel_bytes, 64 + k * 16, K * PANEL, P)
        flat = (flat ^ 128).to(tl.int8, bitcast=True)  # value + 128 as the signed value
        x = tl.permute(tl.reshape(flat, [P, K // 4, PANEL, 4]), 0, 2, 1, 3)
        return tl.reshape(x, [M, K]).to(OPERAND)
    else:
        G: tl.constexpr = K // GROUP
        which = panel + tl.arange(0, P)
        real = (which < panels)[:, None, None]
        start = which.to(tl.int64)[:, None] * panel_bytes + k // GROUP * _GROUP_BYTES
        start = (start + tl.arange(0, G)[None, :] * _GROUP_BYTES)[:, :, None]  # [P, G, 1]
        scale = (w + start).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        scale = tl.load(scale + tl.arange(0, PANEL)[None, None, :], mask=real, other=0.0)
        pairs = w + start + 32
        pairs = tl.load(pairs + tl.arange(0, 256)[None, None, :], mask=real, other=136)
        # [P, G, 256] of (v, row, j) -> [P, G, v, row, j, half] -> [P, row, G, v, half, j]
        x = tl.join(pairs & 15, pairs >> 4)
        x = tl.permute(tl.reshape(x, [P, G, 4, PANEL, 4, 2]), 0, 3, 1, 2, 5, 4)
        x = (tl.reshape(x, [P, PANEL, G, GROUP]).to(tl.int8) - 8).to(OPERAND)
        x = x * tl.permute(scale, 0, 2, 1).to(OPERAND)[:, :, :, None]
        return tl.reshape(x, [M, K])


@triton.jit
def _row_scales(w, panel, panels, panel_bytes, P: tl.constexpr):
    """[16·P] float32 scales of the rows of an int8 matrix."""
    scale = _flat(w, tl.float32, panel, panels, panel_bytes, 0, PANEL, P)
    return tl.reshape(scale, [PANEL * P])


@triton.jit
def ask_for_weights(w, panels, panel_bytes, P: tl.constexpr):
    """Starts to move the panels of this program into the L2 cache; they depend on no other kernel,
    so this comes before the wait for the one that makes x."""
    LINES: tl.constexpr = 256 // P
    panel = tl.minimum(tl.program_id(0) * P + tl.arange(0, P), panels - 1)
    start = w.to(tl.int64) + panel.to(tl.int64)[:, None] * panel_bytes  # [P, 1]
    for first in range(0, panel_bytes, LINES * 128):
        line = tl.minimum(first + tl.arange(0, LINES) * 128, panel_bytes - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [start + line[None, :]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


# ---- LayerNorm from moments of 16 columns --------------------------------------------------------


@triton.jit
def tree(x):
    """[N, C] -> [N], C a power of two: sums of pairs again and again, one order in any layout."""
    C: tl.constexpr = x.shape[1]
    for level in tl.static_range(8):
        if C >> level > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], C >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def _tile_moments(moments, row, real, stride, first, tiles, E, MANY: tl.constexpr):
    """Counts [1, MANY], means and squares about the mean [rows, MANY] of tiles of 16 columns."""
    tile = first + tl.arange(0, MANY)
    count = tl.minimum(tl.maximum(E - tile * 16, 0), 16).to(tl.float32)
    at = moments + row[:, None] * stride + tile[None, :]
    mask = real[:, None] & (tile < tiles)[None, :]
    mean = tl.load(at, mask=mask, other=0.0)
    square = tl.load(at + stride // 2, mask=mask, other=0.0)
    return count[None, :], mean, square


@triton.jit
def _mean_and_rstd(moments, row, real, stride, tiles, E, EPS: tl.constexpr, ROWS: tl.constexpr):
    """LayerNorm's mean and 1 / standard deviation [ROWS], by the rule for merging variances."""
    MANY: tl.constexpr = 64
    total = tl.zeros([ROWS, MANY], tl.float32)
    for first in range(0, tiles, MANY):
        count, mean, _ = _tile_moments(moments, row, real, stride, first, tiles, E, MANY)
        total += count * mean
    centre = tree(total) / E
    total = tl.zeros([ROWS, MANY], tl.float32)
    for first in range(0, tiles, MANY):
        count, mean, square = _tile_moments(moments, row, real, stride, first, tiles, E, MANY)
        away = mean - centre[:, None]
        total += square + count * away * away
    return centre, tl.math.div_rn(1.0, tl.math.sqrt_rn(tree(total) / E + EPS))


# ---- the product ---------------------------------------------------------------------------------


@triton.jit
def product(
    w, panels, panel_bytes, x, x_stride, moments, norm, first_row, R, K, Kp,
    NORM: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Columns [16·P] of this program, rows [BLOCK_R], real rows [BLOCK_R], y [BLOCK_R, 16·P].

    With NORM, x is LayerNorm of the stream x: `moments` has its moments, `norm` weight and bias.
    """
    panel = tl.program_id(0) * P
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < R
    row = (first_row + row).to(tl.int64)
    if NORM:
        tiles = (K + 15) // 16
        mean, rstd = _mean_and_rstd(moments, row, real, 2 * tiles, tiles, K, 1e-5, BLOCK_R)
    acc = tl.zeros([PANEL * P, BLOCK_R], tl.float32)
    at = x + row[:, None] * x_stride
    for k in tl.range(0, Kp, BLOCK_K, num_stages=STAGES):
        weight = _weights(w, panel, panels, panel_bytes, k, BITS, P, BLOCK_K, OPERAND)
        col = k + tl.arange(0, BLOCK_K)
        inside = col < K
        part = tl.load(at + col[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if NORM:
            gain = tl.load(norm + col, mask=inside, other=0.0)
            shift = tl.load(norm + K + col, mask=inside, other=0.0)
            part = (part - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        acc = tl.dot(weight, tl.trans(part.to(OPERAND)), acc, input_precision="ieee")
    y = tl.trans(acc)
    if BITS == 8:
        y *= _row_scales(w, panel, panels, panel_bytes, P)[None, :]
    return panel * PANEL + tl.arange(0, PANEL * P), row, real, y
