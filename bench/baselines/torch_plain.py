"""The eager torch calls that a user writes for the remaining ops."""

from typing import Any

import torch
import torch.nn.functional as F

MEASURES = (
    "code_order",
    "code_stats",
    "cross_entropy",
    "cross_entropy_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
    "quantize_backward",
    "sample_logits",
    "straight_through",
)


def version() -> str:
    return f"torch {torch.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    return globals()[f"_{measure}"](*inputs)


def _code_stats(indices: torch.Tensor, z: torch.Tensor, K: int) -> Any:
    def stats() -> tuple:
        sums = torch.zeros(K, z.shape[1], dtype=torch.float32, device=z.device)
        return torch.bincount(indices, minlength=K), sums.index_add_(0, indices, z.float())

    return stats


def _code_order(indices: torch.Tensor, K: int) -> Any:
    def order() -> tuple:
        codes, rows = torch.sort(indices, stable=True)
        return rows, torch.searchsorted(codes, torch.arange(K + 1))

    return order


def _straight_through(
    z: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor, weight: float
) -> Any:
    def forward() -> tuple:
        z_q = F.embedding(indices, codebook)
        return z_q, F.mse_loss(z_q, z) * weight

    return forward


def _quantize_backward(
    grad_z_q: torch.Tensor, grad_loss: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor,
    order: torch.Tensor, start: torch.Tensor, to_z: float, to_codes: float,
) -> Any:  # fmt: skip
    """Autograd of taming's two losses and its straight-through line, forward outside the clock."""
    owner = torch.repeat_interleave(torch.arange(len(codebook), device=z.device), start.diff())
    indices = torch.empty_like(order).scatter(0, order, owner)
    z, codebook = (t.detach().clone().requires_grad_() for t in (z, codebook))
    z_q = F.embedding(indices, codebook)
    loss = to_z * (z_q.detach() - z).square().mean() + to_codes * (z_q - z.detach()).square().mean()
    outs, grads = (z + (z_q - z).detach(), loss), (grad_z_q, grad_loss.to(loss.dtype))
    return lambda: torch.autograd.grad(outs, (z, codebook), grads, retain_graph=True)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> Any:
    return lambda: F.cross_entropy(logits, targets, reduction="none")


def _cross_entropy_backward(
    grad: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, *saved: torch.Tensor
) -> Any:
    leaf = logits.detach().clone().requires_grad_()
    out = F.cross_entropy(leaf, targets, reduction="none")
    return lambda: torch.autograd.grad(out, leaf, grad.to(out.dtype), retain_graph=True)


def _group_norm_silu(x: torch.Tensor, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    return lambda: F.silu(F.group_norm(x, groups, weight, bias, eps))


def _group_norm_silu_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: Any, bias: Any, mean: Any, rstd: Any, groups: int
) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = F.silu(F.group_norm(leaves[0], groups, leaves[1], leaves[2], 1e-6))
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _sample_logits(
    logits: torch.Tensor,
    sample_index: Any,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    position: int,
) -> Any:
    """taming's order: temperature, top-k, softmax, top-p over sorted probabilities, draw."""
    generator = torch.Generator(logits.device).manual_seed(seed)

    def draw() -> torch.Tensor:
        x = logits.float() / temperature
        if top_k:
            least = x.topk(min(top_k, x.shape[-1])).values[:, -1:]
            x = x.masked_fill(x < least, -torch.inf)
        ordered, at = x.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p
        ordered = ordered.masked_fill(beyond, 0)
        return at.gather(1, torch.multinomial(ordered, 1, generator=generator))[:, 0]

    return draw
