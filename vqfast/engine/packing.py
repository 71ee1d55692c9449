"""Packs the weights of a GPT for `decode_step`: float32, bfloat16, int8 per row or int4 per group.

The layout is described in vqfast/ops/decode_step.py, which also unpacks it. Embeddings, biases and
LayerNorms stay float32: they are looked up or tiny. Everything is a copy, so a packed model does
not follow later changes of the GPT.
"""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.models.gpt import GPT

_layout = importlib.import_module("vqfast.ops.decode_step")  # its module, not its function
PANEL, COLUMNS, GROUP = _layout.PANEL, _layout.COLUMNS, _layout.GROUP

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
# int4 scales that are tried, as parts of the one that just holds the largest value of a group: a
# smaller step for all may pay for clipping one
_INT4_SCALES = (1.0, 0.93, 0.86, 0.79)


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
    shapes = _layout.matrices(c.n_layer, c.n_embd, c.vocab_size)
    sizes = [_layout.matrix_bytes(*shape, bits) for shape in shapes]
    device = gpt.tok_emb.weight.device
    weights = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
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


def pack_matrix(w: Tensor, bits: int) -> Tensor:
    """w [N, K] float32 -> uint8 [bytes]. NaN in w stays NaN in what `unpack` gives back."""
    N, K = w.shape
    w = torch.nn.functional.pad(w, (0, -K % COLUMNS, 0, -N % PANEL))
    panels = w.view(-1, PANEL, w.shape[1]).transpose(1, 2)  # [panels, Kp, 16]
    if bits == 32:
        return _bytes(panels).flatten()
    if bits == 16:
        return _bytes(panels.bfloat16()).flatten()
    if bits == 8:
        scale = panels.abs().amax(1) / 127  # [panels, 16]
        values = (panels / _divisor(scale)[:, None]).round().clamp(-127, 127)
        parts = [_bytes(scale), _bytes(values.to(torch.int8)).flatten(1)]
        return torch.cat([part.flatten(1) for part in parts], dim=1).flatten()
    groups = panels.reshape(panels.shape[0], -1, GROUP, PANEL)  # [panels, groups, 32, 16]
    scale, values = _int4(groups)
    pairs = (values[:, :, 0::2] | values[:, :, 1::2] << 4).flatten(2)  # [panels, groups, 256]
    return torch.cat([_bytes(scale), pairs], dim=2).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _divisor(scale: Tensor) -> Tensor:
    """1 where the scale is 0: a row of zeros stays one."""
    return torch.where(scale == 0, 1.0, scale)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[panels, groups, 32, 16] -> bfloat16 scales [panels, groups, 16], nibbles uint8.

    The extreme value of a group becomes -8, so a scale has the sign that makes it negative. Of a
    few smaller scales the one with the least squared error wins, the first of equals.
    """
    low, high = groups.amin(2), groups.amax(2)
    extreme = torch.where(-low > high, low, high)  # [panels, groups, 16]; NaN if there is one
    best_scale = best_values = best_error = None
    for part in _INT4_SCALES:
        scale = (extreme / -8 * part).bfloat16()
        step = scale.float()[:, :, None]
        values = (groups / _divisor(step)).round().clamp(-8, 7)
        error = ((values * step - groups) ** 2).sum(2)
        if best_error is None:
            best_scale, best_values, best_error = scale, values, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better[:, :, None], values, best_values)
        best_error = torch.where(better, error, best_error)
    return best_scale, (best_values + 8).nan_to_num().to(torch.uint8)
