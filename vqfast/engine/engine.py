"""The decoding engine: a GPT's packed weights, a static key-value cache, and the loop over tokens.

One native call per token for the whole network (`decode_step`), one for the draw
(`sample_logits`). Neither lets a row see the batch it is in, so the codes of a sample are a
function of (seed, sample index, condition) alone, bit for bit on one backend and precision.
"""

import torch
from torch import Tensor

from vqfast import _check
from vqfast.engine.packing import BITS, PackedGPT, choose_precision
from vqfast.models.gpt import GPT
from vqfast.ops import decode_step, sample_logits
from vqfast.ops.decode_step import empty_cache
from vqfast.ops.sample_logits import check_options

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
        return self._start(tokens)

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
        return self._advance(tokens[:, None])

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
        uncond: Tensor | None = None,
        sample_index: int | Tensor = 0,
        position: int = 0,
    ) -> Tensor:
        """Draw n tokens after each condition.

        Args:
            cond: [b, Tc] integers, b <= batch, Tc >= 1: all tokens before the first new one.
            n: >= 0; Tc + n - 1 <= capacity, as the last token is not fed.
            seed, temperature, top_k, top_p: as in `sample_logits`.
            cfg_scale: s of the guided logits u + s·(c - u); 1 is off.
            uncond: like cond, the tokens that u is conditioned on; needed if cfg_scale is not 1.
            sample_index: of row 0, the others follow; or [b] integers. Row i is a function of
                (seed, sample_index of i, cond[i]) alone.
            position: of the first new token among the tokens of its image, for the draw.

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
        scale = _check.number("cfg_scale", cfg_scale)
        index = self._indices(sample_index, b)
        start = cond
        if scale != 1:
            if uncond is None:
                raise ValueError(f"cfg_scale = {scale:g} needs a null condition, there is none")
            self._check_tokens("uncond", uncond, 2)
            _check.shape("uncond", uncond, cond.shape, "like cond")
            start = torch.cat([cond, uncond])
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        check_options(**options)
        out = torch.empty(b, n, dtype=torch.int64, device=self.device)
        fed = start
        for t in range(n if b else 0):
            logits = self._advance(fed) if t else self._start(fed)
            if scale != 1:
                logits = logits[b:] + scale * (logits[:b] - logits[b:])
            out[:, t] = sample_logits(logits, sample_index=index, position=position + t, **options)
            fed = out[:, t : t + 1].repeat(len(start) // b, 1)
        self.reset()
        return out

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
        self._k_cache = self._v_cache = torch.empty(0)  # the old ones go first
        self._k_cache, self._v_cache = (empty_cache(shape, dtype, self.device) for _ in range(2))

    def _start(self, tokens: Tensor) -> Tensor:
        """New sequences; guidance has twice as many rows as `batch`, and the cache grows once."""
        if len(tokens) > self._k_cache.shape[1]:
            self._allocate(len(tokens))
        self._rows, self._length = len(tokens), 0
        return self._advance(tokens)

    def _advance(self, tokens: Tensor) -> Tensor:
        """Feed [rows, T] checked tokens, some positions of all rows per call -> [rows, V]."""
        B, T = tokens.shape
        columns = max(1, _ROWS_PER_CALL // B)
        logits = torch.empty(0)
        for first in range(0, T, columns):
            part = tokens[:, first : first + columns]
            t = part.shape[1]
            at = torch.arange(self._length, self._length + t, device=self.device)
            logits = decode_step(
                part.t().reshape(-1).long().contiguous(),  # all rows of the last position come last
                torch.arange(B, device=self.device).repeat(t),
                at.repeat_interleave(B),
                self._k_cache,
                self._v_cache,
                self._packed,
                bits=BITS[self.precision],
                n_logits=B if first + columns >= T else 0,
            )
            self._length += t
        return logits
