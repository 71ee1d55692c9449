"""Perceptual distance: LPIPS, or the same distance without learned heads on a small trunk.

With f_k the features of layer k, each position scaled to unit length over channels:

    d(x, y) = Σ_k mean_hw Σ_c w_kc (f_k(x) − f_k(y))²_c        (w = 1 without heads)

Weights come from two local files, which users confuse: the *trunk* (VGG16, AlexNet or SqueezeNet
1.1 as torchvision stores it, 5 to 528 MB) and the *heads* w (a few KB). Nothing is downloaded.

The whole network stays in eval mode and without gradients of its own, also inside a model that
is being trained: the dropout in front of the heads, on in taming's training, only adds noise.

Source: arXiv:1801.03924; richzhang/PerceptualSimilarity lpips/lpips.py; CompVis/taming-transformers
taming/modules/losses/lpips.py (names of the state dict).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqfast import _check
from vqfast.checkpoints import _unpickle
from vqfast.errors import CheckpointError

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def _vgg16() -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    return layers


def _alexnet() -> list[nn.Module]:
    convs = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1),
    ]
    layers: list[nn.Module] = []
    for i, conv in enumerate(convs):
        if i in (1, 2):
            layers.append(nn.MaxPool2d(3, 2))
        layers += [conv, nn.ReLU(inplace=True)]
    return layers


class _Fire(nn.Module):
    """SqueezeNet's block: 1x1 to `squeeze` channels, then 1x1 and 3x3 side by side."""

    def __init__(self, before: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(h), self.expand3x3(h)], dim=1).relu_()


def _squeezenet() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return [
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(inplace=True),
        *(pool(), _Fire(64, 16, 64), _Fire(128, 16, 64)),
        *(pool(), _Fire(128, 32, 128), _Fire(256, 32, 128)),
        *(pool(), _Fire(256, 48, 192), _Fire(384, 48, 192)),
        *(_Fire(384, 64, 256), _Fire(512, 64, 256)),
    ]


class _Trunk(NamedTuple):
    layers: Callable[[], list[nn.Module]]
    ends: tuple[int, ...]  # slice k holds the layers before ends[k]; its output is tapped
    widths: tuple[int, ...]  # channels of the taps
    smallest: int  # least image side
    file: str  # usual name in torch's hub cache


_TRUNKS = {
    "vgg": _Trunk(_vgg16, (4, 9, 16, 23, 30), (64, 128, 256, 512, 512), 16, "vgg16-397923af.pth"),
    "alex": _Trunk(
        _alexnet, (2, 5, 8, 10, 12), (64, 192, 384, 256, 256), 31, "alexnet-owt-7be5be79.pth"
    ),
    "squeeze": _Trunk(
        _squeezenet,
        (2, 5, 8, 10, 11, 12, 13),
        (64, 128, 256, 384, 384, 512, 512),
        17,
        "squeezenet1_1-b8a52dc0.pth",
    ),
}
NETS = tuple(_TRUNKS)


class _Scaling(nn.Module):
    """Images in [-1, 1] to the normalisation of the trunks; one channel becomes three."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(_SHIFT, device="cpu").reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE, device="cpu").reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Head(nn.Module):
    """1x1 convolution to one channel; checkpoints call it `model.1`, because 0 was a dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Features(nn.Module):
    """x -> the taps, one per slice."""

    def __init__(self, trunk: _Trunk) -> None:
        super().__init__()
        layers, start = trunk.layers(), 0
        for k, end in enumerate(trunk.ends):
            part = nn.Sequential()
            for i in range(start, end):
                # layers keep their torchvision number: slice3.10 is features.10
                part.add_module(str(i), layers[i])
            self.add_module(f"slice{k + 1}", part)
            start = end

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for part in self.children():
            x = part(x)
            yield x


