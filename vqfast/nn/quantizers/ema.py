"""Quantizer whose codebook is a moving average of the latents that chose it, with dead-code revival.

    n_k ← γ n_k + (1 − γ) · count_k,      m_k ← γ m_k + (1 − γ) · Σ z that chose k
    c_k = m_k / ñ_k,                       ñ_k = (n_k + ε) / (Σn + Kε) · Σn      (Laplace smoothing)
    loss = β · mean |z − sg(c)|²

A code whose n_k falls below a part of the mean is moved onto a latent of the batch.

Source: arXiv:1711.00937 appendix A.1; arXiv:2005.00341 section 3.1 (revival). taming's class of this
name never ran: it uses names that do not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from vqfast import _check
from vqfast.nn.quantizers._remap import Remapping
from vqfast.ops import code_stats, nearest, quantize


class _Codebook(nn.Module):
    """weight [K, D], trained without gradient; cluster_size [K] n_k; embed_avg [K, D] m_k."""

    def __init__(self, K: int, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, D), requires_grad=False)
        # one each: codes that are never chosen keep their place while both sides decay
        self.register_buffer("cluster_size", torch.ones(K))
        self.register_buffer("embed_avg", self.weight.detach().clone())


class EMAVectorQuantizer(Remapping):
    """taming's EMAVectorQuantizer as it was meant.

    State dict: embedding.{weight, cluster_size, embed_avg}; weights start as N(0, 1). The codebook
    moves in training mode only, and never towards a batch that is not finite. With several processes
    counts and sums are added up, so all hold the same codebook.

    Args:
        n_embed: codes K. embedding_dim: their dimension D.
        beta: weight of the commitment loss, the only one.
        decay: γ in [0, 1).
        eps: ε > 0.
        remap, unknown_index: see `Remapping`.
        dead_code_threshold: part of the mean n_k below which a code is revived; 0: never. The latents
            are drawn from torch's global CPU generator.
    """

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | Path | Sequence[int] | None = None,
        unknown_index: str | int = "random",
        *,
        dead_code_threshold: float = 0.01,
    ) -> None:
        super().__init__(_check.integer("n_embed", n_embed, low=1), remap, unknown_index)
        self.num_tokens = n_embed
        self.codebook_dim = _check.integer("embedding_dim", embedding_dim, low=1)
        self.beta = _check.number("beta", beta, low=0)
        self.decay = _check.number("decay", decay, low=0, high=1, high_open=True)
        self.eps = _check.number("eps", eps, low=0, low_open=True)
        self.dead_code_threshold = _check.number("dead_code_threshold", dead_code_threshold, low=0)
        self.embedding = _Codebook(n_embed, embedding_dim)

    def _rows(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] -> [B, h, w, D]."""
        _check.floating("z", z)
        _check.ndim("z", z, 4)
        if z.shape[1] != self.codebook_dim:
            raise ValueError(f"z must be [B, {self.codebook_dim}, h, w], got {list(z.shape)}")
        return z.movedim(1, -1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z [B, D, h, w] -> z_q like z, loss [], (None, None, indices [B·h·w])."""
        rows = self._rows(z)
        # the codebook gets no gradient, so the loss of its own term must not count
        out = quantize(rows, self.embedding.weight.detach(), beta=1.0)
        loss = out.loss * (self.beta / 2)
        indices = out.indices.reshape(-1)
        if self.training and indices.numel():
            self._update(rows.detach().reshape(-1, self.codebook_dim), indices)
        if self.remap is not None:
            indices = self.remap_to_used(indices, self.num_tokens)
        return out.z_q.movedim(-1, 1), loss, (None, None, indices)

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        """One step of the averages from z [N, D] and indices [N]."""
        book, K = self.embedding, self.num_tokens
        counts, sums = code_stats(indices, z, K)
        new = torch.cat([counts[:, None].to(sums.dtype), sums], dim=1)  # [K, 1 + D]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            torch.distributed.all_reduce(new)
        old = torch.cat([book.cluster_size[:, None], book.embed_avg], dim=1).to(new.dtype)
        # a batch that is not finite moves nothing, without asking the device
        moved = torch.where(new.isfinite().all(), old.lerp(new, 1 - self.decay), old)
        if self.dead_code_threshold:
            moved = self._revive(moved, z, distributed)
        n = moved[:, 0]
        smoothed = (n + self.eps) / (n.sum() + K * self.eps) * n.sum()
        book.cluster_size.copy_(n)
        book.embed_avg.copy_(moved[:, 1:])
        book.weight.copy_(moved[:, 1:] / smoothed[:, None])

    def _revive(self, state: Tensor, z: Tensor, distributed: bool) -> Tensor:
        """state [K, 1 + D] with dead codes moved onto latents of z [N, D], at the mean count."""
        K, mean = self.num_tokens, state[:, 0].mean()
        dead = state[:, 0] < self.dead_code_threshold * mean
        order = torch.randperm(len(z))[torch.arange(K) % len(z)].to(z.device)
        rows = z[order].to(state.dtype)  # [K, D]; no latent twice while there are enough
        if distributed:
            torch.distributed.broadcast(rows, src=0)
        usable = dead & rows.isfinite().all(1)
        fresh = torch.cat([mean.expand(K, 1), rows * mean], dim=1)
        return torch.where(usable[:, None], fresh, state)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] -> indices [B, h, w] int64; nothing is updated."""
        indices = nearest(self._rows(z), self.embedding.weight)
        return indices if self.remap is None else self.remap_to_used(indices, self.num_tokens)

    def get_codebook_entry(
        self, indices: Tensor, shape: tuple[int, int, int, int] | None
    ) -> Tensor:
        """indices of B·h·w codes and shape (B, h, w, D) -> [B, D, h, w]; without shape [..., D]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        z_q = self.embedding.weight[indices]
        return z_q if shape is None else z_q.view(shape).movedim(-1, 1)
