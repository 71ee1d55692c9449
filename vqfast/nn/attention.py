"""Attention over the positions of a feature map: one head across all channels.

    y = x + proj(softmax(q k^T / sqrt(C)) v),   q, k, v = 1x1 convolutions of group_norm(x)

Source: CompVis/taming-transformers taming/modules/diffusionmodules/model.py (AttnBlock).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqfast.nn.blocks import group_norm
from vqfast.nn.trained_conv import Conv2d
from vqfast.ops.full_attention import full_attention

# Where `full_attention` is taken: on a CPU, by dtype from this many positions on, up to WIDEST
# channels. Elsewhere it is torch's fused attention; so on a GPU, until the Triton kernel of
# `full_attention` has been measured there. Speed as a multiple of torch's, forward / forward and
# backward, C = 512 | 256, CPU time of one thread of a loaded Zen 4, 2026-11-30:
#
#     T             16            64           256          1024          4096
#     bfloat16  0.3/0.7 |     1.2/1.3 |     2.0/1.6 |     2.0/1.5 |     2.0/1.5 |
#               0.3/0.8       1.0/1.2       1.9/1.6       2.0/1.6       2.1/1.6
#     float32   0.2/0.3 |     0.8/0.7 |     1.0/0.9 |     1.1/1.0 |     1.1/1.0 |
#               0.2/0.3       0.6/0.6       1.0/1.0       1.1/1.1       1.1/1.1
OURS_FROM = {torch.bfloat16: 64, torch.float32: 1024}
WIDEST = 512


def spatial_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over positions; every position sees every other.

    Args:
        q: [B, C, h, w] floating point; channels_last costs no copy.
        k, v: likewise, perhaps of more rows (`models.tiled` takes q by bands).

    Returns:
        [B, C, h, w] like q. The h·w x h·w matrix of weights is never held.
    """
    B, C, h, w = q.shape
    q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (q, k, v))  # [B, 1, h·w, C]
    # scale 1/sqrt(C): one head over all channels
    ours = q.shape == k.shape and h * w >= OURS_FROM.get(q.dtype, h * w + 1) and C <= WIDEST
    if ours and q.device.type == "cpu":
        out = full_attention(*(t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)))
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.squeeze(1).transpose(1, 2).reshape(B, C, h, w)


class SpatialAttention(nn.Module):
    """Residual self-attention over the h·w positions of x [B, C, h, w], one head.

    Args:
        channels: C, a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.proj_out(spatial_attention(self.q(h), self.k(h), self.v(h))).add_(x)
