"""Exact nearest code: idx_n = argmin_k score(z_n, c_k), by one float64 score on every backend.

    l2      score = Σ_i (z_i − c_i)²      in index order, each term rounded before it is added
    cosine  the same, after both sides are divided by max(√Σ x_i², 1e-12)
    dot     score = −Σ_i z_i·c_i

The lowest index wins among equal scores. A row that holds a NaN or an infinity gets index 0 and
score NaN; a code that holds one is left out. The reference screens with a float64 matrix product
about the median m of the codes: with a = z − m, b = c − m and g = (D + 8)·2⁻⁵², half the score
and |a|²/2 + |b|²/2 − ⟨a, b⟩ as computed differ by less than g·(|a| + |b|)² ≤ 2g·(|a|² + |b|²).
Only codes inside that bound of the best one are scored directly.

Cost: N·K·D multiply-adds, reads N·D + K·D values; N×K is never held.
Source: the definition is this project's; formula of arXiv:1711.00937 eq. 1-2.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op

METRICS = {"l2": 0, "cosine": 1, "dot": 2}
_PAIRS = 1 << 21  # (row, code) pairs screened at once by the reference: 16 MiB of float64
_VALUES = 1 << 20  # float64 values of a slice of pairs that are scored directly
# multiply-adds per call on the CPU, some tenths of a second: Ctrl-C is seen between calls
_WORK = 1 << 34
# values of z per call elsewhere: kernels keep a copy of z and records of each row, some 128 MiB
_PACKED = 1 << 25


def check(z: Any, codebook: Any, metric: Any) -> None:
    """The argument checks that `nearest` and `quantize` share."""
    _check.floating("z", z)
    _check.floating("codebook", codebook)
    _check.choice("metric", metric, METRICS)
    _check.same_device("codebook", codebook, "z", z)
    if z.dim() == 0:
        raise ValueError("z must be [..., D], got a tensor without dimensions")
    if codebook.dim() != 2:
        raise ValueError(f"codebook must be [K, D], got shape {list(codebook.shape)}")
    if codebook.shape[1] != z.shape[-1]:
        raise ValueError(
            f"codebook must be [K, {z.shape[-1]}] to match z's last dim, got {list(codebook.shape)}"
        )
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"codebook must hold K >= 1 codes of D >= 1, got {list(codebook.shape)}")


def _in_order(terms: Tensor) -> Tensor:
    """Sum over the last dim, one addition after another: [P, D] -> [P]."""
    columns = terms.T.contiguous()  # [D, P]
    total = torch.zeros_like(columns[0])
    for column in columns:
        total = total + column
    return total


def _normalized(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) row by row, [P, D] float64."""
    norm = _in_order(x * x).sqrt().clamp_min(1e-12)
    return x / norm[:, None]


def _score(z: Tensor, codes: Tensor, metric: int) -> Tensor:
    """The definition, for pairs of rows: [P, D] float64 each (normalised for cosine) -> [P]."""
    if metric == METRICS["dot"]:
        return -_in_order(z * codes)
    difference = z - codes
    return _in_order(difference * difference)


