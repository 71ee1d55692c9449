"""One decoding step of a whole GPT against its key-value cache, in one call. Private:
`vqfast.Engine` is its user.

A row is one token of one sequence: (token, slot of the cache, position). Rows of a call may stand
anywhere, so the same op decodes one token of each sequence and prefills many tokens of each. Per
layer

    q, k, v = qkv(LN1 h);  cache[slot, position] = k, v (of all rows, before any row attends)
    h += proj(attend(q, cache[slot, : position + 1]));  h += out(gelu(fc(LN2 h)))

and at last logits = head(LN h), of the last n_logits rows.

A row's bits depend on its own sequence alone. Each output is summed in an order fixed by the length
of the sum: the reference adds by a tree and takes erf and exp of a row at a time; kernels split
output rows over threads, never a sum.

Letters: R rows, L layers, E width, H heads, d = E / H, S positions, V vocabulary, B sequences of
the cache.

Packed weights: the matrices qkv [3E, E], proj [E, E], fc [4E, E], out [E, 4E] per layer, then head
[V, E], one after another as vqfast/ops/_packed.py describes.

`vectors` holds, per layer, LN1 weight and bias [2E], biases of qkv [3E] and proj [E], LN2 [2E],
biases of fc [4E] and out [E]; then the last LN [2E].

Cost: reads every weight once per call, whatever R (up to the cache size of a panel); 2·R flops per
weight.
Source: the decode loop of taming's mingpt.sample_with_past; arXiv:2301.12017 and 2210.17323
(group-wise weights).
"""

from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op, poison
from vqfast.ops._packed import COLUMNS, matrix_bytes, operand, pack_matrix, padded, unpack
from vqfast.ops.decode_attention import attend, tree_sum

VECTORS_PER_LAYER = 13  # times E
_EPS = 1e-5  # of LayerNorm
_PRODUCTS = 1 << 24  # products that the reference holds at a time


def matrices(L: int, E: int, V: int) -> list[tuple[int, int]]:
    """[N, K] of every packed matrix, in order."""
    return [(3 * E, E), (E, E), (4 * E, E), (E, 4 * E)] * L + [(V, E)]


def _linear(x: Tensor, weight: Tensor, N: int, bits: int) -> Tensor:
    """x [R, K], rounded as the format wants, times an unpacked matrix -> [R, N]."""
    x = operand(torch.nn.functional.pad(x, (0, weight.shape[1] - x.shape[1])), bits)
    rows = max(1, _PRODUCTS // weight.numel())
    parts = [
        # [rows, panels, Kp, 64] -> [rows, panels, 64]
        tree_sum(some[:, None, :, None] * weight, 2).flatten(1)
        for some in x.split(rows)
    ]
    return torch.cat(parts)[:, :N] if parts else x.new_empty(0, N)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    E = x.shape[1]
    centred = x - (tree_sum(x, 1) / E)[:, None]
    variance = tree_sum(centred * centred, 1) / E
    return centred / torch.sqrt(variance + _EPS)[:, None] * weight + bias


def _gelu(x: Tensor) -> Tensor:
    # a row at a time: a vectorised erf may round the tail of an array differently
    erf = [torch.erf(row / 2**0.5) for row in x]
    return 0.5 * x * (1 + torch.stack(erf)) if erf else x


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: list[int], positions: list[int]
) -> Tensor:
    """q [R, H, d], caches [B, H, S, d] -> [R, H·d]; row r reads slots 0..positions[r] of its
    sequence.
    """
    rows = []
    for r, (b, n) in enumerate(zip(slots, positions, strict=True)):
        k, v = (cache[b, :, : n + 1].to(q.dtype) for cache in (k_cache, v_cache))
        rows.append(attend(q[r], k, v).flatten())
    return torch.stack(rows)


