"""Tiny tokenizers with weights that leave nothing out, and pictures for them."""

from typing import Any

import torch
from torch import Tensor

from vqfast.models.vqgan import VQGAN, VQGANConfig

__all__ = ["TINY", "images", "tokenizer"]

TINY: dict[str, Any] = {
    "ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (16,),
    "resolution": 32, "z_channels": 32, "n_embed": 64, "embed_dim": 8,
}  # fmt: skip


def tokenizer(seed: int = 0, **changes: Any) -> VQGAN:
    """Of TINY with `changes`, in eval mode: no bias is zero, the latents spread over the codes."""
    torch.manual_seed(seed)
    tok = VQGAN(VQGANConfig(**{**TINY, **changes})).eval()
    for name, p in tok.named_parameters():
        if p.dim() == 1:
            p.data = 0.1 * torch.randn_like(p) + ("norm" in name and name.endswith("weight"))
    if tok.config.quantizer == "vq":
        with torch.no_grad():
            z = tok.encode_to_prequant(images(2, tok.config)).movedim(1, -1)
            z = z.reshape(-1, tok.config.embed_dim)
            code: Tensor = tok.get_parameter("quantize.embedding.weight")
            code.copy_(z.mean(0) + z.std(0) * torch.randn_like(code))
    return tok


def images(B: int, config: VQGANConfig, height: int = 32, width: int = 32, seed: int = 1) -> Tensor:
    """[B, C, H, W], uniform in [-1, 1)."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, config.in_channels, height, width, generator=g) * 2 - 1
