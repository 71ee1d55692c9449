"""Sample order and augmentation seeds: pure functions of (seed, epoch, position), so that a resume
needs no state.
"""

import functools
import hashlib
import random

import numpy as np
import torch


def _mix(*parts: int | str) -> int:
    """A 63-bit seed from any integers; equal parts give equal seeds on every machine."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of 0..n-1 in which an epoch shows the pictures, int64, read-only."""
    generator = torch.Generator().manual_seed(_mix("order", seed, epoch))
    permutation = torch.randperm(n, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def augmentation(seed: int, ordinal: int) -> random.Random:
    """The random numbers of one sample, numbered from the start of the run."""
    return random.Random(_mix("augmentation", seed, ordinal))
