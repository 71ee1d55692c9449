"""Argument checks: one wording for every TypeError and ValueError.

Kind and dtype raise TypeError; shape, value and device raise ValueError. Each text says the name of
the argument, what was expected and what came.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def floating(name: str, x: Any, *, f64: bool = True) -> None:
    """float32, float16 or bfloat16; float64 too unless `f64` is False."""
    is_tensor(name, x)
    allowed = (torch.float32, torch.float16, torch.bfloat16) + ((torch.float64,) if f64 else ())
    if x.dtype not in allowed:
        names = ", ".join(map(_dtype_name, allowed))
        raise TypeError(f"{name} must be one of {names}, got {_dtype_name(x.dtype)}")


def integer_tensor(name: str, x: Any) -> None:
    is_tensor(name, x)
    if x.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} must hold integers, got {_dtype_name(x.dtype)}")


def ndim(name: str, x: Tensor, expected: int | tuple[int, int]) -> None:
    """`expected` is the number of dimensions, or the least and the most."""
    low, high = (expected, expected) if isinstance(expected, int) else expected
    if not low <= x.dim() <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {list(x.shape)}")


def shape(name: str, x: Tensor, expected: Collection[int], why: str = "") -> None:
    if list(x.shape) != list(expected):
        raise ValueError(f"{name} must be {list(expected)}{why and ' ' + why}, got {list(x.shape)}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {x.device}"
        )


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        expected, got = _dtype_name(other.dtype), _dtype_name(x.dtype)
        raise TypeError(f"{name} must have the dtype of {other_name} ({expected}), got {got}")


def same_or_wide(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x has the dtype of other, or is float32 beside bfloat16, as the weights of autocast."""
    if (x.dtype, other.dtype) != (torch.float32, torch.bfloat16):
        same_dtype(name, x, other_name, other)


def wide_result(dtype: torch.dtype | None, x: Tensor) -> bool:
    """Whether a result for x is asked for in float32 beside bfloat16; else `dtype` is that of x or
    None.
    """
    if dtype in (None, x.dtype):
        return False
    if (dtype, x.dtype) != (torch.float32, torch.bfloat16):
        raise TypeError(
            f"dtype must be {_dtype_name(x.dtype)}, or float32 for bfloat16, got {dtype}"
        )
    return True


def number(
    name: str,
    x: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
    high_open: bool = False,
    finite: bool = True,
) -> float:
    """x as a float inside [low, high]; an open end excludes its bound. bool is not a number
    here."""
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    value = float(x)
    outside = (
        math.isnan(value)
        or (finite and math.isinf(value))
        or (low is not None and (value <= low if low_open else value < low))
        or (high is not None and (value >= high if high_open else value > high))
    )
    if outside:
        left = "(-inf" if low is None else f"{'(' if low_open else '['}{low:g}"
        right = "inf)" if high is None else f"{high:g}{')' if high_open else ']'}"
        raise ValueError(f"{name} must be in {left}, {right}, got {value:g}")
    return value


def integer(name: str, x: Any, *, low: int | None = None, high: int | None = None) -> int:
    if isinstance(x, bool) or not isinstance(x, Integral):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    value = int(x)
    if (low is not None and value < low) or (high is not None and value > high):
        wanted = f">= {low}" if high is None else f"<= {high}" if low is None else f"{low}..{high}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def choice(name: str, x: Any, options: Collection[str]) -> None:
    if x not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {x!r}")
