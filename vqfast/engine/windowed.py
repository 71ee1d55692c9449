"""Sampling grids of codes larger than the model's own: each code in its sliding window.

A window that moves voids its key-value cache, for positions are absolute: the window's cells before
the predicted one are then fed again. All windows of a step, of all images, are fed together, in
calls of a bounded number of rows, and the head runs on the last row of each alone. Where a window
stays (at the borders, and in a grid as wide as the window) its sequence goes on by one token; and
tokens of a condition that is the same in every window stay in the cache for good.

Neither the order nor the batch changes a code: a row's bits depend on its own sequence alone, and
the draw on (seed, sample index, i·W + j).

Letters: H W the grid, h w the window, b images, F rows of the grid in flight, Tc condition tokens
in a window.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vqfast import _check
from vqfast.engine.engine import Engine
from vqfast.engine.guidance import Guidance, guidance
from vqfast.engine.step import OnStep, Step, check_on_step
from vqfast.ops.sample_logits import DrawOptions, check_options, sample_logits
from vqfast.windows import Cell, Windows

__all__ = ["ORDERS", "generate_windows"]

ORDERS = ("wavefront", "sequential")
_ROWS_PER_CALL = 256  # fed at a time: bounds the scratch memory of a step
_UNSAMPLED = 0  # what a cell holds before it is drawn; never read, so any token would do

Job = tuple[int, Cell]  # predict a cell under condition number 0, or 1 where guidance acts


@torch.no_grad()
def generate_windows(
    engine: Engine,
    cond: Tensor,
    windows: Windows,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: tuple[int, int] | None = None,
    uncond: Tensor | None = None,
    sample_index: int | Tensor = 0,
    prefix: Tensor | None = None,
    order: str = "wavefront",
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the codes of whole grids, each in the window that predicts it.

    Args:
        engine: of a GPT over [condition ; h·w codes]; its cache grows to F slots for each image,
            twice that with guidance.
        cond: integers on the engine's device; [b, Tc], the same tokens in every window (class,
            start token), or [b, H, W], of which a window sees its own h·w. 1 <= b <= batch.
        windows: the grid, the model's window and the rule.
        seed, temperature, top_k, top_p: as in `sample_logits`; a code's position is i·W + j.
        cfg_scale, cfg_interval, uncond: as in `Engine.generate`; uncond is like cond.
        sample_index: of row 0, the others follow; or [b] integers. Grid i is a function of (seed,
            sample_index of i, cond[i], prefix[i]) alone.
        prefix: [b, k] codes of the first k cells in raster order, which are kept.
        order: "wavefront", W + w·(H - 1) steps, or "sequential", H·W steps: the same codes.
        on_step: called after every step with a `Step`; its codes are [b, H, W], the prefix
            included. What it raises ends the generation and leaves the engine fit for the next.

    Returns:
        [b, H, W] int64.

    Raises:
        TypeError, ValueError: an argument is wrong, a window with its condition is longer than the
            capacity, or cfg_scale without uncond. NonFiniteError: the logits are not finite.

    Cost: an interior code feeds the (h // 2)·w or so codes of its context, and its condition if
        that is a grid.
    Source: arXiv:2012.09841 section 3.3; the rules are in vqfast/windows.py.
    """
    _check.choice("order", order, ORDERS)
    guide = guidance(cfg_scale, cfg_interval)
    conditions = _conditions(engine, cond, uncond, guide, windows)
    b, (H, W) = len(cond), windows.size
    index = engine._indices(sample_index, b)
    prefix = cond.new_empty(b, 0) if prefix is None else prefix
    engine._check_tokens("prefix", prefix, 2)
    known = prefix.shape[1]
    if len(prefix) != b or known > H * W:
        raise ValueError(f"prefix must be [{b}, <= {H * W}], got {list(prefix.shape)}")
    options = DrawOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_options(**options)
    check_on_step(on_step)

    wave = order == "wavefront"
    steps = list(windows.wavefront(known) if wave else windows.raster(known))
    out = torch.full((b, H * W), -1, dtype=torch.int64, device=engine.device)
    out[:, :known] = prefix
    images = tuple(index.tolist()) if on_step else ()
    try:
        grids = _Grids(engine, conditions, windows, windows.rows_in_flight if wave else 1)
        grids.codes[:, :known] = prefix
        for number, cells in enumerate(steps, 1):
            for cell, logits in grids.guided(cells, guide):
                at = cell[0] * W + cell[1]
                drawn = sample_logits(logits, sample_index=index, position=at, **options)
                out[:, at] = grids.codes[:, at] = drawn
            if on_step:
                on_step(Step(images, number, len(steps), out.view(b, H, W).clone()))
    finally:
        engine.reset()
    return out.view(b, H, W)


