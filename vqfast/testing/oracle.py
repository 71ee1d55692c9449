"""The nearest code once more, in numpy and apart from every implementation that it judges.

    l2      score = Σ_i (z_i − c_i)²   in index order, each term rounded before it is added
    cosine  the same, after both sides are divided by max(√Σ x_i², 1e-12)
    dot     score = −Σ_i z_i·c_i

all in float64. The answer is the lowest index of the least score; a row that is not finite gets
index 0 and score NaN, a code that is not finite is left out.

`definition` is these lines and nothing else. `nearest` gives the same in a fraction of its time: a
float64 matrix product about a centre m leaves the codes that may win, and those are scored. With
a = z − m and b = c − m as computed, the screen |b|²/2 − ⟨a, b⟩ and half the score, as computed,
differ by less than 4(D + 8)·2⁻⁵³·(|a| + |b|)² beyond a constant of the row: rounding of a and b
(2 units), of D + 2 products and sums (D + 3), of |b|² and of the score (D + 2). The code takes
g(|a|² + |b|²) with g = 8(D + 8)·2⁻⁵³. float32 inputs neither overflow nor underflow here.
"""

import math

import numpy as np
import torch
from torch import Tensor

METRICS = ("l2", "cosine", "dot")
_PAIRS = 1 << 17  # (row, code) pairs screened at once: 1 MiB of float64
_VALUES = 1 << 17  # float64 values scored at once


def definition(z: Tensor, codebook: Tensor, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """z [N, D], codebook [K, D] -> indices [N] int64, scores [N] float64; every pair, in order."""
    x, c, sound = _prepared(z, codebook, metric)
    scores = np.zeros((len(x), len(c)))
    for i in range(x.shape[1]):
        if metric == "dot":
            scores -= np.multiply.outer(x[:, i], c[:, i])
        else:
            scores += np.square(np.subtract.outer(x[:, i], c[:, i]))
    scores[:, ~c_finite(codebook)] = math.inf
    index = scores.argmin(1)  # the first of equals
    least = scores[np.arange(len(x)), index]
    lost = ~sound | ~c_finite(codebook).any()
    return np.where(lost, 0, index), np.where(lost, math.nan, least)


def nearest(z: Tensor, codebook: Tensor, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """As `definition`, by screening; one thread."""
    x, c, sound = _prepared(z, codebook, metric)
    index, score = np.zeros(len(x), np.int64), np.full(len(x), math.nan)
    alive = _first_of_equals(codebook)
    rows = np.flatnonzero(sound)
    if len(alive) == 0 or len(rows) == 0:
        return index, score
    x, c = x[rows], c[alive]
    best, least = np.empty(len(x), np.int64), np.empty(len(x))
    screen = _Screen(c, metric)
    step = max(1, _PAIRS // len(c))
    for i in range(0, len(x), step):
        part = slice(i, i + step)
        row, code = screen.survivors(x[part])
        best[part], least[part] = _decide(x[part], c, row, code, metric)
    index[rows], score[rows] = alive[best], least
    return index, score


def c_finite(codebook: Tensor) -> np.ndarray:
    """Codes that take part, [K] bool."""
    return codebook.isfinite().all(1).numpy()


def _prepared(
    z: Tensor, codebook: Tensor, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 rows and codes, normalised for cosine, zeros where not finite; which rows are."""
    sound, taken = z.isfinite().all(1).numpy(), c_finite(codebook)
    x = np.where(sound[:, None], z.double().numpy(), 0.0)
    c = np.where(taken[:, None], codebook.double().numpy(), 0.0)
    if metric == "cosine":
        x, c = (t / np.maximum(np.sqrt(_sum(t * t)), 1e-12)[:, None] for t in (x, c))
    return x, c, sound


def _sum(terms: np.ndarray) -> np.ndarray:
    """[P, D] -> [P]: accumulate is one addition after another, where sum would go pairwise."""
    return np.add.accumulate(terms, axis=1, out=terms)[:, -1]


def _first_of_equals(codebook: Tensor) -> np.ndarray:
    """Ids of the finite codes without those equal to an earlier one, ascending."""
    values = codebook.double().numpy() + 0.0  # -0.0 and 0.0 are one value
    seen: dict[bytes, int] = {}
    for k in np.flatnonzero(c_finite(codebook)):
        seen.setdefault(values[k].tobytes(), int(k))
    return np.fromiter(seen.values(), np.int64, len(seen))


class _Screen:
    """Which of the codes c [K, D] may have the least score."""

    def __init__(self, c: np.ndarray, metric: str):
        self.g = 8 * (c.shape[1] + 8) * 2.0**-53
        self.centre = np.zeros(c.shape[1])
        if metric != "dot":
            self.centre = np.median(c[:: max(1, len(c) // 65)], axis=0)
        b = c - self.centre
        square = np.square(b).sum(1)
        self.slack = np.zeros(len(c)) if metric == "dot" else self.g * square
        self.longest = math.sqrt(square.max()) if metric == "dot" else None
        head = -self.slack if metric == "dot" else square / 2 - self.slack
        self.codes = torch.from_numpy(np.column_stack((-b, head)).T.copy())  # [D + 1, K]

    def survivors(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, code) of each pair that stays, ordered by row, then code."""
        a = x - self.centre
        square = np.square(a).sum(1)
        own = 2 * self.g * (square if self.longest is None else np.sqrt(square) * self.longest)
        rows = torch.from_numpy(np.column_stack((a, np.ones(len(a)))))
        low = (rows @ self.codes).numpy()  # [n, K], least value that half the score may have
        at = low.argmin(1)
        bound = low[np.arange(len(a)), at] + 2 * self.slack[at] + own
        flat = np.flatnonzero(low <= bound[:, None])
        return np.divmod(flat, low.shape[1])


def _decide(
    x: np.ndarray, c: np.ndarray, row: np.ndarray, code: np.ndarray, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """The first code of least score among the pairs of each row, and that score."""
    score = np.empty(len(row))
    step = max(1, _VALUES // x.shape[1])
    for i in range(0, len(row), step):
        pairs = slice(i, i + step)
        left, right = x[row[pairs]], c[code[pairs]]
        if metric == "dot":
            score[pairs] = -_sum(left * right)
        else:
            left -= right
            left *= left
            score[pairs] = _sum(left)
    begin = np.flatnonzero(np.diff(row, prepend=-1))
    least = np.minimum.reduceat(score, begin)
    tied = np.flatnonzero(score == least[row])
    return code[tied[np.flatnonzero(np.diff(row[tied], prepend=-1))]], least
