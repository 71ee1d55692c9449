"""What one batch adds to the moving averages of a codebook, in one tensor to reduce over ranks.

    packed_k = (Σ_{n: idx_n = k} z_n,  |{n : idx_n = k}|)        over the rows that are finite

[K, D + 1]: `all_reduce(packed)` is the whole communication of a step, and `ema_update` reads it as
it is. Sums are accumulated in float64 in ascending n and rounded once.

Cost: reads N·D values and N row numbers, writes K·(D + 1).
Source: arXiv:1711.00937 appendix A.1.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op

# functions of these names replace the modules as attributes of vqfast.ops
_code_order = importlib.import_module("vqfast.ops.code_order")

_VALUES = 1 << 21  # float64 values of z held at once by the reference


def _reference(z: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """z [N, D], order [N], start [K + 1] -> packed [K, D + 1]."""
    D, K = z.shape[1], len(start) - 1
    packed = torch.zeros(K, D + 1, dtype=torch.float64, device=z.device)
    owner = _code_order.code_of_place(start, len(order))  # [N]
    inside = (owner >= 0) & (owner < K)
    for rows in torch.arange(len(order), device=z.device)[inside].split(max(1, _VALUES // D)):
        x = z[order[rows]].double()  # [rows, D]
        healthy = x.isfinite().all(1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)[healthy]  # [rows, D + 1]
        _code_order.add_rows(packed, owner[rows][healthy], x)
    return packed.to(_packed_type(z))


def _packed_type(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _outputs(z: Tensor, order: Tensor, start: Tensor) -> Tensor:
    return z.new_empty((start.shape[0] - 1, z.shape[1] + 1), dtype=_packed_type(z))


_OP = Op(
    "ema_stats(Tensor z, Tensor order, Tensor start) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def ema_stats(indices: Tensor, z: Tensor, K: int) -> Tensor:
    """Sums and counts of one batch. Private: the EMA quantizer is its user and has checked all.

    Args:
        indices: [N] int64 in 0..K−1.
        z: [N, D] floating point; a row that is not finite is left out.
        K: number of codes, ≥ 1.

    Returns:
        packed [K, D + 1] float32 (float64 for float64 z): sums, and in the last column counts
        (exact up to 2²⁴). Not differentiable.
    """
    order, start = _code_order.code_order(indices, K)
    return _OP(z.detach().contiguous(), order, start)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded inputs of the raw op; `case.shape`: N, K, D; one row in nine is not finite."""
    N, K, D = (case[k] for k in "NKD")
    indices, _ = _code_order.sample_inputs(case, dtype, "cpu")
    z = torch.randn(N, D, generator=torch.Generator().manual_seed(N + 977 * D))
    z[4::9, D // 2] = float("inf")
    order, start = _code_order._OP.reference(indices, K)
    return z.to(device, dtype), order.to(device), start.to(device)


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops), float32."""
    N, K, D = (case[k] for k in "NKD")
    return 4 * (N * D + K * (D + 1)) + 8 * (N + K), N * D
