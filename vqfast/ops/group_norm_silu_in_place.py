"""Group normalisation followed by SiLU, over its input, without gradient.

x ← u · σ(u),   u = w_c · (x − mean_g) / √(var_g + eps) + b_c

For an input that nobody reads again: no second map is taken from memory, which for a new map of
float32 costs more time than the normalisation itself.

Cost: reads x twice and writes it.
Source: arXiv:1803.08494 eq. 1-7.
"""

from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op
from vqfast.ops.group_norm_silu import _reference as _reference_of_group_norm_silu
from vqfast.ops.group_norm_silu import _validate
from vqfast.ops.group_norm_silu import sample_inputs as _inputs


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    y, mean, rstd = _reference_of_group_norm_silu(x, weight, bias, groups, eps)
    x.copy_(y)
    return mean, rstd


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((x.shape[0], groups), dtype=stat)
    return mean, torch.empty_like(mean)


_OP = Op(
    "group_norm_silu_in_place(Tensor(a!) x, Tensor weight, Tensor bias, int groups, float eps)"
    " -> (Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def group_norm_silu_in_place(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """`group_norm_silu` with the result in the memory of x.

    Args:
        x: [B, C, *positions] float32, float16 or bfloat16 (float64 on the reference), 2 to 6 dims,
            overwritten. Contiguous and channels-last layouts are fast.
        weight: [C] floating point; may be wider than x.
        bias: [C] likewise.
        groups: divides C.
        eps: added to the variance, >= 0.

    Returns:
        x.

    Raises:
        TypeError, ValueError: as `group_norm_silu`.
        RuntimeError: a gradient is asked for.

    Numerics: the bits of `group_norm_silu`.
    Cost: two reads of x and one write.
    Source: arXiv:1803.08494.
    """
    groups, eps = _validate(x, weight, bias, groups, eps)
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(
                f"group_norm_silu_in_place has no gradient, but {name} requires one: use "
                "group_norm_silu"
            )
    _OP(x, weight.contiguous(), bias.contiguous(), groups, eps)
    return x


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw op for a case with shape B, C, H, W, groups; x is channels_last."""
    x, *rest = _inputs(case, dtype, device)
    return x.contiguous(memory_format=torch.channels_last), *rest


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32: x read twice and written) and flops."""
    n = case.shape["B"] * case.shape["C"] * case.shape["H"] * case.shape["W"]
    return 12 * n, 20 * n
