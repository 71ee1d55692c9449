"""The layers of the stage-1 network as steps over bands of rows, from the top of a map to its end.

A band is n full rows [1, C, n, W]. A stream takes one band after the other and gives the rows that
are settled by then: a 3x3 window is one row late, and the last band brings what is left. Between
two bands it holds only the rows that windows still need, so that each is computed once a pass.

Inside a residual block there are two maps, the one at work and the input of the block, which runs
ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from vqfast.models.tiled_pool import Pool
from vqfast.nn.attention import SpatialAttention
from vqfast.nn.blocks import Conv3x3, Downsample, GroupNormSiLU, ResBlock, Upsample
from vqfast.ops.group_norm_silu_apply import group_norm_silu_apply

Bands = list[Tensor]  # one band of each map
Stream = Callable[[Bands, bool], Bands]  # the flag: these are the last ones


@dataclass(frozen=True)
class Step:
    """A piece of the network between two of its states.

    `stream(normalise, pool)` starts a pass; `normalise` is None where there is no `norm`, whose
    statistics are those of the first map before the step. `before` and `after` are the channels of
    the maps, n rows of the one are n · up / down rows of the other, `macs` multiply-adds fall on a
    position after. `attention` has no stream: it needs the whole map.
    """

    stream: Callable[[Normalise | None, Pool], Stream] | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    macs: int
    norm: nn.GroupNorm | None = None
    up: int = 1
    down: int = 1
    attention: SpatialAttention | None = None


def steps_of(parts: Iterator[nn.Module]) -> list[Step]:
    """The steps of a network's layers, in their order."""
    steps: list[Step] = []
    norm = None
    for part in parts:
        if isinstance(part, GroupNormSiLU):
            norm = part  # of the convolution that follows
        elif isinstance(part, ResBlock):
            steps += _block(part)
        elif isinstance(part, SpatialAttention):
            C = part.q.in_channels
            steps.append(Step(None, (C,), (C,), 4 * C * C, norm=part.norm, attention=part))
        elif not isinstance(part, nn.Identity):
            steps.append(_resampling(part, norm))
    return steps


def _resampling(part: nn.Module, norm: nn.GroupNorm | None) -> Step:
    """A convolution alone, with doubled or with halved sides."""
    conv = part.conv if isinstance(part, (Upsample, Downsample)) else part
    assert isinstance(conv, nn.Conv2d)
    C, O = conv.in_channels, conv.out_channels  # noqa: E741 - the letter of the contract's kernels
    if isinstance(part, Downsample):
        return Step(partial(_Halving, part), (C,), (O,), 9 * C * O, norm, down=2)
    up = 1 + isinstance(part, Upsample)
    return Step(partial(_Convolution, part, conv, up), (C,), (O,), 9 * C * O, norm, up)


def _block(block: ResBlock) -> list[Step]:
    C, O = block.conv1.in_channels, block.conv1.out_channels  # noqa: E741
    opened = partial(_Convolution, block.conv1, block.conv1, 1, keeps=True)
    shortcut = 0 if block.nin_shortcut is None else C * O
    return [
        Step(opened, (C,), (O, C), 9 * C * O, block.norm1),
        Step(partial(_BlockEnd, block), (O, C), (O,), 9 * O * O + shortcut, block.norm2),
    ]


# ---- statistics


