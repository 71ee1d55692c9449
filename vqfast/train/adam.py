"""Adam in one pass over memory, also for weights in channels_last."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Adam"]


class Adam(torch.optim.Adam):
    """torch.optim.Adam(fused=True) that shows the fused kernel weights as they lie in memory.

    On a CPU that kernel copies what is not contiguous (2.1 -> 1.1 ms for 512 x 512 x 3 x 3, one
    core of an AMD Zen 5, 2026-11-25), and it pairs weight and gradient by their place in memory:
    where the two have different layouts its result is wrong. State and names are torch's.

    Args:
        params, options: as torch.optim.Adam.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)

    def _init_group(self, group: dict, weights: list, grads: list, *state: list) -> bool:
        has_complex = super()._init_group(group, weights, grads, *state)
        grads[:] = [_laid_out_as(w, g) for w, g in zip(weights, grads, strict=True)]
        for tensors in (weights, grads, *state):
            tensors[:] = [_in_memory_order(t) for t in tensors]
        return has_complex


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """grad with the strides of weight; no copy if it has them."""
    if grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _in_memory_order(t: Tensor) -> Tensor:
    """t, or if that is channels_last its contiguous view [O, H, W, C]."""
    if t.dim() != 4 or t.is_contiguous():
        return t
    turned = t.movedim(1, -1)
    return turned if turned.is_contiguous() else t
