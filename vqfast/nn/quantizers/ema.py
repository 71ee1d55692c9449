"""Quantizer whose codebook follows the moving average of its latents; dead codes come back.

    n_k ← γ n_k + (1 − γ)·count_k        s_k ← γ s_k + (1 − γ)·Σ_{idx = k} z
    c_k = s_k / ñ_k,    ñ_k = (n_k + eps) / (Σn + K·eps) · Σn
    loss = beta · mean((sg(c_idx) − z)²)

The codebook is a buffer: no optimizer sees it. Statistics are summed over all ranks, as one tensor,
so every rank holds the same codebook. The first batch of training gives the first codes: from
N(0, 1) most codes would never be chosen. A code whose n_k falls under `dead_code_threshold` times
the mean is set to a random latent of the batch (of rank 0), with the mean as its count.

Source: arXiv:1711.00937 appendix A.1; arXiv:2005.00341 section 3.1 (random restarts). taming's
class of this name never ran: it uses names that do not exist.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vqfast import _check
from vqfast.nn.quantizers.base import Info, Quantizer, channels_last, perplexity_of_counts, wide
from vqfast.ops.nearest import nearest

# private functions; those of their names replace the modules as attributes of vqfast.ops
_quantize = importlib.import_module("vqfast.ops.quantize")
_ema_stats = importlib.import_module("vqfast.ops.ema_stats")
_ema_update = importlib.import_module("vqfast.ops.ema_update")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Codebook(nn.Module):
    """Buffers under taming's names: weight [n, dim], cluster_size [n], embed_avg [n, dim]."""

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, n: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(n, dim))
        # all counts zero: no batch has been seen
        self.register_buffer("cluster_size", torch.zeros(n))
        self.register_buffer("embed_avg", self.weight.clone())


class EMAVectorQuantizer(Quantizer):
    """z [B, D, h, w] -> its nearest codes; the codebook moves in `forward` in training mode.

    Args:
        n_embed: number of codes.
        embedding_dim: their dimension D.
        beta: weight of the commitment loss.
        decay: γ of the moving averages, in [0, 1).
        eps: of the Laplace smoothing of the counts, > 0.
        remap, unknown_index: as `Quantizer`.
        dead_code_threshold: a code is revived when its count falls under this share of the mean
            count; 0 never. With decay 0.99 and 0.01 that is after some 460 steps without use.
        sane_index_shape: indices come as [B, h, w]; else flat, [B·h·w].

    State: `embedding.weight`, `embedding.cluster_size`, `embedding.embed_avg`, in float32 always.
    Each call of `forward` in training mode is one update; latents that are not finite take no part.
    The random choices come from torch's global generator of the CPU.
    """

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | Path | Sequence[int] | Tensor | None = None,
        unknown_index: str | int = "random",
        dead_code_threshold: float = 0.01,
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index)
        self.beta = _check.number("beta", beta, low=0.0)
        self.decay = _check.number("decay", decay, low=0.0, high=1.0, high_open=True)
        self.eps = _check.number("eps", eps, low=0.0, low_open=True)
        self.dead_code_threshold = _check.number(
            "dead_code_threshold", dead_code_threshold, low=0.0
        )
        self.sane_index_shape = sane_index_shape
        self.embedding = _Codebook(n_embed, embedding_dim)

    def _apply(self, fn: Callable, recurse: bool = True) -> "EMAVectorQuantizer":
        # .half() and .bfloat16() leave the averages in float32: (1 − decay)·count would vanish
        kept = dict(self.embedding.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in self.embedding.named_buffers(recurse=False):
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self.embedding, name, kept[name].to(moved.device))
        return self

    def codebook(self) -> Tensor:
        return wide(self.embedding.weight)

    def codes(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] -> indices [B, h, w] int64, without gradient and without an update."""
        indices = nearest(channels_last(self._latents(z)), self.codebook())
        return indices if self.remap is None else self.remap_to_used(indices)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Info]:
        """
        Returns:
            z_q [B, D, h, w] like z, from the codebook before this update; loss [];
            (perplexity [], None, indices int64).

        Raises:
            TypeError, ValueError: z is not [B, embedding_dim, h, w] floating point.
        """
        rows = channels_last(self._latents(z)).contiguous()  # [B, h, w, D]
        flat = rows.detach().view(-1, self.e_dim)
        if self.training:
            self._first_codes(flat)
        with torch.autocast(z.device.type, enabled=False):
            # legacy with beta 0 is the commitment term alone
            q, counts = _quantize.counted(rows, self.codebook(), beta=0.0, legacy=True, metric="l2")
            if self.training:
                self._update(flat, q.indices.reshape(-1))
        indices = q.indices if self.remap is None else self.remap_to_used(q.indices)
        if not self.sane_index_shape:
            indices = indices.reshape(-1)
        info = (perplexity_of_counts(counts), None, indices)
        return q.z_q.movedim(-1, 1).to(z.dtype), self.beta * q.loss, info

    def _samples(self, flat: Tensor, n: int) -> Tensor | None:
        """n random finite rows of flat [rows, D], none twice while there are enough; of rank 0.

        None when there are no such rows.
        """
        packed = flat.new_zeros(n, self.e_dim + 1, dtype=torch.float32)  # rows, and 1 if they exist
        healthy = flat.isfinite().all(1).nonzero()[:, 0]
        if len(healthy):
            order = torch.randperm(len(healthy))[torch.arange(n) % len(healthy)]
            packed[:, :-1], packed[:, -1] = flat[healthy[order.to(flat.device)]], 1.0
        if _distributed():
            torch.distributed.broadcast(packed, src=0)
        return packed[:, :-1] if bool(packed[0, -1]) else None

    @torch.no_grad()
    def _first_codes(self, flat: Tensor) -> None:
        book = self.embedding
        if bool(book.cluster_size.any()):
            return
        rows = self._samples(flat, self.n_e)
        if rows is not None:
            book.weight.copy_(rows)
            book.embed_avg.copy_(rows)
            book.cluster_size.fill_(1.0)

    @torch.no_grad()
    def _update(self, flat: Tensor, indices: Tensor) -> None:
        """flat [rows, D], indices [rows]: one step of the averages."""
        book = self.embedding
        packed = _ema_stats.ema_stats(indices, flat, self.n_e)  # [K, D + 1]
        if _distributed():
            torch.distributed.all_reduce(packed)
        totals = _ema_update.ema_update(
            book.cluster_size, book.embed_avg, book.weight, packed.to(book.weight.dtype),
            decay=self.decay, eps=self.eps,
        )  # fmt: skip
        self._revive(flat, totals[0] / self.n_e)

    def _revive(self, flat: Tensor, mean: Tensor) -> None:
        book = self.embedding
        # equal on all ranks, so all take the same branch
        dead = (book.cluster_size < self.dead_code_threshold * mean).nonzero()[:, 0]
        rows = self._samples(flat, len(dead)) if len(dead) else None
        if rows is None:
            return
        rows = rows.to(book.weight.dtype)
        book.weight[dead] = rows
        book.embed_avg[dead] = rows * mean
        book.cluster_size[dead] = mean
