"""Draw one token per row of logits; image i of a request depends on (seed, i) alone.

    p = top_p(softmax(top_k(logits / temperature)))
    token = first v with sum_{w <= v} p_w > u · sum_w p_w

* top-k keeps the k largest logits and every tie of the k-th. top-p sorts the rest by falling
  probability (ties: lower token first) and keeps a token while the sum before it is <= top_p; so
  the crossing token stays.
* u is Philox4x32-10 with key = seed and counter = (sample_index, position): a pure function, so
  that neither the batch size, the place in the batch nor the number of threads can matter.
  u = ((x0 >> 5)·2²⁶ + (x1 >> 6)) / 2⁵³.
* The op takes sample_index [B], or [2, B] whose second row is added to `position`: rows may stand
  at positions of their own, and a captured graph reads them from the device.
* All is float64 on the float32 logits; half-precision logits are widened first, for they change
  what the k-th is.

Cost: reads B·V logits, one exp per kept token.
Source: arXiv:1904.09751 (top-p); Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011 (Philox); CompVis/taming-transformers taming/modules/transformer/mingpt.py (the order).
"""

from typing import TypedDict

import torch
from torch import Tensor

from vqfast import _check
from vqfast._dispatch import Op
from vqfast.errors import NonFiniteError

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BAD_ROW = -1  # written in place of a token when a row has no distribution


def philox(key: tuple[int, int], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors of 32-bit words -> four of the same."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 wraps modulo 2^64: the bits of a 32 x 32-bit product are right, its sign may not be
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, sample_index: Tensor, position: int) -> Tensor:
    """[B] float64 in [0, 1), a pure function of (seed, sample_index, position)."""
    index = sample_index.long()
    where = torch.full_like(index, position)
    if index.ndim == 2:
        index, where = index[0], index[1] + position
    where = where & _WORD
    x0, x1, _, _ = philox(
        (seed & _WORD, (seed >> 32) & _WORD),
        (index & _WORD, (index >> 32) & _WORD, where, torch.zeros_like(index)),
    )
    return ((x0 >> 5) * 2**26 + (x1 >> 6)).double() / 2**53


def _prefix_sums(x: Tensor) -> Tensor:
    """[B, V] running sums by doubling: additions alone, so every device and batch size rounds
    alike.
    """
    step = 1
    while step < x.shape[1]:
        x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step]], dim=1)
        step *= 2
    return x


def _reference(
    logits: Tensor,
    sample_index: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    position: int,
) -> Tensor:
    V = logits.shape[1]
    x = logits if logits.dtype == torch.float64 else logits.float().double()  # [B, V]
    if x.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    best = x.amax(dim=1, keepdim=True)  # [B, 1]; NaN if the row holds one
    good = best.isfinite()[:, 0]  # [B]
    if temperature == 0:
        token = (x == best).long().argmax(dim=1)  # the first of equals
        return torch.where(good, token, _BAD_ROW)
    # a row at a time: a vectorised exp may round the tail of an array differently
    p = torch.stack([torch.exp(row) for row in (x - best) / temperature])
    if 0 < top_k < V:
        kth = x.topk(top_k, dim=1).values[:, -1:]
        p = torch.where(x < kth, 0.0, p)
    if top_p < 1:
        order = x.argsort(dim=1, descending=True, stable=True)
        sums = _prefix_sums(p.gather(1, order))
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
        dropped = before > top_p * sums[:, -1:]
        p = p.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
    sums = _prefix_sums(p)
    u = uniform(seed, sample_index, position)[:, None]
    chosen = (sums > u * sums[:, -1:]) & (p > 0)  # [B, V]
    # rounding may leave no token above u: then the last kept one
    tokens = torch.arange(V, device=x.device).expand_as(p)
    last = torch.where(p > 0, tokens, -1).amax(dim=1)
    token = torch.where(chosen.any(dim=1), chosen.long().argmax(dim=1), last)
    return torch.where(good, token, _BAD_ROW)


def _outputs(logits: Tensor, sample_index: Tensor, *_: float) -> Tensor:
    return torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)


_OP = Op(
    "sample_logits(Tensor logits, Tensor sample_index, float temperature, int top_k, float top_p, "
    "int seed, int position) -> Tensor",
    reference=_reference,
    outputs=_outputs,
)


