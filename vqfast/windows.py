"""Sliding windows over a grid of codes larger than a model's own, and the order to draw it in.

The model knows a window of h x w codes. In a grid of H x W codes each cell (i, j) is predicted in
one such window, from the window's cells before it in raster order; other cells of the grid do not
reach it. Where the window stands is one of two published rules, here for any window side n over a
grid side N:

    make_samples   start(i) = clip(i - n // 2, 0, N - n)
    scene          start(i) = clip(i - (n - 1) // 2, 0, N - n)

With n = 16 they are the scripts' i - 8 and i - 7 (and one rule where n is odd). They are not
interchangeable: the same model draws other codes.

Orders: raster order draws one cell at a time, H·W steps. The wavefront draws cell (i, j) at time
j + w·i, W + w·(H - 1) steps with up to ceil(W / w) rows in flight. It gives the same codes: a
window that predicts (i, j) ends before column j + w, so of row i' < i it reads cells of time
< j + w + w·(i - 1) at most, all of them drawn.

Source: CompVis/taming-transformers scripts/make_samples.py (run_conditional) and
scripts/make_scene_samples.py (_helper). The wavefront is our own.

Letters: H W the grid, h w the window, both in codes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from vqfast import _check

__all__ = ["RULES", "Window", "Windows"]

RULES = ("make_samples", "scene")

Cell = tuple[int, int]  # (row, column) of the grid


class Window(NamedTuple):
    """Where a cell is predicted: the window's first row and column, and how many of its cells come
    before the predicted one in raster order.
    """

    top: int
    left: int
    before: int


class Windows:
    """The windows of one grid.

    Args:
        size: (H, W) of the grid.
        window: (h, w) of the model's own grid.
        rule: "make_samples" or "scene".

    Raises:
        TypeError: a side is no int. ValueError: a side below 1, an unknown rule, or a grid that is
            smaller than the window: the published rules have no place for one there.
    """

    def __init__(self, size: Cell, window: Cell, rule: str = "make_samples"):
        self.size = _sides("size", size)
        self.window = _sides("window", window)
        _check.choice("window_rule", rule, RULES)
        (H, W), (h, w) = self.size, self.window
        if h > H or w > W:
            raise ValueError(
                f"size must be at least {h}x{w} codes, the window of the model, got {H}x{W}: in a "
                "smaller grid no window fits"
            )
        self.rule = rule

    @property
    def rows_in_flight(self) -> int:
        """Most rows of the grid that a step of the wavefront works on: ceil(W / w)."""
        return -(-self.size[1] // self.window[1])

    def at(self, cell: Cell) -> Window:
        """The window that predicts a cell."""
        (i, j), w = cell, self.window[1]
        top, left = (
            min(max(x - (n // 2 if self.rule == "make_samples" else (n - 1) // 2), 0), N - n)
            for x, n, N in zip(cell, self.window, self.size, strict=True)
        )
        return Window(top, left, (i - top) * w + j - left)

    def cells(self, window: Window, first: int, last: int) -> list[int]:
        """The window's cells first..last - 1 in its raster order, as indices i·W + j of the grid.

        Args:
            window: of this grid.
            first, last: 0 <= first <= last <= h·w.
        """
        W, w = self.size[1], self.window[1]
        return [(window.top + n // w) * W + window.left + n % w for n in range(first, last)]

    def raster(self, first: int = 0) -> Iterator[list[Cell]]:
        """One cell at a time, from cell number `first` in raster order on."""
        H, W = self.size
        return ([divmod(n, W)] for n in range(first, H * W))

    def wavefront(self, first: int = 0) -> Iterator[list[Cell]]:
        """The cells of one time after the other, upper rows first; cells before number `first` in
        raster order are known and left out, and so is a time at which nothing is left.
        """
        (H, W), w = self.size, self.window[1]
        for time in range(W + w * (H - 1)):
            # rows i with 0 <= time - w·i < W
            rows = range(max(0, (time - W) // w + 1), min(H - 1, time // w) + 1)
            cells = [(i, time - w * i) for i in rows if i * W + time - w * i >= first]
            if cells:
                yield cells


def _sides(name: str, value: Cell) -> Cell:
    try:
        first, second = value
    except TypeError:
        raise TypeError(f"{name} must be a pair of ints, got {type(value).__name__}") from None
    except ValueError:
        raise ValueError(f"{name} must be a pair of ints, got {value!r}") from None
    return _check.integer(name, first, low=1), _check.integer(name, second, low=1)
