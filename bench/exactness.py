"""How often a search misses the nearest code, by the contract's float64 rule, on two kinds of data.

gaussian   z and codes from one normal distribution: even low precision finds most of them
taming     codes from U(-1/K, 1/K), as VectorQuantizer2 starts: all look alike from where z is, and
           formulas in float32 miss
"""

import numpy as np
import torch
from torch import Tensor

from vqfast.testing import oracle, tolerances
from vqfast.testing.cases import Case

KINDS = ("gaussian", "taming")
_ROWS = 1024  # rows judged; fewer for the largest codebooks
_PAIRS = 1 << 28


def inputs(kind: str, case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int]:
    """A sample of rows against as many codes as the case has: z, codebook, l2."""
    K, D = case["K"], case["D"]
    g = torch.Generator().manual_seed(K + D)
    z = torch.randn(min(case["N"], _ROWS, max(64, _PAIRS // K)), D, generator=g)
    if kind == "gaussian":
        codebook = torch.randn(K, D, generator=g)
    else:
        codebook = (torch.rand(K, D, generator=g) * 2 - 1) / K
    return z.to(device, dtype), codebook.to(device, dtype), 0


class Judge:
    """The right answers for some rows; `miss_rate` holds others against them."""

    def __init__(self, z: Tensor, codebook: Tensor):
        self._z, self._codebook = z.cpu(), codebook.cpu()
        _, self._least = oracle.nearest(self._z, self._codebook, "l2")

    def miss_rate(self, index: Tensor) -> float:
        """Part of the rows whose code is not the nearest, or is none of the codebook."""
        index = index.reshape(-1).cpu()
        inside = (index >= 0) & (index < len(self._codebook))
        codes = self._codebook[index.where(inside, torch.zeros_like(index)).long()]
        terms = np.square(self._z.double().numpy() - codes.double().numpy())
        score = np.add.accumulate(terms, axis=1)[:, -1]
        tiny = np.finfo(np.float64).tiny
        near = score <= self._least * (1 + tolerances.NEAREST_REGRET) + tiny
        return float((~(near & inside.numpy())).mean())
