"""Gumbel-softmax quantizer with the interface of taming's GumbelQuantize.

    logits = proj(z);   y = softmax((logits + Gumbel noise) / temperature);   z_q = y · embed
    loss = kl_weight · mean over positions of Σ_k p_k log(n p_k),   p = softmax(logits)

Noise is drawn in training mode alone. In evaluation mode the codes are the argmax of the logits;
taming draws noise there too, so that it encodes one image differently each time.

Source: arXiv:1611.01144; CompVis/taming-transformers taming/modules/vqvae/quantize.py.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import _check
from vqfast.nn.quantizers.base import Info, Quantizer, perplexity, wide

_EPS = 1e-10  # inside the logarithm, as taming has it


class GumbelQuantizer(Quantizer):
    """z [B, num_hiddens, h, w] -> [B, embedding_dim, h, w].

    Args:
        num_hiddens: channels of z.
        embedding_dim: dimension of a code.
        n_embed: number of codes.
        straight_through: in training, z_q is one code (gradient of the soft mixture); else the
            mixture itself.
        kl_weight: weight of the KL divergence to the uniform distribution.
        temp_init: first temperature; the attribute `temperature` may be changed between steps and
            is not part of the state.
        use_vqinterface: return the triple of `VectorQuantizer`; else (z_q, loss, indices).
        remap, unknown_index: as `Quantizer`; only the kept codes are ever chosen.

    State: `proj.weight` [n_embed, num_hiddens, 1, 1], `proj.bias`, `embed.weight`
    [n_embed, embedding_dim].
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | Path | Sequence[int] | Tensor | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index)
        self.num_hiddens = _check.integer("num_hiddens", num_hiddens, low=1)
        self.kl_weight = _check.number("kl_weight", kl_weight, low=0.0)
        self.temperature = _check.number("temp_init", temp_init, low=0.0, low_open=True)
        self.straight_through, self.use_vqinterface = straight_through, use_vqinterface
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        # on the meta device a normal draw imports half of torch (seconds), for nothing
        self.embed = nn.Embedding.from_pretrained(torch.empty(n_embed, embedding_dim), freeze=False)
        if not self.embed.weight.is_meta:
            nn.init.normal_(self.embed.weight)

    def codebook(self) -> Tensor:
        return wide(self.embed.weight)

    def logits(self, z: Tensor) -> Tensor:
        """z [B, num_hiddens, h, w] -> [B, n, h, w] in float32 or wider; n kept codes."""
        z = self._latents(z, self.num_hiddens)
        assert self.proj.bias is not None
        weight, bias = wide(self.proj.weight), wide(self.proj.bias)
        if self.remap is not None:
            weight, bias = weight[self.used], bias[self.used]
        with torch.autocast(z.device.type, enabled=False):
            return F.conv2d(z.to(weight.dtype), weight, bias)

    def _ids(self, chosen: Tensor) -> Tensor:
        """Places among the logits -> ids of all codes."""
        return chosen if self.remap is None else self.used[chosen]

    def codes(self, z: Tensor) -> Tensor:
        """z [B, num_hiddens, h, w] -> indices [B, h, w] int64 without noise, in either mode."""
        with torch.no_grad():
            chosen = self.logits(z).argmax(1)
        return chosen if self.remap is None else self.remap_to_used(self._ids(chosen))

    def forward(
        self, z: Tensor, temp: float | None = None, return_logits: bool = False
    ) -> (
        tuple[Tensor, Tensor, Info]
        | tuple[Tensor, Tensor, Info, Tensor]
        | tuple[Tensor, Tensor, Tensor]
    ):
        """
        Args:
            z: [B, num_hiddens, h, w].
            temp: temperature of this call; None takes the attribute.
            return_logits: append the logits [B, n, h, w] (needs `use_vqinterface`).

        Returns:
            z_q [B, embedding_dim, h, w] like z; loss []; (perplexity [], None, indices [B, h, w]
            int64) or the indices alone. In evaluation mode z_q has no gradient to z.

        Raises:
            TypeError, ValueError: z is not [B, num_hiddens, h, w] floating point; temp <= 0.
        """
        if return_logits and not self.use_vqinterface:
            raise ValueError("return_logits needs use_vqinterface=True")
        temp = self.temperature if temp is None else temp
        temp = _check.number("temp", temp, low=0.0, low_open=True)
        logits = self.logits(z)
        with torch.autocast(z.device.type, enabled=False):
            z_q, chosen = self._choose(logits, temp)
            log_p = F.log_softmax(logits, dim=1)
            p = log_p.exp()
            loss = self.kl_weight * (p * torch.log(p * self.n_e + _EPS)).sum(1).mean()
        ids = self._ids(chosen)
        indices = ids if self.remap is None else self.remap_to_used(ids)
        z_q = z_q.movedim(-1, 1).to(z.dtype)
        if not self.use_vqinterface:
            return z_q, loss, indices
        info = (perplexity(ids, self.n_e), None, indices)
        return (z_q, loss, info, logits) if return_logits else (z_q, loss, info)

    def _choose(self, logits: Tensor, temp: float) -> tuple[Tensor, Tensor]:
        """logits [B, n, h, w] -> z_q [B, h, w, D] and the place of the chosen code [B, h, w]."""
        codebook = self.codebook()
        if self.remap is not None:
            codebook = codebook[self.used]
        if not self.training:
            chosen = logits.argmax(1)
            return F.embedding(chosen, codebook), chosen
        y = F.gumbel_softmax(logits, tau=temp, hard=self.straight_through, dim=1)
        return torch.einsum("bnhw,nd->bhwd", y, codebook), y.argmax(1)
