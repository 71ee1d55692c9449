"""Statistics of a map that what wrote it has found, for the group normalisation that reads it next.

Inside `kept()` a convolution hands on the mean and rstd of each group of its result (`note`),
and the normalisation of that very tensor takes them (`of`): it reads the map once, not twice. Each
thread has its own. A map that something else may change in between, such as a hook, must be
forgotten.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Stats", "forget", "kept", "note", "of", "wanted"]

Stats = tuple[Tensor, Tensor]  # mean and rstd, [B, groups]


class _Last:
    """The map that was noted last."""

    def __init__(self) -> None:
        self.map: weakref.ref[Tensor] | None = None
        self.stats: Stats | None = None


_last: ContextVar[_Last | None] = ContextVar("_last", default=None)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside the block, statistics are noted and taken."""
    before = _last.set(_Last())
    try:
        yield
    finally:
        _last.reset(before)


def wanted() -> bool:
    """Whether `note` would be of use; never in a compiled graph."""
    return not torch.compiler.is_compiling() and _last.get() is not None


def note(y: Tensor, stats: Stats) -> Tensor:
    """y [B, C, H, W], whose statistics these are."""
    last = _last.get()
    if last is not None:
        last.map, last.stats = weakref.ref(y), stats
    return y


def of(x: Tensor) -> Stats | None:
    """The statistics of x, if x is the tensor that was noted last."""
    last = None if torch.compiler.is_compiling() else _last.get()
    if last is None or last.map is None or last.map() is not x:
        return None
    return last.stats


def forget() -> None:
    """No map is known any more."""
    last = _last.get()
    if last is not None:
        last.map = last.stats = None
