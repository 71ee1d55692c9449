"""The search and what follows it in `quantize`: z_q, the loss and the histogram.

Computes: indices and distances as kernels/nearest.py; z_q[n] = codes[idx_n]; counts[k] = how many
    rows have code k; loss = weight · Σ (z_q − x)² / (N·D), with the sums of squares of 64 rows in
    `partial`.
Contract: that of kernels/nearest.py for z and codebook; x [N, D] and codes [K, D] contiguous.
Numerics: the loss has the bits of kernels/straight_through.py. Counts are integers, added by atomic
    additions: their order does not matter.
Shape of the code: the five launches of the search: `pack` sets the counts to zero, and what decides
    8 rows looks them up; then one program adds their sums.
"""

import torch
import triton
from torch import Tensor
from vqfast.kernels import _lookup
from vqfast.kernels import _nearest_launch as launch
from vqfast.kernels._tuning import not_contiguous, not_floats, on_device


def unsupported_nearest_quantize(
    z: Tensor, codebook: Tensor, x: Tensor, codes: Tensor, metric: int, weight: float
) -> str | None:
    """Why these inputs cannot run: dtypes, strides, D above 4000, or K of 2^23 and more."""
    return (
        launch.refusal(z, codebook)
        or not_floats(x=x, codes=codes)
        or not_contiguous(x=x, codes=codes)
    )


def scratch_nearest_quantize(
    z: Tensor, codebook: Tensor, x: Tensor, codes: Tensor, metric: int, weight: float
) -> tuple[Tensor, ...]:
    """Working memory of the search, and the sums of squares of 8 rows each."""
    parts = z.new_empty(triton.cdiv(len(z), _lookup.PART), dtype=torch.float64)
    return *launch.scratch(z, codebook), parts


def nearest_quantize(
    z: Tensor, codebook: Tensor, x: Tensor, codes: Tensor, metric: int, weight: float,
    indices: Tensor, distances: Tensor, z_q: Tensor, loss: Tensor, partial: Tensor, counts: Tensor,
    *scratch: Tensor,
) -> None:  # fmt: skip
    """Writes indices [N] int64, scores [N] float32, z_q [N, D] like x, loss [], partial
    [ceil(N / 64)] float64 and counts [K] int64."""
    if len(z) == 0:
        loss.zero_()
        counts.zero_()
        return
    *memory, parts = scratch
    lookup = launch.Lookup(x, codes, z_q, parts, counts)
    launch.search(z, codebook, metric, indices, distances, memory, lookup)
    with on_device(z):
        _lookup.merge(parts, partial, loss, z.numel(), weight)
