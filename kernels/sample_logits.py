"""One token per row of logits: temperature, top-k, top-p and the draw in one launch, without sorting.

Computes: p_v = exp((x_v − max x) / temperature) for the kept v;  token = first v with Σ_{w≤v} p_w > u · Σ p_w.
Contract: logits [B, V] contiguous, sample_index [B] int64; temperature 0 is the first largest; -1 for a row that holds NaN
    or +inf, or nothing but -inf. u is Philox4x32-10 of (seed, sample_index, position).
Numerics: the logits as float32, their weights and sums in float64, in an order that V alone decides.
Shape of the code: one program per row, which stays in registers. The k-th largest logit, and the least one that top-p
    keeps, are found bit by bit over the 32 bits of an order-preserving integer: 32 counts, or sums, of a row at rest beat a
    sort. Ties of the k-th are all kept; of equal logits top-p keeps the first ones, as a stable sort would.
"""

import triton
import triton.language as tl
from torch import Tensor

from vqfast.kernels._tuning import not_contiguous, not_floats, on_device, power_of_2

_LARGEST = 32768  # tokens of a row: 1024 threads with 32 float64 weights each


@triton.jit
def _ordered(x):
    """uint32 that rises with the float32 x (finite, or -inf); +0 and -0 become one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _uniform(seed, index, position):
    """float64 in [0, 1) with 53 random bits."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    x0, x1, _, _ = tl.philox(seed, low, high, position.to(tl.uint32), low * 0)
    return ((x0 >> 5).to(tl.float64) * 67108864.0 + (x1 >> 6).to(tl.float64)) / 9007199254740992.0


@triton.jit
def _kth_key(key, valid, k):
    """The largest t that at least k valid keys reach: the k-th largest key."""
    t = tl.zeros([], tl.uint32)
    for i in range(32):
        trial = t | (tl.full([], 2147483648, tl.uint32) >> i)
        count = tl.sum((valid & (key >= trial)).to(tl.int32), axis=0)
        t = tl.where(count >= k, trial, t)
    return t


@triton.jit
def _nucleus_key(key, p, limit):
    """The least t for which the keys above t weigh no more than limit."""
    t = tl.zeros([], tl.uint32)
    for i in range(32):
        # with this bit clear and all lower ones set, do the keys above still weigh too much?
        bit = tl.full([], 2147483648, tl.uint32) >> i
        mass = tl.sum(tl.where(key > (t | (bit - 1)), p, 0.0), axis=0)
        t = tl.where(mass > limit, t | bit, t)
    return t


# without the types temperature and top_p would arrive as float32
@triton.jit(do_not_specialize=["top_k", "seed", "position"])
def _sample(
    logits, sample_index, token, V,
    temperature: tl.float64, top_k: tl.int32, top_p: tl.float64, seed: tl.int64, position: tl.int64,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    valid = at < V
    x = tl.load(logits + row * V + at, mask=valid, other=float("-inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    bad = (x != x) | (x == float("inf"))
    sick = (tl.max(bad.to(tl.int32), axis=0) > 0) | (best == float("-inf"))
    if GREEDY:
        chosen = tl.min(tl.where(x == best, at, BLOCK), axis=0)
    else:
        best = tl.where(sick, 0.0, best)
        x = tl.where(bad, 0.0, x)
        key = _ordered(x)
        p = tl.exp((x.to(tl.float64) - best.to(tl.float64)) / temperature)
        p = tl.where(valid, p, 0.0)
        if TOP_K:
            p = tl.where(key >= _kth_key(key, valid, top_k), p, 0.0)
        if TOP_P:
            limit = top_p * tl.sum(p, axis=0)
            edge = _nucleus_key(key, p, limit)
            above = tl.sum(tl.where(key > edge, p, 0.0), axis=0)
            equal = (key == edge) & valid
            before = tl.cumsum(equal.to(tl.int32), axis=0) - 1  # equal tokens that come earlier
            kept = (key > edge) | (equal & (above + before * p <= limit))
            p = tl.where(kept, p, 0.0)
        sums = tl.cumsum(p, axis=0)
        u = _uniform(seed, tl.load(sample_index + row), position)
        # the last sum, and not tl.sum, so that both sides round alike
        level = u * tl.max(sums, axis=0)
        last = tl.max(tl.where(p > 0.0, at, 0), axis=0)
        chosen = tl.min(tl.where((sums > level) & (p > 0.0), at, BLOCK), axis=0)
        chosen = tl.minimum(chosen, last)
    tl.store(token + row, tl.where(sick, -1, chosen).to(tl.int64))


def unsupported_sample_logits(
    logits: Tensor,
    sample_index: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    position: int,
) -> str | None:
    """Why these inputs cannot run: other dtypes, strided logits, or more than 32768 tokens."""
    if logits.shape[1] > _LARGEST:
        return f"V = {logits.shape[1]} is above {_LARGEST}"
    return not_floats(logits=logits) or not_contiguous(logits=logits, sample_index=sample_index)


def sample_logits(
    logits: Tensor,
    sample_index: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    position: int,
    token: Tensor,
) -> None:
    """Writes token [B] int64. top_k 0 and top_p 1 are off; seed is a signed 64-bit word."""
    B, V = logits.shape
    if B == 0:
        return
    block = power_of_2(V, 32, _LARGEST)
    with on_device(logits):
        _sample[(B,)](
            logits, sample_index, token, V, temperature, min(top_k, V), top_p, seed, position,
            GREEDY=temperature == 0, TOP_K=0 < top_k < V, TOP_P=top_p < 1, BLOCK=block,
            num_warps=power_of_2(block // 1024, 1, 32), enable_fp_fusion=False,
        )  # fmt: skip
