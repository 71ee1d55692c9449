"""One decoding step of a whole GPT: an embedding, five launches a layer, a head.

Computes: as vqfast/ops/decode_step.py says, for weights of 32, 16, 8 and 4 bits.
    embedding       h = token + position
    per layer       qkv        of LayerNorm h; k and v go into the cache
                    attention  split over slots
                    residual   h += proj(attended)
                    gelu       of fc of LayerNorm h
                    residual   h += out(hidden)
    head            of LayerNorm of the last n_logits rows
Contract: caches [L, B, H, S, d] contiguous, float32, float16 or bfloat16; d <= 256. Tokens, slots
    and positions are read on the device alone: a step can be captured in a graph.
Numerics: the stream h, moments, softmax and sums are float32. Bits of a row depend on its sequence
    alone (see _decode_step_matrix.py and _decode_step_attention.py); so no product may be fused
    with a sum where two compilations of one kernel could choose differently: enable_fp_fusion is
    off in the kernels that BLOCK_R specialises.
Shape of the code: a step reads every weight once, up to 64 rows (32 in float32); more rows go in
    blocks of so many. All that a kernel needs of whole rows of h is their moments per 16 columns,
    left by the kernel that wrote them. Where the GPU has it, launches overlap (programmatic
    dependent launch): a kernel asks for the weights it will read, then waits for the one before.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._decode_step_attention import decode_step_attention
from vqfast.kernels._decode_step_matrix import ask_for_weights, product, tree
from vqfast.kernels._tuning import FLOATS, hopper, not_contiguous, on_device, power_of_2

_VECTORS = 13  # times E, of a layer: LN1 w b, biases of qkv [3E] and proj, LN2 w b, of fc [4E], out
_SPLIT = 128  # slots of one program of the attention
_LOG2E = 1.4426950408889634
# columns of a step of the loop over K, at most: after LayerNorm, and of operands as they are stored
_COLUMNS = {32: (64, 64), 16: (128, 256), 8: (128, 256), 4: (128, 256)}
_STAGE_BYTES, _MOST_STAGES = 128 << 10, 6  # of the pipeline of that loop: what an A100 holds


@triton.jit
def decode_step_embedding(
    tokens, positions, tok_emb, pos_emb, h, moments, arrived, E, h_stride, tiles, H,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes h and its moments; sets the counters of the attention to zero."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    token, position = tl.load(tokens + row), tl.load(positions + row)
    head = tl.arange(0, HEADS)
    tl.store(arrived + row * H + head, tl.zeros([HEADS], tl.int32), mask=head < H)
    T: tl.constexpr = BLOCK // 16
    for first in range(0, E, BLOCK):
        tile = first // 16 + tl.arange(0, T)
        col = tile[:, None] * 16 + tl.arange(0, 16)[None, :]  # [T, 16]
        inside = col < E
        x = tl.load(tok_emb + token * E + col, mask=inside, other=0.0)
        x += tl.load(pos_emb + position * E + col, mask=inside, other=0.0)
        tl.store(h + row * h_stride + col, x, mask=inside)
        _store_moments(x, inside, moments + row * 2 * tiles + tile, tiles, tile < tiles)


@triton.jit
def _store_moments(x, inside, at, tiles, mask):
    """Mean, and squares about it, of the valid ones of 16 values x [N, 16]."""
    count = tl.maximum(tree(inside.to(tl.float32)), 1.0)
    mean = tree(tl.where(inside, x, 0.0)) / count
    away = tl.where(inside, x - mean[:, None], 0.0)
    tl.store(at, mean, mask=mask)
    tl.store(at + tiles, tree(away * away), mask=mask)


@triton.jit(do_not_specialize=["R"])
def decode_step_qkv(
    w, panel_bytes, h, h_stride, moments, norm, bias, q, k_cache, v_cache, slots, positions,
    R, E, Kp, H, S, d,
    BITS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [R, E]; keys and values into the caches [B, H, S, d] of one layer."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        ask_for_weights(w, panel_bytes, M)
        tl.extra.cuda.gdc_wait()
    n, row, real, y = product(
        w, panel_bytes, h, h_stride, moments, norm, 0, R, E, Kp,
        True, BITS, M, BLOCK_K, BLOCK_R, STAGES, OPERAND,
    )  # fmt: skip
    y += tl.load(bias + n, mask=n < 3 * E, other=0.0)[None, :]
    part, c = n // E, n % E
    mask = real[:, None] & (part < 1)[None, :]
    tl.store(q + row[:, None] * h_stride + c[None, :], y, mask=mask)
    slot = tl.load(slots + row, mask=real, other=0)
    position = tl.load(positions + row, mask=real, other=0)
    # int64 as far as the rows of one head, int32 for what a column adds, which saves registers
    start = slot * (H * S * d) + position * d
    at = c // d * (S * d) + c % d
    y = y.to(k_cache.dtype.element_ty)
    tl.store(k_cache + start[:, None] + at[None, :], y, mask=real[:, None] & (part == 1)[None, :])
    tl.store(v_cache + start[:, None] + at[None, :], y, mask=real[:, None] & (part == 2)[None, :])


@triton.jit(do_not_specialize=["R"])
def decode_step_residual(
    w, panel_bytes, x, x_stride, bias, h, h_stride, moments, R, E, K, Kp,
    BITS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h += W x + bias, and the moments of the new h; 16 columns a program, which are one tile."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        ask_for_weights(w, panel_bytes, M)
        tl.extra.cuda.gdc_wait()
    n, row, real, y = product(
        w, panel_bytes, x, x_stride, moments, bias, 0, R, K, Kp,
        False, BITS, M, BLOCK_K, BLOCK_R, STAGES, OPERAND,
    )  # fmt: skip
    mask = real[:, None] & (n < E)[None, :]
    at = h + row[:, None] * h_stride + n[None, :]
    y = tl.load(at, mask=mask, other=0.0) + (y + tl.load(bias + n, mask=n < E, other=0.0)[None, :])
    tl.store(at, y, mask=mask)
    tiles = (E + 15) // 16
    _store_moments(y, mask, moments + row * 2 * tiles + tl.program_id(0), tiles, real)


@triton.jit(do_not_specialize=["R"])
def decode_step_gelu(
    w, panel_bytes, h, h_stride, moments, norm, bias, out, out_stride, R, N, E, Kp,
    BITS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [R, N] = gelu(W LayerNorm h + bias), by the error function."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        ask_for_weights(w, panel_bytes, M)
        tl.extra.cuda.gdc_wait()
    n, row, real, y = product(
        w, panel_bytes, h, h_stride, moments, norm, 0, R, E, Kp,
        True, BITS, M, BLOCK_K, BLOCK_R, STAGES, OPERAND,
    )  # fmt: skip
    y += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    mask = real[:, None] & (n < N)[None, :]
    tl.store(out + row[:, None] * out_stride + n[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "first_row"])
def decode_step_head(
    w, panel_bytes, h, h_stride, moments, norm, logits, first_row, R, V, E, Kp,
    BITS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [R, V] of LayerNorm of rows first_row and on."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        ask_for_weights(w, panel_bytes, M)
        tl.extra.cuda.gdc_wait()
    n, row, real, y = product(
        w, panel_bytes, h, h_stride, moments, norm, first_row, R, E, Kp,
        True, BITS, M, BLOCK_K, BLOCK_R, STAGES, OPERAND,
    )  # fmt: skip
    row -= first_row
    tl.store(logits + row[:, None] * V + n[None, :], y, mask=real[:, None] & (n < V)[None, :])


# ---- launching -----------------------------------------------------------------------------------


def _padded(n: int, to: int) -> int:
    return -(-n // to) * to


class _Matrix:
    """Where a packed matrix [N, K] lies in the weights, and its tiles."""

    def __init__(self, N: int, K: int, bits: int, *, norm: bool):
        self.N, self.K, self.Kp = N, K, _padded(K, 64)
        self.bits, self.norm = bits, norm
        per_column = {32: 256, 16: 128, 8: 64, 4: 36}[bits]  # bytes of a panel of 64 rows
        self.panel_bytes = per_column * self.Kp + (256 if bits == 8 else 0)
        self.bytes = _padded(N, 64) // 64 * self.panel_bytes
        # 32 rows a program where that still fills a GPU, and float32 does not fill its registers;
        # `residual` has a tile of moments each
        self.M = 32 if norm and bits < 32 and N >= 3072 else 16
        self.programs = -(-N // self.M)

    def tiles(self, rows: int) -> dict[str, int]:
        """Of a launch for blocks of 16, 32 or 64 rows; none changes the order of a sum."""
        columns = _COLUMNS[self.bits][not self.norm] // (1 if rows <= 32 else 2)
        columns = math.gcd(self.Kp, max(64, columns))
        size = 4 if self.norm or self.bits == 32 else 2  # of an element of x
        stage = columns * (self.M * self.bits // 8 + rows * size)
        stages = max(2, min(_MOST_STAGES, _STAGE_BYTES // stage))
        return {
            "BITS": self.bits, "M": self.M, "BLOCK_K": columns, "BLOCK_R": rows, "STAGES": stages,
            # without a bound ptxas spills for an occupancy that shared memory forbids
            "num_warps": 4, "maxnreg": 255,
        }  # fmt: skip


def _operand(t: Tensor, bits: int) -> tl.dtype:
    """What is multiplied. The interpreter knows no rounding to bfloat16, nor its products."""
    return tl.float32 if bits == 32 or t.device.type == "cpu" else tl.bfloat16


def _unsupported_shape(k_cache: Tensor, bits: int) -> str | None:
    if k_cache.shape[4] > 256:
        return f"head dim {k_cache.shape[4]} is above 256"
    if math.prod(k_cache.shape[2:]) >= 2**31:
        return f"a sequence has a cache of {tuple(k_cache.shape[2:])} values"
    return None if bits in _COLUMNS else f"bits = {bits} is none of 32, 16, 8, 4"


def unsupported_decode_step(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tok_emb: Tensor,
    pos_emb: Tensor,
    vectors: Tensor,
    weights: Tensor,
    bits: int,
    n_logits: int,
) -> str | None:
    """Why these inputs cannot run: dtypes, strides, d above 256, or weights not at 16 bytes."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in FLOATS:
            return f"{name} is {str(cache.dtype).removeprefix('torch.')}"
    for name, t in (("tok_emb", tok_emb), ("pos_emb", pos_emb), ("vectors", vectors)):
        if t.dtype != torch.float32:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}, takes float32"
    if weights.data_ptr() % 16:
        return "weights do not begin at a multiple of 16 bytes"
    return _unsupported_shape(k_cache, bits) or not_contiguous(
        tokens=tokens, slots=slots, positions=positions, k_cache=k_cache, v_cache=v_cache,
        tok_emb=tok_emb, pos_emb=pos_emb, vectors=vectors, weights=weights,
    )  # fmt: skip


