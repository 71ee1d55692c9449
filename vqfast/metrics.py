"""How good reconstructions, codes and samples are. Each measure states its protocol.

Images are [B, 3, H, W] in [-1, 1] throughout. A Frechet distance is called FID only if Inception's
own weights made the features; with any other extractor it is named after that. Nothing is
downloaded.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import _check

if TYPE_CHECKING:  # most metrics need no network
    from vqfast.models.lpips import LPIPS

__all__ = [
    "FeatureStatistics",
    "FrechetResult",
    "frechet",
    "frechet_distance",
    "inception_features",
    "perplexity",
    "psnr",
    "ssim",
    "trunk_features",
    "usage",
]

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # Wang et al. 2004: 11x11 Gaussian window
_SSIM_K1, _SSIM_K2 = 0.01, 0.03


def _pair(a: Tensor, b: Tensor, data_range: float) -> None:
    _check.floating("a", a)
    _check.floating("b", b)
    _check.ndim("a", a, 4)
    _check.shape("b", b, a.shape, "like a")
    _check.same_device("b", b, "a", a)
    _check.number("data_range", data_range, low=0, low_open=True)


def psnr(a: Tensor, b: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB, over all its channels.

    psnr = 10 log10(range² / mean((a − b)²))

    Args:
        a, b: [B, C, H, W] of one shape and device.
        data_range: distance from black to white: 2 for [-1, 1], 255 for levels.

    Returns:
        [B] float64; infinite where the images are equal.
    """
    _pair(a, b, data_range)
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def _blur(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H - 10, W - 10]: Gaussian means of the windows that lie inside."""
    at = torch.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (at / _SSIM_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    flat = x.flatten(0, 1).unsqueeze(1)  # [B * C, 1, H, W]
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return flat.view(*x.shape[:2], *flat.shape[-2:])


def ssim(a: Tensor, b: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each image: [B] float64 in [-1, 1], 1 for equal ones.

    The protocol of Wang et al. 2004: Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03,
    population covariance, windows inside the image only, mean over pixels and channels.
    scikit-image gives the same with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`.

    Args:
        a, b: [B, C, H, W] of one shape and device, H and W >= 11.
        data_range: as in `psnr`.

    Raises:
        ValueError: an image is smaller than the window.
    """
    _pair(a, b, data_range)
    if min(a.shape[-2:]) < 2 * _SSIM_RADIUS + 1:
        raise ValueError(f"a must be at least 11 x 11 for SSIM, got {list(a.shape)}")
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (_SSIM_K1 * data_range) ** 2, (_SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1)


# ---- codebook


def _counts(counts: Tensor) -> Tensor:
    _check.is_tensor("counts", counts)
    _check.ndim("counts", counts, 1)
    if not counts.numel():
        raise ValueError("counts must hold one number per code, got an empty tensor")
    return counts.double()


def usage(counts: Tensor) -> float:
    """Fraction of the codes that were used at least once, out of `counts` [K] over the whole
    set.
    """
    return float((_counts(counts) > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the code frequencies: K if all are used alike, 1 if one is.

    No use at all gives 0.
    """
    n = _counts(counts)
    if n.sum() == 0:
        return 0.0
    return float(torch.special.entr(n / n.sum()).sum().exp())


# ---- Frechet distances


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches, in float64.

    Batches are merged by their own means (Chan et al. 1979), so a large common offset costs no
    digits.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(_check.integer("dim", dim, low=1), dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take in [n, dim] features of any floating dtype and device."""
        _check.floating("features", features)
        _check.shape("features", features, [len(features), len(self.mean)], "of these statistics")
        if not len(features):
            return
        x = features.detach().double().cpu()
        n, mean = len(x), x.mean(0)
        centred, shift = x - mean, mean - self.mean
        total = self.count + n
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[dim, dim], divided by count - 1, as every published FID does."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½), the squared 2-Wasserstein distance of two
    Gaussians.

    The trace of the root is taken from the eigenvalues of S_a^½ S_b S_a^½, which is symmetric: no
    complex parts arise when there are fewer features than dimensions.

    Source: arXiv:1706.08500 eq. 6.
    """
    _check.shape("b.mean", b.mean, a.mean.shape, "like a.mean")
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * inner
    return max(0.0, float(distance))


@dataclass(frozen=True)
class FrechetResult:
    """A distance with what it takes to compare it: name, features and how many images of each
    kind.
    """

    name: str
    value: float
    dim: int
    n_real: int
    n_fake: int

    @property
    def protocol(self) -> str:
        """One line for a report."""
        few = min(self.n_real, self.n_fake) <= self.dim
        note = "; fewer images than dimensions, biased upwards" if few else ""
        return (
            f"{self.name}: {self.n_real} real and {self.n_fake} fake images, {self.dim} features, "
            f"sample covariance, no resizing by the metric{note}"
        )


def frechet(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    features: Callable[[Tensor], Tensor],
    name: str,
) -> FrechetResult:
    """Frechet distance of two sets of images under an extractor.

    Args:
        real, fake: batches [B, 3, H, W] in [-1, 1].
        features: maps a batch to [B, dim].
        name: of the extractor; the result is called `fd_<name>`, and `fid` for "inception" alone.

    Raises:
        ValueError: fewer than 2 images on a side.
    """
    sides = []
    for batches in (real, fake):
        statistics: FeatureStatistics | None = None
        for batch in batches:
            with torch.no_grad():
                vectors = features(batch)
            if statistics is None:
                _check.ndim("features(batch)", vectors, 2)
                statistics = FeatureStatistics(vectors.shape[1])
            statistics.update(vectors)
        if statistics is None:
            raise ValueError("a Frechet distance needs at least 2 images on each side, got 0")
        sides.append(statistics)
    a, b = sides
    title = "fid" if name == "inception" else f"fd_{name}"
    return FrechetResult(title, frechet_distance(a, b), len(a.mean), a.count, b.count)


def trunk_features(network: "LPIPS") -> Callable[[Tensor], Tensor]:
    """The last tap of the trunk of a `vqfast.losses.LPIPS`, its mean over space: [B, channels].

    Call the distance after the trunk, e.g. `frechet(real, fake, trunk_features(net), net.trunk)`.
    """

    def features(images: Tensor) -> Tensor:
        *_, last = network.net(network.scaling_layer(images))
        return last.mean((2, 3))

    return features


def inception_features(weights: str | os.PathLike) -> Callable[[Tensor], Tensor]:
    """The 2048 features of FID's Inception, from a local copy of
    `pt_inception-2015-12-05-6726825d.pth`.

    Needs the extra `eval` (torch-fidelity). Images are truncated to 8 bits and resized as that
    network does itself.

    Raises:
        FileNotFoundError: no such file. ImportError: the extra is missing.
    """
    if not os.path.isfile(weights):
        raise FileNotFoundError(f"{weights}: no Inception weights there")
    try:
        # optional: only an FID needs it
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ImportError('FID needs torch-fidelity: pip install "vqfast[eval]"') from None
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=os.fspath(weights)
    ).eval()

    def features(images: Tensor) -> Tensor:
        levels = ((images.clamp(-1, 1) + 1) * 127.5 + 1e-3).to(torch.uint8)
        return network.to(images.device)(levels)[0]

    return features
