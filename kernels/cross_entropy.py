"""Token loss of a row of logits, and its gradient; no table of probabilities.

Computes: top_n = max_v x_nv,  log_sum_n = log Σ_v exp(x_nv − top_n),
          loss_n = log_sum_n − (x_nt − top_n);
          dx_nv = g_n · (exp(x_nv − top_n − log_sum_n) − [v = t]).
Contract: logits [N, V] contiguous, targets [N] int64; a target outside 0..V-1 gives a loss of NaN
    and reads nothing.
Numerics: float32, the maximum taken out first; the order of a row's sum depends on V alone.
Shape of the code: one program per row, up to 4096 values in registers at a time, the running
    maximum and the rescaled running sum kept per lane and merged once at the end. Reads the row
    once forward; once, with one write, backward.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_contiguous, not_floats, on_device, power_of_2

_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _forward(logits, targets, loss, top, log_sum, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(high, x)
        # a lane that has seen nothing but -inf must not take inf from inf
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(high - base) + tl.exp(x - base)
        high = new
    best = tl.max(high, axis=0)
    total = tl.sum(total * tl.exp(high - best), axis=0)  # NaN for a row whose best is not finite
    log_total = tl.log(total)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    chosen = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(top + row, best)
    tl.store(log_sum + row, log_total)
    tl.store(loss + row, log_total - (chosen - best))


@triton.jit
def _backward(grad, grad_stride, logits, targets, top, log_sum, dx, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    dx += row * V
    g = tl.load(grad + row * grad_stride)  # stride 0 below a sum or a mean
    best = tl.load(top + row)
    log_total = tl.load(log_sum + row)
    target = tl.load(targets + row)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < V, other=0.0).to(tl.float32)
        p = tl.exp(x - best - log_total)
        d = g * (p - tl.where(at == target, 1.0, 0.0))
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=at < V)


def _shape(V: int) -> dict[str, int]:
    block = power_of_2(V, 64, 4096)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512)), **_OPTIONS}


def unsupported_cross_entropy(logits: Tensor, targets: Tensor) -> str | None:
    """Why these inputs cannot run: dtypes, or strided logits or targets."""
    return not_floats(logits=logits) or not_contiguous(logits=logits, targets=targets)


def cross_entropy(
    logits: Tensor, targets: Tensor, loss: Tensor, top: Tensor, log_sum: Tensor
) -> None:
    """Writes loss, top and log_sum, [N] float32 each, from logits [N, V] and targets [N] int64."""
    N, V = logits.shape
    if N:
        with on_device(logits):
            _forward[(N,)](logits, targets, loss, top, log_sum, V, **_shape(V))


def unsupported_cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor
) -> str | None:
    """Why these inputs cannot run, as for the forward pass."""
    return not_floats(grad=grad) or unsupported_cross_entropy(logits, targets)


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor, dx: Tensor
) -> None:
    """Writes dx [N, V], dtype of logits, from grad [N], any stride, top and log_sum."""
    N, V = logits.shape
    if N:
        with on_device(logits):
            _backward[(N,)](grad, grad.stride(0), logits, targets, top, log_sum, dx, V, **_shape(V))
