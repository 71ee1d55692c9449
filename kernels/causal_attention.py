"""Causal attention, forward and backward, without a table of weights.

Computes: out_i = Σ_{j≤i} w_ij v_j,  w_ij = exp(scale ⟨q_i, k_j⟩ − lse_i),
          lse_i = log Σ_{j≤i} exp(scale ⟨q_i, k_j⟩);
          with δ_i = ⟨grad_i, out_i⟩ and s_ij = w_ij (⟨grad_i, v_j⟩ − δ_i) · scale:
          dq_i = Σ_{j≤i} s_ij k_j,   dk_j = Σ_{i≥j} s_ij q_i,   dv_j = Σ_{i≥j} w_ij grad_i.
Contract: q, k, v, grad [B, H, T, d], any strides, d <= 256 (64 in float32); out and the gradients
    contiguous. Slots of the future may hold NaN. A row whose scores are all -inf gives zeros and
    lse = +inf.
Numerics: float32 scores, softmax and sums. float32 inputs are multiplied as three TF32 products;
    for float16 and bfloat16 the weights are rounded to the input dtype before they meet v, k, q and
    grad, as in FlashAttention. No atomics: dq has its own kernel, at the price of computing the
    scores twice; every sum has one order, whatever B and H are.
    Scale and log2(e) enter in the multiply-add of each exponent: the running maximum is that of the
    bare scores, and the sign of scale is taken into q.
Shape of the code: forward and dq take one block of rows, its square on the diagonal first, then
    the keys before it, unmasked; dk and dv take one block of keys, the square first, then the rows
    after it. Heavy blocks start first. In the square a weight of zero may stand against a NaN. Its
    product is taken as if there were none; if it comes out not finite, once more with the hidden
    values taken out (`_visible_dot`). So the usual case pays one sum for the promise about NaN.
    The kernel of dq, which runs first, leaves δ for the one of dk and dv.
Ladder, static, sm_90, d = 64, bfloat16, triton 3.8, 2026-11-30: instructions a visible pair at
    T = 256, all warps and everything outside the loops counted. Diagonal last in two masked tiles,
    searched for NaN each time, 64-bit index arithmetic: 39; as above 22, and two blocks an SM
    where there was one (126 registers for 187). Rows in blocks of 64: 20, but K and V are then read
    2.5 times instead of 1.5, and L2 is the bound. One program a head would read them once; at
    B·H = 128 each SM would hold the warps of one program. Not timed: no GPU was at hand.
    Loads are vectors where d and the strides are multiples of 8: d = 100 spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import hopper, not_floats, on_device, power_of_2

_LOG2E = 1.4426950408889634
LOG2E = tl.constexpr(_LOG2E)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(
    x, start, ROWS: tl.constexpr, row_stride, col_stride, T, D, COLS: tl.constexpr,
    WHOLE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of x from row `start`; rows >= T and cols >= D are zero.

    Not EDGE: all rows are below T; WHOLE: COLS is D. The block's address is int64, offsets inside
    it are int32 (see `_far`), which saves registers.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    x += tl.cast(start, tl.int64) * row_stride
    at = x + (row[:, None] * row_stride + col[None, :] * col_stride)
    if EDGE and WHOLE:
        return tl.load(at, mask=(start + row < T)[:, None], other=0.0)
    if EDGE:
        return tl.load(at, mask=(start + row < T)[:, None] & (col < D)[None, :], other=0.0)
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=(col < D)[None, :], other=0.0)


@triton.jit
def _store(
    x, start, value, ROWS: tl.constexpr, T, D, COLS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """value [ROWS, COLS] to the rows of x [T, D], contiguous, from `start` on."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    at = x + tl.cast(start, tl.int64) * D + (row[:, None] * D + col[None, :])
    mask = (start + row < T)[:, None]
    if not WHOLE:
        mask = mask & (col < D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _not_finite(acc):
    """Whether acc holds a NaN or an infinity: 0 · x is then NaN, and so is any sum with it."""
    return tl.sum(tl.sum(acc * 0.0, axis=1), axis=0) != 0.0


@triton.jit
def _visible_dot(weight, x, FORWARD: tl.constexpr, PRECISION: tl.constexpr):
    """weight @ x on the diagonal; weight [M, M] is zero for hidden pairs, where x [M, D] may not be
    finite.

    Row m sees row n if n <= m (FORWARD), or n >= m (not FORWARD). What is not finite shows, as NaN,
    in the rows that see it.
    """
    at = tl.arange(0, x.shape[0])
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    clean = tl.where(finite, x, 0.0).to(x.dtype)
    acc = tl.dot(weight, clean, input_precision=PRECISION)
    if FORWARD:
        bad = tl.min(tl.where(finite, 2147483647, at[:, None]), axis=0)  # [D], the first bad row
        return tl.where(at[:, None] >= bad[None, :], float("nan"), acc)
    bad = tl.max(tl.where(finite, -1, at[:, None]), axis=0)  # [D], the last bad row
    return tl.where(at[:, None] <= bad[None, :], float("nan"), acc)


@triton.jit
def _softmax(score, high, scale_log2):
    """Weights of the scores of a tile, as their maximum with `high`, and that maximum."""
    new = tl.maximum(high, tl.max(score, axis=1))
    # the maximum of the bare scores, so that scale enters in the multiply-add of the exponent
    base = tl.where(new == float("-inf"), 0.0, new * scale_log2)
    weight = tl.exp2(score * scale_log2 - base[:, None])
    return weight, tl.exp2(high * scale_log2 - base), new


@triton.jit
def _forward(
    q, k, v, out, lse,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    H, T, D, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, RETRY: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    at = tl.arange(0, BLOCK_M)
    query = _tile(
        q + b * q_b + h * q_h, first, BLOCK_M, q_t, q_d, T, D, BLOCK_D, WHOLE, True
    )  # fmt: skip
    if SIGN != 1:
        query = (query * SIGN).to(query.dtype)

    key = _tile(k, first, BLOCK_M, k_t, k_d, T, D, BLOCK_D, WHOLE, True)
    value = _tile(v, first, BLOCK_M, v_t, v_d, T, D, BLOCK_D, WHOLE, True)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, M]
    score = tl.where(at[None, :] <= at[:, None], score, float("-inf"))
    weight, _, high = _softmax(score, tl.full([BLOCK_M], float("-inf"), tl.float32), scale_log2)
    total = tl.sum(weight, axis=1)
    rounded = weight.to(value.dtype)
    if RETRY:
        acc = tl.dot(rounded, value, input_precision=PRECISION)
        if _not_finite(acc):
            again = _tile(v, first, BLOCK_M, v_t, v_d, T, D, BLOCK_D, WHOLE, True)
            acc = _visible_dot(rounded, again, True, PRECISION)
    else:
        acc = _visible_dot(rounded, value, True, PRECISION)

    for start in range(0, first, BLOCK_N):
        keys = _tile(k, start, BLOCK_N, k_t, k_d, T, D, BLOCK_D, WHOLE, False)
        values = _tile(v, start, BLOCK_N, v_t, v_d, T, D, BLOCK_D, WHOLE, False)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)  # [M, N]
        weights, shrink, high = _softmax(scores, high, scale_log2)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)

    empty = total == 0.0
    mean = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]
    row = head.to(tl.int64) * T
    _store(out + row * D, first, mean, BLOCK_M, T, D, BLOCK_D, WHOLE)
    log_sum = tl.where(empty, float("inf"), (high * scale_log2 + tl.log2(total)) * LN2)
    tl.store(lse + row + first + at, log_sum, mask=first + at < T)