class LPIPS(nn.Module):
    """Perceptual distance of x and y [B, 3 or 1, H, W] in [-1, 1] -> [B, 1, 1, 1].

    Args:
        weights: file of the trunk (.pth or .safetensors, torchvision's names); "auto": the file
            under its usual name in torch's hub cache; None or "random": random, the same in every
            process, for tests and for a state dict that is loaded later.
        net: "vgg", "alex" or "squeeze".
        heads: file of the heads; "auto": in torch's hub cache or in an installed lpips package;
            "none": no heads, layers are summed equally; "random". None: "random" with a random
            trunk, else "none".

    Raises:
        TypeError, ValueError: unknown net, or images of wrong type or shape.
        CheckpointError: a file is missing, is the other file of the two, or does not fit.

    Numerics: unit lengths are taken in float32 and the gradient is finite also where all features
        are zero (a plain square root has an infinite slope there).
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        net: str = "vgg",
        heads: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check.choice("net", net, NETS)
        self.trunk = net
        random = weights in (None, "random")
        if heads is None:
            heads = "random" if random else "none"
        # is the number LPIPS as published? Only with a trained trunk and its heads
        self.is_lpips = not random and heads not in ("none", "random")
        spec = _TRUNKS[net]
        self.scaling_layer = _Scaling()
        # meta: nothing is drawn from the global random state
        with torch.device("meta"):
            self.net = _Features(spec)
            for k, width in enumerate(spec.widths if heads != "none" else ()):
                self.add_module(f"lin{k}", _Head(width))
        self._fill_random()
        if not random:
            self._load(_find_trunk(weights, net), "trunk")
        if heads not in ("none", "random"):
            self._load(_find_heads(heads, net), "heads")
        self.requires_grad_(False)
        self.train(False)

    def _fill_random(self) -> None:
        """Give the parameters memory and seeded random values."""
        g = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to_empty(device="cpu")
                fan_in = module.weight[0].numel()
                with torch.no_grad():
                    module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=g)
                    if module.bias is None:  # a head: weights are not negative
                        module.weight.abs_()
                    else:
                        module.bias.zero_()

    def train(self, mode: bool = True) -> LPIPS:
        """Always eval mode, whatever the parent module is put into."""
        return super().train(False)

    @property
    def has_heads(self) -> bool:
        return hasattr(self, "lin0")

    @property
    def name(self) -> str:
        """What to call the number: "lpips_vgg", or e.g. "squeeze_dist" when it is not LPIPS."""
        return f"lpips_{self.trunk}" if self.is_lpips else f"{self.trunk}_dist"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _check.floating("x", x)
        _check.floating("y", y)
        _check.ndim("x", x, 4)
        least = _TRUNKS[self.trunk].smallest
        if x.shape[1] not in (1, 3) or min(x.shape[2:]) < least:
            raise ValueError(
                f"x must be [B, 3 or 1, H, W] with sides of at least {least} for {self.trunk}, "
                f"got {list(x.shape)}"
            )
        if x.shape != y.shape:
            raise ValueError(f"y must have the shape of x {list(x.shape)}, got {list(y.shape)}")
        total = torch.zeros((), device=x.device)
        taps = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)), strict=True)
        for k, (a, b) in enumerate(taps):
            diff = (_unit(a) - _unit(b)).square()  # [B, C, h, w] float32
            if self.has_heads:
                weight = getattr(self, f"lin{k}").model[1].weight  # [1, C, 1, 1]
                diff = diff * weight.to(diff.dtype)
            total = total + diff.sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total

    def _load(self, path: Path, part: str) -> None:
        """Strictly: every weight of the part is there and fits; the file is not the other one."""
        tensors = _read(path)
        is_heads = any(k.startswith("lin") for k in tensors)
        is_trunk = any(k.startswith(("features.", "net.slice")) for k in tensors)
        if part == "trunk" and is_heads and not is_trunk:
            raise CheckpointError(
                f"{path}: these are the heads; the trunk is missing: {_where_trunk(self.trunk)}"
            )
        if part == "heads" and is_trunk and not is_heads:
            raise CheckpointError(
                f"{path}: this is the trunk; the heads are missing: {_where_heads(self.trunk)}"
            )
        own = {
            k: v
            for k, v in self.state_dict().items()
            if k.startswith("net." if part == "trunk" else "lin")
        }
        bad = []
        for key, value in own.items():
            found = tensors.get(key)
            if found is None and part == "trunk":
                # net.slice3.10.weight is features.10.weight
                found = tensors.get("features." + key.split(".", 2)[-1])
            if found is None:
                bad.append(f"{key} is missing")
            elif found.shape != value.shape:
                bad.append(f"{key} must be {list(value.shape)}, got {list(found.shape)}")
            elif not found.isfinite().all():
                bad.append(f"{key} is not finite")
            else:
                value.copy_(found)
        if bad:
            raise CheckpointError(f"{path} is not the {part} of {self.trunk}: {'; '.join(bad)}")


def _unit(f: Tensor) -> Tensor:
    """f [B, C, h, w] / (|f| + 1e-10) over channels, in float32 or wider."""
    f = f if f.dtype == torch.float64 else f.float()
    # below 1e-12 the length is a constant: its slope would be infinite at zero
    length = f.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()
    return f / (length + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle.load(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path}: {e}") from e
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} must hold a state dict of tensors")
    return state


def _hub_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _where_trunk(net: str) -> str:
    return (
        f"torchvision's {_TRUNKS[net].file}; put it into {_hub_cache()}, or give its path as the "
        "perceptual weights"
    )


def _where_heads(net: str) -> str:
    return (
        f"{net}.pth of a few KB, as the lpips package ships it under weights/v0.1; install lpips, "
        f"put the file into {_hub_cache()}, give its path as the perceptual heads, or ask for none"
    )


def _find_trunk(weights: str | Path | None, net: str) -> Path:
    path = _hub_cache() / _TRUNKS[net].file if weights == "auto" else Path(str(weights))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. The trunk is {_where_trunk(net)}")
    return path


def _find_heads(heads: str | Path, net: str) -> Path:
    places = [Path(heads)]
    if heads == "auto":
        places = [_hub_cache() / f"{net}.pth"]
        # located, not imported: the package would bring torchvision
        package = importlib.util.find_spec("lpips")
        for folder in (package and package.submodule_search_locations) or ():
            places.append(Path(folder) / "weights" / "v0.1" / f"{net}.pth")
    for path in places:
        if path.is_file():
            return path
    tried = ", ".join(map(str, places))
    raise CheckpointError(f"{tried}: no such file. The heads are {_where_heads(net)}")
