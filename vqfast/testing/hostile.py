"""Random searches that are hard to get right, each a pure function of (seed, index).

`KINDS` holds one function per kind of data: (draw, N, K, D) -> float32 z [N, D] and codebook
[K, D]. `case` picks a kind, sizes, scale, shift, dtypes and metric, and then may spoil rows and
codes. Sizes are primes, powers of two, their neighbours and anything between, D up to 512 and K up
to 20,000 (140,000 now and then). N shrinks as the work of a row grows, so that the mean search
takes some milliseconds.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.testing.oracle import METRICS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SEARCH_NS = 7e6  # what a search takes at most, reckoned in nanoseconds of one core
_PRIMES = (3, 5, 7, 11, 13, 17, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 19997)


class Search(NamedTuple):
    """One search. `pieces`: z goes in so many parts, whose answers are joined."""

    kind: str
    z: Tensor
    codebook: Tensor
    metric: str
    pieces: int


class Draw:
    """Random numbers of one case."""

    def __init__(self, seed: int, index: int):
        self.r = random.Random(f"{seed}/{index}")
        self.g = torch.Generator().manual_seed(self.r.getrandbits(63))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g)

    def uniform(self, *shape: int) -> Tensor:
        """In [-1, 1)."""
        return torch.rand(*shape, generator=self.g) * 2 - 1

    def whole(self, top: int, *shape: int) -> Tensor:
        """Integers from -top to top, as float32."""
        return torch.randint(-top, top + 1, shape, generator=self.g).float()

    def pick(self, t: Tensor, n: int) -> Tensor:
        """n rows of t, with repetition."""
        return t[torch.randint(len(t), (n,), generator=self.g)]

    def size(self, top: int) -> int:
        """1 to top, even in the logarithm; half of them at a power of two, beside one, or prime."""
        near = round(math.exp(self.r.uniform(0, math.log(top))))
        if self.r.random() < 0.25:
            near = (1 << round(math.log2(near))) + self.r.choice((-1, 0, 1))
        elif self.r.random() < 0.33:
            near = min(_PRIMES, key=lambda p: abs(math.log(p / near)))
        return max(1, min(top, near))


# ---- kinds


def _gaussian(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    return d.normal(N, D), d.normal(K, D)


def _taming(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Codes as VectorQuantizer2 starts: all at one place, seen from z."""
    return d.normal(N, D), d.uniform(K, D) / K