@triton.jit
def _backward_q(
    grad, q, k, v, out, lse, dq, delta,
    g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    H, T, D, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, RETRY: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = head.to(tl.int64) * T
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    at = tl.arange(0, BLOCK_M)
    up = _tile(
        grad + b * g_b + h * g_h, first, BLOCK_M, g_t, g_d, T, D, BLOCK_D, WHOLE, True
    )  # fmt: skip
    result = _tile(out + row * D, first, BLOCK_M, D, 1, T, D, BLOCK_D, WHOLE, True)
    inner = tl.sum(up.to(tl.float32) * result.to(tl.float32), axis=1)  # δ
    tl.store(delta + row + first + at, inner, mask=first + at < T)
    base = tl.load(lse + row + first + at, mask=first + at < T, other=float("inf")) * LOG2E
    query = _tile(
        q + b * q_b + h * q_h, first, BLOCK_M, q_t, q_d, T, D, BLOCK_D, WHOLE, True
    )  # fmt: skip

    key = _tile(k, first, BLOCK_M, k_t, k_d, T, D, BLOCK_D, WHOLE, True)
    value = _tile(v, first, BLOCK_M, v_t, v_d, T, D, BLOCK_D, WHOLE, True)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, M]
    d_weight = tl.dot(up, tl.trans(value), input_precision=PRECISION)
    d_score = tl.exp2(score * scale_log2 - base[:, None]) * (d_weight - inner[:, None])
    rounded = tl.where(at[None, :] <= at[:, None], d_score, 0.0).to(key.dtype)
    if RETRY:
        acc = tl.dot(rounded, key, input_precision=PRECISION)
        if _not_finite(acc):
            again = _tile(k, first, BLOCK_M, k_t, k_d, T, D, BLOCK_D, WHOLE, True)
            acc = _visible_dot(rounded, again, True, PRECISION)
    else:
        acc = _visible_dot(rounded, key, True, PRECISION)

    for start in range(0, first, BLOCK_N):
        keys = _tile(k, start, BLOCK_N, k_t, k_d, T, D, BLOCK_D, WHOLE, False)
        values = _tile(v, start, BLOCK_N, v_t, v_d, T, D, BLOCK_D, WHOLE, False)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)  # [M, N]
        d_weights = tl.dot(up, tl.trans(values), input_precision=PRECISION)
        d_scores = tl.exp2(scores * scale_log2 - base[:, None]) * (d_weights - inner[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)

    _store(dq + row * D, first, acc * scale, BLOCK_M, T, D, BLOCK_D, WHOLE)


@triton.jit
def _backward_kv(
    grad, q, k, v, lse, delta, dk, dv,
    g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    H, T, D, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, RETRY: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N  # the first keys are seen by most rows
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = head.to(tl.int64) * T
    grad += b * g_b + h * g_h
    q += b * q_b + h * q_h
    lse += row
    delta += row
    at = tl.arange(0, BLOCK_N)
    key = _tile(
        k + b * k_b + h * k_h, first, BLOCK_N, k_t, k_d, T, D, BLOCK_D, WHOLE, True
    )  # fmt: skip
    value = _tile(
        v + b * v_b + h * v_h, first, BLOCK_N, v_t, v_d, T, D, BLOCK_D, WHOLE, True
    )  # fmt: skip

    query = _tile(q, first, BLOCK_N, q_t, q_d, T, D, BLOCK_D, WHOLE, True)
    up = _tile(grad, first, BLOCK_N, g_t, g_d, T, D, BLOCK_D, WHOLE, True)
    base = tl.load(lse + first + at, mask=first + at < T, other=float("inf")) * LOG2E
    inner = tl.load(delta + first + at, mask=first + at < T, other=0.0)
    seen = at[:, None] <= at[None, :]
    score = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [N, N]
    weight = tl.where(seen, tl.exp2(score * scale_log2 - base[None, :]), 0.0)
    d_weight = tl.dot(value, tl.trans(up), input_precision=PRECISION)
    d_score = tl.where(seen, weight * (d_weight - inner[None, :]), 0.0).to(query.dtype)
    rounded = weight.to(up.dtype)
    if RETRY:
        dv_sum = tl.dot(rounded, up, input_precision=PRECISION)
        dk_sum = tl.dot(d_score, query, input_precision=PRECISION)
        if _not_finite(dv_sum) | _not_finite(dk_sum):
            up_again = _tile(grad, first, BLOCK_N, g_t, g_d, T, D, BLOCK_D, WHOLE, True)
            dv_sum = _visible_dot(rounded, up_again, False, PRECISION)
            q_again = _tile(q, first, BLOCK_N, q_t, q_d, T, D, BLOCK_D, WHOLE, True)
            dk_sum = _visible_dot(d_score, q_again, False, PRECISION)
    else:
        dv_sum = _visible_dot(rounded, up, False, PRECISION)
        dk_sum = _visible_dot(d_score, query, False, PRECISION)

    for start in range(first + BLOCK_N, T, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = _tile(q, start, BLOCK_M, q_t, q_d, T, D, BLOCK_D, WHOLE, True)
        ups = _tile(grad, start, BLOCK_M, g_t, g_d, T, D, BLOCK_D, WHOLE, True)
        bases = tl.load(lse + rows, mask=rows < T, other=float("inf")) * LOG2E
        inners = tl.load(delta + rows, mask=rows < T, other=0.0)
        scores = tl.dot(key, tl.trans(queries), input_precision=PRECISION)  # [N, M]
        weights = tl.exp2(scores * scale_log2 - bases[None, :])
        d_weights = tl.dot(value, tl.trans(ups), input_precision=PRECISION)
        d_scores = weights * (d_weights - inners[None, :])
        dv_sum = tl.dot(weights.to(ups.dtype), ups, dv_sum, input_precision=PRECISION)
        dk_sum = tl.dot(d_scores.to(queries.dtype), queries, dk_sum, input_precision=PRECISION)

    _store(dk + row * D, first, dk_sum * scale, BLOCK_N, T, D, BLOCK_D, WHOLE)
    _store(dv + row * D, first, dv_sum, BLOCK_N, T, D, BLOCK_D, WHOLE)


# (widest d, bytes of an element): BLOCK of the own side, BLOCK of the side walked, warps, stages,
# and the registers a thread may have where that lets one more block onto an SM. The fastest guess
# that fits the registers without spills, on Hopper and elsewhere. The own side is a multiple of the
# walked one, which walks whole tiles.
_FORWARD = {
    True: {
        (64, 2): (128, 64, 8, 2, 128), (128, 2): (128, 32, 8, 2, None),
        (256, 2): (32, 32, 8, 1, None), (64, 4): (32, 16, 4, 2, None),
    },
    False: {
        (64, 2): (64, 64, 4, 2, 168), (128, 2): (64, 32, 4, 2, None),
        (256, 2): (32, 32, 8, 1, None), (64, 4): (32, 16, 4, 2, None),
    },
}  # fmt: skip
_BACKWARD_Q = {
    True: {
        (64, 2): (64, 64, 4, 2, None), (128, 2): (64, 32, 4, 2, None),
        (256, 2): (16, 16, 4, 1, None), (64, 4): (16, 16, 4, 1, None),
    },
    False: {
        (64, 2): (64, 64, 4, 2, None), (128, 2): (32, 32, 4, 2, None),
        (256, 2): (16, 16, 4, 1, None), (64, 4): (16, 16, 4, 1, None),
    },
}  # fmt: skip
_BACKWARD_KV = {
    True: {
        (64, 2): (64, 32, 4, 2, None), (128, 2): (64, 32, 8, 1, None),
        (256, 2): (16, 16, 8, 1, 255), (64, 4): (16, 16, 4, 1, None),
    },
    False: {
        (64, 2): (64, 32, 4, 2, None), (128, 2): (32, 32, 4, 1, None),
        (256, 2): (16, 16, 8, 1, 255), (64, 4): (16, 16, 4, 1, None),
    },
}  # fmt: skip


def _shape(q: Tensor, table: dict, swap: bool = False) -> dict:
    """Tile constants and options for the head dim and dtype of q."""
    block_d = power_of_2(q.shape[-1], 16, 256)
    own, walked, warps, stages, registers = table[hopper(q)][max(64, block_d), q.element_size()]
    return {
        "BLOCK_M": walked if swap else own,
        "BLOCK_N": own if swap else walked,
        "BLOCK_D": block_d,
        "WHOLE": q.shape[-1] == block_d,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        # a second product costs registers that only these have
        "RETRY": q.element_size() == 2 and block_d <= (128 if hopper(q) else 64),
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers,
        "enable_fp_fusion": True,
    }


def _far(**tensors: Tensor) -> str | None:
    """A stride too long for int32 offsets inside a block of at most 128 rows and 256 columns."""
    for name, t in tensors.items():
        if 128 * abs(t.stride(2)) + 256 * abs(t.stride(3)) >= 2**31:
            return f"{name} has strides {t.stride()}"
    return None


def unsupported_causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why these inputs cannot run: dtypes, d above 256 (64 for float32), or very long strides."""
    limit = 64 if q.dtype == torch.float32 else 256  # three TF32 operands spill above it
    if q.shape[-1] > limit:
        return f"head dim {q.shape[-1]} is above {limit} for {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] > 2**20:  # 65,535 blocks of 16 along the second axis of the grid
        return f"{q.shape[2]} tokens are above {2**20}"
    return not_floats(q=q, k=k, v=v) or _far(q=q, k=k, v=v)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Writes out [B, H, T, d], contiguous, and lse [B, H, T] float32; q, k, v of any strides."""
    B, H, T, d = q.shape
    if q.numel() == 0:
        return
    shape = _shape(q, _FORWARD)
    shape["SIGN"] = (scale > 0) - (scale < 0)  # taken into q: the maximum is that of bare scores
    scale_log2 = abs(scale) * _LOG2E if scale else 1.0
    with on_device(q):
        _forward[(B * H, triton.cdiv(T, shape["BLOCK_M"]))](
            q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), H, T, d, scale_log2, **shape
        )


def unsupported_causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> str | None:
    """Why these inputs cannot run, as for the forward pass."""
    return unsupported_causal_attention(q, k, v, scale) or not_floats(grad=grad) or _far(grad=grad)


def scratch_causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor]:
    """δ of every row."""
    return (torch.empty_like(lse),)


def causal_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
) -> None:
    """Writes dq, dk, dv [B, H, T, d], contiguous; grad of any strides, out and lse as left."""
    B, H, T, d = q.shape
    if q.numel() == 0:
        return
    strides = (*grad.stride(), *q.stride(), *k.stride(), *v.stride())
    rest = (*strides, H, T, d, scale, scale * _LOG2E)
    rows, keys = _shape(q, _BACKWARD_Q), _shape(q, _BACKWARD_KV, swap=True)
    with on_device(q):
        _backward_q[(B * H, triton.cdiv(T, rows["BLOCK_M"]))](
            grad, q, k, v, out, lse, dq, delta, *rest, **rows
        )
        _backward_kv[(B * H, triton.cdiv(T, keys["BLOCK_N"]))](
            grad, q, k, v, lse, delta, dk, dv, *rest, **keys
        )
