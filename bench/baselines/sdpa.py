"""torch's scaled_dot_product_attention: causal, and one query row against a filled cache."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

MEASURES = ("causal_attention", "causal_attention_backward", "decode_attention")


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    if measure == "decode_attention":
        q, k, v, length = inputs
        q, k, v = q[:, :, None], k[:, :, :length], v[:, :, :length]
        return lambda: scaled_dot_product_attention(q, k, v)[:, :, 0]
    if measure == "causal_attention":
        q, k, v, scale = inputs
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    grad, q, k, v, _, _, scale = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
