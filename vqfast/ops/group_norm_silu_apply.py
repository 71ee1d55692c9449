"""Group normalisation with given statistics, followed by SiLU, without gradient.

y = u · σ(u),   u = w_c · (x − mean_g) · rstd_g + b_c

The second half of `group_norm_silu`, for statistics that come from elsewhere: of a whole image
whose tiles are normalised one by one, or from what made x.

Cost: reads x and writes y.
Source: arXiv:1803.08494 eq. 1-7.
"""

from typing import Any

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op


def _validate(x: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
    named = (("x", x), ("weight", weight), ("bias", bias), ("mean", mean), ("rstd", rstd))
    for name, t in named:
        _check.floating(name, t)
        _check.same_device(name, t, "x", x)
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(
                f"group_norm_silu_apply has no gradient, but {name} requires one: use "
                "group_norm_silu"
            )
    _check.ndim("x", x, (2, 6))
    B, C = x.shape[:2]
    for name, t in named[1:3]:
        _check.shape(name, t, [C], "to match the channels of x")
    _check.ndim("mean", mean, 2)
    _check.shape("mean", mean, [B, mean.shape[1]], "to match the images of x")
    _check.shape("rstd", rstd, list(mean.shape), "to match mean")
    if mean.shape[1] == 0 or C % mean.shape[1]:
        raise ValueError(f"mean must be [{B}, groups] of {C} channels, got {list(mean.shape)}")


def _reference(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    B, C = x.shape[:2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_channel = (1, C, *(1,) * (x.ndim - 2))
    per_image = (B, C, *(1,) * (x.ndim - 2))
    mu, scale = (t.repeat_interleave(C // t.shape[1], 1).reshape(per_image) for t in (mean, rstd))
    w, b = (t.to(wide).reshape(per_channel) for t in (weight, bias))
    u = (x.to(wide) - mu) * scale * w + b
    return torch.empty_like(x).copy_(u * u.sigmoid())


def _outputs(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x)


_OP = Op(
    "group_norm_silu_apply(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
    " -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def group_norm_silu_apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """SiLU of x, normalised by the mean and the reciprocal deviation of each group.

    Args:
        x: [B, C, *positions] float32, float16 or bfloat16 (float64 on the reference), 2 to 6 dims.
            Contiguous and channels-last layouts are read in place; any other is copied.
        weight: [C] floating point; may be wider than x.
        bias: [C] likewise.
        mean: [B, groups] of the C/groups channels of each group; groups divides C. Any floating
            point; float32 for no copy.
        rstd: [B, groups]: 1 / √(var + eps).

    Returns:
        y like x: shape, dtype and layout. No gradient.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices disagree, or groups does not divide C.
        RuntimeError: a gradient is asked for.

    Numerics: float32, rounded once. With the statistics that `group_norm_silu` finds, its bits.
    Cost: one read of x and one write.
    Source: arXiv:1803.08494.
    """
    _validate(x, weight, bias, mean, rstd)
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (t.to(wide).contiguous() for t in (mean, rstd))
    return _OP(x if last else x.contiguous(), weight.contiguous(), bias.contiguous(), mean, rstd)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Inputs of the raw op for a case with shape B, C, H, W, groups."""
    g = torch.Generator().manual_seed(0)
    B, C, H, W, groups = (case.shape[n] for n in ("B", "C", "H", "W", "groups"))
    x = torch.randn(B, H, W, C, generator=g).movedim(-1, 1)
    weight, bias = 1 + 0.1 * torch.randn(C, generator=g), 0.1 * torch.randn(C, generator=g)
    mean, rstd = torch.randn(B, groups, generator=g), 0.5 + torch.rand(B, groups, generator=g)
    tensors = (t.to(device, dtype) for t in (x, weight, bias))
    return *tensors, mean.to(device), rstd.to(device)


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32: x read, y written) and flops."""
    n = case.shape["B"] * case.shape["C"] * case.shape["H"] * case.shape["W"]
    return 8 * n, 12 * n
