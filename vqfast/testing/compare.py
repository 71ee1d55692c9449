"""THE comparisons. tests/test_compare.py plants faults in each and sees them found."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqfast.testing import tolerances


def budget_ratio(out: Tensor | None, plain: Tensor, exact: Tensor, factor: float) -> float:
    """Error of `out` as a part of what it may be; right if <= 1.

    Args:
        out: the result under test. None, another shape, or a value that is not finite where `exact`
            is, gives infinity.
        plain: the same in plain torch at the same dtype.
        exact: the same in float64.
        factor: tolerances.FORWARD or tolerances.BACKWARD.
    """
    if out is None or out.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    out64, plain64, exact64 = (t.detach().double() for t in (out, plain, exact))
    if not torch.equal(out64.isnan(), exact64.isnan()):
        return math.inf
    same = out64 == exact64  # infinities too
    error = (out64 - exact64).abs().masked_fill(same | exact64.isnan(), 0.0).max()
    finite = exact64[exact64.isfinite()].abs()
    scale = finite.max() if finite.numel() else exact64.new_zeros(())
    torch_error = (plain64 - exact64).abs().nan_to_num(0.0, 0.0, 0.0).max()
    eps = max(tolerances.EPS[out.dtype], tolerances.STATISTICS_EPS)
    allowed = factor * torch_error + eps * scale
    ratio = (error / allowed.clamp_min(1e-300)).item()
    return ratio if math.isfinite(ratio) else math.inf


def exact_mismatches(out: Tensor, expected: Tensor) -> int:
    """Elements that differ; another shape or dtype counts as all of them."""
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return max(1, out.numel(), expected.numel())
    return int((out != expected).sum())


def chi_square_p(counts: Sequence[int] | Tensor, probabilities: Tensor) -> float:
    """p-value of drawing `counts` from `probabilities` [V]; 0 when anything lies outside the
    support."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    p = probabilities.double() / probabilities.double().sum()
    if bool((n[p == 0] > 0).any()):
        return 0.0
    expected = (p * n.sum())[p > 0]
    statistic = ((n[p > 0] - expected) ** 2 / expected).sum()
    freedom = max(1, int((p > 0).sum()) - 1)
    return float(
        torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64), statistic / 2)
    )


def nearest_wrong_rows(idx: Tensor, z: Tensor, codebook: Tensor, metric: str = "l2") -> int:
    """How many indices [N] break the contract's float64 rule for z [N, D] against codebook [K,
    D]."""
    if idx.dtype != torch.int64 or idx.shape != z.shape[:-1]:
        return max(1, z.shape[0])
    z64, c64 = z.detach().double(), codebook.detach().double()
    dead = ~c64.isfinite().all(1)
    odd = ~z64.isfinite().all(1)
    c64, z64 = c64.masked_fill(dead[:, None], 0.0), z64.masked_fill(odd[:, None], 0.0)
    if metric == "cosine":
        z64, c64 = (torch.nn.functional.normalize(t, dim=1) for t in (z64, c64))
    if metric == "dot":
        score = -(z64 @ c64.T)
        slack = 1e-13 * z64.norm(dim=1) * c64.norm(dim=1).max()
    else:
        score = torch.cdist(z64, c64, compute_mode="donot_use_mm_for_euclid_dist").square()
        slack = torch.full_like(score[:, 0], 1e-14 if metric == "cosine" else 1e-300)
    score = score.masked_fill(dead, math.inf)
    outside = (idx < 0) | (idx >= len(codebook))
    safe = idx.clamp(0, len(codebook) - 1)
    best = score.min(1).values
    got = score.gather(1, safe[:, None])[:, 0]
    wrong = outside | ~(got <= best + best.abs() * tolerances.NEAREST_REGRET + slack)
    # bitwise-equal codes: the first of them
    _, inverse = torch.unique(codebook.double().nan_to_num(1e300) + 0.0, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(codebook)).scatter_reduce(
        0, inverse, torch.arange(len(codebook)), "amin"
    )
    wrong |= first[inverse[safe]] != safe
    wrong[odd] = idx[odd] != 0
    return int(wrong.sum())
