"""Encoder and decoder in bounded memory, for images of any size, with the result of the whole.

The network runs over bands of full rows. Group normalisation takes its mean and variance over the
whole map, as always: they are gathered in a pass of their own where the map is too large to keep,
so that the result is that of the network up to rounding, without seams. Attention keeps keys and
values of all positions and takes queries by bands. `tiled_plan` chooses which maps to keep.

Source: our own. Tiled decoding elsewhere (diffusers AutoencoderKL.enable_tiling) normalises every
tile by itself and blends the seams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from vqfast import _check, _dispatch
from vqfast.models.tiled_plan import Hop, Plans
from vqfast.models.tiled_pool import Pool, give_back_heap
from vqfast.models.tiled_steps import Bands, Moments, Normalise, Step, Stream, pointwise, steps_of
from vqfast.nn.attention import SpatialAttention, spatial_attention

if TYPE_CHECKING:  # that file imports this one
    from vqfast.models.vqgan import Decoder, Encoder

__all__ = ["forward", "least_memory"]

# bands after which what malloc holds is given back: it is a few hundred KiB more after each
_TIDY = 16


def forward(network: Encoder | Decoder, x: Tensor, max_memory: int) -> Tensor:
    """network(x) without gradient in `max_memory` bytes, one image at a time.

    Args:
        network: an Encoder or a Decoder.
        x: [B, C, H, W] as the network takes it.
        max_memory: bytes of maps and bands, beyond the weights, x and the result. On Linux the
            process took up to 26 MiB more (512 px to 4096 x 2048), packed weights above all. Where
            they suffice for an image as a whole the network itself is called.

    Returns:
        What the network returns, up to rounding.

    Raises:
        TypeError: max_memory is no int.
        ValueError: max_memory is less than what this size needs (the text names it), or dropout is
            at work.
    """
    memory = _check.integer("max_memory", max_memory, low=1)
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in network.modules()):
        raise ValueError("max_memory needs a model in eval mode: dropout differs from pass to pass")
    with torch.no_grad():
        if not x.numel():
            return network(x)
        steps = steps_of(network.parts())
        H, W = x.shape[2:]
        plans = Plans(steps, (H, W), x.element_size())
        if memory >= plans.whole():
            return _joined(len(x), (network(image) for image in x.split(1)))
        if memory < plans.least:
            least = min(plans.least, plans.whole())
            needs = f"an input of {H}x{W} needs, got {memory}"
            raise ValueError(f"max_memory must be at least {least} bytes, which {needs}")
        hops = plans.cheapest(memory)
        pool = Pool(memory)
        with _dispatch.results_by(pool.place):
            images = (_Run(steps, plans, image, pool).follow(hops) for image in x.split(1))
            return _joined(len(x), images)


def least_memory(network: Encoder | Decoder, size: tuple[int, int], itemsize: int) -> int:
    """The smallest `max_memory` that `forward` takes, in bytes.

    Args:
        network: an Encoder or a Decoder.
        size: (H, W) of its input.
        itemsize: bytes of a value.
    """
    plans = Plans(steps_of(network.parts()), size, itemsize)
    return min(plans.least, plans.whole())


def _joined(B: int, images: Iterator[Tensor]) -> Tensor:
    """[1, C, H, W] each -> [B, C, H, W]."""
    first = next(images)
    if B == 1:
        return first
    out = _empty((B, *first.shape[1:]), first)
    out[:1] = first
    for i in range(1, B):
        out[i : i + 1] = next(images)
    return out


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


class _Run:
    """One image on its way through the network."""

    def __init__(self, steps: list[Step], plans: Plans, x: Tensor, pool: Pool) -> None:
        self._steps, self._plans, self._pool = steps, plans, pool
        self._maps: Bands = [x]  # those of the state that was reached
        self._norms: dict[int, Normalise] = {}  # by the step that has them

    def follow(self, hops: list[Hop]) -> Tensor:
        for hop in hops:
            attention = self._steps[hop.begin].attention
            if attention is not None:
                self._attend(attention, hop)
                continue
            for stop in self._plans.stops(hop.begin, hop.end):
                self._pass(hop, stop)
        return self._maps[0]

    def _pass(self, hop: Hop, stop: int) -> None:
        """Gather the statistics of the map before step `stop`; keep the maps if the hop ends."""
        begin, ends = hop.begin, stop == hop.end
        streams = [self._stream(k) for k in range(begin, stop)]
        moments = self._moments(stop)
        kept: Bands = []
        full = [0, 0]
        for i, (bands, last) in enumerate(self._parts(self._maps, True, begin, hop.band)):
            if i % _TIDY == 0:
                give_back_heap()
            for result in self._through(streams, bands, last, begin, hop.band):
                if moments is not None:
                    moments.add(result[0])
                if ends:
                    kept = kept or self._room(hop, result)
                    for j, rows in enumerate(result):
                        n = rows.shape[2]
                        kept[j][:, :, full[j] : full[j] + n] = rows
                        full[j] += n
                del result  # it would live while the next one is made
        if moments is not None:
            self._norms[stop] = self._normalise(stop, moments)
        if ends:
            self._maps = kept

    def _stream(self, k: int) -> Stream:
        """Step k at the start of a pass."""
        start = self._steps[k].stream
        assert start is not None  # attention is a hop of its own
        return start(self._norms.get(k), self._pool)

    def _parts(self, bands: Bands, last: bool, k: int, band: int) -> Iterator[tuple[Bands, bool]]:
        """`bands` before step k, in parts of its height; the flag marks the last of the map."""
        height, limit = bands[0].shape[2], self._plans.rows(k, band)
        for begin in range(0, height, limit):
            yield [t[:, :, begin : begin + limit] for t in bands], last and begin + limit >= height

    def _through(
        self, streams: list[Stream], bands: Bands, last: bool, k: int, band: int
    ) -> Iterator[Bands]:
        """`bands` through the streams of steps k, k + 1, ..."""
        for i, stream in enumerate(streams):
            # doubling makes four of one: parts of it go on by themselves
            if self._steps[k + i].up > 1 and bands[0].shape[2] > self._plans.rows(k + i, band):
                for part, end in self._parts(bands, last, k + i, band):
                    yield from self._through(streams[i:], part, end, k + i, band)
                return
            bands = stream(bands, last)
            if not any(t.shape[2] for t in bands):
                return  # nothing is settled yet
        yield bands

    def _room(self, hop: Hop, like: Bands) -> Bands:
        """Memory for the maps at the end of a hop, over those at its begin where shapes agree."""
        free = list(self._maps) if hop.begin else []  # the first is the caller's
        final = hop.end == len(self._steps)
        room = []
        # the input of a block first: it stays where it is
        shapes = self._plans.shapes[hop.end]
        for (C, H, W), rows in reversed(list(zip(shapes, like, strict=True))):
            fits = [t for t in free if t.shape == (1, C, H, W) and t.dtype == rows.dtype]
            if final:
                room.append(_empty((1, C, H, W), rows))
            elif fits:
                free = [t for t in free if t is not fits[-1]]
                room.append(fits[-1])
            else:
                room.append(self._pool.empty((1, C, H, W), rows))
        return room[::-1]

    def _moments(self, k: int) -> Moments | None:
        """Empty statistics for the norm of step k; None if it has none."""
        norm = None if k == len(self._steps) else self._steps[k].norm
        return None if norm is None else Moments(norm.num_groups, self._pool)

    def _normalise(self, k: int, moments: Moments) -> Normalise:
        """The norm of step k by the statistics of the map before it."""
        norm = self._steps[k].norm
        assert norm is not None  # it has moments
        return Normalise(norm, moments, self._maps[0].dtype, self._pool)

    def _attend(self, attention: SpatialAttention, hop: Hop) -> None:
        """x + attention(x), over x itself."""
        (x,), normalise = self._maps, self._norms[hop.begin]
        k, v = (self._pool.empty(tuple(x.shape), x) for _ in range(2))
        moments = self._moments(hop.end)
        bands = [
            slice(a, a + n)
            for n in [self._plans.rows(hop.begin, hop.band)]
            for a in range(0, x.shape[2], n)
        ]
        for rows in bands:
            h = normalise(x[:, :, rows])
            for t, conv in ((k, attention.k), (v, attention.v)):
                t[:, :, rows] = pointwise(conv, h, self._pool)
        for rows in bands:
            band = x[:, :, rows]
            q = pointwise(attention.q, normalise(band), self._pool)
            band += pointwise(attention.proj_out, spatial_attention(q, k, v), self._pool)
            if moments is not None:
                moments.add(band)
        if moments is not None:
            self._norms[hop.end] = self._normalise(hop.end, moments)
