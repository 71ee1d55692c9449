"""Stage-1 losses: reconstruction, perceptual, codebook, adversarial and its adaptive weight.

    mean |x − x̂|  +  w_p · LPIPS(x, x̂)  +  λ · φ(step) · (−mean D(x̂))  +  w_c · codebook
    ^ rec                  ^ perceptual                    ^ gan                  ^ codebook
    λ = disc_weight · clamp(‖∇nll‖ / (‖∇gan‖ + 1e-4), 0, 1e4),   nll = rec + w_p · perceptual

with both gradients taken at the decoder's last convolution and φ zero before `gan_start`.

Source: arXiv:2012.09841 eq. 5-7; CompVis/taming-transformers taming/modules/losses/vqperceptual.py,
segmentation.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check
from vqfast.errors import CheckpointError
from vqfast.models.discriminator import NLayerDiscriminator, fitting_layers
from vqfast.models.lpips import LPIPS

__all__ = [
    "LPIPS",
    "DiscriminatorLoss",
    "GeneratorLoss",
    "NLayerDiscriminator",
    "Stage1Loss",
    "adaptive_weight",
    "hinge_d_loss",
    "non_finite",
    "vanilla_d_loss",
]


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½ (mean relu(1 − real) + mean relu(1 + fake)); logits of any shape -> []."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½ (mean softplus(−real) + mean softplus(fake)); logits of any shape -> []."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def adaptive_weight(
    nll: Tensor, g: Tensor, last_layer: Tensor, disc_weight: float = 1.0, *, most: float = 1e4
) -> Tensor:
    """disc_weight · clamp(‖∂nll/∂last_layer‖ / (‖∂g/∂last_layer‖ + 1e-4), 0, most), detached.

    Args:
        nll: [] reconstruction and perceptual loss, without the codebook's.
        g: [] adversarial loss of the generator. Both graphs are kept.
        last_layer: weight of the decoder's last convolution.
        disc_weight: factor, ≥ 0.
        most: cap of the ratio.

    Returns:
        [] finite always: a gradient that holds NaN, or infinity on both sides, gives 0.
    """
    (grad_nll,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (grad_g,) = torch.autograd.grad(g, last_layer, retain_graph=True)
    return _gradient_ratio(grad_nll, grad_g, most) * disc_weight


def _gradient_ratio(grad_nll: Tensor, grad_g: Tensor, most: float) -> Tensor:
    above, below = (torch.linalg.vector_norm(_wide(t.detach())) for t in (grad_nll, grad_g))
    # the clamp lets NaN through
    return (above / (below + 1e-4)).clamp(0, most).nan_to_num(nan=0.0)


def non_finite(parts: Mapping[str, Tensor]) -> str | None:
    """Name of the first component that is NaN or infinite, or None."""
    return next((name for name, v in parts.items() if not bool(v.isfinite().all())), None)


@dataclass(frozen=True)
class GeneratorLoss:
    """What the autoencoder is trained on. `parts` are detached scalars, without their weights."""

    total: Tensor  # [] call backward() on it
    parts: dict[str, Tensor]  # rec, perceptual, gan, codebook
    nll: Tensor  # [] rec + perceptual_weight · perceptual, detached
    d_weight: Tensor  # [] λ; 0 while the adversarial term is off


@dataclass(frozen=True)
class DiscriminatorLoss:
    """What the discriminator is trained on; `active` is False before disc_start: no step then."""

    total: Tensor  # []
    parts: dict[str, Tensor]  # gan; logits_real and logits_fake (means)
    active: bool


class Stage1Loss(nn.Module):
    """The whole objective of stage 1. `discriminator` is the only part that is trained.

    Args:
        in_channels: channels of the images. image_size: their side; None: unknown.
        pixel: "l1", "l2", or "bce" for segmentation: x_hat holds logits of the one-hot x; it stands
            alone, so it needs perceptual_weight 0 and disc_factor 0.
        codebook_weight: of the quantizer's loss.
        perceptual_weight: 0 needs no perceptual network.
        perceptual_net, perceptual_weights, perceptual_heads: `LPIPS`; weights None means "auto".
        disc_start: step (updates done) from which the discriminator is trained.
        gan_start: step from which the autoencoder sees it; None: disc_start, as in taming.
        gan_ramp: steps over which the adversarial term then rises to its full weight.
        disc_factor: of both adversarial losses; 0: no discriminator at all.
        disc_weight, disc_adaptive, disc_weight_max: λ as above; disc_weight itself if not adaptive.
        disc_loss: "hinge" or "vanilla". The generator's term is −mean D(x̂) for both.
        disc_num_layers: of the PatchGAN; fewer where image_size does not allow as many.
        disc_channels: its first width. disc_norm: "batch" or "actnorm".

    Raises:
        TypeError, ValueError: naming the argument. CheckpointError: no perceptual weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        image_size: int | None = None,
        pixel: str = "l1",
        codebook_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        perceptual_net: str = "vgg",
        perceptual_weights: str | Path | None = None,
        perceptual_heads: str | Path | None = None,
        disc_start: int = 10_000,
        gan_start: int | None = None,
        gan_ramp: int = 0,
        disc_factor: float = 1.0,
        disc_weight: float = 0.8,
        disc_adaptive: bool = True,
        disc_weight_max: float = 1e4,
        disc_loss: str = "hinge",
        disc_num_layers: int = 3,
        disc_channels: int = 64,
        disc_norm: str = "batch",
    ) -> None:
        super().__init__()
        _check.choice("pixel", pixel, ("l1", "l2", "bce"))
        _check.choice("disc_loss", disc_loss, ("hinge", "vanilla"))
        _check.choice("disc_norm", disc_norm, ("batch", "actnorm"))
        self.codebook_weight = _check.number("codebook_weight", codebook_weight, low=0)
        self.perceptual_weight = _check.number("perceptual_weight", perceptual_weight, low=0)
        self.disc_start = _check.integer("disc_start", disc_start, low=0)
        start = disc_start if gan_start is None else gan_start
        self.gan_start = _check.integer("gan_start", start, low=0)
        self.gan_ramp = _check.integer("gan_ramp", gan_ramp, low=0)
        self.disc_factor = _check.number("disc_factor", disc_factor, low=0)
        self.disc_weight = _check.number("disc_weight", disc_weight, low=0)
        self.disc_weight_max = _check.number("disc_weight_max", disc_weight_max, low=0)
        self.disc_adaptive, self.pixel = bool(disc_adaptive), pixel
        if pixel == "bce" and (perceptual_weight or disc_factor):
            raise ValueError(
                "pixel bce needs perceptual_weight 0 and disc_factor 0, "
                f"got {perceptual_weight} and {disc_factor}"
            )
        self.d_loss = hinge_d_loss if disc_loss == "hinge" else vanilla_d_loss
        self.perceptual: LPIPS | None = None
        if perceptual_weight:
            self.perceptual = _perceptual(perceptual_net, perceptual_weights, perceptual_heads)
        self.discriminator: NLayerDiscriminator | None = None
        if disc_factor:
            layers = _check.integer("disc_num_layers", disc_num_layers, low=1)
            if image_size is not None:
                layers = fitting_layers(image_size, layers)
            self.discriminator = NLayerDiscriminator(
                in_channels, disc_channels, layers, use_actnorm=disc_norm == "actnorm"
            )

    def gan_factor(self, step: int) -> float:
        """φ(step): factor of the generator's adversarial term."""
        if self.discriminator is None or step < self.gan_start:
            return 0.0
        return self.disc_factor * min(1.0, (step - self.gan_start + 1) / (self.gan_ramp + 1))

    def generator(
        self, x: Tensor, x_hat: Tensor, codebook_loss: Tensor, last_layer: Tensor, step: int
    ) -> GeneratorLoss:
        """The autoencoder's loss.

        Perceptual network and discriminator are differentiated once, down to x_hat. Both the
        adaptive weight and the backward pass start there, which equals differentiating the sum.

        Args:
            x, x_hat: [B, C, H, W]; without a graph (validation) λ is 0, as in taming.
            codebook_loss: the quantizer's, of any shape; its mean counts.
            last_layer: `VQGAN.last_layer`.
            step: updates done so far, from 0.
        """
        factor = self.gan_factor(step)
        has_graph = torch.is_grad_enabled() and x_hat.requires_grad
        leaf = _wide(x_hat.detach()).requires_grad_(has_graph)
        zero = leaf.new_zeros(())
        gan = d_weight = zero
        with _no_float16(x_hat.device):
            rec, perceptual = self._pixel_loss(x, leaf), zero
            if self.perceptual is not None:
                perceptual = self.perceptual(_wide(x), leaf).mean()
            if factor:
                assert self.discriminator is not None  # disc_factor is not 0
                gan = -_wide(_frozen(self.discriminator, leaf)).mean()
        nll = rec + self.perceptual_weight * perceptual
        codebook = codebook_loss.mean()
        if has_graph:
            (gradient,) = torch.autograd.grad(nll, leaf)
            if factor:
                (gan_gradient,) = torch.autograd.grad(gan, leaf)
                d_weight = self._balance(x_hat, gradient, gan_gradient, last_layer)
                gradient = gradient + d_weight * factor * gan_gradient
        value = (nll + d_weight * factor * gan).detach()
        image_loss = _WithGradient.apply(x_hat, gradient, value) if has_graph else value
        total = image_loss + self.codebook_weight * codebook
        parts = {"rec": rec, "perceptual": perceptual, "gan": gan, "codebook": codebook}
        return GeneratorLoss(
            total, {k: v.detach() for k, v in parts.items()}, nll.detach(), d_weight
        )

    def _pixel_loss(self, x: Tensor, x_hat: Tensor) -> Tensor:
        x = x.to(x_hat.dtype)
        if self.pixel == "bce":
            return F.binary_cross_entropy_with_logits(x_hat, x)
        return (x - x_hat).abs().mean() if self.pixel == "l1" else (x - x_hat).square().mean()

    def _balance(
        self, x_hat: Tensor, grad_nll: Tensor, grad_gan: Tensor, last_layer: Tensor
    ) -> Tensor:
        """λ [] from the gradients at x_hat."""
        if not self.disc_adaptive:
            return grad_nll.new_tensor(self.disc_weight)
        # a gradient of 1 / numel would be subnormal in float16; |Σ g h| is about mean |h|, so a
        # thousand times that still fits
        scale = 1024.0 if x_hat.dtype == torch.float16 else 1.0
        at_layer = [
            torch.autograd.grad(x_hat, last_layer, (g * scale).to(x_hat.dtype), retain_graph=True)
            for g in (grad_nll, grad_gan)
        ]
        above, below = (_wide(g) / scale for (g,) in at_layer)
        return _gradient_ratio(above, below, self.disc_weight_max) * self.disc_weight

    def discriminate(self, x: Tensor, x_hat: Tensor, step: int) -> DiscriminatorLoss:
        """The discriminator's loss; x_hat is detached. Real and fake go through in separate passes.

        Args:
            x, x_hat: [B, C, H, W].
            step: updates done so far, from 0; before `disc_start` nothing is computed.
        """
        if self.discriminator is None or step < self.disc_start:
            zero = x.new_zeros((), dtype=torch.float32)
            parts = {"gan": zero, "logits_real": zero, "logits_fake": zero}
            return DiscriminatorLoss(zero, parts, active=False)
        with _no_float16(x.device):
            real = self.discriminator(_wide(x.detach()))
            fake = self.discriminator(_wide(x_hat.detach()))
        loss = self.disc_factor * self.d_loss(_wide(real), _wide(fake))
        parts = {"gan": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return DiscriminatorLoss(loss, {k: v.detach() for k, v in parts.items()}, active=True)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to x_hat is already known."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x_hat.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # multiplied before the cast: a loss scale has to lift small values first
        return (grad * gradient).to(ctx.dtype), None, None


def _frozen(net: nn.Module, x: Tensor) -> Tensor:
    """net(x), for gradients of x alone: those of its weights are not computed."""
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return torch.func.functional_call(net, weights, (x,))


def _perceptual(net: str, weights: str | Path | None, heads: str | Path | None) -> LPIPS:
    try:
        return LPIPS("auto" if weights is None else weights, net=net, heads=heads)
    except CheckpointError as e:
        raise CheckpointError(f"{e}. A perceptual_weight of 0 trains without it") from e


def _no_float16(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside float16 autocast the losses run in float32: gradients of 1 / numel would underflow."""
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
