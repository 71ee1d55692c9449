"""PatchGAN discriminator: one logit per patch, not per image.

Parameter names are taming's (`main.0`, `main.2`, ...), so `loss.discriminator.*` of its checkpoints
loads after that prefix is removed.

Source: arXiv:1611.07004 section 3.2.2; CompVis/taming-transformers
taming/modules/discriminator/model.py, taming/modules/util.py (ActNorm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from vqfast import _check
from vqfast.nn.trained_conv import Conv2d


class ActNorm(nn.Module):
    """scale · (x + loc) per channel; the first training batch comes out with mean 0, deviation 1.

    With several processes all take the values of the first one.

    State: loc and scale [1, C, 1, 1], and the uint8 buffer `initialized`, taming's.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # once true it stays true: asking the buffer each step would synchronise a GPU
        self._known_initialized = False

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x.float(), dim=(0, 2, 3), keepdim=True)  # [1, C, 1, 1]
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))
        self.initialized.fill_(1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for value in (self.loc, self.scale):
                torch.distributed.broadcast(value, src=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._known_initialized:
            if not self.initialized.item():
                self._initialize(x)
            self._known_initialized = True
        return self.scale * (x + self.loc)

    def _load_from_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        self._known_initialized = False
        super()._load_from_state_dict(state_dict, *args, **kwargs)


class NLayerDiscriminator(nn.Module):
    """Images [B, input_nc, H, W] -> logits [B, 1, about H / 2^n_layers, about W / 2^n_layers].

    Convolution weights start as N(0, 0.02), BatchNorm weights as N(1, 0.02), as in taming. Real and
    fake images go through in separate calls: BatchNorm would mix their statistics.

    Args:
        input_nc: channels of the images.
        ndf: width of the first layer; it doubles per layer up to eight times.
        n_layers: layers of stride 2. 3 gives the 70 x 70 PatchGAN.
        use_actnorm: ActNorm (and convolutions with bias) in place of BatchNorm.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("input_nc", input_nc), ("ndf", ndf), ("n_layers", n_layers)):
            _check.integer(name, value, low=1)
        self.input_nc, self.n_layers = input_nc, n_layers
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        layers: list[nn.Module] = [Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = ndf
        for n in range(1, n_layers + 1):
            width = ndf * min(2**n, 8)
            # the last of these keeps the resolution
            stride = 2 if n < n_layers else 1
            layers += [
                # BatchNorm has a bias of its own
                Conv2d(before, width, 4, stride, 1, bias=use_actnorm),
                norm(width),
                nn.LeakyReLU(0.2),
            ]
            before = width
        layers.append(Conv2d(before, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        _check.floating("x", x)
        _check.ndim("x", x, 4)
        least = smallest_side(self.n_layers)
        if x.shape[1] != self.input_nc or min(x.shape[2:]) < least:
            raise ValueError(
                f"x must be [B, {self.input_nc}, H, W] with sides of at least {least} for "
                f"{self.n_layers} layers, got {list(x.shape)}"
            )
        return self.main(x)


def smallest_side(n_layers: int) -> int:
    """The least image side for which a discriminator of n_layers has a logit."""
    return 3 * 2**n_layers


def fitting_layers(side: int, most: int = 3) -> int:
    """The largest n_layers up to `most` that images of this side allow.

    Raises:
        ValueError: not even one layer fits.
    """
    fitting = [n for n in range(1, most + 1) if smallest_side(n) <= side]
    if not fitting:
        raise ValueError(
            f"images must have sides of at least {smallest_side(1)} for a discriminator, got {side}"
        )
    return fitting[-1]


def _initialize(m: nn.Module) -> None:
    if isinstance(m, nn.Conv2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)
