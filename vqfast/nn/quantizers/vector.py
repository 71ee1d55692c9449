"""Nearest-code quantizer with a trained codebook and the interface of taming's VectorQuantizer2.

Source: arXiv:1711.00937; CompVis/taming-transformers taming/modules/vqvae/quantize.py.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import _check
from vqfast.nn.quantizers.base import Info, Quantizer, channels_last, perplexity_of_counts, wide
from vqfast.ops.nearest import nearest

# the function of this name replaces the module as attribute of vqfast.ops
_quantize = importlib.import_module("vqfast.ops.quantize")


class VectorQuantizer(Quantizer):
    """z [B, D, h, w] -> its nearest codes, with straight-through gradient.

    Args:
        n_e: number of codes.
        e_dim: their dimension D.
        beta: weight of the commitment term; with `legacy` of the codebook term.
        remap: ids that are kept; see `Quantizer`.
        unknown_index: "random", "extra" or an id, for codes outside of `remap`.
        sane_index_shape: indices come as [B, h, w]; else flat, [B·h·w] ([B·h·w, 1] with `remap`).
        legacy: beta on the codebook term, as every released taming checkpoint was trained.
        metric: "l2", "cosine" (both sides normalised for distance, loss and lookup) or "dot".

    State: `embedding.weight` [n_e, e_dim], drawn from U(-1/n_e, 1/n_e); `used` with `remap`.
    Works in float32 (or wider) whatever the dtype of z and under autocast. Indices are exact.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | Path | Sequence[int] | Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        metric: str = "l2",
    ) -> None:
        super().__init__(n_e, e_dim, remap, unknown_index)
        _check.choice("metric", metric, ("l2", "cosine", "dot"))
        self.beta = _check.number("beta", beta, low=0.0)
        self.sane_index_shape, self.legacy, self.metric = sane_index_shape, legacy, metric
        # nn.Embedding's own normal draw imports half of torch (seconds) on the meta device
        self.embedding = nn.Embedding.from_pretrained(torch.empty(n_e, e_dim), freeze=False)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def codebook(self) -> Tensor:
        weight = wide(self.embedding.weight)
        return F.normalize(weight, dim=-1) if self.metric == "cosine" else weight

    def codes(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] -> indices [B, h, w] int64, without gradient."""
        rows = channels_last(self._latents(z))
        indices = nearest(rows, wide(self.embedding.weight), metric=self.metric)
        return indices if self.remap is None else self.remap_to_used(indices)

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Info]:
        """
        Args:
            z: [B, D, h, w].
            temp, rescale_logits, return_logits: for callers that also drive a Gumbel quantizer;
                must be None (or 1.0), False and False.

        Returns:
            z_q [B, D, h, w] like z, contiguous if z is; loss []; (perplexity [], None, indices
            int64). taming returns None for the perplexity. It counts the codes before `remap`.

        Raises:
            TypeError, ValueError: z is not [B, e_dim, h, w] floating point, or a Gumbel argument is
                set.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("temp, rescale_logits and return_logits are for GumbelQuantizer only")
        rows = channels_last(self._latents(z))  # [B, h, w, D]
        with torch.autocast(z.device.type, enabled=False):
            q, counts = _quantize.counted(
                rows,
                wide(self.embedding.weight),
                beta=self.beta,
                legacy=self.legacy,
                metric=self.metric,
            )
        indices = q.indices
        spread = perplexity_of_counts(counts)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.reshape(-1) if self.remap is None else indices.reshape(-1, 1)
        z_q = q.z_q.movedim(-1, 1).to(z.dtype)
        if z.is_contiguous():  # callers of taming's class may use .view
            z_q = z_q.contiguous()
        return z_q, q.loss, (spread, None, indices)
