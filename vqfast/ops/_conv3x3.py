"""What the ops of a 3x3 convolution share: the definition, and the check of their inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, scale: int
) -> Tensor:
    """x [B, H, W, C], weight [O, 3, 3, C], bias [O], residual like y -> y [B, sH, sW, O]."""
    w = weight.movedim(-1, 1)  # [O, C, 3, 3]
    if scale == 2:
        x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    y = F.conv2d(x.movedim(-1, 1), w, bias, padding=1).movedim(1, -1)
    return (y if residual is None else y + residual).contiguous()


def outputs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, scale: int) -> Tensor:
    B, H, W, _ = x.shape
    return x.new_empty((B, scale * H, scale * W, weight.shape[0]))


def rows(
    op: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """The arguments of the public op, checked, as the raw one takes them: channels last.

    Raises:
        TypeError, ValueError, RuntimeError: as `conv3x3`.
    """
    inputs = [("x", x), ("weight", weight), ("bias", bias)]
    if residual is not None:
        inputs.append(("residual", residual))
    for name, t in inputs:
        _check.floating(name, t)
        _check.same_dtype(name, t, "x", x)
        _check.same_device(name, t, "x", x)
        if torch.is_grad_enabled() and t.requires_grad:
            raise RuntimeError(f"{op} has no gradient, but {name} requires one: use F.conv2d")
    if scale not in (1, 2):
        raise ValueError(f"scale must be 1 or 2, got {scale!r}")
    _check.ndim("x", x, 4)
    _check.ndim("weight", weight, 4)
    _check.shape("weight", weight, [len(weight), x.shape[1], 3, 3], "to match the channels of x")
    _check.shape("bias", bias, [len(weight)], "to match weight")
    if residual is not None:
        B, _, H, W = x.shape
        _check.shape("residual", residual, [B, len(weight), scale * H, scale * W], "as the result")
        residual = residual.movedim(1, -1).contiguous()
    x, weight = x.movedim(1, -1).contiguous(), weight.movedim(1, -1).contiguous()
    return x, weight, bias.contiguous(), residual, scale


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of the raw op for a case with shape B, C, O, H, W, perhaps scale and residual."""
    g = torch.Generator().manual_seed(0)
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    scale, adds = case.shape.get("scale", 1), case.shape.get("residual", 0)
    x = torch.randn(B, H, W, C, generator=g)
    weight = torch.randn(outs, 3, 3, C, generator=g) / (9 * C) ** 0.5
    bias = torch.randn(outs, generator=g)
    residual = torch.randn(B, scale * H, scale * W, outs, generator=g) if adds else None
    tensors = (x, weight, bias, residual)
    return *(t if t is None else t.to(device, dtype) for t in tensors), scale


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read or written once) and flops of the definition."""
    B, C, outs, H, W = (case.shape[k] for k in "BCOHW")
    positions = B * H * W * case.shape.get("scale", 1) ** 2  # of y
    macs = 9 * positions * C * outs
    writes = positions * outs * (1 + case.shape.get("residual", 0))
    return 4 * (B * H * W * C + writes + 9 * C * outs), 2 * macs