def scratch_decode_step(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tok_emb: Tensor,
    pos_emb: Tensor,
    vectors: Tensor,
    weights: Tensor,
    bits: int,
    n_logits: int,
) -> tuple[Tensor, ...]:
    """h, moments, q, attended, hidden, then sums, levels and counters of the attention."""
    R, (_, _, H, S, d) = tokens.shape[0], k_cache.shape
    E, splits = H * d, -(-S // _SPLIT)
    wide, operand = torch.float32, torch.float32 if bits == 32 else torch.bfloat16

    def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    stride = _padded(E, 64)  # rows at multiples of 16 bytes
    return (
        empty(R, stride), empty(R, 2, -(-E // 16)), empty(R, stride),
        empty(R, stride, dtype=operand), empty(R, _padded(4 * E, 64), dtype=operand),
        empty(R, H, splits, power_of_2(d, 16, 256)), empty(R, H, 2, splits),
        empty(R, H, dtype=torch.int32),
    )  # fmt: skip


def decode_step(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tok_emb: Tensor,
    pos_emb: Tensor,
    vectors: Tensor,
    weights: Tensor,
    bits: int,
    n_logits: int,
    logits: Tensor,
    h: Tensor,
    moments: Tensor,
    q: Tensor,
    attended: Tensor,
    hidden: Tensor,
    sums: Tensor,
    levels: Tensor,
    arrived: Tensor,
) -> None:
    """Writes the caches and logits [n_logits, V]; the rest is scratch, as made above."""
    R, (L, _, H, S, d), V = tokens.shape[0], k_cache.shape, tok_emb.shape[0]
    if R == 0:
        return
    E, stride, splits, D = H * d, h.stride(0), sums.shape[2], sums.shape[3]
    qkv, proj, fc, out, head = (
        _Matrix(N, K, bits, norm=norm)
        for N, K, norm in (
            (3 * E, E, True),
            (E, E, False),
            (4 * E, E, True),
            (E, 4 * E, False),
            (V, E, True),
        )
    )
    # programmatic dependent launch begins with Hopper; off the GPU there is nothing to overlap
    pdl = tokens.device.type != "cpu" and hopper(tokens)
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    fixed = {
        "OPERAND": _operand(tokens, bits), "enable_fp_fusion": False, **launch,
    }  # fmt: skip
    most = 32 if bits == 32 else 64  # rows of a program; float32 operands fill its registers
    size = power_of_2(R, 16, most)
    blocks = -(-R // size)
    base = vector = 0

    def take(m: _Matrix) -> tuple[Tensor, int]:
        nonlocal base
        base += m.bytes
        return weights[base - m.bytes : base], m.panel_bytes

    def part(n: int) -> Tensor:
        nonlocal vector
        vector += n
        return vectors[vector - n : vector]

    def residual(m: _Matrix, x: Tensor) -> None:
        decode_step_residual[m.programs, blocks](
            *take(m), x, x.stride(0), part(E), h, stride, moments, R, E, m.K, m.Kp,
            **m.tiles(size), **fixed,
        )  # fmt: skip

    block = power_of_2(E, 64, 2048)
    walk = {
        "DIM": d, "D": D, "SPLIT": _SPLIT, "SLOTS": max(16, 8192 // k_cache.element_size() // D),
        # copies to shared memory take four bytes or more
        "STAGES": 2 if d * k_cache.element_size() % 16 == 0 else 1,
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    with on_device(tokens):
        decode_step_embedding[(R,)](
            tokens, positions, tok_emb, pos_emb, h, moments, arrived, E, stride, moments.shape[2],
            H, BLOCK=block, HEADS=power_of_2(H, 1, 1 << 20), num_warps=4, enable_fp_fusion=False,
            **launch,
        )  # fmt: skip
        for layer in range(L):
            keys, values = k_cache[layer], v_cache[layer]
            norm, bias = part(2 * E), part(3 * E)
            decode_step_qkv[qkv.programs, blocks](
                *take(qkv), h, stride, moments, norm, bias, q, keys, values, slots, positions,
                R, E, qkv.Kp, H, S, d, **qkv.tiles(size), **fixed,
            )  # fmt: skip
            decode_step_attention[R, H, splits](
                q, keys, values, slots, positions, attended, sums, levels, arrived,
                stride, attended.stride(0), H, S, splits, _LOG2E / math.sqrt(d), **walk, **launch,
            )  # fmt: skip
            residual(proj, attended)
            norm, bias = part(2 * E), part(4 * E)
            decode_step_gelu[fc.programs, blocks](
                *take(fc), h, stride, moments, norm, bias, hidden, hidden.stride(0),
                R, fc.N, E, fc.Kp, **fc.tiles(size), **fixed,
            )  # fmt: skip
            residual(out, hidden)
        if n_logits:
            size = power_of_2(n_logits, 16, most)
            decode_step_head[head.programs, -(-n_logits // size)](
                *take(head), h, stride, moments, part(2 * E), logits, R - n_logits, n_logits,
                V, E, head.Kp, **head.tiles(size), **fixed,
            )  # fmt: skip