def _clusters(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    codes = d.normal(K, D)
    return d.pick(codes, N) + 10 ** d.r.uniform(-3, 0) * d.normal(N, D), codes


def _on_codes(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """z equal to codes, or off by some units in the last place."""
    codes = d.normal(K, D)
    return d.pick(codes, N) * (1 + d.whole(d.r.choice((0, 1, 8)), N, D) * 2.0**-23), codes


def _one_ulp(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Codes in families that differ by one unit in the last place of one coordinate."""
    codes = d.pick(d.normal(max(1, K // 16), D), K).contiguous()
    at = torch.randint(D, (K,), generator=d.g)
    bits = codes.view(torch.int32)
    bits[torch.arange(K), at] += torch.randint(-1, 2, (K,), generator=d.g, dtype=torch.int32)
    return d.pick(codes, N) + d.r.choice((0.0, 1e-6, 1.0)) * d.normal(N, D), codes


def _midpoints(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    codes = d.normal(K, D) if d.r.random() < 0.5 else 2 * d.whole(4, K, D)
    return (d.pick(codes, N) + d.pick(codes, N)) / 2, codes


def _integers(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Scores without rounding, so that ties are exact."""
    return d.whole(3, N, D), d.whole(2, K, D)


def _permuted(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Codes with the same components in another order, z with all components equal: equal in the
    real numbers, told apart by the order of summation alone.
    """
    base = d.normal(max(1, K // 32), D)
    orders = torch.rand(64, D, generator=d.g).argsort(1)
    return d.normal(N, 1).repeat(1, D), d.pick(base, K).gather(1, d.pick(orders, K))


def _mirrored(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Codes that differ in signs, z at or near the origin."""
    signs = d.whole(1, K, D).sign() + 0.5
    return d.r.choice((0.0, 1e-9)) * d.normal(N, D), d.pick(d.normal(4, D), K) * signs.sign()


def _heavy_tails(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """Norms over many orders of magnitude."""
    low, high = sorted((d.r.uniform(-30, 18), d.r.uniform(-30, 18)))
    z, c = (10 ** (low + (high - low) * (d.uniform(n, 1) + 1) / 2) for n in (N, K))
    return z * d.normal(N, D), c * d.normal(K, D)


def _far_apart(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    """z much larger or smaller than the codes: every code may win."""
    return 10 ** d.r.uniform(-9, 9) * d.normal(N, D), d.normal(K, D)


def _one_far_coordinate(d: Draw, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    codes = d.normal(K, D)
    codes[:, d.r.randrange(D)] += 10 ** d.r.uniform(2, 8)
    return d.normal(N, D), codes


KINDS: dict[str, Callable[[Draw, int, int, int], tuple[Tensor, Tensor]]] = {
    f.__name__[1:]: f
    for f in (
        _gaussian, _taming, _clusters, _on_codes, _one_ulp, _midpoints, _integers, _permuted,
        _mirrored, _heavy_tails, _far_apart, _one_far_coordinate,
    )
}  # fmt: skip
# of these the oracle and the kernels score many codes a row in float64
_CROWDED = {"taming", "permuted", "mirrored", "far_apart", "integers", "heavy_tails"}


def case(seed: int, index: int) -> Search:
    """The search number `index` of a seed."""
    d = Draw(seed, index)
    kind = d.r.choice(list(KINDS))
    K, D = _book_size(d, d.r.random())
    pair_ns = 2 + 0.1 * D + (1 + D if kind in _CROWDED else 0)
    room = int(_SEARCH_NS / (K * pair_ns))
    room = max(2, min(room, d.r.choice((256, 1024, 4096))))
    N = room if d.r.random() < 0.7 else d.size(room)
    if d.r.random() < 0.02:  # few dimensions, many rows and codes: worth an index over the codes
        N, K, D = d.r.randrange(1500, 5000), 1024 + d.size(8192), d.size(6)
    z, codebook = KINDS[kind](d, N, K, D)
    kinds = d.r.choices(DTYPES, (0.6, 0.2, 0.2), k=2)
    kinds = kinds if d.r.random() < 0.15 else kinds[:1] * 2
    z, codebook = _spoiled(d, *_moved(d, z, codebook, torch.float16 in kinds))
    metric = d.r.choices(METRICS, (0.7, 0.15, 0.15))[0]
    pieces = d.r.choice((2, 3)) if d.r.random() < 0.1 else 1
    return Search(kind, z.to(kinds[0]), codebook.to(kinds[1]), metric, pieces)


def _book_size(d: Draw, chance: float) -> tuple[int, int]:
    """K and D, small ones more often: a large codebook costs as much as a thousand rows."""
    if chance < 0.002:  # more codes than a kernel packs at once
        return d.r.randrange(60_000, 140_000), d.size(4)
    if chance < 0.01:
        return d.size(20_000), d.size(512)
    values, K, D = 10 ** d.r.uniform(4, 6), 20_000, 512
    while values < K * D:
        K, D = d.size(8192), d.size(512)
        if d.r.random() < 0.5:  # a half of them leans to many codes
            K = max(K, d.size(8192))
    return K, D


def _moved(d: Draw, z: Tensor, codebook: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Both at another scale, about another origin; `narrow`: within reach of float16."""
    if d.r.random() < 0.2:
        shift = 10 ** d.r.uniform(-2, 3 if narrow else 6) * d.normal(z.shape[1])
        z, codebook = z + shift, codebook + shift
    if d.r.random() < 0.3:
        scale = 10 ** (d.r.uniform(-6, 2) if narrow else d.r.uniform(-30, 30))
        z, codebook = z * scale, codebook * scale
    return z, codebook


def _spoiled(d: Draw, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Now and then zero rows, repeated codes, and rows or codes that are not finite."""

    def some(n: int) -> Tensor:
        return torch.rand(n, generator=d.g) < d.r.choice((0.02, 0.5, 0.98))

    if d.r.random() < 0.1:
        z[some(len(z))] = d.r.choice((0.0, -0.0))
        codebook[some(len(codebook))] *= 0.0
    if d.r.random() < 0.1:
        codebook = d.pick(codebook[: d.r.choice((1, 13, len(codebook)))], len(codebook))
    for t in (z, codebook):
        if d.r.random() < 0.1:
            at = torch.randint(t.shape[1], (len(t),), generator=d.g)
            bad = some(len(t))
            value = d.r.choice((math.nan, math.inf, -math.inf))
            t[bad, at[bad]] = value
    return z, codebook
