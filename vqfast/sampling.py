"""A sampling request: checked before anything is drawn, then drawn batch by batch.

    check_request  what a user asks for -> Request
    draw           Request, Engine      -> codes [b, h, w], one batch after another

Image i of a request takes row i of each of its tables, modulo their length, and is a function of
(seed, i) and of those rows alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqfast import _check
from vqfast.engine import Engine, Step, generate_windows
from vqfast.engine.guidance import guidance
from vqfast.engine.step import OnStep, check_on_step
from vqfast.models.conditioning import Conditioning
from vqfast.models.vqgan import VQGAN
from vqfast.ops.sample_logits import DrawOptions, check_options
from vqfast.windows import RULES, Windows

__all__ = ["Request", "check_request", "draw", "model_grid"]

_PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")


@dataclass(frozen=True, eq=False)
class Request:
    """A request that suits the model; tensors are int64 on the CPU."""

    n: int  # images first..first + n - 1
    first: int
    batch_size: int
    precision: str
    grid: tuple[int, int]  # of the codes of an image
    windows: Windows | None  # of a grid that is not the model's own
    conditions: Tensor  # [m, Tc], or [m, h, w] of which a window sees its part; image i has i % m
    known: Tensor  # [m, k], the first k codes of an image in raster order
    null: Tensor | None  # [1, Tc], where guidance acts
    guidance: dict[str, Any]  # cfg_scale, cfg_interval
    options: DrawOptions  # of the draw of a token
    on_step: OnStep | None

    def batches(self) -> Iterator[Tensor]:
        """Numbers [b] of the images that are drawn side by side."""
        end = self.first + self.n
        for begin in range(self.first, end, self.batch_size):
            yield torch.arange(begin, min(begin + self.batch_size, end))


def model_grid(tokenizer: VQGAN) -> tuple[int, int]:
    """(h, w) of the codes of an image as the model was trained: resolution over factor."""
    side = tokenizer.config.resolution // tokenizer.config.factor
    return side, side


def check_request(
    tokenizer: VQGAN,
    conditioning: Conditioning,
    classes: Any = None,
    n: int | None = None,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
    window_rule: str = "make_samples",
    batch_size: int = 8,
    precision: str = "auto",
    cond: Tensor | None = None,
    prefix: Tensor | None = None,
    first: int = 0,
    on_step: OnStep | None = None,
) -> Request:
    """The request; arguments and errors are those of `Pipeline.sample_codes`."""
    grid, windows = _grid(tokenizer, size, window_rule)
    _check.choice("precision", precision, _PRECISIONS)
    batch_size = _check.integer("batch_size", batch_size, low=1)
    first = _check.integer("first", first, low=0, high=2**62)
    options = DrawOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_options(**options)
    conditions = _conditions(conditioning, classes, cond)
    if n is None:
        n = len(conditions) if classes is not None or cond is not None else 1
    n = _check.integer("n", n, low=0)
    conditions = _fitting(conditioning, conditions, model_grid(tokenizer), windows)
    known = _known(prefix, grid)
    if windows is not None:
        batch_size = max(1, batch_size // windows.rows_in_flight)
    check_on_step(on_step)
    guide = guidance(cfg_scale, cfg_interval)
    scale = guide.scale
    if guide.begin < guide.end and guide.begin >= grid[0] * grid[1]:
        raise ValueError(
            f"cfg_interval must begin among the {grid[0] * grid[1]} codes of an image, got "
            f"{guide.begin}"
        )
    null = conditioning.null(1) if scale != 1 else None
    if scale != 1 and null is None:
        raise ValueError(f"cfg_scale = {scale:g} needs a model with a null condition")
    return Request(
        n=n,
        first=first,
        batch_size=batch_size,
        precision=precision,
        grid=grid,
        windows=windows,
        conditions=conditions,
        known=known,
        null=null,
        guidance={"cfg_scale": scale, "cfg_interval": cfg_interval},
        options=options,
        on_step=on_step,
    )


def draw(request: Request, engine_for: Callable[[str, int], Engine]) -> Iterator[Tensor]:
    """[b, h, w] int64 on the CPU, one batch after another.

    Args:
        engine_for: (precision, batch) -> an engine with room for the batch; asked before the first
            batch.
    """
    engine = engine_for(request.precision, min(request.batch_size, max(request.n, 1)))
    for index in request.batches():
        if request.windows is None:
            yield _draw_batch(engine, request, index)
        else:
            yield _draw_windows(engine, request, request.windows, index)


def _draw_batch(engine: Engine, request: Request, index: Tensor) -> Tensor:
    """Images `index` [b] of the model's own grid -> [b, h, w]."""
    h, w = request.grid
    known = request.known[index % len(request.known)]  # [b, k]
    cond = request.conditions[index % len(request.conditions)]  # [b, Tc]
    uncond = None
    if request.null is not None:
        uncond = torch.cat([request.null.expand(len(index), -1), known], dim=1).to(engine.device)
    drawn = engine.generate(
        torch.cat([cond, known], dim=1).to(engine.device),
        h * w - known.shape[1],
        uncond=uncond,
        sample_index=index,
        position=known.shape[1],
        on_step=_with_known(request, known),
        **request.guidance,
        **request.options,
    )
    return torch.cat([known, drawn.cpu()], dim=1).view(-1, h, w)


