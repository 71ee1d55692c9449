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
Shape of the code: forward and dq take one block of rows and walk the keys, the block on the
    diagonal last; dk and dv take one block of keys and walk the rows. Heavy blocks start first.
    Only blocks that the diagonal crosses are masked. There a zero weight may stand against NaN, so
    hidden values are taken out before the product (`_visible_dot`). δ is summed again by each
    program that needs it: d products a row against 4·d·BLOCK, and no scratch memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_floats, on_device, power_of_2

_LOG2E = 1.4426950408889634
LOG2E = tl.constexpr(_LOG2E)


@triton.jit
def _tile(x, base, start, ROWS: tl.constexpr, row_stride, col_stride, T, D, COLS: tl.constexpr):
    """[ROWS, COLS] of x from row `start`; rows >= T and cols >= D are zero.

    The block's address is int64, offsets inside it are int32 (see `_far`), which saves registers.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    x += base + tl.cast(start, tl.int64) * row_stride
    mask = (start + row < T)[:, None] & (col < D)[None, :]
    return tl.load(x + row[:, None] * row_stride + col[None, :] * col_stride, mask=mask, other=0.0)


@triton.jit
def _visible_dot(weight, x, result_at, x_at, acc, FORWARD: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weight @ x; weight [M, N] is zero for hidden pairs, where x [N, D] may not be finite.

    Row m sees row n if x_at[n] <= result_at[m] (FORWARD), or >= (not FORWARD). What is not finite
    shows, as NaN, in the rows that see it.
    """
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    clean = tl.where(finite, x, 0.0).to(x.dtype)
    acc = tl.dot(weight.to(x.dtype), clean, acc, input_precision=PRECISION)
    if FORWARD:
        bad = tl.min(tl.where(finite, 2147483647, x_at[:, None]), axis=0)  # [D], the first bad row
        return tl.where(result_at[:, None] >= bad[None, :], float("nan"), acc)
    bad = tl.max(tl.where(finite, -1, x_at[:, None]), axis=0)  # [D], the last bad row
    return tl.where(result_at[:, None] <= bad[None, :], float("nan"), acc)


