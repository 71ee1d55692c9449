"""Both gradients of `quantize`, code after code.

Computes: with c_k = codebook[k] and the rows n of code k, order[start[k]] .. order[start[k + 1]):
          grad_z[n] = grad_z_q[n] + 2·to_z·grad_loss/(N·D) · (z[n] − c_k)
          grad_codes[k] = 2·to_codes·grad_loss/(N·D) · Σ_n (c_k − z[n])
Contract: all contiguous; order [N] is a permutation sorted by code, start [K + 1] ascends from 0 to
    N. A code without rows gets zero.
Numerics: a sum of differences in float64, as ROWS interleaved sums that are added at the end: one
    order for a given D, no atomics, equal bits in every run. grad_z is three float32 operations,
    not fused.
Shape of the code: a program owns one code and a slab of columns; the code stays in registers while
    its rows pass, ROWS at a time. z and grad_z_q are read once, grad_z and grad_codes written once.
    A code with very many rows is walked by one program: a skewed histogram costs time, not
    correctness.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_contiguous, not_floats, on_device, power_of_2

_TILE = 512  # values of a tile


@triton.jit
def _gradients(
    grad_z_q, grad_loss, z, codebook, order, start, grad_z, grad_codes, D, scale, to_z, to_codes,
    HAS_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, ROWS)
    real = col < D
    step = tl.load(grad_loss).to(tl.float32) * scale
    begin = tl.load(start + k)
    rows = (tl.load(start + k + 1) - begin).to(tl.int32)
    code = tl.load(codebook + k * D + col, mask=real, other=0.0).to(tl.float32)  # [BLOCK_D]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float64)
    for done in range(0, rows, ROWS):
        mine = done + lane < rows
        n = tl.load(order + begin + done + lane, mask=mine, other=0).to(tl.int64)  # [ROWS]
        at = n[:, None] * D + col[None, :]
        mask = mine[:, None] & real[None, :]
        x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        d = (x - code[None, :]) * (step * to_z)
        if HAS_GRAD:
            d = tl.load(grad_z_q + at, mask=mask, other=0.0).to(tl.float32) + d
        tl.store(grad_z + at, d.to(grad_z.dtype.element_ty), mask=mask)
        acc += tl.where(mask, code[None, :].to(tl.float64) - x.to(tl.float64), 0.0)
    total = tl.sum(acc, axis=0) * (step * to_codes).to(tl.float64)
    # a step that is not finite leaves codes without rows alone
    total = tl.where(rows > 0, total, 0.0)
    tl.store(grad_codes + k * D + col, total.to(grad_codes.dtype.element_ty), mask=real)


def unsupported_quantize_backward(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codebook: Tensor, order: Tensor,
    start: Tensor, to_z: float, to_codes: float,
) -> str | None:  # fmt: skip
    """Why these inputs cannot run: float64, strides, or a grid that is too large."""
    given = {} if grad_z_q is None else {"grad_z_q": grad_z_q}
    if triton.cdiv(z.shape[1], 256) > 65535:  # second axis of the grid
        return f"D = {z.shape[1]} is too large"
    return not_floats(z=z, codebook=codebook, **given) or not_contiguous(
        z=z, codebook=codebook, order=order, start=start, **given
    )


def quantize_backward(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codebook: Tensor, order: Tensor,
    start: Tensor, to_z: float, to_codes: float, grad_z: Tensor, grad_codes: Tensor,
) -> None:  # fmt: skip
    """Writes grad_z [N, D] like z and grad_codes [K, D] like codebook; grad_z_q None is zero."""
    K, D = codebook.shape
    block_d = power_of_2(D, 1, 256)
    rows = power_of_2(_TILE // block_d, 1, 16)
    with on_device(z):
        _gradients[(K, triton.cdiv(D, block_d))](
            z if grad_z_q is None else grad_z_q, grad_loss, z, codebook, order, start,
            grad_z, grad_codes, D, 2.0 / max(1, z.numel()), to_z, to_codes,
            HAS_GRAD=grad_z_q is not None, ROWS=rows, BLOCK_D=block_d,
            num_warps=4 if rows * block_d == _TILE else 1, enable_fp_fusion=False,
        )  # fmt: skip
