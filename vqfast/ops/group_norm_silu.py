"""Group normalisation followed by SiLU, in one pass over memory more than a copy.

x̂ = (x − mean_g) · rstd_g,   u = w_c · x̂ + b_c,   y = u · σ(u),   rstd = 1 / √(var + eps)

mean and (biased) variance are taken over the C/groups channels of a group and all positions.
Backward, with du = dy · σ(u) · (1 + u · (1 − σ(u))) and n values in a group:

dw_c = Σ du · x̂,   db_c = Σ du,   dx = rstd · (w·du − Σ_g(w·du)/n − x̂ · Σ_g(w·du·x̂)/n)

Cost: reads x twice and writes y (the second read comes from cache where a group fits); backward
reads x and dy twice.
Source: arXiv:1803.08494 eq. 1-7; CompVis/taming-transformers
taming/modules/diffusionmodules/model.py (Normalize, nonlinearity).
"""

from typing import Any

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op


def _validate(x: Any, weight: Any, bias: Any, groups: Any, eps: Any) -> tuple[int, float]:
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        _check.floating(name, t)
    _check.ndim("x", x, (2, 6))
    channels = x.shape[1]
    for name, t in (("weight", weight), ("bias", bias)):
        _check.same_device(name, t, "x", x)
        _check.shape(name, t, [channels], "to match the channels of x")
    groups = _check.integer("groups", groups, low=1)
    if channels % groups or channels == 0:
        raise ValueError(f"x must have channels that groups = {groups} divides, got {channels}")
    return groups, _check.number("eps", eps, low=0.0)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    """x in one of the two layouts that kernels read; no copy if it has it."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, C = x.shape[:2]
    positions = x.shape[2:].numel()  # named, because -1 means nothing in an empty batch
    u = _wide(x, x).reshape(B, groups, C // groups * positions)  # [B, groups, n]
    mean = u.mean(-1)  # [B, groups]
    mean = mean + (u - mean[..., None]).mean(-1)  # what rounding left of a large offset
    centred = u - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()  # [B, groups]
    u = (centred * rstd[..., None]).reshape(B, C, positions)  # [B, C, n / (C / groups)]
    u = u * _wide(weight, x)[:, None] + _wide(bias, x)[:, None]
    y = torch.empty_like(x)
    y.copy_((u * u.sigmoid()).reshape(x.shape))
    return y, mean, rstd


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((x.shape[0], groups), dtype=stat)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    B, C = x.shape[:2]
    rows, planes = (B, groups, x.shape[1:].numel() // groups), (B, C, x.shape[2:].numel())
    w, b = _wide(weight, x)[:, None], _wide(bias, x)[:, None]  # [C, 1]
    x_hat = (_wide(x, x).reshape(rows) - mean[..., None]) * rstd[..., None]  # [B, groups, n]
    u = x_hat.reshape(planes) * w + b  # [B, C, n / (C / groups)]
    gate = u.sigmoid()
    du = _wide(grad, x).reshape(planes) * gate * (1 + u * (1 - gate))
    dw, db = (du * x_hat.reshape(planes)).sum((0, 2)), du.sum((0, 2))  # [C]
    dx_hat = (du * w).reshape(rows)  # [B, groups, n]
    along = (dx_hat * x_hat).mean(-1, keepdim=True)
    dx = rstd[..., None] * (dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * along)
    grads = _outputs_backward(grad, x, weight, bias, mean, rstd, groups)
    for into, value in zip(grads, (dx.reshape(x.shape), dw, db), strict=True):
        into.copy_(value)
    return grads


def _outputs_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


_OP = Op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)
_BACKWARD = Op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor rstd, int groups) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    outputs=_outputs_backward,
)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        y, mean, rstd = _OP(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad = _dense(grad, _channels_last(x))
        grads = _BACKWARD(grad, x, weight, bias, mean, rstd, ctx.groups)
        wanted = ctx.needs_input_grad
        return *(g if w else None for g, w in zip(grads, wanted[:3], strict=True)), None, None


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """SiLU of the group-normalised input: the pair before every convolution of a VQGAN.

    y = u · σ(u),   u = w_c · (x − mean_g) / √(var_g + eps) + b_c

    Args:
        x: [B, C, *positions] float32, float16 or bfloat16 (float64 on the reference), 2 to 6 dims.
            Contiguous and channels-last layouts are read in place; any other is copied.
        weight: [C] floating point; may be wider than x, as under autocast.
        bias: [C] likewise.
        groups: divides C.
        eps: added to the variance, >= 0.

    Returns:
        y like x: shape, dtype and layout. Differentiable once in x, weight and bias.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor; groups is not an int; eps is
            not a number.
        ValueError: wrong number of dims, groups does not divide C, weight or bias is not [C],
            devices differ, eps < 0.

    Numerics: mean and variance are merged in float64 from blocks of float32 sums about the block's
        own mean, so a large offset costs no digits; everything after them is float32 and rounded
        once. Equal results for any number of threads.
    Cost: two reads of x and one write; 2 reads of x and grad and one write backward.
    Source: arXiv:1803.08494; taming/modules/diffusionmodules/model.py (Normalize, nonlinearity).
    """
    groups, eps = _validate(x, weight, bias, groups, eps)
    x = _dense(x, _channels_last(x))
    return _GroupNormSilu.apply(x, weight.contiguous(), bias.contiguous(), groups, eps)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw op for a case with shape B, C, H, W, groups."""
    g = torch.Generator().manual_seed(0)
    B, C, H, W, groups = (case.shape[n] for n in ("B", "C", "H", "W", "groups"))
    x = torch.randn(B, C, H, W, generator=g)
    weight, bias = 1 + 0.1 * torch.randn(C, generator=g), 0.1 * torch.randn(C, generator=g)
    return *(t.to(device, dtype) for t in (x, weight, bias)), groups, 1e-6


def sample_backward_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw backward op for the same case."""
    x, weight, bias, groups, eps = sample_inputs(case, dtype, device)
    _, mean, rstd = _OP(x, weight, bias, groups, eps)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(x.shape, generator=g).to(device, dtype)
    return grad, x, weight, bias, mean, rstd, groups


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32: x read twice, y written) and flops of the forward pass."""
    n = case.shape["B"] * case.shape["C"] * case.shape["H"] * case.shape["W"]
    return 12 * n, 20 * n