def _draw_windows(engine: Engine, request: Request, windows: Windows, index: Tensor) -> Tensor:
    """Images `index` [b] of another grid -> [b, h, w]."""
    call, device = request.on_step, engine.device
    codes = generate_windows(
        engine,
        request.conditions[index % len(request.conditions)].to(device),
        windows,
        uncond=None if request.null is None else request.null.expand(len(index), -1).to(device),
        sample_index=index,
        prefix=request.known[index % len(request.known)].to(device),
        on_step=None if call is None else lambda s: call(s._replace(codes=s.codes.cpu())),
        **request.guidance,
        **request.options,
    )
    return codes.cpu()


def _with_known(request: Request, known: Tensor) -> OnStep | None:
    """The callback of a request as one of the engine, which knows no grid and no prefix."""
    call = request.on_step
    if call is None:
        return None

    def on_step(step: Step) -> None:
        codes = torch.cat([known, step.codes.cpu()], dim=1).view(-1, *request.grid)
        call(step._replace(codes=codes))

    return on_step


def _grid(
    tokenizer: VQGAN, size: int | Sequence[int] | None, rule: str
) -> tuple[tuple[int, int], Windows | None]:
    """(h, w) of the codes of an image of `size`, and its windows if it is not the model's own."""
    _check.choice("window_rule", rule, RULES)
    own, f = model_grid(tokenizer), tokenizer.config.factor
    if size is None:
        return own, None
    sides = (size, size) if isinstance(size, int) else size
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
        raise ValueError(f"size must be (H, W) or a side, got {size!r}")
    H, W = (_check.integer("size", side, low=1) for side in sides)
    if H % f or W % f:
        raise ValueError(f"size must have sides that are multiples of {f}, got {H}x{W}")
    grid = H // f, W // f
    if grid[0] < own[0] or grid[1] < own[1]:
        least = "x".join(str(n * f) for n in own)
        raise ValueError(
            f"size must be at least {least}, got {H}x{W}: the model predicts a code in a window of "
            "that size, which does not fit into a smaller picture"
        )
    return grid, None if grid == own else Windows(grid, own, rule)


def _fitting(
    conditioning: Conditioning, conditions: Tensor, own: tuple[int, int], windows: Windows | None
) -> Tensor:
    """[m, Tc] for a condition that is the same in every window, [m, h, w] for one that is a grid of
    which each window sees its part.
    """
    Tc, (h, w) = conditioning.length(own), own
    if windows is None or conditioning.kind in ("class", "sos"):
        if conditions.shape[1] != Tc:
            raise ValueError(
                f"cond must be [m, {Tc}] to match the model, got {list(conditions.shape)}"
            )
        return conditions
    if Tc != h * w:
        raise ValueError(
            f"size must be the model's own: its condition of {Tc} tokens does not fit the {h}x{w} "
            "codes of a window"
        )
    H, W = windows.size
    if conditions.shape[1] != H * W:
        raise ValueError(
            f"cond must be [m, {H * W}], a token for each code of the size, got "
            f"{list(conditions.shape)}"
        )
    return conditions.view(-1, H, W)


def _conditions(conditioning: Conditioning, classes: Any, cond: Tensor | None) -> Tensor:
    """[m, Tc] int64 on the CPU; image i takes row i % m."""
    kind = conditioning.kind
    if kind != "class" and classes is not None:
        raise ValueError(f"classes must be None: this model is conditioned on {kind!r}")
    if cond is not None:
        if classes is not None:
            raise ValueError("classes and cond exclude one another")
        _check.integer_tensor("cond", cond)
        _check.ndim("cond", cond, 2)
        if not len(cond):
            raise ValueError("cond must hold at least one row, got 0")
        return cond.cpu().long()
    if conditioning.kind == "class":
        ids = range(conditioning.n_classes) if classes is None else classes
        if isinstance(ids, (int, str)):
            ids = [ids]
        tokens = conditioning.encode(ids if isinstance(ids, Tensor) else list(ids)).cpu()
        if not len(tokens):
            raise ValueError("classes must hold at least one class, got none")
        return tokens
    if conditioning.kind == "sos":
        return conditioning.encode(1)
    raise ValueError(f"cond must be given: this model is conditioned on {kind!r}")


def _known(prefix: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """[m, k] int64 on the CPU; k = 0 without a prefix."""
    if prefix is None:
        return torch.empty(1, 0, dtype=torch.int64)
    h, w = grid
    _check.integer_tensor("prefix", prefix)
    _check.ndim("prefix", prefix, 2)
    if not len(prefix) or prefix.shape[1] > h * w:
        raise ValueError(f"prefix must be [m >= 1, k <= {h * w}], got {list(prefix.shape)}")
    return prefix.cpu().long()
