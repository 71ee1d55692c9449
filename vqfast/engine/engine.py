"""The decoding engine: a GPT's packed weights, a static key-value cache, and the loop over tokens.

One native call per token for the whole network (`decode_step`), one for the draw
(`sample_logits`). Neither lets a row see the batch it is in, so the codes of a sample are a
function of (seed, sample index, condition) alone, bit for bit on one backend and precision.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vqfast import _check
from vqfast.engine import graph
from vqfast.engine.guidance import Guidance, guidance
from vqfast.engine.packing import BITS, PackedGPT, choose_precision
from vqfast.engine.step import OnStep, Step, check_on_step
from vqfast.models.gpt import GPT
from vqfast.ops.decode_step import decode_step, empty_cache
from vqfast.ops.sample_logits import DrawOptions, check_options, sample_logits

_ROWS_PER_CALL = 64  # of a prefill: bounds its scratch memory


class Engine:
    """Decodes up to `batch` sequences of one GPT side by side.

    Args:
        gpt: the model; its weights are copied, so later changes do not show. Those of a PackedGPT
            are used as they are.
        precision: of weights: "fp32", "bf16", "int8" (a scale per row) or "int4" (a scale per 32
            weights of a row); "auto" is that of the model, "fp32" unless it is packed. Sums are
            float32; activations are rounded as the products want them (vqfast/ops/_packed.py); the
            cache is bfloat16 unless "fp32".
        batch: most sequences at a time. Cache: 2·n_layer·block_size·n_embd values for each.

    Raises:
        TypeError: gpt is neither. ValueError: unknown precision, one that packed weights cannot
            give, batch < 1, or a GPT with n_unmasked > 0, which no cache can serve.
    """

    _loops: ClassVar = {"cuda": graph.loop}  # by device; elsewhere `_loop`

    def __init__(self, gpt: GPT | PackedGPT, precision: str = "auto", batch: int = 8):
        if not isinstance(gpt, GPT | PackedGPT):
            raise TypeError(f"gpt must be a vqfast.GPT or a PackedGPT, got {type(gpt).__name__}")
        self.precision = choose_precision(gpt, precision)
        self.batch = _check.integer("batch", batch, low=1)
        self.config, self._packed = gpt.config, PackedGPT.of(gpt, self.precision).packed
        self.device = self._packed.weights.device
        self._k_cache = self._v_cache = torch.empty(0)
        self._allocate(self.batch)
        self.reset()

    def reset(self) -> None:
        """Forget all sequences; the next call is a `prefill`."""
        self._rows, self._length = 0, 0

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can feed, condition included: the GPT's block_size."""
        return self.config.block_size

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Start new sequences with these tokens.

        Args:
            tokens: [B, T] integers on the engine's device, 1 <= B <= batch, 1 <= T <= capacity.

        Returns:
            [B, V] float32, the logits of token T.

        Raises:
            TypeError: not integers. ValueError: shape, device or token ids are wrong.
        """
        self._check_tokens("tokens", tokens, 2)
        B, T = tokens.shape
        if not 1 <= B <= self.batch or not 1 <= T <= self.capacity:
            raise ValueError(
                f"tokens must be [1..{self.batch}, 1..{self.capacity}], got {list(tokens.shape)}"
            )
        self._start(B)
        return self._feed(tokens, T)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each sequence.

        Args:
            tokens: [B] integers, B as in the last `prefill`.

        Returns:
            [B, V] float32, the logits of the next token.

        Raises:
            TypeError: not integers. ValueError: nothing was prefilled, shape, device or token ids
                are wrong, or the cache is full.
        """
        self._check_tokens("tokens", tokens, 1)
        if not self._rows:
            raise ValueError("step needs sequences: call prefill first")
        _check.shape("tokens", tokens, (self._rows,), "as in the last prefill")
        if self._length == self.capacity:
            raise ValueError(f"the cache is full: its capacity is {self.capacity} tokens")
        return self._feed(tokens[:, None], self._length + 1)

    @torch.no_grad()
    def generate(
        self,
        cond: Tensor,
        n: int,
        *,
        seed: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scale: float = 1.0,
        cfg_interval: Sequence[int] | None = None,
        uncond: Tensor | None = None,
        sample_index: int | Tensor = 0,
        position: int = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw n tokens after each condition.

        Args:
            cond: [b, Tc] integers, b <= batch, Tc >= 1: all tokens before the first new one.
            n: >= 0; Tc + n - 1 <= capacity, as the last token is not fed.
            seed, temperature, top_k, top_p: as in `sample_logits`.
            cfg_scale: s of the guided logits u + s·(c - u); 1 is off.
            cfg_interval: (begin, end), the positions in which guidance acts, half-open and counted
                as `position` is; None is all. Elsewhere the logits are c, and u costs nothing.
            uncond: like cond, the tokens that u is conditioned on; needed if cfg_scale is not 1.
            sample_index: of row 0, the others follow; or [b] integers. Row i is a function of
                (seed, sample_index of i, cond[i]) alone.
            position: of the first new token among the tokens of its image, for the draw.
            on_step: called after every token with a `Step`; its codes are [b, n]. What it raises
                ends the generation and leaves the engine fit for the next.

        Returns:
            [b, n] int64.

        Raises:
            TypeError, ValueError: an argument is wrong, more tokens than the capacity, or cfg_scale
                without uncond. NonFiniteError: the logits are not finite.
        """
        self._check_tokens("cond", cond, 2)
        b, Tc = cond.shape
        if b > self.batch or Tc < 1:
            raise ValueError(f"cond must be [<= {self.batch}, >= 1], got {list(cond.shape)}")
        n = _check.integer("n", n, low=0)
        if Tc + n - 1 > self.capacity:
            raise ValueError(
                f"n = {n} tokens after {Tc} do not fit: the capacity is {self.capacity}"
            )
        guide = guidance(cfg_scale, cfg_interval)
        index = self._indices(sample_index, b)
        uncond = guide.needed(uncond)
        if uncond is None:
            uncond = cond[:, :0]
        else:
            self._check_tokens("uncond", uncond, 2)
            _check.shape("uncond", uncond, cond.shape, "like cond")
        options = DrawOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        check_options(**options)
        check_on_step(on_step)
        out = torch.full((b, n), -1, dtype=torch.int64, device=self.device)
        if out.numel():
            try:
                loop = self._loops.get(self.device.type, Engine._loop)
                loop(self, out, cond, uncond, guide, index, position, on_step, options)
            finally:
                self.reset()
        return out

    def _loop(
        self,
        out: Tensor,
        cond: Tensor,
        uncond: Tensor,
        guide: Guidance,
        index: Tensor,
        position: int,
        on_step: OnStep | None,
        options: DrawOptions,
    ) -> None:
        """Token after token into `out` [b, n]; checked arguments of `generate`; uncond is
        [b, 0] where guidance is off.
        """
        b, n = out.shape
        guided = [guide.acts_at(position + t) for t in range(n)]
        self._start(b + b * any(guided))
        images = tuple(index.tolist()) if on_step else ()
        fed, behind = cond, uncond  # tokens that the cache has yet to take, with and without c
        for t in range(n):
            end = cond.shape[1] + t
            if not guided[t]:
                logits = self._feed(fed, end)
            elif behind.shape == fed.shape:
                logits = guide.mix(*self._feed(torch.cat([fed, behind]), end).split(b))
            else:  # guidance begins: u takes what it has missed in few calls
                logits = guide.mix(self._feed(fed, end), self._feed(behind, end, first_slot=b))
            out[:, t] = sample_logits(logits, sample_index=index, position=position + t, **options)
            fed = out[:, t : t + 1]
            if guided[t]:
                behind = fed
            elif position + t < guide.begin:
                behind = torch.cat([behind, fed], dim=1)
            if on_step:
                on_step(Step(images, t + 1, n, out.clone()))

    def _indices(self, sample_index: int | Tensor, b: int) -> Tensor:
        if isinstance(sample_index, Tensor):
            _check.integer_tensor("sample_index", sample_index)
            _check.shape("sample_index", sample_index, (b,), "to match cond")
            return sample_index.to(self.device, torch.int64)
        first = _check.integer("sample_index", sample_index, low=0, high=2**62)
        return torch.arange(first, first + b, device=self.device)

    def _check_tokens(self, name: str, tokens: Tensor, ndim: int) -> None:
        _check.integer_tensor(name, tokens)
        _check.ndim(name, tokens, ndim)
        if tokens.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, got {tokens.device}")
        V = self.config.vocab_size
        if tokens.numel():
            low, high = (int(v) for v in tokens.aminmax())
            if low < 0 or high >= V:
                raise ValueError(f"{name} must hold token ids in 0..{V - 1}, got {low}..{high}")

    def _allocate(self, rows: int) -> None:
        c = self.config
        shape = (c.n_layer, rows, c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        self._steps: dict[tuple, graph.Steps] = {}  # captured steps read and write one cache
        self._k_cache = self._v_cache = torch.empty(0)  # the old ones go first
        self._k_cache, self._v_cache = (empty_cache(shape, dtype, self.device) for _ in range(2))

    def _start(self, rows: int) -> None:
        """New sequences; guidance has twice as many rows as `batch`, and the cache grows once."""
        if rows > self._k_cache.shape[1]:
            self._allocate(rows)
        self._rows, self._length = rows, 0

    def _feed(self, tokens: Tensor, end: int, first_slot: int = 0) -> Tensor:
        """Feed [rows, T] checked tokens, the last at position end - 1, to the slots from first_slot
        on, some positions of all rows per call -> [rows, V].
        """
        B, T = tokens.shape
        columns = max(1, _ROWS_PER_CALL // B)
        slots = torch.arange(first_slot, first_slot + B, device=self.device)
        logits = torch.empty(0)
        for first in range(0, T, columns):
            part = tokens[:, first : first + columns]
            t, begin = part.shape[1], end - T + first
            at = torch.arange(begin, begin + t, device=self.device)
            logits = self._call(
                part.t().reshape(-1).long(),  # all rows of the last position come last
                slots.repeat(t),
                at.repeat_interleave(B),
                B if first + columns >= T else 0,
            )
        self._length = end
        return logits

    def _call(self, tokens: Tensor, slots: Tensor, positions: Tensor, n_logits: int) -> Tensor:
        """`decode_step` of checked rows of any sequences -> [n_logits, V]."""
        return decode_step(
            tokens.contiguous(),
            slots.contiguous(),
            positions.contiguous(),
            self._k_cache,
            self._v_cache,
            self._packed,
            bits=BITS[self.precision],
            n_logits=n_logits,
        )
