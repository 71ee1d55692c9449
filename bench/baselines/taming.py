"""taming-transformers itself (or the package taming-transformers-rom1504): its network classes in
eager torch.

Newer libraries dropped names that it imports; stand-ins are put in their place. A training step is
its own `training_step` with VQLPIPSWithDiscriminator, which needs pytorch-lightning: two passes of
the autoencoder, adaptive weight, hinge loss. A step of the second stage is its GPT with
F.cross_entropy and AdamW, as in its Net2NetTransformer.
"""

import sys
import types
from collections.abc import Mapping
from typing import Any

import torch

from baselines import Unsuitable, torch_gpt
from baselines._plain_training import squeeze_state

MEASURES = ("encode", "decode", "train_tokenizer", "train_transformer", "generate")
FORMATS = {"generate": ("fp32",)}  # its sampler knows no other


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
    if measure == "train_transformer":
        return _train_gpt(case, *inputs)
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

    net = torch.nn.Module()
    settings = _network_settings(config)
    net.encoder, net.decoder = Encoder(**settings), Decoder(**settings)
    net.quant_conv = torch.nn.Conv2d(config.z_channels, config.embed_dim, 1)
    net.post_quant_conv = torch.nn.Conv2d(config.embed_dim, config.z_channels, 1)
    return net


