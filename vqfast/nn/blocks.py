"""Blocks of the stage-1 network: normalisation with SiLU, residual block, down- and upsampling.

Parameter names are those of released VQGAN checkpoints, so a state dict loads without renaming.

Source: arXiv:2012.09841 (appendix, table 7); CompVis/taming-transformers
taming/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqfast.nn import known_stats
from vqfast.nn.trained_conv import Conv2d
from vqfast.nn.trained_conv3x3 import trained_conv3x3
from vqfast.ops.conv3x3 import conv3x3
from vqfast.ops.conv3x3_down import conv3x3_down
from vqfast.ops.conv3x3_stats import conv3x3_perhaps_stats
from vqfast.ops.group_norm_silu import group_norm_silu
from vqfast.ops.group_norm_silu_apply import group_norm_silu_apply

GROUPS = 32
# torch's default is 1e-5; every released checkpoint was trained with this one
EPS = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as the network uses it: 32 groups, eps 1e-6."""
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


class GroupNormSiLU(nn.GroupNorm):
    """x -> silu(group_norm(x)) in one pass; 32 groups, eps 1e-6.

    Args:
        channels: C of x [B, C, ...], a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        stats = known_stats.of(x)
        if stats is not None:
            return group_norm_silu_apply(x, self.weight, self.bias, *stats)
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


def _by_op(x: Tensor, conv: nn.Conv2d) -> bool:
    """An op computes this convolution: on a CPU, without gradients and autocast."""
    right = x.dtype == conv.weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    free = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and right and free


def _affine(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has both."""
    assert conv.bias is not None
    return conv.weight, conv.bias


class Conv3x3(nn.Conv2d):
    """3x3 convolution, padding 1, of x [B, C, H, W], plus a residual [B, O, H, W] if there is one.

    On a CPU it is `ops.conv3x3` in float32 and bfloat16; with gradients it is `trained_conv3x3`.
    """

    bias: nn.Parameter
    before_norm = False  # a `GroupNormSiLU` of this file reads the result next

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if _by_op(x, self):
            return self._noted(x, residual)
        if torch.is_grad_enabled():
            return trained_conv3x3(x, self.weight, self.bias, residual)
        y = super().forward(x)
        return y if residual is None else y.add_(residual)

    def _noted(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """By an op; the statistics are noted where a normalisation reads the result next."""
        # a hook or a subclass may change the result before it is normalised
        ours = type(self) is Conv3x3 and not self._forward_hooks
        if not self.before_norm or not ours or not known_stats.wanted():
            return conv3x3(x, self.weight, self.bias, residual)
        y, stats = conv3x3_perhaps_stats(x, self.weight, self.bias, residual, GROUPS, EPS)
        return y if stats is None else known_stats.note(y, stats)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut only where channels change.

    Args:
        in_channels: C of x [B, C, H, W], a multiple of 32.
        out_channels: channels of the result, a multiple of 32.
        dropout: probability before the second convolution, in training only.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.conv1.before_norm = True
        self.norm2 = GroupNormSiLU(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        changes = in_channels != out_channels
        self.nin_shortcut = Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        # one expression: a name for the middle would keep it alive through the second convolution
        return self.conv2(
            self.dropout(self.norm2(self.conv1(self.norm1(x)))),  # [B, C', H, W]
            x if self.nin_shortcut is None else self.nin_shortcut(x),
        )


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2] by a 3x3 convolution of stride 2.

    One row and column of zeros at the bottom and the right only: symmetric padding would shift
    every feature by half a cell and no released checkpoint would fit. On a CPU without gradients
    it is `ops.conv3x3_down`, which needs no padded copy.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if _by_op(x, self.conv):
            return conv3x3_down(x, *_affine(self.conv))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: each pixel becomes 2x2, then a 3x3 convolution.

    Without gradients the two are one step where that pays: an output pixel reads only 2x2 different
    inputs, so that each of the four phases (even or odd row and column) is a 2x2 convolution of x
    with sums of the weights: 4/9 of the work, equal up to rounding. On a CPU it is `ops.conv3x3`,
    with 1/4 of the work.
    """

    # summing the weights costs about as much as 500 positions of convolution save
    LEAST_POSITIONS = 1024

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return trained_conv3x3(doubled, *_affine(self.conv))
        if _by_op(x, self.conv):
            return conv3x3(x, *_affine(self.conv), scale=2)
        # not a question of B: an image is decoded the same in every batch
        if x.shape[2] * x.shape[3] < self.LEAST_POSITIONS:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return upsample_conv(x, self.conv.weight, self.conv.bias)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(nearest 2x of x, weight [O, C, 3, 3], bias, padding=1) -> [B, O, 2H, 2W]; no gradient.

    Even rows of the result read rows i − 1, i, i of x, odd rows i, i, i + 1; columns likewise.
    """
    B, _, H, W = x.shape
    w = weight if weight.dtype == torch.float64 else weight.float()
    out: Tensor | None = None
    for p, rows in enumerate(_fold(w, 2)):
        for q, phase in enumerate(_fold(rows, 3)):  # [O, C, 2, 2]
            phase = phase.to(weight.dtype, memory_format=torch.channels_last)
            y = F.conv2d(x, phase, bias, padding=1)  # [B, O, H + 1, W + 1]
            if out is None:
                shape = (B, y.shape[1], 2 * H, 2 * W)
                out = torch.empty(
                    shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last
                )
            out[:, :, p::2, q::2] = y[:, :, p : p + H, q : q + W]
    assert out is not None  # there are four phases
    return out


def _fold(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights of a 3-tap axis on doubled pixels as 2-tap axes of the even and the odd phase."""
    a, b, c = w.unbind(dim)
    return torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)