def _centre(codes: Tensor) -> Tensor:
    """Median of each coordinate over a sample, [D]; a mean would follow a single huge code."""
    step = max(1, len(codes) // 257)
    return codes[::step].median(dim=0).values


def _survivors(z: Tensor, codes: Tensor, square: Tensor, metric: int) -> Tensor:
    """Which codes may have the least score, [rows, K] bool; z and codes about the centre."""
    g = (z.shape[1] + 8) * torch.finfo(torch.float64).eps
    length = (z * z).sum(1)  # [rows]
    if metric == METRICS["dot"]:
        screen = -(z @ codes.T)  # [rows, K]
        slack = torch.zeros_like(square)
        own = 2 * g * (length * square.max()).sqrt()
    else:
        screen = torch.addmm(square / 2, z, codes.T, alpha=-1)
        slack = 2 * g * square  # [K]
        own = 4 * g * length
    value, best = screen.min(dim=1)
    bound = value + slack[best] + own  # [rows]
    screen -= slack
    # a NaN, from squares that overflow in float64 inputs, excludes nothing
    return ~(screen > bound[:, None])


def _reference(z: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    """z [N, D], codebook [K, D] -> indices [N] int64, scores [N] float32."""
    N, D = z.shape
    indices = torch.zeros(N, dtype=torch.int64, device=z.device)
    scores = torch.full((N,), float("nan"), dtype=torch.float64, device=z.device)
    good = codebook.isfinite().all(1).nonzero()[:, 0]  # ids of the codes that take part
    rows = max(1, _PAIRS // max(1, len(good)))
    codes = codebook[good].double()
    if metric == METRICS["cosine"]:
        codes = _normalized(codes)
    shift = torch.zeros_like(codebook[0], dtype=torch.float64)
    if metric != METRICS["dot"] and len(good):
        shift = _centre(codes)
    centred = codes - shift
    square = (centred * centred).sum(1)
    for start in range(0, N if len(good) else 0, rows):
        part = z[start : start + rows]
        healthy = part.isfinite().all(1).nonzero()[:, 0]
        x = part[healthy].double()
        if metric == METRICS["cosine"]:
            x = _normalized(x)
        row, code = _survivors(x - shift, centred, square, metric).nonzero(as_tuple=True)  # [P]
        score = torch.empty(len(row), dtype=torch.float64, device=z.device)
        step = max(1, _VALUES // D)
        for i in range(0, len(row), step):
            pairs = slice(i, i + step)
            score[pairs] = _score(x[row[pairs]], codes[code[pairs]], metric)
        least = torch.full_like(x[:, 0], float("inf")).scatter_reduce(0, row, score, "amin")
        tied = score == least[row]
        first = torch.full_like(healthy, len(good)).scatter_reduce(0, row[tied], code[tied], "amin")
        indices[start + healthy] = good[first]
        scores[start + healthy] = least
    return indices, scores.float()


def _outputs(z: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(z.shape[:1], dtype=torch.int64),
        z.new_empty(z.shape[:1], dtype=torch.float32),
    )


_OP = Op(
    "nearest(Tensor z, Tensor codebook, int metric) -> (Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)


def rows_of_a_call(codebook: Tensor) -> int:
    """How many rows one call of a kernel may search; more are searched in parts."""
    K, D = codebook.shape
    return max(64, _WORK // (K * D) if codebook.device.type == "cpu" else _PACKED // (D + 16))


def search(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Checked inputs z [N, D], codebook [K, D] -> indices [N], scores [N]; outside of autograd."""
    z, codebook, kind = z.detach().contiguous(), codebook.detach().contiguous(), METRICS[metric]
    rows = rows_of_a_call(codebook)
    if torch.compiler.is_compiling() or len(z) <= rows:
        return _OP(z, codebook, kind)
    parts = [_OP(part, codebook, kind) for part in z.split(rows)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@overload
def nearest(
    z: Tensor, codebook: Tensor, *, metric: str = ..., return_distance: Literal[False] = ...
) -> Tensor: ...
@overload
def nearest(
    z: Tensor, codebook: Tensor, *, metric: str = ..., return_distance: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def nearest(
    z: Tensor, codebook: Tensor, *, metric: str = ..., return_distance: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def nearest(
    z: Tensor, codebook: Tensor, *, metric: str = "l2", return_distance: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Index of the nearest code of each vector, exact.

    idx_n = argmin_k ‖z_n − c_k‖²

    Args:
        z: [..., D] float32, float16 or bfloat16 (float64 on the reference); contiguous for no copy.
        codebook: [K, D] on the device of z, any of these dtypes, 1 ≤ K < 2³¹.
        metric: "l2", "cosine" (both sides normalised) or "dot" (largest inner product).
        return_distance: also return the distances.

    Returns:
        indices [...] int64; with `return_distance` the pair (indices, distances [...] float32):
        the squared l2 distance, for "cosine" that of the normalised vectors (2 − 2·cos), for "dot"
        the negative inner product. The distance of a row that is not finite is NaN.

    Raises:
        TypeError: z or codebook is not a floating-point tensor.
        ValueError: shapes disagree, K = 0, D = 0, unknown metric, or devices differ.

    Numerics: the float64 rule of this module's docstring on every backend, instruction set, thread
        count and batch split; equal scores give the lowest index; a row of z that holds NaN or
        infinity gives index 0; a code that holds one never wins against a finite code. Nothing is
        differentiable through this function.
    Cost: reads N·D + K·D values, 2·N·K·D flops; never holds N×K.
    Source: arXiv:1711.00937 eq. 1-2.
    """
    check(z, codebook, metric)
    indices, distances = search(z.reshape(-1, z.shape[-1]), codebook, metric)
    indices = indices.view(z.shape[:-1])
    return (indices, distances.view(z.shape[:-1])) if return_distance else indices


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int]:
    """Seeded inputs of the raw op. `case.shape`: N, K, D; tags pick the metric and hard data.

    Tags: "cosine", "dot"; "duplicates" (K codes of which 3 differ), "nonfinite" (bad rows and
    codes), "huge" and "tiny" (scale 1e18 and 1e-18, float32 only), "shifted" (all vectors moved by
    1e3), "clustered" (rows near codes).
    """
    N, K, D = (case.shape[k] for k in "NKD")
    g = torch.Generator().manual_seed(N + 31 * K + 977 * D)
    z, codebook = torch.randn(N, D, generator=g), torch.randn(K, D, generator=g)
    tags = set(case.tags)
    if "duplicates" in tags:
        codebook = codebook[torch.arange(K) % min(K, 3)]
    if "clustered" in tags:
        z = codebook[torch.randint(K, (N,), generator=g)] + 0.05 * z
    if "shifted" in tags:
        z, codebook = z + 1e3, codebook + 1e3
    for tag, scale in (("huge", 1e18), ("tiny", 1e-18)):
        if tag in tags and dtype == torch.float32:
            z, codebook = z * scale, codebook * scale
    if "nonfinite" in tags:
        z[::3, 0] = float("nan")
        codebook[::2, -1] = float("inf")
    metric = next((m for name, m in METRICS.items() if name in tags), 0)
    return z.to(device, dtype), codebook.to(device, dtype), metric


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops), float32."""
    N, K, D = (case.shape[k] for k in "NKD")
    return 4 * (N * D + K * D) + 12 * N, 2 * N * K * D
