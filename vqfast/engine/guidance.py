"""Classifier-free guidance: where in an image it acts, and how it mixes two sets of logits."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vqfast import _check

EVERYWHERE = 2**62  # more positions than any image has


class Guidance(NamedTuple):
    """Guidance by `scale` at the positions begin <= position < end of the tokens of an image."""

    scale: float
    begin: int
    end: int

    def acts_at(self, position: int) -> bool:
        return self.begin <= position < self.end

    def needed(self, uncond: Tensor | None) -> Tensor | None:
        """`uncond`, or None where a scale of 1 needs none; ValueError if it is missing."""
        if self.scale == 1:
            return None
        if uncond is None:
            raise ValueError(f"cfg_scale = {self.scale:g} needs a null condition, there is none")
        return uncond

    def mix(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """u + s·(c - u) of two [b, V]."""
        return unconditional + self.scale * (conditional - unconditional)


def guidance(scale: float, interval: Sequence[int] | None = None) -> Guidance:
    """Guidance that a request asks for; a scale of 1 acts nowhere.

    Args:
        scale: s, 1 is off.
        interval: (begin, end), half-open, 0 <= begin <= end; None is all positions.

    Raises:
        TypeError, ValueError: scale is no finite number, or interval no such pair.

    Source: arXiv:2207.12598 (s = 1 + w there); arXiv:2404.07724 (interval, for diffusion).
    """
    scale = _check.number("cfg_scale", scale)
    if interval is None:
        begin, end = 0, EVERYWHERE
    else:
        if isinstance(interval, str) or not isinstance(interval, Sequence):
            kind = type(interval).__name__
            raise TypeError(f"cfg_interval must be (begin, end) or None, got {kind}")
        if len(interval) != 2:
            raise ValueError(f"cfg_interval must be (begin, end), got {len(interval)} values")
        begin = _check.integer("cfg_interval begin", interval[0], low=0)
        end = _check.integer("cfg_interval end", interval[1], low=0)
        if begin > end:
            raise ValueError(f"cfg_interval must have begin <= end, got ({begin}, {end})")
    return Guidance(scale, 0, 0) if scale == 1 else Guidance(scale, begin, end)
