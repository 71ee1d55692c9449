"""Exact nearest code: a screen on the tensor cores with a proved bound, then float64 on what the
bound leaves.

Computes: idx_n = argmin_k score(z_n, c_k), and that score, as vqfast/ops/nearest.py defines it (l2,
    cosine, dot).
Contract: z [N, D], codebook [K, D], contiguous, D <= 4000, K < 2^23. Lowest index on ties of the
    float64 score; a row that is not finite gives 0 and NaN; a code that is not finite never wins.
Numerics: kernels/_nearest_screen.py proves which groups of codes may hold the answer. Their codes
    are scored in float64: direct differences, in index order, without fused multiply-add. Rows
    without a certificate (more than three groups, three in one slot, scales too far apart) are
    scored against all codes.
Shape of the code: five launches, see kernels/_nearest_launch.py. Scratch memory: 2 bytes a packed
    column of rows and codes, 24 bytes a row and split.
"""

from torch import Tensor
from vqfast.kernels import _nearest_launch as launch


def unsupported_nearest(z: Tensor, codebook: Tensor, metric: int) -> str | None:
    """Why these inputs cannot run: dtypes, strides, D above 4000, or K of 2^23 and more."""
    return launch.refusal(z, codebook)


def scratch_nearest(z: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, ...]:
    """Working memory of the launches."""
    return launch.scratch(z, codebook)


def nearest(
    z: Tensor, codebook: Tensor, metric: int, indices: Tensor, distances: Tensor, *scratch: Tensor
) -> None:
    """Writes indices [N] int64 and scores [N] float32; metric 0 is l2, 1 cosine, 2 dot."""
    if len(z):
        launch.search(z, codebook, metric, indices, distances, scratch)
