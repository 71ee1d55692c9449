"""The token loop of `Engine.generate` on a GPU: one captured step, replayed token by token.

A step of a small transformer is some hundred launches of a few microseconds, which a host cannot
issue as fast as the device runs them. So the step works on static buffers: what differs from token
to token (the token, its place in the cache, its position in the image, the column it is written to)
lies on the device and is advanced there, and the host replays a graph. Nothing waits for the device
inside the loop: logits that are not finite leave -1 in the codes, which is looked at once, at the
end.

The first token of a condition, and what guidance has missed before it begins, go through the
engine's own calls. A step runs once launch by launch, which compiles what is missing, and is then
captured. Off CUDA nothing is captured: the same steps run one after another.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from vqfast import _dispatch
from vqfast.engine.guidance import Guidance
from vqfast.engine.packing import BITS
from vqfast.engine.step import OnStep, Step
from vqfast.ops.decode_step import decode_step
from vqfast.ops.sample_logits import DrawOptions, check_drawn, check_options, draw

_KEPT = 4  # captured sets of options of an engine: the oldest goes first
_FEW = 8  # steps that are not worth a capture

_log = logging.getLogger("vqfast")


class Steps:
    """Static buffers of b sequences, and the steps that work on them.

    Args:
        engine: whose cache and weights are used, as they are now; it keeps the Steps, not they it.
        b: sequences; guidance has twice as many rows.
        guide, options: constants of a captured step.
    """

    def __init__(self, engine: Any, b: int, guide: Guidance, options: tuple):
        self._b, self._guide, self._options, self._bits = b, guide, options, BITS[engine.precision]
        self._memory = (engine._k_cache, engine._v_cache, engine._packed)
        self._V, device = engine.config.vocab_size, engine.device
        # what a step advances, in one tensor so that one launch does: sample indices and positions
        # in the image [2, b], places in the cache [2b], the column of the codes
        self._state = torch.zeros(4 * b + 1, dtype=torch.int64, device=device)
        self._advance = torch.ones_like(self._state)
        self._advance[:b] = 0
        self._where = self._state[: 2 * b].view(2, b)
        self._places = self._state[2 * b : 4 * b]
        self._column = self._state[4 * b :]
        self._tokens = torch.zeros(2, b, dtype=torch.int64, device=device)  # with and without c
        self._slots = torch.arange(2 * b, device=device)
        self.codes = torch.empty(b, engine.capacity, dtype=torch.int64, device=device)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._why_not = None if device.type == "cuda" else f"the engine is on {device.type}"

    def begin(self, index: Tensor, position: int, place: int) -> None:
        """Before the first token: sample indices [b], its position in the image, and the place in
        the cache that it will take.
        """
        self.codes.fill_(-1)
        self._state.zero_()
        self._where[0] = index
        self._where[1] = position
        self._places.fill_(place)

    def record(self, logits: Tensor) -> None:
        """Draw from logits [b, V], write the codes, and advance."""
        token = draw(logits, self._where, 0, self._options)
        self.codes.scatter_(1, self._column.expand(self._b, 1), token[:, None])
        # -1 is no row of the embedding
        torch.clamp_min(token.expand(2, -1), 0, out=self._tokens)
        self._state.add_(self._advance)

    def run(self, guided: bool, left: int) -> None:
        """Feed the last token and draw the next; `left` steps follow, at least about."""
        if guided in self._graphs:
            self._graphs[guided].replay()
            return
        self._step(guided)
        if left >= _FEW and self._why_not is None:
            self._capture(guided)

    def _step(self, guided: bool) -> None:
        rows = 2 * self._b if guided else self._b
        logits = decode_step(*self._rows(rows), *self._memory, bits=self._bits, n_logits=rows)
        if guided:
            logits = self._guide.mix(*logits.split(self._b))
        self.record(logits)

    def _rows(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._tokens.view(-1)[:n], self._slots[:n], self._places[:n]

    def _capture(self, guided: bool) -> None:
        """A graph of the step; a reason why not ends all further attempts, and is logged."""
        self._why_not = self._waits()
        if self._why_not is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with (
                    torch.cuda.device(self._state.device),
                    # another thread may use CUDA meanwhile
                    torch.cuda.graph(graph, capture_error_mode="thread_local"),
                ):
                    self._step(guided)
            except RuntimeError as e:  # what CUDA says of a launch that no graph can hold
                self._why_not = str(e)
            else:
                self._graphs[guided] = graph
                return
        _log.warning("decoding launch by launch, without a CUDA graph: %s", self._why_not)

    def _waits(self) -> str | None:
        """The op that runs on its reference, which waits for the device."""
        *caches, packed = self._memory
        logits = self._state.new_empty(self._b, self._V, dtype=torch.float32)
        calls = {
            "decode_step": (*self._rows(self._b), *caches, *packed, self._bits, self._b),
            "sample_logits": (logits, self._where, *self._options, 0),
        }
        for op, inputs in calls.items():
            if _dispatch.OPS[op].choose(*inputs) == "reference":
                return f"{op} runs on its reference"
        return None


def _steps_of(engine: Any, b: int, guide: Guidance, options: tuple) -> Steps:
    """The engine's Steps for these constants, made on first need."""
    key = (b, guide.scale, options, _dispatch.forced_backend())
    steps = engine._steps.pop(key, None) or Steps(engine, b, guide, options)
    engine._steps[key] = steps  # the newest is last
    while len(engine._steps) > _KEPT:
        engine._steps.pop(next(iter(engine._steps)))
    return steps


def loop(
    engine: Any,
    out: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guide: Guidance,
    index: Tensor,
    position: int,
    on_step: OnStep | None,
    options: DrawOptions,
) -> None:
    """Token after token into `out` [b, n]; checked arguments of `Engine.generate`; uncond is
    [b, 0] where guidance is off.

    Raises:
        NonFiniteError: some logits were not finite; names the first such position.
    """
    (b, n), Tc = out.shape, cond.shape[1]
    guided = [guide.acts_at(position + t) for t in range(n)]
    engine._start(b + b * any(guided))
    images = tuple(index.tolist()) if on_step else ()
    steps = _steps_of(engine, b, guide, check_options(**options))
    steps.begin(index, position, Tc - 1)
    taken = 0  # tokens that the cache holds of the sequences without c
    for t in range(n):
        end = Tc + t  # tokens of a sequence so far
        behind = guided[t] and taken < end - 1
        if t and not behind:
            steps.run(guided[t], n - t - 1)
        else:
            last = cond if t == 0 else steps.codes[:, t - 1 : t].clamp_min(0)
            logits = engine._feed(last, end)
            if guided[t]:
                missed = torch.cat([uncond, steps.codes[:, :t].clamp_min(0)], dim=1)[:, taken:]
                logits = guide.mix(logits, engine._feed(missed, end, first_slot=b))
            steps.record(logits)
        taken = end if guided[t] else taken
        if on_step:
            on_step(Step(images, t + 1, n, steps.codes[:, :n].clone()))
    out.copy_(steps.codes[:, :n])
    bad = (out < 0).any(0)
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        check_drawn(out[:, column], index, position + column)
