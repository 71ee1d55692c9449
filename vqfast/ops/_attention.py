"""What attention ops share: their checks, the shapes of their results and their samples."""

import math
from typing import Any

import torch
from torch import Tensor

from vqfast import _check


def validate(q: Any, k: Any, v: Any, scale: Any) -> float:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.floating(name, x)
    for name, x in (("k", k), ("v", v)):
        _check.same_dtype(name, x, "q", q)
    _check.ndim("q", q, 4)
    for name, x in (("k", k), ("v", v)):
        _check.same_device(name, x, "q", q)
        _check.shape(name, x, q.shape, "like q")
    if q.shape[-1] == 0:
        raise ValueError(f"q must be [B, H, T, d] with d >= 1, got {list(q.shape)}")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else _check.number("scale", scale)


def wide(*tensors: Tensor) -> list[Tensor]:
    """float32, or float64 where it came so."""
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def outputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


def outputs_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw op for a case with shape B, H, T, d."""
    g = torch.Generator().manual_seed(0)
    size = [case.shape[n] for n in "BHTd"]
    q, k, v = (torch.randn(size, generator=g).to(device, dtype) for _ in range(3))
    return q, k, v, 1 / math.sqrt(size[-1])
