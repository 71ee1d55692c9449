"""3x3 convolution that also finds the statistics of what it writes, without gradient.

    y = conv3x3(x),   mean_g and rstd_g = 1 / √(var_g + eps) of y over the O/groups channels of a
    group and all positions of an image

A group normalisation that follows then reads y once (`group_norm_silu_apply`), not twice. The C++
kernel takes them while its results are in registers, from tiles of 4x4 and direct sums; it refuses
the others, where a pass over y is cheaper. The reference computes them from y.

Cost: that of `conv3x3`; one read of y less in the normalisation.
Source: arXiv:1803.08494 eq. 1-6; the convolution as in `conv3x3`.
"""

from typing import Any

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op, forced_backend
from vqfast.ops import _conv3x3 as shared


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = shared.reference(x, weight, bias, residual, scale)  # [B, sH, sW, O]
    B, O = y.shape[0], y.shape[-1]  # noqa: E741 - the letter of the contract's kernels
    wide = torch.promote_types(y.dtype, torch.float32)
    values = y.reshape(B, y.shape[1:3].numel(), groups, O // groups).to(wide)
    # rounding of a large mean must not reach the variance
    mean = values.mean((1, 3), keepdim=True)
    mean = mean + (values - mean).mean((1, 3), keepdim=True)
    variance = (values - mean).square().mean((1, 3))
    return y, mean.flatten(1), (variance + eps).rsqrt()


def _outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty((x.shape[0], groups), dtype=wide)
    return shared.outputs(x, weight, bias, residual, scale), mean, torch.empty_like(mean)


_OP = Op(
    "conv3x3_stats(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int scale, int groups,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def conv3x3_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv3x3`, with the statistics of its result for the group normalisation that follows.

    Args:
        x, weight, bias, residual: as `conv3x3` takes them.
        groups: divides O.
        eps: added to the variance, >= 0.

    Returns:
        y: [B, O, H, W], the bits of `conv3x3`.
        mean: [B, groups] float32 (float64 of float64), of y as it is, rounded to its dtype.
        rstd: [B, groups] likewise: 1 / √(var + eps), var biased. Both as `group_norm_silu_apply`
            takes them.

    Raises:
        TypeError, ValueError, RuntimeError: as `conv3x3`; or groups is no int or does not divide
            O; eps is no number or below 0.

    Numerics: of a few hundred values in float32, about their mean and less one of them, merged in
        float64: a large offset costs no digits. Equal for any number of threads and any batch.
    Cost: as `conv3x3`.
    Source: arXiv:1803.08494.
    """
    given = shared.rows("conv3x3_stats", x, weight, bias, residual, 1)
    groups, outs = _check.integer("groups", groups, low=1), len(weight)
    if outs % groups or outs == 0:
        raise ValueError(f"weight must have outputs that groups = {groups} divides, got {outs}")
    y, mean, rstd = _OP(*given, groups, _check.number("eps", eps, low=0.0))
    return y.movedim(-1, 1), mean, rstd


def conv3x3_perhaps_stats(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """y, and mean and rstd where they cost less than another pass over y; else None.

    Args, Raises: as `conv3x3_stats`.
    """
    given = shared.rows("conv3x3_stats", x, weight, bias, residual, 1)
    pays = forced_backend() in (None, "cpu") and _OP.reason("cpu", (*given, groups, eps)) is None
    if not pays:
        return torch.ops.vqfast.conv3x3(*given).movedim(-1, 1), None
    y, mean, rstd = _OP(*given, groups, eps)
    return y.movedim(-1, 1), (mean, rstd)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of the raw op for a case of `conv3x3` with groups."""
    return *shared.sample_inputs(case, dtype, device), case.shape["groups"], 1e-6


COST = shared.COST
