"""The nearest code of each row, what it is replaced by, the loss and the histogram, in one call.

    idx_n = argmin_k score(z_n, c_k)       as in `nearest`
    z_q,n = y[idx_n]       loss = weight · mean((z_q − x)²)       counts_k = |{n : idx_n = k}|

x [N, D] and y [K, D] are z and the codebook themselves, but for "cosine", which searches by float64
norms of its own and looks up in rows and codes that autograd has normalised. A kernel that decides
a row has it and its code at hand: the lookup then costs the writing of z_q.

Cost: that of `nearest`, and 2·N·D + K values.
Source: arXiv:1711.00937 eq. 1-3.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast._dispatch import Op

# functions of these names replace the modules as attributes of vqfast.ops
_nearest = importlib.import_module("vqfast.ops.nearest")
_straight_through = importlib.import_module("vqfast.ops.straight_through")


def _histogram(indices: Tensor, K: int) -> Tensor:
    """indices [N] in 0..K−1 -> counts [K] int64."""
    return indices.new_zeros(K).scatter_add(0, indices, torch.ones_like(indices))


def _reference(
    z: Tensor, codebook: Tensor, x: Tensor, codes: Tensor, metric: int, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, x [N, D], codebook, codes [K, D] -> indices, distances [N], z_q [N, D], loss [], partial,
    counts [K]."""
    indices, distances = _nearest._reference(z, codebook, metric)
    z_q, loss, partial = _straight_through._reference(x, codes, indices, weight)
    return indices, distances, z_q, loss, partial, _histogram(indices, len(codebook))


def _outputs(
    z: Tensor, codebook: Tensor, x: Tensor, codes: Tensor, metric: int, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices, distances = _nearest._outputs(z, codebook, metric)
    counts = indices.new_empty((codebook.shape[0],))
    return indices, distances, *_straight_through._outputs(x, codes, indices, weight), counts


_OP = Op(
    "nearest_quantize(Tensor z, Tensor codebook, Tensor x, Tensor codes, int metric, float weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def nearest_quantize(
    z: Tensor, codebook: Tensor, x: Tensor, codes: Tensor, metric: str, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass of `quantize`, without autograd. Private: `quantize` is its user.

    Args:
        z: [N, D] floating point, contiguous, as all of these: what is searched for.
        codebook: [K, D] floating point: what is searched.
        x: [N, D] floating point: what is replaced.
        codes: [K, D] floating point: by what.
        metric: "l2", "cosine" or "dot".
        weight: of the mean of squares.

    Returns:
        z_q [N, D] of the dtype of x, loss [] float32 (float64 for float64), indices [N] and counts
        [K] int64. Equal bits, whether one call does it or, for very many rows, several.
    """
    if torch.compiler.is_compiling() or len(z) <= _nearest.rows_of_a_call(codebook):
        kind = _nearest.METRICS[metric]
        indices, _, z_q, loss, _, counts = _OP(z, codebook, x, codes, kind, weight)
        return z_q, loss, indices, counts
    indices, _ = _nearest.search(z, codebook, metric)
    z_q, loss = _straight_through.straight_through(x, codes, indices, weight)
    return z_q, loss, indices, _histogram(indices, len(codebook))


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Seeded inputs of the raw op; `case.shape`: N, K, D, which also pick the metric."""
    z, codebook, _, weight = _straight_through.sample_inputs(case, dtype, device)
    x, codes, metric = z, codebook, (case["N"] + case["K"]) % 3
    if metric == _nearest.METRICS["cosine"]:
        x, codes = (F.normalize(t.float(), dim=-1) for t in (z, codebook))
    return z, codebook, x, codes, metric, weight


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops), float32."""
    N, K, D = (case[k] for k in "NKD")
    return 4 * (2 * N * D + K * D) + 20 * N + 8 * K, 2 * N * K * D + 3 * N * D
