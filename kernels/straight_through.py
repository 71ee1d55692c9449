"""Codes of given indices and the mean square of the replacement; the gradient that passes through.

Computes: z_q[n] = c_{idx_n},  partial[b] = Σ (c − z)² over the 64 rows of block b,
          loss = weight · Σ partial / (N·D);
          grad_z = grad_z_q + 2·to_z·grad_loss/(N·D) · (z − codes).
Contract: all contiguous. An index outside of 0..K-1 reads nothing; its row of z_q is 0.
Numerics: differences and squares in float64; every sum has an order fixed by N and D: no atomics.
    The gradient is three float32 operations, not fused.
Shape of the code: forward, a program owns 64 rows and walks them 8 at a time (kernels/_lookup.py);
    one program adds the partial sums. Reads z and the codes once, writes z_q.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels import _lookup
from vqfast.kernels._tuning import not_contiguous, not_floats, on_device

_FLAT = 4096  # values of a program of the backward pass


@triton.jit
def _forward(
    z, codebook, indices, z_q, partial, N, K, D,
    ROWS: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    total = tl.full([], 0.0, tl.float64)
    for begin in range(0, ROWS, PART):
        n = tl.program_id(0).to(tl.int64) * ROWS + begin + tl.arange(0, PART)
        code = tl.load(indices + n, mask=n < N, other=-1)
        total += _lookup.replace(z, codebook, z_q, n, code, N, K, D, PART, BLOCK_D)
    tl.store(partial + tl.program_id(0), total)


@triton.jit
def _backward(
    grad_z_q, grad_loss, z, codes, grad_z, count, scale,
    HAS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    step = tl.load(grad_loss).to(tl.float32) * scale
    x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(codes + at, mask=mask, other=0.0).to(tl.float32)
    d = (x - c) * step
    if HAS_GRAD:
        d = tl.load(grad_z_q + at, mask=mask, other=0.0).to(tl.float32) + d
    tl.store(grad_z + at, d.to(grad_z.dtype.element_ty), mask=mask)


def unsupported_straight_through(
    z: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> str | None:
    """Why these inputs cannot run: float64, or strides."""
    return not_floats(z=z, codebook=codebook) or not_contiguous(
        z=z, codebook=codebook, indices=indices
    )


def straight_through(
    z: Tensor, codebook: Tensor, indices: Tensor, weight: float,
    z_q: Tensor, loss: Tensor, partial: Tensor,
) -> None:  # fmt: skip
    """Writes z_q [N, D], loss [] and partial [ceil(N / 64)] float64."""
    (N, D), K = z.shape, codebook.shape[0]
    with on_device(z):
        if N:  # with no bound of registers named ptxas spills to use fewer
            _forward[(partial.shape[0],)](
                z, codebook, indices, z_q, partial, N, K, D,
                ROWS=_lookup.BLOCK, PART=_lookup.PART, BLOCK_D=_lookup.columns(D),
                num_warps=_lookup.WARPS, maxnreg=128, enable_fp_fusion=False,
            )  # fmt: skip
        _lookup.merge(partial, partial, loss, N * D, weight)


def unsupported_straight_through_backward(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codes: Tensor, to_z: float
) -> str | None:
    """Why these inputs cannot run: float64, or strides."""
    given = {} if grad_z_q is None else {"grad_z_q": grad_z_q}
    return not_floats(z=z, codes=codes, **given) or not_contiguous(z=z, codes=codes, **given)


def straight_through_backward(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codes: Tensor, to_z: float,
    grad_z: Tensor,
) -> None:  # fmt: skip
    """Writes grad_z [N, D], dtype of z, from grad_z_q (None is zero), z and codes [N, D]."""
    count = z.numel()
    if count:
        with on_device(z):
            _backward[(triton.cdiv(count, _FLAT),)](
                z if grad_z_q is None else grad_z_q, grad_loss, z, codes, grad_z, count,
                2.0 * to_z / count,
                HAS_GRAD=grad_z_q is not None, BLOCK=_FLAT, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
