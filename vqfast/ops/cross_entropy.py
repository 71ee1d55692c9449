"""Cross-entropy of logits against integer targets, without a table of probabilities.

loss_n = log Σ_v exp(x_nv) − x_nt        ∂loss_n/∂x_nv = exp(x_nv − top_n − log_sum_n) − [v = t]

The normaliser is kept in two parts, top_n = max_v x_nv and log_sum_n = log Σ_v exp(x_nv − top_n):
their float32 sum would lose the digits of log_sum when the logits are large.

Cost: reads the logits once forward (a row stays in cache between its two passes); one read and one
write backward.
Source: the definition; torch.nn.functional.cross_entropy for the meaning of the arguments.
"""

from typing import Any

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op

_CHUNK = 1 << 22  # logits that the reference widens at a time
_REDUCTIONS = ("mean", "sum", "none")


def _validate(logits: Any, targets: Any, reduction: Any) -> None:
    _check.floating("logits", logits)
    _check.integer_tensor("targets", targets)
    _check.choice("reduction", reduction, _REDUCTIONS)
    _check.same_device("targets", targets, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {list(logits.shape)}")
    _check.shape("targets", targets, logits.shape[:-1], "to match logits without their last dim")
    # a graph, a fake or a meta tensor has no data to look at; there a bad target gives NaN
    has_data = type(targets) is Tensor and not targets.is_meta
    if targets.numel() and has_data and not torch.compiler.is_compiling():
        low, high = (int(t) for t in targets.aminmax())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"targets must be in 0..{logits.shape[-1] - 1} to match logits, got {low}..{high}"
            )


def _blocks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    return [slice(n, n + step) for n in range(0, logits.shape[0], step)]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, top, log_sum = _outputs(logits, targets)
    V = logits.shape[1]
    for rows in _blocks(logits):
        x, t = _wide(logits[rows]), targets[rows]  # [rows, V], [rows]
        top[rows] = x.amax(1)
        log_sum[rows] = (x - top[rows, None]).exp().sum(1).log()
        chosen = x.gather(1, t.clamp(0, V - 1)[:, None])[:, 0]  # [rows]
        inside = (t >= 0) & (t < V)
        loss[rows] = torch.where(inside, log_sum[rows] - (chosen - top[rows]), torch.nan)
    return loss, top, log_sum


def _outputs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(logits.shape[:1], dtype=kind)
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _reference_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor
) -> Tensor:
    dx = _outputs_backward(grad, logits, targets, top, log_sum)
    at = torch.arange(logits.shape[1], device=logits.device)  # [V]
    for rows in _blocks(logits):
        p = (_wide(logits[rows]) - top[rows, None] - log_sum[rows, None]).exp()  # [rows, V]
        p = p - (at == targets[rows, None]).to(p.dtype)
        dx[rows] = (p * grad[rows, None]).to(dx.dtype)
    return dx


def _outputs_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, top: Tensor, log_sum: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape)


_OP = Op(
    "cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)
_BACKWARD = Op(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor top, Tensor log_sum)"
    " -> Tensor",
    reference=_reference_backward,
    outputs=_outputs_backward,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, top, log_sum = _OP(logits, targets)
        ctx.save_for_backward(logits, targets, top, log_sum)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _BACKWARD(grad, *ctx.saved_tensors), None


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of the targets under softmax(logits).

    loss_n = log Σ_v exp(x_nv) − x_nt

    Args:
        logits: [..., V] float32, float16 or bfloat16 (float64 on the reference); contiguous for no
            copy.
        targets: [...] integers in 0..V-1.
        reduction: "mean", "sum" or "none".

    Returns:
        [] or, for "none", [...]; float32 (float64 for float64). Differentiable once in logits.

    Raises:
        TypeError: logits are not floating point, or targets are not integers.
        ValueError: shapes or devices disagree, V = 0, unknown reduction, or a target out of range
            (under torch.compile and on the meta device the range is not looked at: there such a
            target gives NaN, never a wild read).

    Numerics: float32 sums over a row, the largest logit taken out first; the loss is accurate also
        when the logits share a large offset. A row whose largest logit is not finite gives NaN.
    Cost: reads N·V values; backward reads and writes N·V.
    Source: torch.nn.functional.cross_entropy.
    """
    _validate(logits, targets, reduction)
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    loss = _CrossEntropy.apply(flat, targets.reshape(-1).to(torch.int64).contiguous())
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.mean() if reduction == "mean" else loss.sum()


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw op for a case with shape N, V."""
    g = torch.Generator().manual_seed(0)
    N, V = case.shape["N"], case.shape["V"]
    logits = 3 * torch.randn(N, V, generator=g)
    return logits.to(device, dtype), torch.randint(V, (N,), generator=g).to(device)


def sample_backward_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw backward op for the same case."""
    logits, targets = sample_inputs(case, dtype, device)
    loss, top, log_sum = _OP(logits, targets)
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return grad, logits, targets, top, log_sum


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read once) and flops of the forward pass."""
    n = case.shape["N"] * case.shape["V"]
    return 4 * n, 12 * n