class _Grids:
    """The codes drawn so far of b images, and what the cache holds of their windows.

    An image has G·F slots of the cache, its lanes: grid row i under condition g uses lane
    g·F + i % F, and rows in flight at the same time differ in that. All images are in step, so that
    one note says what a lane holds.
    """

    def __init__(self, engine: Engine, conditions: list[Tensor], windows: Windows, F: int):
        self.engine, self.windows, self.F = engine, windows, F
        (H, W), (h, w), b = windows.size, windows.window, len(conditions[0])
        self.lanes = len(conditions) * F
        self.is_grid = conditions[0].dim() == 3
        self.C = conditions[0][0].numel()  # tokens of a condition: Tc or H·W
        self.Tc = h * w if self.is_grid else self.C
        codes = conditions[0].new_full((b, H * W), _UNSAMPLED)
        # every token that may be fed: [b, G·C + H·W]
        self.tokens = torch.cat([c.flatten(1) for c in conditions] + [codes], dim=1).long()
        self.codes = self.tokens[:, len(conditions) * self.C :]
        engine._start(b * self.lanes)
        # window (top, left) and number of tokens, condition included, of a lane
        self.held: dict[int, tuple[tuple[int, int], int]] = {}

    def guided(self, cells: list[Cell], guide: Guidance) -> Iterator[tuple[Cell, Tensor]]:
        """Each of these cells with its logits [b, V], mixed where guidance acts."""
        W = self.windows.size[1]
        jobs = [(0, cell) for cell in cells]
        jobs += [(1, cell) for cell in cells if guide.acts_at(cell[0] * W + cell[1])]
        logits = dict(zip(jobs, self._logits(jobs), strict=True))
        for cell in cells:
            x, u = logits[0, cell], logits.get((1, cell))
            yield cell, x if u is None else guide.mix(x, u)

    def _logits(self, jobs: list[Job]) -> Tensor:
        """Logits [len(jobs), b, V] that predict these cells of every image."""
        inner: list[tuple[int, int, int]] = []  # (column of `tokens`, lane, position)
        last: list[tuple[int, int, int]] = []
        for g, cell in jobs:
            lane = g * self.F + cell[0] % self.F
            columns, first = self._missing(g, lane, cell)
            fed = [(column, lane, first + n) for n, column in enumerate(columns)]
            inner += fed[:-1]
            last.append(fed[-1])
        plan = torch.tensor(inner + last, device=self.engine.device)  # [n, 3]
        return self._feed(plan[:, 0], plan[:, 1], plan[:, 2], len(last))

    def _missing(self, g: int, lane: int, cell: Cell) -> tuple[list[int], int]:
        """What the cache lacks to predict a cell: columns of `tokens`, and the position of the
        first of them in the sequence [condition ; window].
        """
        window = self.windows.at(cell)
        corner, length = window[:2], self.Tc + window.before
        before, have = self.held.get(lane, (None, 0))
        if before != corner:  # a condition that no window crops is the same in the next one
            have = 0 if self.is_grid else min(have, self.Tc, length - 1)
        self.held[lane] = (corner, length)
        codes = self.windows.cells(window, max(have - self.Tc, 0), window.before)
        crop = (
            self.windows.cells(window, min(have, self.Tc), self.Tc)
            if self.is_grid
            else range(have, self.Tc)
        )
        start = self.tokens.shape[1] - self.codes.shape[1]
        return [g * self.C + n for n in crop] + [start + n for n in codes], have

    def _feed(self, columns: Tensor, lanes: Tensor, positions: Tensor, n_last: int) -> Tensor:
        """Feed columns [n] of `tokens` of every image -> logits [n_last, b, V] of the last ones."""
        tokens = self.tokens[:, columns]  # [b, n]
        b, n = tokens.shape
        slots = torch.arange(b, device=tokens.device)[:, None] * self.lanes + lanes
        rows = torch.stack([tokens, slots, positions.expand(b, n)])  # [3, b, n]
        inner, last = rows.split([n - n_last, n_last], dim=2)
        rows = torch.cat([inner.flatten(1), last.transpose(1, 2).flatten(1)], dim=1)
        first_last = inner[0].numel()
        found = []
        for begin in range(0, rows.shape[1], _ROWS_PER_CALL):
            some = rows[:, begin : begin + _ROWS_PER_CALL]
            n_logits = max(0, begin + some.shape[1] - max(begin, first_last))
            found.append(self.engine._call(some[0], some[1], some[2], n_logits))
        return torch.cat(found).view(n_last, b, -1)


def _conditions(
    engine: Engine, cond: Tensor, uncond: Tensor | None, guide: Guidance, windows: Windows
) -> list[Tensor]:
    """What the codes are predicted under: cond and, if it is guided, uncond."""
    _check_condition(engine, "cond", cond, windows)
    uncond = guide.needed(uncond)
    if uncond is None:
        return [cond]
    _check_condition(engine, "uncond", uncond, windows)
    _check.shape("uncond", uncond, cond.shape, "like cond")
    return [cond, uncond]


def _check_condition(engine: Engine, name: str, cond: Tensor, windows: Windows) -> None:
    _check.integer_tensor(name, cond)
    _check.ndim(name, cond, (2, 3))
    engine._check_tokens(name, cond, cond.dim())
    b, (h, w) = len(cond), windows.window
    if not 1 <= b <= engine.batch or not cond.shape[1]:
        raise ValueError(f"{name} must be [1..{engine.batch}, >= 1], got {list(cond.shape)}")
    if cond.dim() == 3:
        _check.shape(name, cond, (b, *windows.size), "to match the grid of codes")
    Tc = cond.shape[1] if cond.dim() == 2 else h * w
    if Tc + h * w - 1 > engine.capacity:
        raise ValueError(
            f"a window of {h * w} codes after {Tc} tokens does not fit: the capacity is "
            f"{engine.capacity}"
        )
