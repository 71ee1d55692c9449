"""diffusers' VQModel of the same widths, with random weights of its own: only its speed is
compared.
"""

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
    torch.manual_seed(0)
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
    peer = peer.eval().requires_grad_(False).to(case.device, dtype)
    data = data.to(case.device)

    @torch.no_grad()
    def encode() -> torch.Tensor:
        return peer.quantize(peer.encode(data.to(dtype)).latents)[2][2]

    @torch.no_grad()
    def decode() -> torch.Tensor:
        z = peer.quantize.embedding(data).permute(0, 3, 1, 2)
        return peer.decode(z, force_not_quantize=True).sample

    return encode if measure == "encode" else decode
