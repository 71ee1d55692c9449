"""taming-transformers itself (or the package taming-transformers-rom1504): its network classes in
eager torch.

Newer libraries dropped three names that it imports; stand-ins are put in their place. A training
step is written out here after its `training_step` and VQLPIPSWithDiscriminator: two passes of the
autoencoder, adaptive weight, hinge loss; without the perceptual net, whose weights it would fetch.
"""

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F

from baselines import Unsuitable

MEASURES = ("encode", "decode", "train_tokenizer", "generate")
FORMATS = ("fp32",)  # of its sampler, which knows no other


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    import taming.modules.diffusionmodules.model  # noqa: F401  is it importable?

    try:
        return f"taming-transformers-rom1504 {installed('taming-transformers-rom1504')}"
    except PackageNotFoundError:
        return "taming-transformers"


def make(measure: str, case: Any, inputs: tuple) -> Any:
    if measure == "generate":
        return _generate(case, *inputs)
    if measure == "train_tokenizer":
        return _train_step(case, *inputs)
    model, data = inputs
    net = _network(model.config).eval().requires_grad_(False)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("quantize.")}
    net.load_state_dict(state)
    quantizer = _quantizer(model.config)
    quantizer.load_state_dict({"embedding.weight": model.quantize.embedding.weight})
    if case.dtype == "fp16":
        raise Unsuitable("measured in fp32 and bf16")
    net = net.to(case.device, torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    quantizer, data = quantizer.to(case.device), data.to(case.device)
    weight = next(net.parameters())

    @torch.no_grad()
    def encode() -> torch.Tensor:
        z = net.quant_conv(net.encoder(data.to(weight.dtype)))
        return quantizer(z.float())[2][2]

    @torch.no_grad()
    def decode() -> torch.Tensor:
        z = quantizer.embedding(data).permute(0, 3, 1, 2).to(weight.dtype)
        return net.decoder(net.post_quant_conv(z))

    return encode if measure == "encode" else decode


def _network(config: Any) -> torch.nn.Module:
    from taming.modules.diffusionmodules.model import Decoder, Encoder

    settings = {
        "ch": config.ch,
        "out_ch": config.out_ch,
        "ch_mult": tuple(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attn_resolutions),
        "in_channels": config.in_channels,
        "resolution": config.resolution,
        "z_channels": config.z_channels,
        "double_z": False,
        "dropout": 0.0,
    }
    net = torch.nn.Module()
    net.encoder, net.decoder = Encoder(**settings), Decoder(**settings)
    net.quant_conv = torch.nn.Conv2d(config.z_channels, config.embed_dim, 1)
    net.post_quant_conv = torch.nn.Conv2d(config.embed_dim, config.z_channels, 1)
    return net


def _quantizer(config: Any) -> torch.nn.Module:
    from taming.modules.vqvae.quantize import VectorQuantizer2

    return VectorQuantizer2(config.n_embed, config.embed_dim, beta=config.beta)


def _train_step(case: Any, config: Any, images: torch.Tensor) -> Any:
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    torch.manual_seed(0)
    net, quantizer = _network(config), _quantizer(config)
    critic = NLayerDiscriminator(input_nc=3, n_layers=3).apply(weights_init)
    for part in (net, quantizer, critic):
        part.to(case.device).train()
    rate = {"lr": 1e-4, "betas": (0.5, 0.9)}
    weights = [*net.parameters(), *quantizer.parameters()]
    for_net = torch.optim.Adam(weights, **rate)
    for_critic = torch.optim.Adam(critic.parameters(), **rate)
    x = images.to(case.device)
    bf16 = case.dtype == "bf16"

    def reconstruct() -> tuple[torch.Tensor, torch.Tensor]:
        z = net.quant_conv(net.encoder(x))
        with torch.autocast(case.device, enabled=False):
            z_q, codebook_loss, _ = quantizer(z.float())
        return net.decoder(net.post_quant_conv(z_q)).float(), codebook_loss

    def step() -> torch.Tensor:
        with torch.autocast(case.device, torch.bfloat16, enabled=bf16):
            x_hat, codebook_loss = reconstruct()
            nll = (x - x_hat).abs().mean()
            gan = -critic(x_hat).float().mean()
        last = net.decoder.conv_out.weight
        (for_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
        (for_gan,) = torch.autograd.grad(gan, last, retain_graph=True)
        ratio = (for_nll.norm() / (for_gan.norm() + 1e-4)).clamp(0, 1e4).detach()
        (nll + 0.8 * ratio * gan + codebook_loss).backward()
        for_net.step()
        for_net.zero_grad()
        for_critic.zero_grad()
        # the second optimizer's turn runs the autoencoder again, with a graph that is then detached
        with torch.autocast(case.device, torch.bfloat16, enabled=bf16):
            x_hat, _ = reconstruct()
            real, fake = critic(x).float(), critic(x_hat.detach()).float()
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        for_critic.step()
        for_critic.zero_grad()
        return nll.detach()

    return step


def _generate(case: Any, gpt: Any, cond: torch.Tensor) -> Any:
    mingpt, config = _mingpt(), gpt.config
    shape = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd")}
    with torch.device(case.device):
        model = mingpt.GPT(config.vocab_size, config.block_size, **shape).eval()
    # the same parameters, not a copy; its masks are buffers, which ours has not
    model.load_state_dict({**model.state_dict(), **gpt.state_dict()}, assign=True)
    return lambda n: mingpt.sample_with_past(cond, model, n, top_k=100, top_p=1.0)


def _mingpt() -> types.ModuleType:
    """taming's transformer module, with stand-ins for what newer libraries dropped."""
    import transformers

    def top_k_top_p_filtering(logits: Any, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
        if not top_k:
            return logits
        return logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)

    if not hasattr(transformers, "top_k_top_p_filtering"):
        transformers.top_k_top_p_filtering = top_k_top_p_filtering
    six = types.ModuleType("torch._six")
    six.string_classes = (str, bytes)
    sys.modules.setdefault("torch._six", six)
    try:
        from taming.modules.transformer import mingpt
    except ImportError as error:
        raise Unsuitable(str(error)) from None
    return mingpt