class DrawOptions(TypedDict):
    """How a token is drawn; the arguments of these names of `sample_logits`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


def check_options(
    temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> tuple[float, int, float, int]:
    """(temperature, top_k, top_p, seed) as the op takes them: 0 and 1 for off, the seed as a signed
    word.

    Raises:
        TypeError: not numbers. ValueError: temperature < 0 or not finite, top_k < 1, top_p outside
            (0, 1], seed outside 0..2⁶⁴ - 1.
    """
    temperature = _check.number("temperature", temperature, low=0)
    k = 0 if top_k is None else _check.integer("top_k", top_k, low=1)
    p = 1.0 if top_p is None else _check.number("top_p", top_p, low=0, high=1, low_open=True)
    seed = _check.integer("seed", seed, low=0, high=2**64 - 1)
    return temperature, min(k, 2**62), p, seed - 2**64 if seed >= 2**63 else seed


def draw(logits: Tensor, sample_index: Tensor, position: int | Tensor, options: tuple) -> Tensor:
    """Like `sample_logits`, of checked arguments, with options as `check_options` gives them. It
    never waits for the device: -1 stands where `sample_logits` raises (see `check_drawn`).
    """
    where = sample_index.long()
    if isinstance(position, Tensor):
        where, position = torch.stack([where, position.long().expand_as(where)]), 0
    return _OP(logits.detach().contiguous(), where.contiguous(), *options, position)


def check_drawn(token: Tensor, sample_index: Tensor, position: int | Tensor) -> None:
    """NonFiniteError for the first -1 of tokens [B] that `draw` gave."""
    if not bool((token < 0).any()):
        return
    row = int((token < 0).nonzero()[0])
    at = int(position.expand_as(token)[row]) if isinstance(position, Tensor) else position
    raise NonFiniteError(
        f"logits of sample {int(sample_index[row])} at position {at} hold NaN or +inf, or nothing "
        "but -inf"
    )


def sample_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int,
    sample_index: Tensor,
    position: int | Tensor,
) -> Tensor:
    """Draw one token per row, after temperature, top-k, softmax and top-p in this order.

    Args:
        logits: [B, V] float32, float16 or bfloat16; -inf marks an impossible token.
        temperature: divides the logits; 0 takes the largest (the first of equals).
        top_k: keeps the k largest and the ties of the k-th; None or more than V: all.
        top_p: in (0, 1]; keeps the most probable tokens up to and with the one that crosses it;
            None or 1: all.
        seed: 0..2⁶⁴ - 1.
        sample_index: [B] int64, which sample of the request each row belongs to.
        position: >= 0, which token of the sample this is; or [B] integers, of each row its own.

    Returns:
        [B] int64.

    Raises:
        TypeError: a tensor or number of the wrong kind. ValueError: shapes, devices or values are
            wrong.
        NonFiniteError: a row holds NaN or +inf, or nothing but -inf; the text names sample and
            position.

    Numerics: float64; the same result for a row in any batch and on any number of threads.
        Backends may differ where u falls within 1e-15 of an edge between two tokens.
    """
    _check.floating("logits", logits)
    _check.ndim("logits", logits, 2)
    _check.integer_tensor("sample_index", sample_index)
    _check.shape("sample_index", sample_index, logits.shape[:1], "to match the rows of logits")
    _check.same_device("sample_index", sample_index, "logits", logits)
    if logits.shape[1] == 0:
        raise ValueError("logits must hold at least one token per row, got shape [B, 0]")
    options = check_options(temperature, top_k, top_p, seed)
    if isinstance(position, Tensor):
        _check.integer_tensor("position", position)
        _check.shape("position", position, logits.shape[:1], "to match the rows of logits")
        _check.same_device("position", position, "logits", logits)
    else:
        position = _check.integer("position", position, low=0, high=_WORD)
    token = draw(logits, sample_index, position, options)
    check_drawn(token, sample_index, position)
    return token


def sample_inputs(case, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """Positional inputs of the op for one case, with every filter on."""
    B, V = case["B"], case["V"]
    g = torch.Generator().manual_seed(B * 7919 + V)
    logits = (3 * torch.randn(B, V, generator=g)).to(device, dtype)
    index = torch.randint(1 << 40, (B,), generator=g).to(device)
    return logits, index, 0.9, 100, 0.95, 1234, 5


def COST(case) -> tuple[int, int]:
    """Bytes read and flops: one pass over the logits, an exp (about 20 flops) each."""
    n = case["B"] * case["V"]
    return 4 * n, 25 * n
