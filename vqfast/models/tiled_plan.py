"""Which maps of a network to keep, so that a pass over it fits a memory and takes least time.

State k is what lies between steps k - 1 and k: one map, or two inside a residual block. A hop from
one kept state to the next makes one pass over bands of rows for each statistic in between that a
norm waits for, and a last one that fills the maps of its end; each pass recomputes from the hop's
begin. Maps of equal shape are written over as they are read. So few kept maps mean little memory
and many passes; the cheapest chain of hops that fits is a shortest path.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from vqfast.models.tiled_steps import Step

# bands alive at once: a step's input, the block's, the normalised rows, these after the rows that
# were held, and the result
_ALIVE = 5
# a larger band gains nothing on a CPU and fills a GPU
_MOST_BAND = 64 << 20
# a smaller one costs more in rows computed twice than anyone would wait for
_LEAST_ROWS = 4
# maps alive at once in the network itself: input and result of a step, the block's input, and one
# more in a shortcut
_ALIVE_WHOLE = 4


class Hop(NamedTuple):
    """From state `begin` to state `end`, by bands of up to `band` bytes."""

    begin: int
    end: int
    band: int


class Plans:
    """Ways over a network for one image.

    Args:
        steps: of the network.
        size: (H, W) of its input.
        itemsize: bytes of a value.
    """

    def __init__(self, steps: Sequence[Step], size: tuple[int, int], itemsize: int) -> None:
        self._steps, self._itemsize = steps, itemsize
        H, W = size
        states = [(H, W, steps[0].before)]
        for step in steps:
            H, W = (side * step.up // step.down for side in (H, W))
            states.append((H, W, step.after))
        # [states][maps] of (C, H, W)
        self.shapes = [[(C, H, W) for C in channels] for H, W, channels in states]
        self._bytes = [sum(map(self._map_bytes, maps)) for maps in self.shapes]

    def _map_bytes(self, shape: tuple[int, int, int]) -> int:
        return math.prod(shape) * self._itemsize

    def whole(self) -> int:
        """Bytes that the network takes without bands."""
        return _ALIVE_WHOLE * max(self._map_bytes(maps[0]) for maps in self.shapes)

    @cached_property
    def least(self) -> int:
        """The smallest memory for which there is a way."""
        need = [0.0] + [math.inf] * len(self._steps)
        for end in range(1, len(need)):
            for begin in self._begins(end):
                hop = Hop(begin, end, self._least_band(begin, end))
                need[end] = min(need[end], max(need[begin], self._memory(hop)))
        return int(need[-1])

    def cheapest(self, memory: int) -> list[Hop]:
        """The hops that take least time within `memory` bytes, which are at least `least`."""
        ways: list[tuple[float, list[Hop]]] = [(0.0, [])]
        for end in range(1, len(self.shapes)):
            best: tuple[float, list[Hop]] = (math.inf, [])
            for begin in self._begins(end):
                hop = self._widest(begin, end, memory)
                if hop is not None:
                    cost, hops = ways[begin]
                    best = min(best, (cost + self._cost(hop), [*hops, hop]))
            ways.append(best)
        return ways[-1][1]

    def row_bytes(self, k: int) -> int:
        """Of one row before step k, or of what becomes of it if that is more."""
        step = self._steps[k]
        C, _, W = self.shapes[k][0]
        O, _, V = self.shapes[k + 1][0]  # noqa: E741
        return max(C * W, O * V * step.up // step.down) * self._itemsize

    def rows(self, k: int, band: int) -> int:
        """How many rows before step k a band of so many bytes has."""
        return max(1, min(band // self.row_bytes(k), self.shapes[k][0][1]))

    def stops(self, begin: int, end: int) -> list[int]:
        """States that the passes of a hop lead to: those with a norm behind them, and its end."""
        return [k for k in range(begin + 1, end) if self._steps[k].norm is not None] + [end]

    def _begins(self, end: int) -> range:
        """States from which a hop may lead to `end`: no attention on the way, or nothing else."""
        for k in reversed(range(end)):
            if self._steps[k].attention is not None:
                return range(k, end) if k == end - 1 else range(k + 1, end)
        return range(end)

    def _least_band(self, begin: int, end: int) -> int:
        return _LEAST_ROWS * max(self.row_bytes(k) for k in range(begin, end))

    def _widest(self, begin: int, end: int, memory: int) -> Hop | None:
        """The hop by the largest bands that fit; None if none fits."""
        band, least = _MOST_BAND, self._least_band(begin, end)
        while band > least and self._memory(Hop(begin, end, band)) > memory:
            band //= 2
        hop = Hop(begin, end, max(band, least))
        return hop if self._memory(hop) <= memory else None

    def _cost(self, hop: Hop) -> float:
        """Multiply-adds, with those for rows that neighbouring bands share."""
        stops, cost = self.stops(hop.begin, hop.end), 0.0
        for k in range(hop.begin, hop.end):
            C, H, W = self.shapes[k + 1][0]
            shared = 1 + 2 / self.rows(k, hop.band)
            cost += self._steps[k].macs * H * W * shared * sum(stop > k for stop in stops)
        return cost

    def _memory(self, hop: Hop) -> int:
        """Bytes, beyond input and output of the network, while the last pass of a hop works."""
        begin, end, band = hop
        kept = self._bytes[begin] if begin else 0
        made = Counter(self.shapes[end]) if end + 1 < len(self.shapes) else Counter()
        over = made & Counter(self.shapes[begin] if begin else [])
        kept += sum(self._map_bytes(shape) * n for shape, n in (made - over).items())
        if self._steps[begin].attention is not None:
            return kept + self._attention(begin, band)
        most = held = late = 0
        for k in range(begin, end):
            step, row = self._steps[k], self.row_bytes(k)
            if step.up > 1:
                held += (self.rows(k, band) + late) * row  # the whole band waits while parts go on
                late = 0
            # the last band is higher by the rows that are late
            most = max(most, (self.rows(k, band) + late + 2) * row)
            late = -(-late // step.down) + 1
            held += 2 * row * len(step.before)
        return kept + held + _ALIVE * most

    def _attention(self, k: int, band: int) -> int:
        """Keys and values of all positions, and what the queries of a band take."""
        work = _ALIVE * self.rows(k, band) * self.row_bytes(k)
        return 2 * self._bytes[k] + work
