"""Rows in the order of their codes: what every sum over the rows of a code starts from.

    order = the rows of code 0, then those of code 1, ...; ascending within a code
    start_k = number of rows of the codes before k;  rows of k: order[start_k : start_{k+1}]

With it a sum per code is one pass, in one order, without a one-hot matrix and without atomic
additions. A counting sort on the CPU; torch's stable (radix) sort elsewhere.

Cost: reads N indices twice, writes N + K.
Source: Knuth, The Art of Computer Programming, vol. 3, 5.2 (distribution counting).
"""

from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op


def _reference(indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """indices [N] int64 -> order [N], start [K + 1] int64; what is outside of 0..K-1 has no
    code."""
    codes, order = torch.sort(indices, stable=True)
    edges = torch.arange(K + 1, device=indices.device)
    return order, torch.searchsorted(codes, edges)


def _outputs(indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(indices), indices.new_empty((K + 1,))


_OP = Op(
    "code_order(Tensor indices, int K) -> (Tensor, Tensor)", reference=_reference, outputs=_outputs
)


def code_order(indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Sort rows by code. Private: the caller has checked that all indices are in 0..K−1.

    Args:
        indices: [N] int64.
        K: number of codes, ≥ 1.

    Returns:
        order [N] and start [K + 1], int64.
    """
    return _OP(indices.detach().contiguous(), K)


def code_of_place(start: Tensor, N: int) -> Tensor:
    """[N]: the code of the row at each place of the order, the last that starts at or before it."""
    place = torch.arange(N, device=start.device)
    return torch.searchsorted(start, place, right=True) - 1


def add_rows(sums: Tensor, codes: Tensor, rows: Tensor) -> None:
    """sums[codes[n]] += rows[n] in ascending n, in place; for the references."""
    if sums.device.type == "cpu":
        sums.index_add_(0, codes, rows)
    else:  # index_add_ is not deterministic there; index_put_ sorts first
        sums.index_put_((codes,), rows, accumulate=True)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, int]:
    """Seeded inputs of the raw op; `case.shape`: N, K. Tag "skewed": most rows on one code."""
    N, K = case["N"], case["K"]
    g = torch.Generator().manual_seed(N + 31 * K)
    indices = torch.randint(K, (N,), generator=g)
    if "skewed" in case.tags:
        indices[: N * 9 // 10] = K // 2
    return indices.to(device), K


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops)."""
    return 8 * (3 * case["N"] + case["K"]), 0
