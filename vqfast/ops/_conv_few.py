"""What the ops of convolutions on few positions share: checks, sizes, cases."""

from typing import Any

import torch


def side(size: int, k: int, stride: int, padding: int) -> int:
    """Positions of y along an axis that has `size` of x, under a weight of k taps."""
    return (size + 2 * padding - k) // stride + 1


def check_steps(stride: int, padding: int) -> None:
    """ValueError unless stride is at least 1 and padding at least 0."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Inputs of the raw op for a case with shape B, C, O, H, W, k, stride, padding and perhaps
    bias (0: none) and wide (1: weight and bias in float32 where x is bfloat16).
    """
    g = torch.Generator().manual_seed(0)
    B, C, outs, H, W, k = (case.shape[n] for n in ("B", "C", "O", "H", "W", "k"))
    own = torch.float32 if case.shape.get("wide") and dtype == torch.bfloat16 else dtype
    x = torch.randn(B, H, W, C, generator=g).to(device, dtype)
    weight = (torch.randn(outs, k, k, C, generator=g) / (k * k * C) ** 0.5).to(device, own)
    bias = torch.randn(outs, generator=g).to(device, own) if case.shape.get("bias", 1) else None
    return x, weight, bias, case.shape["stride"], case.shape["padding"]


def COST(case: Any) -> tuple[int, int]:
    """Bytes (float32, read or written once) and flops of the definition."""
    s = case.shape
    h, w = (side(s[n], s["k"], s["stride"], s["padding"]) for n in "HW")
    weights, positions = s["k"] ** 2 * s["C"] * s["O"], s["B"] * h * w
    return 4 * (s["B"] * s["H"] * s["W"] * s["C"] + positions * s["O"] + weights), (
        2 * positions * weights
    )
