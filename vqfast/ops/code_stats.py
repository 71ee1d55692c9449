"""How many rows each code has, and their sum.

    counts_k = |{n : idx_n = k}|        sums_k = Σ_{n : idx_n = k} z_n

The EMA update, the codebook gradient, usage and perplexity all come from these two; no one-hot N×K
matrix is built. Sums are accumulated in float64 in ascending n and rounded once: the same bits on
every backend, thread count and run.

Cost: reads N·D values and N indices, writes K·D + K.
Source: arXiv:1711.00937 appendix A.1 (the EMA statistics).
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op

# the function of this name replaces the module as attribute of vqfast.ops
_code_order = importlib.import_module("vqfast.ops.code_order")

_VALUES = 1 << 21  # float64 values of z held at once by the reference


def _reference(indices: Tensor, z: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """indices [N], z [N, D] -> counts [K] int64, sums [K, D] float32 (float64 for float64 z)."""
    N, D = z.shape
    counts = torch.bincount(indices, minlength=K)  # [K]
    sums = torch.zeros(K, D, dtype=torch.float64, device=z.device)
    rows = max(1, _VALUES // D)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        _code_order.add_rows(sums, indices[part], z[part].double())
    return counts, sums.to(_sums_dtype(z))


def _sums_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _outputs(indices: Tensor, z: Tensor, K: int) -> tuple[Tensor, Tensor]:
    counts = indices.new_empty((K,), dtype=torch.int64)
    return counts, z.new_empty((K, z.shape[1]), dtype=_sums_dtype(z))


_OP = Op(
    "code_stats(Tensor indices, Tensor z, int K) -> (Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def collect(indices: Tensor, z: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Checked inputs: indices [N] in range, z [N, D] -> counts [K], sums [K, D]; no autograd."""
    return _OP(indices.detach().contiguous(), z.detach().contiguous(), K)


def code_stats(indices: Tensor, z: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Count and sum of the rows that belong to each code.

    Args:
        indices: [...] integers in 0..K−1.
        z: [..., D] floating point on the device of indices, D ≥ 1.
        K: number of codes, ≥ 1.

    Returns:
        counts [K] int64 and sums [K, D] float32 (float64 for float64 z). Codes without rows give 0.

    Raises:
        TypeError: indices are not integers, z is not floating point, K is not an int.
        ValueError: shapes disagree, an index is out of range, K < 1, or devices differ. (The range
            is not looked at while torch.compile traces; the kernels then raise IndexError.)

    Numerics: float64 accumulation in ascending n, one rounding; equal bits on every backend, thread
        count and run. Nothing is differentiable through this function.
    Cost: reads N·D values and N indices, writes K·D + K.
    Source: arXiv:1711.00937 appendix A.1.
    """
    _check.integer_tensor("indices", indices)
    _check.floating("z", z)
    _check.same_device("z", z, "indices", indices)
    K = _check.integer("K", K, low=1)
    if z.dim() == 0 or z.shape[:-1] != indices.shape or z.shape[-1] == 0:
        raise ValueError(
            f"z must be {[*indices.shape, 'D']} to match indices, D >= 1, got {list(z.shape)}"
        )
    flat = indices.reshape(-1).to(torch.int64)
    if not torch.compiler.is_compiling() and flat.numel():
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= K:
            raise ValueError(f"indices must be in 0..{K - 1}, got {low if low < 0 else high}")
    return collect(flat, z.reshape(-1, z.shape[-1]), K)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int]:
    """Seeded inputs of the raw op; `case.shape`: N, K, D. Tag "skewed": most rows on one code."""
    N, K, D = (case.shape[k] for k in "NKD")
    g = torch.Generator().manual_seed(N + 31 * K + 977 * D)
    indices = torch.randint(K, (N,), generator=g)
    if "skewed" in case.tags:
        indices[: N * 9 // 10] = K // 2
    return indices.to(device), torch.randn(N, D, generator=g).to(device, dtype), K


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops), float32."""
    N, K, D = (case.shape[k] for k in "NKD")
    return 4 * (N * D + K * D) + 8 * (N + K), N * D