@triton.jit
def _forward_block(
    query, k, v, k_base, v_base, k_t, k_d, v_t, v_d, row, start, acc, high, total, T, D, scale_log2,
    DIAGONAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_at = start + tl.arange(0, BLOCK_N)
    key = _tile(k, k_base, start, BLOCK_N, k_t, k_d, T, D, BLOCK_D)
    value = _tile(v, v_base, start, BLOCK_N, v_t, v_d, T, D, BLOCK_D)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, N]
    visible = key_at[None, :] <= row[:, None]
    if DIAGONAL:
        score = tl.where(visible, score, float("-inf"))
    # the maximum of the bare scores, so that scale enters in the multiply-add of the exponent
    new = tl.maximum(high, tl.max(score, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new * scale_log2)
    weight = tl.exp2(score * scale_log2 - base[:, None])
    shrink = tl.exp2(high * scale_log2 - base)
    total = total * shrink + tl.sum(weight, axis=1)
    acc = acc * shrink[:, None]
    if DIAGONAL:
        acc = _visible_dot(weight, value, row, key_at, acc, True, PRECISION)
    else:
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, new, total


@triton.jit
def _forward(
    q, k, v, out, lse,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    heads, H, T, D, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = (tl.cdiv(T, BLOCK_M) - 1 - pid // heads) * BLOCK_M  # the longest rows first
    head = (pid % heads).to(tl.int64)
    b, h = head // H, head % H
    row = first + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)
    query = _tile(q, b * q_b + h * q_h, first, BLOCK_M, q_t, q_d, T, D, BLOCK_D)
    if SIGN != 1:
        query = (query * SIGN).to(query.dtype)
    k_base, v_base = b * k_b + h * k_h, b * v_b + h * v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, first, BLOCK_N):
        acc, high, total = _forward_block(
            query, k, v, k_base, v_base, k_t, k_d, v_t, v_d, row, start, acc, high, total, T, D,
            scale_log2, False, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    for start in range(first, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        acc, high, total = _forward_block(
            query, k, v, k_base, v_base, k_t, k_d, v_t, v_d, row, start, acc, high, total, T, D,
            scale_log2, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    empty = total == 0.0
    mean = acc / tl.where(empty, 1.0, total)[:, None]
    at = (head * T + row)[:, None] * D + col[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=(row < T)[:, None] & (col < D)[None, :])
    log_sum = tl.where(empty, float("inf"), (high * scale_log2 + tl.log2(total)) / LOG2E)
    tl.store(lse + head * T + row, log_sum, mask=row < T)


@triton.jit
def _weights(score, lse, visible, DIAGONAL: tl.constexpr):
    """exp2 of scores in base 2 less their lse; hidden ones zero."""
    weight = tl.exp2(score - lse)
    return tl.where(visible, weight, 0.0) if DIAGONAL else weight


@triton.jit
def _dq_block(
    query, up, delta, row_lse, k, v, k_base, v_base, k_t, k_d, v_t, v_d, row, start, acc, T, D,
    scale_log2,
    DIAGONAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_at = start + tl.arange(0, BLOCK_N)
    key = _tile(k, k_base, start, BLOCK_N, k_t, k_d, T, D, BLOCK_D)
    value = _tile(v, v_base, start, BLOCK_N, v_t, v_d, T, D, BLOCK_D)
    visible = key_at[None, :] <= row[:, None]
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
    weight = _weights(score, row_lse[:, None], visible, DIAGONAL)
    d_weight = tl.dot(up, tl.trans(value), input_precision=PRECISION)
    d_score = weight * (d_weight - delta[:, None])
    if DIAGONAL:
        d_score = tl.where(visible, d_score, 0.0)
        return _visible_dot(d_score, key, row, key_at, acc, True, PRECISION)
    return tl.dot(d_score.to(key.dtype), key, acc, input_precision=PRECISION)


@triton.jit
def _backward_q(
    grad, q, k, v, out, lse, dq,
    g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    heads, H, T, D, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = (tl.cdiv(T, BLOCK_M) - 1 - pid // heads) * BLOCK_M
    head = (pid % heads).to(tl.int64)
    b, h = head // H, head % H
    row = first + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_D)
    query = _tile(q, b * q_b + h * q_h, first, BLOCK_M, q_t, q_d, T, D, BLOCK_D)
    up = _tile(grad, b * g_b + h * g_h, first, BLOCK_M, g_t, g_d, T, D, BLOCK_D)
    result = _tile(out, head * T * D, first, BLOCK_M, D, 1, T, D, BLOCK_D)
    delta = tl.sum(up.to(tl.float32) * result.to(tl.float32), axis=1)
    row_lse = tl.load(lse + head * T + row, mask=row < T, other=float("inf")) * LOG2E
    k_base, v_base = b * k_b + h * k_h, b * v_b + h * v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, first, BLOCK_N):
        acc = _dq_block(
            query, up, delta, row_lse, k, v, k_base, v_base, k_t, k_d, v_t, v_d, row, start, acc,
            T, D, scale_log2, False, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    for start in range(first, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        acc = _dq_block(
            query, up, delta, row_lse, k, v, k_base, v_base, k_t, k_d, v_t, v_d, row, start, acc,
            T, D, scale_log2, True, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    at = (head * T + row)[:, None] * D + col[None, :]
    mask = (row < T)[:, None] & (col < D)[None, :]
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_block(
    key, value, grad, q, out, lse, g_base, q_base, o_base, l_base, g_t, g_d, q_t, q_d,
    key_at, start, dk, dv, T, D, scale_log2,
    DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, BLOCK_M)
    query = _tile(q, q_base, start, BLOCK_M, q_t, q_d, T, D, BLOCK_D)
    up = _tile(grad, g_base, start, BLOCK_M, g_t, g_d, T, D, BLOCK_D)
    result = _tile(out, o_base, start, BLOCK_M, D, 1, T, D, BLOCK_D)
    delta = tl.sum(up.to(tl.float32) * result.to(tl.float32), axis=1)
    row_lse = tl.load(lse + l_base + row, mask=row < T, other=float("inf")) * LOG2E
    visible = key_at[:, None] <= row[None, :]  # [N, M]
    score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2
    weight = _weights(score, row_lse[None, :], visible, DIAGONAL)
    d_weight = tl.dot(value, tl.trans(up), input_precision=PRECISION)
    d_score = weight * (d_weight - delta[None, :])
    if DIAGONAL:
        d_score = tl.where(visible, d_score, 0.0)
        dv = _visible_dot(weight, up, key_at, row, dv, False, PRECISION)
        dk = _visible_dot(d_score, query, key_at, row, dk, False, PRECISION)
    else:
        dv = tl.dot(weight.to(up.dtype), up, dv, input_precision=PRECISION)
        dk = tl.dot(d_score.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_kv(
    grad, q, k, v, out, lse, dk, dv,
    g_b, g_h, g_t, g_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    heads, H, T, D, scale, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = (pid // heads) * BLOCK_N  # the first keys are seen by most rows
    head = (pid % heads).to(tl.int64)
    b, h = head // H, head % H
    key_at = first + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    key = _tile(k, b * k_b + h * k_h, first, BLOCK_N, k_t, k_d, T, D, BLOCK_D)
    value = _tile(v, b * v_b + h * v_h, first, BLOCK_N, v_t, v_d, T, D, BLOCK_D)
    g_base, q_base = b * g_b + h * g_h, b * q_b + h * q_h
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + BLOCK_N, T), BLOCK_M):
        key_sum, value_sum = _dkv_block(
            key, value, grad, q, out, lse, g_base, q_base, head * T * D, head * T, g_t, g_d,
            q_t, q_d, key_at, start, key_sum, value_sum, T, D, scale_log2,
            True, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
    for start in range(first + BLOCK_N, T, BLOCK_M):
        key_sum, value_sum = _dkv_block(
            key, value, grad, q, out, lse, g_base, q_base, head * T * D, head * T, g_t, g_d,
            q_t, q_d, key_at, start, key_sum, value_sum, T, D, scale_log2,
            False, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
    at = (head * T + key_at)[:, None] * D + col[None, :]
    mask = (key_at < T)[:, None] & (col < D)[None, :]
    tl.store(dk + at, (key_sum * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, value_sum.to(dv.dtype.element_ty), mask=mask)


# (widest d, bytes of an element): BLOCK of the own side, BLOCK of the side walked, warps, stages.
# The fastest guess that fits the registers without spills on sm_80 and sm_90. The own side is a
# multiple of the walked one: the walk turns from masked to unmasked tiles at its end.
_FORWARD = {
    (64, 2): (128, 64, 8, 3), (128, 2): (128, 32, 8, 3), (256, 2): (32, 32, 8, 1),
    (64, 4): (32, 32, 4, 2),
}  # fmt: skip
_BACKWARD_Q = {
    (64, 2): (64, 64, 8, 2), (128, 2): (64, 32, 4, 2), (256, 2): (32, 32, 8, 1),
    (64, 4): (32, 32, 8, 1),
}  # fmt: skip
_BACKWARD_KV = {
    (64, 2): (64, 32, 8, 1), (128, 2): (64, 16, 8, 1), (256, 2): (16, 16, 8, 1),
    (64, 4): (32, 32, 8, 1),
}  # fmt: skip


def _shape(q: Tensor, table: dict, swap: bool = False) -> dict:
    """Tile constants and options for the head dim and dtype of q."""
    block_d = power_of_2(q.shape[-1], 16, 256)
    own, walked, warps, stages = table[max(64, block_d), q.element_size()]
    return {
        "BLOCK_M": walked if swap else own,
        "BLOCK_N": own if swap else walked,
        "BLOCK_D": block_d,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
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
        _forward[(triton.cdiv(T, shape["BLOCK_M"]) * B * H,)](
            q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(),
            B * H, H, T, d, scale_log2, **shape,
        )  # fmt: skip


def unsupported_causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> str | None:
    """Why these inputs cannot run, as for the forward pass."""
    return unsupported_causal_attention(q, k, v, scale) or not_floats(grad=grad) or _far(grad=grad)


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
) -> None:
    """Writes dq, dk, dv [B, H, T, d], contiguous; grad of any strides, out and lse as left."""
    B, H, T, d = q.shape
    if q.numel() == 0:
        return
    rest = (
        *grad.stride(), *q.stride(), *k.stride(), *v.stride(),
        B * H, H, T, d, scale, scale * _LOG2E,
    )  # fmt: skip
    rows, keys = _shape(q, _BACKWARD_Q), _shape(q, _BACKWARD_KV, swap=True)
    with on_device(q):
        _backward_q[(triton.cdiv(T, rows["BLOCK_M"]) * B * H,)](
            grad, q, k, v, out, lse, dq, *rest, **rows
        )
        _backward_kv[(triton.cdiv(T, keys["BLOCK_N"]) * B * H,)](
            grad, q, k, v, out, lse, dk, dv, *rest, **keys
        )