def _network_settings(config: Any) -> dict[str, Any]:
    return {
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


def _quantizer(config: Any) -> torch.nn.Module:
    from taming.modules.vqvae.quantize import VectorQuantizer2

    return VectorQuantizer2(config.n_embed, config.embed_dim, beta=config.beta)


def _train_step(case: Any, config: Any, images: torch.Tensor, start: Mapping[str, Any]) -> Any:
    """What Lightning does with its VQModel for one batch, its optimizers in turn: parameters of the
    others do not require gradients meanwhile.
    """
    if case.dtype not in ("fp32", "bf16"):
        raise Unsuitable("trains in fp32 and bf16")
    model = _vqmodel(config, start).to(case.device).train()
    optimizers = model.configure_optimizers()[0]
    weights = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    batch = {"image": images.permute(0, 2, 3, 1).contiguous().to(case.device)}
    bf16 = case.dtype == "bf16"

    def step() -> dict[str, torch.Tensor]:
        losses = []
        for i, optimizer in enumerate(optimizers):
            for k, part in enumerate(weights):
                for p in part:
                    p.requires_grad_(k == i)
            with torch.autocast(case.device, torch.bfloat16, enabled=bf16):
                loss = model.training_step(batch, 0, i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss, disc_loss = losses
        return {"loss": loss, "nll_loss": model.logged["train/nll_loss"], "disc_loss": disc_loss}

    step.note = "autocast" if bf16 else ""
    step.looks_again = True
    return step


def _vqmodel(config: Any, start: Mapping[str, Any]) -> Any:
    """Its VQModel with PatchGAN, from the first step on, with the weights of `start`. Its
    perceptual net would fetch others, so there is none, or its formula on a SqueezeNet.
    """
    squeeze = "perceptual" in start
    _stand_ins()
    import taming.modules.losses.vqperceptual as losses
    from taming.models.vqgan import VQModel

    losses.LPIPS = _squeeze_lpips() if squeeze else torch.nn.Identity
    loss = {"disc_start": 0, "disc_weight": 0.8, "perceptual_weight": float(squeeze)}
    target = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    lossconfig = {"target": target, "params": loss}
    model = VQModel(_network_settings(config), lossconfig, config.n_embed, config.embed_dim)
    for part in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"):
        state = start["vqgan"].items()
        own = {k.removeprefix(f"{part}."): v for k, v in state if k.startswith(f"{part}.")}
        getattr(model, part).load_state_dict(own)
    model.loss.discriminator.load_state_dict(start["discriminator"])
    if squeeze:
        model.loss.perceptual_loss.load_state_dict(_perceptual_state(start["perceptual"]))
    model.learning_rate = 1e-4
    # there is no trainer to log to
    model.logged = {}
    model.log, model.log_dict = lambda *_, **__: None, lambda d, **_: model.logged.update(d)
    return model


def _squeeze_lpips() -> type:
    from taming.modules.losses import lpips
    from torchvision.models import squeezenet1_1

    class SqueezeLPIPS(lpips.LPIPS):
        """Without the dropout of its heads, which would draw other losses each time."""

        ENDS, chns = (2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512)

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            layers = squeezenet1_1(weights=None).features
            starts = (0, *self.ENDS)
            self.parts = torch.nn.ModuleList(
                layers[a:b] for a, b in zip(starts, self.ENDS, strict=False)
            )
            self.scaling_layer = lpips.ScalingLayer()
            self.heads = torch.nn.ModuleList(lpips.NetLinLayer(c, 1, True) for c in self.chns)
            for head in self.heads:
                head.model[0] = torch.nn.Identity()
            self.requires_grad_(False)

        def taps(self, x: torch.Tensor) -> list[torch.Tensor]:
            found = [self.scaling_layer(x)]
            for part in self.parts:
                found.append(part(found[-1]))
            return found[1:]

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            total = 0
            for head, *pair in zip(self.heads, self.taps(input), self.taps(target), strict=True):
                a, b = map(lpips.normalize_tensor, pair)
                total = total + lpips.spatial_average(head.model((a - b) ** 2), keepdim=True)
            return total

    return SqueezeLPIPS


def _perceptual_state(state: Mapping[str, Any]) -> dict[str, Any]:
    found = squeeze_state(state)
    return {f"scaling_layer.{k}" if k in ("shift", "scale") else k: v for k, v in found.items()}


def _generate(case: Any, gpt: Any, cond: torch.Tensor) -> Any:
    mingpt = _mingpt()
    # the same parameters, not a copy
    model = _gpt(mingpt, case, gpt, assign=True).eval()
    return lambda n: mingpt.sample_with_past(cond, model, n, top_k=100, top_p=1.0)


def _train_gpt(case: Any, gpt: Any, idx: torch.Tensor, cond: torch.Tensor) -> Any:
    if sum(p.numel() for p in gpt.parameters()) > 100_000_000:
        raise Unsuitable("left out above 100 M parameters: memory of all contestants at once")
    model = _gpt(_mingpt(), case, gpt).train()

    class Logits(torch.nn.Module):
        """Its forward gives (logits, loss)."""

        def __init__(self) -> None:
            super().__init__()
            self.gpt = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.gpt(tokens)[0]

    return torch_gpt.training_step(Logits(), case, idx, cond)


def _gpt(mingpt: types.ModuleType, case: Any, gpt: Any, assign: bool = False) -> torch.nn.Module:
    """Its GPT with the weights of ours, and no dropout."""
    config = gpt.config
    shape = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd")}
    with torch.device(case.device):
        model = mingpt.GPT(config.vocab_size, config.block_size, **shape)
    # its masks are buffers, which ours has not
    model.load_state_dict({**model.state_dict(), **gpt.state_dict()}, assign=assign)
    return model


def _stand_ins() -> None:
    """Modules under names that newer versions of torch and Lightning dropped."""
    six = types.ModuleType("torch._six")
    six.string_classes = (str, bytes)
    sys.modules.setdefault("torch._six", six)
    try:
        from pytorch_lightning.utilities import rank_zero
    except ImportError:
        return
    distributed = types.ModuleType("pytorch_lightning.utilities.distributed")
    distributed.rank_zero_only = rank_zero.rank_zero_only
    sys.modules.setdefault(distributed.__name__, distributed)


def _mingpt() -> types.ModuleType:
    """taming's transformer module, with stand-ins for what newer libraries dropped."""
    import transformers

    def top_k_top_p_filtering(logits: Any, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
        if not top_k:
            return logits
        return logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)

    if not hasattr(transformers, "top_k_top_p_filtering"):
        transformers.top_k_top_p_filtering = top_k_top_p_filtering
    _stand_ins()
    try:
        from taming.modules.transformer import mingpt
    except ImportError as error:
        raise Unsuitable(str(error)) from None
    return mingpt
