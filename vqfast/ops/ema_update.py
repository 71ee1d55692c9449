"""One step of a codebook's moving averages, in place, from the packed statistics of a batch.

    n_k ← γ n_k + (1 − γ)·count_k        s_k ← γ s_k + (1 − γ)·sum_k
    ñ_k = (n_k + eps) / (Σn + K·eps) · Σn        c_k ← s_k / ñ_k

A batch without rows changes nothing. One pass over K·D values.

Cost: reads 2·K·D values, writes 2·K·D.
Source: arXiv:1711.00937 appendix A.1; smoothed counts as in sonnet's VectorQuantizerEMA.
"""

from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op


def _reference(
    cluster_size: Tensor,
    embed_avg: Tensor,
    weight: Tensor,
    packed: Tensor,
    decay: float,
    eps: float,
) -> Tensor:
    """cluster_size [K], embed_avg and weight [K, D], packed [K, D + 1] -> totals [2]."""
    sums, counts = packed[:, :-1], packed[:, -1]
    # a select and not a branch: the host need not wait for the device
    some = counts.any()
    cluster_size.copy_(torch.where(some, cluster_size.lerp(counts, 1.0 - decay), cluster_size))
    embed_avg.copy_(torch.where(some, embed_avg.lerp(sums, 1.0 - decay), embed_avg))
    total = cluster_size.sum()
    smooth = (cluster_size + eps) / (total + len(cluster_size) * eps) * total
    weight.copy_(torch.where(some, embed_avg / smooth[:, None], weight))
    return torch.stack([total, counts.sum()])


def _outputs(
    cluster_size: Tensor,
    embed_avg: Tensor,
    weight: Tensor,
    packed: Tensor,
    decay: float,
    eps: float,
) -> Tensor:
    return cluster_size.new_empty((2,))


_OP = Op(
    "ema_update(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) weight, Tensor packed,"
    " float decay, float eps) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


def ema_update(
    cluster_size: Tensor,
    embed_avg: Tensor,
    weight: Tensor,
    packed: Tensor,
    *,
    decay: float,
    eps: float,
) -> Tensor:
    """Move the averages by one batch and set the codes. Private: the EMA quantizer is its user.

    Args:
        cluster_size: [K], written in place; n.
        embed_avg: [K, D], written in place; s.
        weight: [K, D], written in place; c.
        packed: [K, D + 1] from `ema_stats`, summed over ranks; all of one dtype and contiguous.
        decay: γ, in [0, 1).
        eps: > 0.

    Returns:
        totals [2]: Σ cluster_size after the step, and Σ of the batch's counts.
    """
    return _OP(cluster_size, embed_avg, weight, packed, decay, eps)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Seeded inputs of the raw op, float32 whatever dtype; a third of the codes without rows."""
    K, D = case["K"], case["D"]
    g = torch.Generator().manual_seed(K + 977 * D)
    counts = torch.randint(5, (K,), generator=g).float()
    counts[::3] = 0.0
    if not case["N"]:
        counts.zero_()
    sums = torch.randn(K, D, generator=g) * counts[:, None]
    size = torch.rand(K, generator=g) + 0.1
    average = torch.randn(K, D, generator=g)
    weight = average / size[:, None]
    packed = torch.cat([sums, counts[:, None]], dim=1)
    return *(t.to(device) for t in (size, average, weight, packed)), 0.99, 1e-5


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops), float32."""
    K, D = case["K"], case["D"]
    return 4 * (4 * K * D + 3 * K), 4 * K * D
