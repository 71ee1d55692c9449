"""A training step of stage 1 in plain torch, the one that `vqfast.train.tokenizer` takes by
default: one pass of the autoencoder, perceptual net and discriminator differentiated once down to
x̂, adaptive weight, hinge loss, the discriminator on the same x̂, Adam for both.

`start` holds state dicts: vqgan, discriminator, and perceptual where there is one, a SqueezeNet
with LPIPS heads under vqfast's names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import Unsuitable
from baselines._plain_vqgan import PlainVQGAN, first_in_time

DISC_WEIGHT, RATE, BETAS = 0.8, 1e-4, (0.5, 0.9)  # taming's
_TAPS = {2: 64, 5: 128, 8: 256, 10: 384, 11: 384, 12: 512, 13: 512}  # layers before it: channels


class Discriminator(nn.Module):
    """taming's PatchGAN of three layers, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class SqueezeLPIPS(nn.Module):
    """LPIPS on torchvision's SqueezeNet 1.1. x, y [B, 3, H, W] in [-1, 1] -> []."""

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        from torchvision.models import squeezenet1_1

        layers = squeezenet1_1(weights=None).features
        starts = (0, *_TAPS)
        self.parts = nn.ModuleList(layers[a:b] for a, b in zip(starts, _TAPS, strict=False))
        heads = (nn.Conv2d(width, 1, 1, bias=False) for width in _TAPS.values())
        # as the heads are stored: the layer before the convolution was a dropout
        self.heads = nn.ModuleList(
            nn.ModuleDict({"model": nn.Sequential(nn.Identity(), head)}) for head in heads
        )
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.load_state_dict(squeeze_state(state))
        self.requires_grad_(False)

    def taps(self, x: Tensor) -> list[Tensor]:
        found = [(x - self.shift) / self.scale]
        for part in self.parts:
            found.append(part(found[-1]))
        return found[1:]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        for head, *pair in zip(self.heads, self.taps(x), self.taps(y), strict=True):
            a, b = (f.float() / (f.float().norm(dim=1, keepdim=True) + 1e-10) for f in pair)
            total = total + head["model"]((a - b).square()).mean((2, 3)).mean()
        return total


def squeeze_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of vqfast's LPIPS("squeeze") under the names of this file's."""
    found = {}
    for name, value in state.items():
        kind, rest = name.split(".", 1)
        if kind == "net":
            k, rest = rest.removeprefix("slice").split(".", 1)
            found[f"parts.{int(k) - 1}.{rest}"] = value
        elif kind == "scaling_layer":
            found[rest] = value
        else:
            found[f"heads.{kind.removeprefix('lin')}.{rest}"] = value
    return found


class Step:
    """One step per call; it gives the losses of generator and discriminator as they were before
    their updates. `looks_again`: the discriminator sees what the updated autoencoder makes, as
    taming has it.
    """

    def __init__(
        self,
        device: str,
        config: Any,
        start: Mapping[str, Mapping[str, Tensor]],
        looks_again: bool = False,
    ):
        self.looks_again = looks_again
        self.net = PlainVQGAN(config, start["vqgan"]).train()
        self.critic = Discriminator().train()
        self.critic.load_state_dict(start["discriminator"])
        squeeze = "perceptual" in start
        self.perceptual = SqueezeLPIPS(start["perceptual"]) if squeeze else None
        self.optimizers = []
        for part in (self.net, self.critic, self.perceptual):
            if part is not None:
                part.to(device, memory_format=torch.channels_last)
        for part in (self.net, self.critic):
            self.optimizers.append(
                torch.optim.Adam(part.parameters(), lr=RATE, betas=BETAS, fused=True)
            )

    def __call__(self, x: Tensor, autocast: Any) -> dict[str, Tensor]:
        with autocast:
            x_hat, loss, toward_x_hat = self.generator(x)
        torch.autograd.backward((x_hat, loss), (toward_x_hat, None))
        self._update(0)
        x_hat = x_hat.detach()
        if self.looks_again:
            with autocast, torch.no_grad():
                x_hat = self.net.decode(self.net.encode(x))
        with autocast:
            real, fake = self.critic(x), self.critic(x_hat)
            d_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        # gradients of the generator's pass did not reach it: they stopped at x_hat
        d_loss.backward()
        self._update(1)
        whole = loss.detach() + self.image_loss
        return {"loss": whole, "nll_loss": self.nll, "disc_loss": d_loss.detach()}

    def _update(self, which: int) -> None:
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def generator(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x̂, the codebook's loss, and the gradient of all other losses at x̂."""
        net = self.net
        z = net.latents(x)
        rows = F.embedding(net.nearest(z.detach()), net.codebook).movedim(-1, 1)  # [B, D, h, w]
        z32 = z.float()
        # taming's legacy form: beta is on the codebook's term
        codebook = F.mse_loss(rows.detach(), z32) + net.beta * F.mse_loss(rows, z32.detach())
        x_hat = net.decoder(net.post_quant_conv(z32 + (rows - z32).detach()))
        leaf = x_hat.detach().float().requires_grad_()
        nll = (x - leaf).abs().mean()
        if self.perceptual is not None:
            nll = nll + self.perceptual(x, leaf)
        gan = -self.critic(leaf).float().mean()
        down = [torch.autograd.grad(loss, leaf)[0] for loss in (nll, gan)]
        last = net.decoder.conv_out.weight
        sizes = [
            torch.autograd.grad(x_hat, last, g.to(x_hat.dtype), retain_graph=True)[0].float().norm()
            for g in down
        ]
        weight = DISC_WEIGHT * (sizes[0] / (sizes[1] + 1e-4)).clamp(0, 1e4)
        self.nll, self.image_loss = nll.detach(), (nll + weight * gan).detach()
        return x_hat, codebook, (down[0] + weight * down[1]).to(x_hat.dtype)


def contestant(
    case: Any,
    config: Any,
    images: Tensor,
    start: Mapping[str, Any],
    *,
    compiled: bool = False,
    looks_again: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """A step on these images; bf16 is autocast. Encoder and decoder by torch.compile if asked for.

    Raises:
        Unsuitable: float16; in the first call that it does not compile in time.
    """
    if case.dtype not in ("fp32", "bf16"):
        raise Unsuitable("trains in fp32 and bf16")
    step = Step(case.device, config, start, looks_again)
    x = images.to(case.device, memory_format=torch.channels_last)
    bf16 = case.dtype == "bf16"

    def run() -> dict[str, Tensor]:
        kind = case.device.partition(":")[0]
        return step(x, torch.autocast(kind, torch.bfloat16, enabled=bf16))

    if compiled:
        # the adaptive weight walks through the decoder's graph before the backward pass does
        torch._functorch.config.donated_buffer = False
        step.net.encoder.compile(dynamic=False)
        step.net.decoder.compile(dynamic=False)
        run = first_in_time(run)
    run.note = ", ".join(["channels_last"] * compiled + ["autocast"] * bf16)
    return run