class Moments:
    """Mean and variance of each group of channels over all rows that were added.

    A band's sums are taken in float32 about its own mean, and bands merged in float64 in their
    order: Chan, Golub and LeVeque, doi:10.1080/00031305.1983.10483115, eq. 2.1.
    """

    def __init__(self, groups: int, pool: Pool) -> None:
        self.groups, self.count, self._pool = groups, 0, pool
        self.mean: Tensor | None = None  # [groups] float64
        self.squares: Tensor | None = None  # sum of (x - mean)^2, likewise

    def add(self, band: Tensor) -> None:
        """band [1, C, n, W]."""
        C, count = band.shape[1], band.numel() // self.groups
        if not count:
            return
        wide = torch.promote_types(band.dtype, torch.float32)
        copy = self._pool.empty(tuple(band.shape), band, wide).copy_(band)
        centred = copy.movedim(1, -1).view(-1, C)  # [n W, C]
        about = self._grouped(centred.mean(0)).mean(1)  # [groups]
        centred -= about.to(wide).repeat_interleave(C // self.groups)
        rest = self._grouped(centred.sum(0)).sum(1)  # what rounding left of the mean
        squares = self._grouped(centred.square_().sum(0)).sum(1) - rest.square() / count
        mean = about.to(wide).double() + rest / count
        if self.mean is None or self.squares is None:
            self.mean, self.squares, self.count = mean, squares, count
            return
        both, apart = self.count + count, mean - self.mean
        self.mean = self.mean + apart * (count / both)
        self.squares = self.squares + squares + apart.square() * (self.count * count / both)
        self.count = both

    def _grouped(self, channels: Tensor) -> Tensor:
        return channels.double().view(self.groups, -1)


class Normalise:
    """Group normalisation by known statistics, and SiLU where the layer has it."""

    def __init__(
        self, norm: nn.GroupNorm, moments: Moments, dtype: torch.dtype, pool: Pool
    ) -> None:
        assert moments.mean is not None and moments.squares is not None
        self._norm, self._silu, self._pool = norm, isinstance(norm, GroupNormSiLU), pool
        wide = torch.promote_types(dtype, torch.float32)
        rstd = (moments.squares / moments.count + norm.eps).rsqrt()
        self._mean, self._rstd = (t.to(wide)[None] for t in (moments.mean, rstd))  # [1, groups]

    def __call__(self, band: Tensor) -> Tensor:
        """band [1, C, n, W] -> the same shape, dtype and layout, in memory of its own."""
        weight, bias = self._norm.weight, self._norm.bias
        if self._silu:
            return group_norm_silu_apply(band, weight, bias, self._mean, self._rstd)
        each = self._norm.num_channels // self._norm.num_groups
        mean, rstd = (t[0].repeat_interleave(each) for t in (self._mean, self._rstd))  # [C]
        copy = self._pool.empty(tuple(band.shape), band, mean.dtype).copy_(band)
        rows = copy.movedim(1, -1)  # [1, n, W, C]
        rows.sub_(mean).mul_(weight * rstd).add_(bias)
        return (
            copy
            if copy.dtype == band.dtype
            else self._pool.empty(tuple(band.shape), band).copy_(copy)
        )


# ---- streams

# bytes of a convolution by torch, which finds memory for the result by itself
_PIECE = 4 << 20


def pointwise(conv: nn.Conv2d, x: Tensor, pool: Pool) -> Tensor:
    """A 1x1 convolution of x [1, C, n, W]."""
    _, _, n, W = x.shape
    y = pool.empty((1, conv.out_channels, n, W), x)
    step = max(1, _PIECE // (conv.out_channels * W * x.element_size()))
    for i in range(0, n, step):
        y[:, :, i : i + step] = conv(x[:, :, i : i + step])
    return y


def _plain(conv: nn.Conv2d, x: Tensor, pool: Pool) -> Tensor:
    """A 3x3 convolution of padding 1 that no op computes, of x [1, C, n, W]."""
    _, _, n, W = x.shape
    y = pool.empty((1, conv.out_channels, n, W), x)
    step = max(1, _PIECE // (conv.out_channels * W * x.element_size()))
    for i in range(0, n, step):
        top = max(i - 1, 0)
        y[:, :, i : i + step] = conv(x[:, :, top : i + step + 1])[:, :, i - top :][:, :, :step]
    return y


class _Window:
    """A 3x3 convolution of padding 1, perhaps of doubled pixels, over bands."""

    def __init__(self, module: nn.Module, conv: nn.Conv2d, scale: int, pool: Pool) -> None:
        self._module, self._conv, self._scale, self._pool = module, conv, scale, pool
        # torch computes it, and finds memory for the result by itself
        self._by_torch = module is conv and not isinstance(conv, Conv3x3)
        self._held: Tensor | None = None  # the last two rows, or the only one
        self._top = 0  # rows of _held whose result is out

    def __call__(self, band: Tensor, last: bool) -> Tensor:
        rows = band if self._held is None else self._pool.stacked(self._held, band)
        n, s = rows.shape[2], self._scale
        begin, end = self._top, n if last else n - 1
        # a copy: a view would keep the band, and a map that is written over would change it
        self._held = self._pool.copy(rows[:, :, -2:])
        if begin >= end:
            return rows.new_empty((1, self._conv.out_channels, 0, s * rows.shape[3]))
        self._top = 1
        y = _plain(self._conv, rows, self._pool) if self._by_torch else self._module(rows)
        return y[:, :, s * begin : s * end]


class _Convolution:
    """A convolution of the normalised map; at the start of a block its input goes along."""

    def __init__(
        self,
        module: nn.Module,
        conv: nn.Conv2d,
        scale: int,
        normalise: Normalise | None,
        pool: Pool,
        keeps: bool = False,
    ) -> None:
        self._window, self._normalise = _Window(module, conv, scale, pool), normalise
        self._keeps = keeps

    def __call__(self, bands: Bands, last: bool) -> Bands:
        (x,) = bands
        y = self._window(x if self._normalise is None else self._normalise(x), last)
        return [y, x] if self._keeps else [y]


class _BlockEnd:
    """The second convolution of a block, plus the input of the block."""

    def __init__(self, block: ResBlock, normalise: Normalise, pool: Pool) -> None:
        self._window, self._normalise = _Window(block.conv2, block.conv2, 1, pool), normalise
        self._shortcut, self._pool = block.nin_shortcut, pool
        self._ahead: Tensor | None = None  # rows of the input whose result is not there yet

    def __call__(self, bands: Bands, last: bool) -> Bands:
        x = bands[1]
        if self._shortcut is not None:
            x = pointwise(self._shortcut, x, self._pool)
        y = self._window(self._normalise(bands[0]), last)
        ahead = x[:, :, :0] if self._ahead is None else self._ahead
        n, first = y.shape[2], min(y.shape[2], ahead.shape[2])
        y[:, :, :first].add_(ahead[:, :, :first])
        y[:, :, first:].add_(x[:, :, : n - first])
        self._ahead = self._pool.stacked(ahead[:, :, first:], x[:, :, n - first :])
        return [y]


class _Halving:
    """The convolution of stride 2; below the last row there is one of zeros."""

    def __init__(self, down: Downsample, normalise: Normalise | None, pool: Pool) -> None:
        self._down, self._pool = down, pool
        self._held: Tensor | None = None

    def __call__(self, bands: Bands, last: bool) -> Bands:
        (band,) = bands
        rows = band if self._held is None else self._pool.stacked(self._held, band)
        if last:
            return [self._down(rows)]
        n = max(0, rows.shape[2] - 1) // 2
        self._held = self._pool.copy(rows[:, :, 2 * n :])
        if not n:
            shape = (1, self._down.conv.out_channels, 0, rows.shape[3] // 2)
            return [rows.new_empty(shape)]
        return [self._down(rows[:, :, : 2 * n + 1])]  # reads no row below these
