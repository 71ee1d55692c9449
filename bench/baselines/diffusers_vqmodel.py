"""diffusers' VQModel with the same weights, under its names."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from baselines import Unsuitable

MEASURES = ("encode", "decode")


def version() -> str:
    try:
        import diffusers
        from diffusers import VQModel  # noqa: F401  is it importable?
    except RuntimeError as error:  # how its lazy modules pass on a failed import
        raise ImportError(str(error)) from None
    return f"diffusers {diffusers.__version__}"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    from diffusers import VQModel

    model, data = inputs
    config = model.config
    levels = len(config.ch_mult)
    if tuple(config.attn_resolutions) != (config.resolution >> (levels - 1),):
        raise Unsuitable("it has attention in the last level or in all")
    if case.dtype == "fp16" and case.device == "cpu":
        raise Unsuitable("measured in fp32 and bf16 on the CPU")
    down = ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"]
    up = ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1)
    peer = VQModel(
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.ch * m for m in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        num_vq_embeddings=config.n_embed,
        vq_embed_dim=config.embed_dim,
        sample_size=config.resolution,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    peer.load_state_dict(renamed(model.state_dict(), levels))
    peer = peer.eval().requires_grad_(False).to(case.device, dtype)
    peer.quantize.float()  # distances in bfloat16 would miss most codes
    data = data.to(case.device)

    @torch.no_grad()
    def encode() -> torch.Tensor:
        return peer.quantize(peer.encode(data.to(dtype)).latents.float())[2][2]

    @torch.no_grad()
    def decode() -> torch.Tensor:
        z = peer.quantize.embedding(data).permute(0, 3, 1, 2).to(dtype)
        return peer.decode(z, force_not_quantize=True).sample

    return encode if measure == "encode" else decode


_NAMES = (  # taming's, diffusers'
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"down\.(\d+)\.", r"down_blocks.\1."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"downsample\.", "downsamplers.0."),
    (r"upsample\.", "upsamplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out\.", "conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def renamed(state: Mapping[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """A state dict under taming's names for VQModel: it counts `up` from the coarsest level on,
    and 1x1 convolutions of attention are linear layers.
    """
    found = {}
    for name, value in state.items():
        name = re.sub(
            r"\bup\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m.group(1))}.", name
        )
        for theirs, here in _NAMES:
            name = re.sub(theirs, here, name)
        linear = re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", name)
        found[name] = value[:, :, 0, 0] if linear else value
    return found
