"""Codes of given indices, the loss of the replacement, and the straight-through gradient.

    z_q,n = c[idx_n]        loss = weight · mean((z_q − z)²)
    backward, where the codes get no gradient:
    grad_z = grad_z_q + 2·to_z·grad_loss/(N·D)·(z − z_q)

`partial` holds the sums of squares of BLOCK rows each, in float64: with it the sum has one order,
whatever the number of threads. Where the codes are trained, `quantize_backward` gives both
gradients in one pass.

Cost: forward reads N·D values of z and of codes and writes N·D; backward reads 3·N·D, writes N·D.
Source: arXiv:1308.3432 section 4 (straight-through), arXiv:1711.00937 eq. 3 (commitment).
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from vqfast._dispatch import Op

# the function of this name replaces the module as attribute of vqfast.ops
_code_order = importlib.import_module("vqfast.ops.code_order")

BLOCK = 64  # rows of a partial sum


def wide_type(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what losses and gradients are computed in."""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def _reference(
    z: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, D], codebook [K, D], indices [N] -> z_q [N, D], loss [], partial [N / BLOCK]."""
    wide = wide_type(z, codebook)
    codes = codebook.index_select(0, indices)  # [N, D]
    rows = (codes.to(wide) - z.to(wide)).double().square().sum(1)  # [N]
    padding = -len(z) % BLOCK
    partial = torch.nn.functional.pad(rows, (0, padding)).view(-1, BLOCK).sum(1)
    mean = partial.sum() / max(1, z.numel())
    return codes.to(z.dtype), (mean * weight).to(wide), partial


def _outputs(
    z: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (z.shape[0] + BLOCK - 1) // BLOCK
    return (
        z.new_empty(z.shape),
        z.new_empty((), dtype=wide_type(z, codebook)),
        z.new_empty((blocks,), dtype=torch.float64),
    )


def _reference_backward(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codes: Tensor, to_z: float
) -> Tensor:
    """grad_z_q, z, codes [N, D], grad_loss [] -> grad_z [N, D]."""
    wide = wide_type(z, codes)
    step = grad_loss.to(wide) * (2.0 * to_z / max(1, z.numel()))
    grad_z = (z.to(wide) - codes.to(wide)) * step
    return (grad_z if grad_z_q is None else grad_z_q.to(wide) + grad_z).to(z.dtype)


def _outputs_backward(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codes: Tensor, to_z: float
) -> Tensor:
    return z.new_empty(z.shape)


_OP = Op(
    "straight_through(Tensor z, Tensor codebook, Tensor indices, float weight)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    outputs=_outputs,
)
_BACKWARD = Op(
    "straight_through_backward(Tensor? grad_z_q, Tensor grad_loss, Tensor z, Tensor codes,"
    " float to_z) -> Tensor",
    reference=_reference_backward,
    outputs=_outputs_backward,
)


def straight_through(
    z: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """The forward pass, without autograd. Private: `quantize` is its user.

    Args:
        z: [N, D] floating point, contiguous.
        codebook: [K, D] floating point, contiguous.
        indices: [N] int64 in 0..K−1.
        weight: of the mean of squares.

    Returns:
        z_q [N, D] of the dtype of z, loss [] float32 (float64 for float64). The loss of no rows
        is 0; that of a row that is not finite is not finite.
    """
    z_q, loss, _ = _OP(z, codebook, indices, weight)
    return z_q, loss


def commitment_grad(
    grad_z_q: Tensor | None, grad_loss: Tensor, z: Tensor, codes: Tensor, to_z: float
) -> Tensor:
    """grad_z [N, D] like z, where codes [N, D] get no gradient; grad_z_q None is zero."""
    return _BACKWARD(grad_z_q, grad_loss, z, codes, to_z)


def sample_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Seeded inputs of the raw op; `case.shape`: N, K, D; rows near their codes."""
    N, K, D = (case[k] for k in "NKD")
    g = torch.Generator().manual_seed(N + 31 * K + 977 * D)
    codebook = torch.randn(K, D, generator=g)
    indices, _ = _code_order.sample_inputs(case, dtype, "cpu")
    z = codebook[indices] + 0.3 * torch.randn(N, D, generator=g)
    return z.to(device, dtype), codebook.to(device, dtype), indices.to(device), 1.25


def sample_backward_inputs(case: Any, dtype: torch.dtype, device: str) -> tuple:
    """Inputs of the raw backward op for the same case."""
    z, codebook, indices, _ = sample_inputs(case, dtype, device)
    g = torch.Generator().manual_seed(1)
    grad_z_q = torch.randn(z.shape, generator=g).to(device, dtype) / max(1, z.numel())
    return grad_z_q, torch.tensor(1.7, device=device), z, codebook[indices], 0.25


def COST(case: Any) -> tuple[int, int]:
    """(bytes moved, flops), float32, of the forward pass."""
    N, K, D = (case[k] for k in "NKD")
    return 4 * (2 * N * D + min(N, K) * D), 3 * N * D
