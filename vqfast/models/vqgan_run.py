"""How the layers of an encoder or decoder run, one after the other.

On a CPU without gradients: large maps image by image, in memory that they share, and a convolution
finds the statistics of the normalisation after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn as nn
from torch import Tensor

from vqfast._dispatch import results_by
from vqfast.models.tiled_pool import Pool, give_back_heap
from vqfast.nn import known_stats
from vqfast.nn.blocks import Conv3x3, GroupNormSiLU, ResBlock, Upsample

__all__ = ["mark_norms", "run"]

# Maps of this size go image by image on a CPU: glibc asks Linux for such blocks anew each time;
# clearing them was 6 to 24 % of a bfloat16 encode of 4 images at 256 px (loaded Zen 4, 2026-11-30).
_LARGE_BYTES = 32 << 20
# From this size on maps lie in memory of their own, where a freed one serves the next of its size:
# glibc 2.36 cannot give a freed aligned block out again as one of the same size. From 2 MiB on, an
# encode took 1.2 times as long: fresh mappings have to be cleared.
_POOLED_BYTES = 8 << 20


def _bytes(part: nn.Module, x: Tensor) -> int:
    """Of an image's map, the larger one of what `part` reads and writes."""
    channels = part.out_channels if isinstance(part, nn.Conv2d) else x.shape[1]
    growth = 4 if isinstance(part, Upsample) else 1
    return max(growth * channels * x.shape[2] * x.shape[3] * x.element_size(), x[0].nbytes)


def run(parts: list[nn.Module], x: Tensor) -> Tensor:
    """`parts` one after the other on x [B, C, H, W]."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        for part in parts:
            x = part(x)
        return x
    pool, small_before = Pool(0), False
    with known_stats.kept():
        while parts:
            size = len(x) * _bytes(parts[0], x) if len(x) else 0
            pooled = size >= _POOLED_BYTES
            if pooled and small_before:
                give_back_heap()  # what the smaller maps of a decoder left
            small_before = not pooled
            with results_by(pool.place) if pooled else nullcontext():
                if len(x) > 1 and size >= _LARGE_BYTES:
                    x, parts = _run_by_images(parts, x)
                else:
                    x, parts = _run_part(parts[0], x), parts[1:]
    return x


def _run_part(part: nn.Module, x: Tensor) -> Tensor:
    y = part(x)
    if part._forward_hooks or type(part) not in (Conv3x3, ResBlock):
        known_stats.forget()  # they may have changed y
    return y


def _run_by_images(parts: list[nn.Module], x: Tensor) -> tuple[Tensor, list[nn.Module]]:
    """The result of the first of the parts, image by image as long as maps are large, and the other
    parts: on small maps the images go together, as weights are read once.
    """
    known, found = known_stats.of(x), []

    def image(i: int) -> Tensor:
        y = x[i : i + 1]
        if known is not None:
            known_stats.note(y, (known[0][i : i + 1], known[1][i : i + 1]))
        return y

    y, done = image(0), 0
    for part in parts:
        if done and len(x) * _bytes(part, y) < _LARGE_BYTES:
            break
        y = _run_part(part, y)
        done += 1
    shape = (len(x), *y.shape[1:])
    together = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    for i in range(len(x)):
        if i:
            y = image(i)
            for part in parts[:done]:
                y = _run_part(part, y)
        together[i : i + 1] = y
        found.append(known_stats.of(y))
    if all(found):
        mean, rstd = (torch.cat(t) for t in zip(*found, strict=True))
        known_stats.note(together, (mean, rstd))
    return together, parts[done:]


def mark_norms(parts: Iterator[nn.Module]) -> None:
    """Tells the convolutions whose result is normalised next."""
    for part, after in pairwise(p for p in parts if not isinstance(p, nn.Identity)):
        conv = part.conv2 if isinstance(part, ResBlock) else part
        if isinstance(conv, Conv3x3):
            conv.before_norm = isinstance(after, (ResBlock, GroupNormSiLU))
