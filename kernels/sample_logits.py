"""One token per row of logits: temperature, top-k, top-p and the draw in one launch, without
sorting.

Computes: p_v = exp((x_v − max x) / temperature) for the kept v;
          token = first v with Σ_{w≤v} p_w > u · Σ p_w.
Contract: logits [B, V] contiguous, sample_index int64 [B], or [2, B] with what is added to the
    position of each row; temperature 0 is the first largest; -1 for a row that holds NaN or +inf,
    or nothing but -inf. u is Philox4x32-10 of (seed, sample_index, position).
Numerics: float32. A weight is off by about 2e-7 per unit of its exponent, and sums run over a tree
    that V alone decides, so a draw differs from the float64 reference only where u falls within
    about 1e-6 of an edge between two tokens. (Float64 sums of 16 tokens a thread spill.)
Shape of the code: one program per row, which stays in registers: 16 tokens a thread, which 1024
    threads of 64 registers can hold. The k-th largest logit and the least weight that top-p keeps
    are found bit by bit: 32 counts and 30 sums of a row at rest beat a sort. The token is found by
    bisection over its index, so that no prefix sums are held. Ties of the k-th are all kept; of
    equal logits top-p keeps the first ones, as a stable sort would.
"""

import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_contiguous, not_floats, on_device, power_of_2

_LOG2E = 1.4426950408889634
_LARGEST = 16384  # tokens of a row: 1024 threads with 16 tokens each


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
def _kth_key(key, k):
    """The k-th largest key: the largest t that at least k keys reach."""
    t = tl.zeros([], tl.uint32)
    for i in range(32):
        trial = t | (tl.full([], 2147483648, tl.uint32) >> i)
        count = tl.sum((key >= trial).to(tl.int32), axis=0)
        t = tl.where(count >= k, trial, t)
    return t


@triton.jit
def _sum(p):
    return tl.sum(p, axis=0)


@triton.jit
def _nucleus_edge(p, limit):
    """The least weight t for which the weights above t sum to no more than limit; p in [0, 1]."""
    t = tl.zeros([], tl.int32)
    for i in range(30):  # the two top bits of a float32 in [0, 1] are zero
        # with this bit clear and all lower ones set, do the weights above still sum to too much?
        bit = tl.full([], 536870912, tl.int32) >> i
        trial = (t | (bit - 1)).to(tl.float32, bitcast=True)
        t = tl.where(_sum(tl.where(p > trial, p, 0.0)) > limit, t | bit, t)
    return t.to(tl.float32, bitcast=True)


@triton.jit
def _first_above(weight, at, level, BLOCK: tl.constexpr):
    """The first index whose sum of weights up to and with it exceeds level; BLOCK - 1 if none does.

    Every sum runs over one tree, where rounding is monotone: more weights never sum to less.
    """
    found = tl.zeros([], tl.int32)
    step = BLOCK // 2
    while step > 0:
        before = _sum(tl.where(at < found + step, weight, 0.0))
        found = tl.where(before > level, found, found + step)
        step = step // 2
    return found


# without its type top_p would arrive as float32; sharpness is 1 / temperature, in base 2
@triton.jit(do_not_specialize=["top_k", "seed", "position"])
def _sample(
    logits, sample_index, token, V,
    sharpness: tl.float32, top_k: tl.int32, top_p: tl.float64, seed: tl.int64, position: tl.int64,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    bad = (x != x) | (x == float("inf"))
    sick = (tl.max(bad.to(tl.int32), axis=0) > 0) | (best == float("-inf"))
    if GREEDY:
        chosen = tl.min(tl.where(x == best, at, BLOCK), axis=0)
    else:
        # all weights of a sick row are zero, by which it is known at the end
        best = tl.where(sick, float("nan"), best)
        if TOP_K:  # padding is -inf, which changes no k-th of the k <= V largest
            key = _ordered(x)
            x = tl.where(key >= _kth_key(key, top_k), x, float("-inf"))
        p = tl.exp2(tl.maximum((x - best) * sharpness, -1000.0))  # 2^-1000 is zero
        if TOP_P:
            limit = (top_p * _sum(p).to(tl.float64)).to(tl.float32)
            edge = _nucleus_edge(p, limit)
            above = _sum(tl.where(p > edge, p, 0.0))
            # of r tokens at the edge before it, one is kept while above + r * edge <= limit
            room = tl.floor((limit - above) / tl.where(edge > 0.0, edge, 1.0))
            room = tl.minimum(room, 1.0 * BLOCK)
            last = _first_above(tl.where(p == edge, 1.0, 0.0), at, room, BLOCK)
            # up to `last` the edge itself is kept: compare with the float below it
            below = (edge.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
            below = tl.where(edge > 0.0, below, -1.0)
            p = tl.where(p > tl.where(at <= last, below, edge), p, 0.0)
        if PLACED:
            position += tl.load(sample_index + tl.num_programs(0) + row)
        u = _uniform(seed, tl.load(sample_index + row), position)
        total = _sum(p)
        chosen = _first_above(p, at, (u * total).to(tl.float32), BLOCK)
        sick = total < 0.5  # else it holds the 1 of the largest logit
        # rounding may leave no token above u: then the last kept one
        chosen = tl.minimum(chosen, tl.max(tl.where(p > 0.0, at, 0), axis=0))
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
    """Why these inputs cannot run: other dtypes, strided logits, or more than 16384 tokens."""
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
    # bounded, as infinity times the zero of the largest logit would be NaN
    sharpness = _LOG2E / max(temperature, 1e-37)
    with on_device(logits):
        _sample[(B,)](
            logits, sample_index, token, V, sharpness, min(top_k, V), top_p, seed, position,
            GREEDY=temperature == 0, TOP_K=0 < top_k < V, TOP_P=top_p < 1,
            PLACED=sample_index.ndim == 2, BLOCK=block,
            num_warps=power_of_2(block // 512, 1, 32), enable_fp_fusion=False,
        )  # fmt: skip
