"""Packs the weights of a GPT for `decode_step`: float32, bfloat16, int8 per row or int4 per group.

The layout is described in vqfast/ops/_packed.py. Embeddings, biases and LayerNorms stay float32:
they are looked up or tiny. Everything is a copy, so a packed model does not follow later changes of
the GPT.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.engine._memory import empty_bytes
from vqfast.models.gpt import GPT
from vqfast.ops._packed import matrix_bytes, pack_matrix
from vqfast.ops.decode_step import matrices

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


class Packed(NamedTuple):
    """Arguments of `decode_step`, in its order."""

    tok_emb: Tensor  # [V, E] float32
    pos_emb: Tensor  # [S, E] float32
    vectors: Tensor  # [n] float32
    weights: Tensor  # [bytes] uint8


def pack_gpt(gpt: GPT, precision: str) -> Packed:
    """All weights of a GPT in one format, on its device.

    Args:
        gpt: read, never changed.
        precision: "fp32", "bf16", "int8" or "int4".
    """
    bits, c = BITS[precision], gpt.config
    shapes = matrices(c.n_layer, c.n_embd, c.vocab_size)
    sizes = [matrix_bytes(*shape, bits) for shape in shapes]
    device = gpt.tok_emb.weight.device
    weights = empty_bytes(sum(sizes), device)
    with torch.no_grad():
        sources, vectors = [], []
        for block in gpt.blocks:
            attention, fc, out = block.attn, block.mlp[0], block.mlp[2]
            qkv = (attention.query, attention.key, attention.value)
            sources += [qkv, (attention.proj,), (fc,), (out,)]
            vectors += [block.ln1.weight, block.ln1.bias, *(layer.bias for layer in qkv)]
            vectors += [attention.proj.bias, block.ln2.weight, block.ln2.bias, fc.bias, out.bias]
        vectors += [gpt.ln_f.weight, gpt.ln_f.bias]
        for layers, place in zip([*sources, (gpt.head,)], weights.split(sizes), strict=True):
            matrix = torch.cat([layer.weight for layer in layers])
            place.copy_(pack_matrix(matrix.float(), bits))
        return Packed(
            gpt.tok_emb.weight.detach().float().clone(),
            gpt.pos_emb.detach()[0].float().clone(),
            torch.cat([v.float() for v in vectors]),
            weights,
        )