def _reference(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tok_emb: Tensor,
    pos_emb: Tensor,
    vectors: Tensor,
    weights: Tensor,
    bits: int,
    n_logits: int,
) -> Tensor:
    L, _, H, _, d = k_cache.shape
    E, V = H * d, tok_emb.shape[0]
    shapes = matrices(L, E, V)
    pieces = iter(weights.split([matrix_bytes(*shape, bits) for shape in shapes]))
    shapes_left = iter(shapes)

    def linear(x: Tensor) -> Tensor:
        N, K = next(shapes_left)
        return _linear(x, unpack(next(pieces), N, K, bits), N, bits)

    b, n = slots.tolist(), positions.tolist()
    h = tok_emb[tokens] + pos_emb[positions]  # [R, E]
    for layer in range(L):
        part = vectors[layer * VECTORS_PER_LAYER * E :][: VECTORS_PER_LAYER * E]
        w1, b1, qkv_bias, proj_bias, w2, b2, fc_bias, out_bias = part.split(
            [E, E, 3 * E, E, E, E, 4 * E, E]
        )
        qkv = linear(_layer_norm(h, w1, b1)) + qkv_bias
        q, k, v = (part.reshape(-1, H, d) for part in qkv.split(E, dim=1))  # [R, H, d]
        k_cache[layer, slots, :, positions] = k.to(k_cache.dtype)
        v_cache[layer, slots, :, positions] = v.to(v_cache.dtype)
        h = h + linear(_attention(q, k_cache[layer], v_cache[layer], b, n)) + proj_bias
        h = h + linear(_gelu(linear(_layer_norm(h, w2, b2)) + fc_bias)) + out_bias
    if not n_logits:
        return tok_emb.new_empty(0, V)
    last = vectors[L * VECTORS_PER_LAYER * E :]
    return linear(_layer_norm(h[-n_logits:], last[:E], last[E:]))


def _outputs(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tok_emb: Tensor,
    pos_emb: Tensor,
    vectors: Tensor,
    weights: Tensor,
    bits: int,
    n_logits: int,
) -> Tensor:
    return tok_emb.new_empty(n_logits, tok_emb.shape[0])


def _scratch(tokens: Tensor, *inputs: Any) -> tuple[Tensor]:
    """One row after another: h, normed, attended, the rounded of both [Kp of E], hidden and its
    rounded [Kp of 4E], qkv [3E].
    """
    E = inputs[4].shape[1]  # of tok_emb
    # 16 more, so that the same column of all rows does not fall into one set of the cache
    row = 4 * padded(E, COLUMNS) + 2 * padded(4 * E, COLUMNS) + 3 * E + 16
    return (inputs[4].new_empty(tokens.shape[0], row),)


_OP = Op(
    "decode_step(Tensor tokens, Tensor slots, Tensor positions, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor tok_emb, Tensor pos_emb, Tensor vectors, Tensor weights, int bits, "
    "int n_logits) -> Tensor",
    reference=_reference,
    outputs=_outputs,
    scratch=_scratch,
)


def decode_step(
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    bits: int,
    n_logits: int,
) -> Tensor:
    """Append R tokens to the cache and give the logits of the last n_logits of them.

    The caller has checked all values: token ids, slots and positions are in range, no (slot,
    position) comes twice, and every earlier position of a row's sequence is in the cache or in this
    call.

    Args:
        tokens, slots, positions: [R] int64.
        k_cache, v_cache: [L, B, H, S, d] float32 or bfloat16; written in place.
        packed: tok_emb [V, E], pos_emb [S, E], vectors [n] float32, weights uint8; see the top of
            this file.
        bits: of a packed weight: 32, 16, 8 or 4.
        n_logits: 0..R.

    Returns:
        [n_logits, V] float32.
    """
    return _OP(tokens, slots, positions, k_cache, v_cache, *packed, bits, n_logits)


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An unwritten cache; full of NaN when tests poison memory."""
    return poison(torch.empty(shape, dtype=dtype, device=device))


def sample_inputs(case, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """Inputs of the op for one case: T tokens, in no order, of each of B sequences that have n. The
    dtype is the cache's, whose slots from n on hold NaN; the case gives the bits of the weights.
    """
    L, B, H, S, d, V, n, T = (case[letter] for letter in "LBHSdVnT")
    E, bits, g = H * d, case["bits"], torch.Generator().manual_seed(B * 1009 + S * 31 + d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    order = torch.randperm(B * T, generator=g)
    cache = normal(2, L, B, H, S, d)
    cache[..., n:, :] = float("nan")
    weights = [pack_matrix(normal(N, K) / K**0.5, bits) for N, K in matrices(L, E, V)]
    vectors = normal((L * VECTORS_PER_LAYER + 2) * E)
    tensors = (
        torch.randint(V, (B * T,), generator=g), order // T, n + order % T, *cache.to(dtype),
        normal(V, E), normal(S, E), vectors, torch.cat(weights),
    )  # fmt: skip
    return tuple(x.to(device) for x in tensors) + (bits, case["logits"])
