"""What several kernels share unchanged: the device of a launch, block sizes, common refusals."""

import contextlib

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Makes the GPU of t current for a launch; does nothing for CPU tensors (the interpreter)."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def hopper(t: Tensor) -> bool:
    """Whether the GPU of t has wgmma; true off the GPU, for the tiles of the interpreter."""
    return not t.is_cuda or torch.cuda.get_device_capability(t.device) >= (9, 0)


def processors(t: Tensor) -> int:
    """Multiprocessors of the GPU of t; those of an H100 off the GPU."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 132


def power_of_2(n: int, low: int, high: int) -> int:
    """The least power of two >= n, kept within [low, high]; low and high are powers of two."""
    return max(low, min(high, triton.next_power_of_2(max(1, n))))


def not_floats(**tensors: Tensor) -> str | None:
    """The first tensor that is not float32, float16 or bfloat16, as a reason; None if all are."""
    for name, t in tensors.items():
        if t.dtype not in FLOATS:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}"
    return None


def not_contiguous(**tensors: Tensor) -> str | None:
    """The first tensor that is not C-contiguous, as a reason; None if all are."""
    for name, t in tensors.items():
        if not t.is_contiguous():
            return f"{name} is not contiguous"
    return None
