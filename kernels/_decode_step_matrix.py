"""A packed matrix times the rows of a step: the part that all products of `decode_step` share.

Computes: y[r, n] = Σ_k W[n, k] · x[r, k],  x either as stored or LayerNorm of the residual stream.
Shape of the code: a program owns M = 16 or 32 rows of W, in one packed panel, and up to BLOCK_R
    rows of x. W stands on M of the tensor core and x on N, so that few rows waste little. Each of
    the four warps adds up every fourth 16 columns, as one batch of a batched product: products of a
    chain wait for one another, 256 of them at 4096 columns, and no warp repeats another's. Chains
    are added in pairs at the end. So the order of a sum is the same whatever M, BLOCK_K and BLOCK_R
    are, and the bits of y do not depend on R. LayerNorm's mean and variance come from moments of 16
    columns each, left behind by whoever wrote the stream, so that nobody reads a row twice.
Numerics: float32 sums; bfloat16 operands for weights of 16 bits and less (int4 values times their
    scale are rounded to it), float32 ones with fused multiply-adds for 32 bits. The interpreter
    multiplies in float32 always.
"""

import triton
import triton.language as tl

CHAINS = tl.constexpr(4)  # sums of a product that run side by side, one a warp
GROUP = tl.constexpr(32)  # columns that share an int4 scale
_PANEL = tl.constexpr(64)  # rows of the packed layout
_LINE = tl.constexpr(256)  # bytes: a word of each row of a panel, which holds 32 / BITS columns
_GROUP_BYTES = tl.constexpr(1152)  # of int4: 64 bfloat16 scales and four lines


# ---- the packed layout: all its address arithmetic -----------------------------------------------


@triton.jit
def _panel(w, panel_bytes, M: tl.constexpr):
    """Where the panel of this program begins, and the place of its M rows in it."""
    MANY: tl.constexpr = _PANEL // M
    pid = tl.program_id(0)  # the product comes last, so that the compiler sees a multiple of M
    return w + (pid // MANY).to(tl.int64) * panel_bytes, pid % MANY * M


@triton.jit
def _weights(w, panel_bytes, k, BITS: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
             OPERAND: tl.constexpr):  # fmt: skip
    """[M, K] of a packed matrix, the rows of this program, columns from k on, which is a multiple
    of K; int8 without its scales."""
    base, within = _panel(w, panel_bytes, M)
    if BITS == 4:
        G: tl.constexpr = K // GROUP
        group = k // GROUP + tl.arange(0, G)  # [G]
        scale = (base + group[:, None] * _GROUP_BYTES).to(tl.pointer_type(tl.bfloat16))
        scale = tl.load(scale + within + tl.arange(0, M)[None, :])  # [G, M]
        line = group[:, None] * _GROUP_BYTES + 128 + tl.arange(0, 4)[None, :] * _LINE  # [G, 4]
        pairs = base + line[:, :, None] + within * 4
        pairs = tl.load(pairs + tl.arange(0, 4 * M)[None, None, :])
        # [G, v, (row, j)] -> [G, v, row, j, half] -> [row, G, v, half, j]
        x = tl.join(pairs & 15, pairs >> 4)
        x = tl.permute(tl.reshape(x, [G, 4, M, 4, 2]), 2, 0, 1, 4, 3)
        x = (tl.reshape(x, [M, G, GROUP]).to(tl.int8) - 8).to(OPERAND)
        return tl.reshape(x * tl.trans(scale).to(OPERAND)[:, :, None], [M, K])
    else:
        element: tl.constexpr = (
            tl.float32 if BITS == 32 else (tl.bfloat16 if BITS == 16 else tl.uint8)
        )
        EACH: tl.constexpr = 32 // BITS  # columns of a line, and elements of a word
        LINES: tl.constexpr = K // EACH
        line = k // EACH + tl.arange(0, LINES)
        if BITS == 8:
            base += _LINE  # the scales
        at = (base + line[:, None] * _LINE + within * 4).to(tl.pointer_type(element))
        x = tl.load(at + tl.arange(0, M * EACH)[None, :])
        if BITS == 8:
            x = (x ^ 128).to(tl.int8, bitcast=True)  # value + 128 as the signed value
        x = tl.permute(tl.reshape(x, [LINES, M, EACH]), 1, 0, 2)
        return tl.reshape(x, [M, K]).to(OPERAND)


@triton.jit
def _row_scales(w, panel_bytes, M: tl.constexpr):
    """[M] float32 scales of the rows of an int8 matrix."""
    base, within = _panel(w, panel_bytes, M)
    return tl.load(base.to(tl.pointer_type(tl.float32)) + within + tl.arange(0, M))


@triton.jit
def ask_for_weights(w, panel_bytes, M: tl.constexpr):
    """Starts to move the rows of this program into the L2 cache; they depend on no other kernel, so
    this comes before the wait for the one that makes x."""
    base, within = _panel(w, panel_bytes, M)
    start = base.to(tl.int64) + within * 4
    for first in range(0, panel_bytes, 256 * _LINE):
        # scales of int4 put its lines off by half a line: the next one then comes too
        line = tl.minimum(first + tl.arange(0, 256) * _LINE, panel_bytes - _LINE)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [start + line],
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


@triton.jit
def _chains(x, N: tl.constexpr, K: tl.constexpr):
    """[N, K] -> [CHAINS, N, K / CHAINS]: 16 columns for each chain in turn."""
    x = tl.reshape(x, [N, K // (16 * CHAINS), CHAINS, 16])
    return tl.reshape(tl.permute(x, 2, 0, 1, 3), [CHAINS, N, K // CHAINS])


# ---- the product ---------------------------------------------------------------------------------


@triton.jit
def product(
    w, panel_bytes, x, x_stride, moments, norm, first_row, R, K, Kp,
    NORM: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Columns [M] of this program, rows [BLOCK_R], real rows [BLOCK_R], y [BLOCK_R, M].

    With NORM, x is LayerNorm of the stream x: `moments` has its moments, `norm` weight and bias.
    """
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < R
    row = (first_row + row).to(tl.int64)
    if NORM:
        tiles = (K + 15) // 16
        mean, rstd = _mean_and_rstd(moments, row, real, 2 * tiles, tiles, K, 1e-5, BLOCK_R)
    acc = tl.zeros([CHAINS, M, BLOCK_R], tl.float32)
    at = x + row[:, None] * x_stride
    for k in tl.range(0, Kp, BLOCK_K, num_stages=STAGES):
        weight = _weights(w, panel_bytes, k, BITS, M, BLOCK_K, OPERAND)
        col = k + tl.arange(0, BLOCK_K)
        inside = col < K
        part = tl.load(at + col[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        if NORM:
            gain = tl.load(norm + col, mask=inside, other=0.0)
            shift = tl.load(norm + K + col, mask=inside, other=0.0)
            part = (part - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        weight = _chains(weight, M, BLOCK_K)
        part = tl.permute(_chains(part.to(OPERAND), BLOCK_R, BLOCK_K), 0, 2, 1)
        acc = tl.dot(weight, part, acc, input_precision="ieee")
    y = tl.reshape(tree(tl.reshape(tl.permute(acc, 2, 1, 0), [BLOCK_R * M, CHAINS])), [BLOCK_R, M])
    if BITS == 8:
        y *= _row_scales(w, panel_bytes, M)[None, :]
    return tl.program_id(0) * M + tl.arange(0, M), row, real, y
