"""`vqfast eval`: how near reconstructions or samples are to real pictures."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqfast import metrics
from vqfast.cli import _models
from vqfast.cli._parser import Report, UsageError
from vqfast.cli.reconstruct import mean, quality
from vqfast.data import open_source
from vqfast.errors import DataError
from vqfast.images import to_tensor
from vqfast.losses import LPIPS

Features = tuple[str, Callable[[Tensor], Tensor]]


def run(args: argparse.Namespace) -> Report:
    """--fake: a Frechet distance of two sets. Else --model: its reconstructions of --real, in
    pairs (PSNR, SSIM, LPIPS, code usage) and as sets."""
    device = _models.choose_device(args.device)
    perceptual, features = _networks(args, device)
    if args.fake is not None:
        return _two_sets(args, features, device)
    return _reconstructions(args, perceptual, features, device)


# ---- networks


def _networks(
    args: argparse.Namespace, device: torch.device
) -> tuple[LPIPS | None, list[Features]]:
    """The perceptual distance and the Frechet features that --weights gives."""
    perceptual, features = None, []
    for kind, path in args.weights:
        if kind == "inception":
            try:
                extract = metrics.inception_features(path)
            except ImportError as error:
                raise UsageError(str(error)) from None
            features.append(("inception", extract))
        elif perceptual is not None:
            raise UsageError("--weights: one of vgg, alex and squeeze is enough")
        else:
            perceptual = LPIPS(path, net=kind, heads=args.heads).to(device)
            features.append((kind, _pooled(perceptual)))
    if args.heads is not None and perceptual is None:
        raise UsageError("--heads belongs to --weights vgg=, alex= or squeeze=")
    return perceptual, features


def _pooled(network: LPIPS) -> Callable[[Tensor], Tensor]:
    """[B, C]: the last features of a perceptual network, averaged over the picture."""

    def features(x: Tensor) -> Tensor:
        *_, last = network.net(network.scaling_layer(x))
        return last.mean((2, 3))

    return features


# ---- the two kinds of evaluation


def _two_sets(args: argparse.Namespace, features: list[Features], device: torch.device) -> Report:
    if args.model is not None:
        raise UsageError("--fake and --model exclude each other")
    if not features:
        raise UsageError("--fake needs --weights: a Frechet distance needs a network's features")
    real, fake = _Pictures(args.real, args), _Pictures(args.fake, args)
    fake.size = real.size
    distances = [
        metrics.frechet(real.batches(device), fake.batches(device), extract, name)
        for name, extract in features
    ]
    values = _frechet_values(distances) | {"real": args.real, "fake": args.fake}
    values |= {"size": list(real.size), "skipped": real.skipped + fake.skipped}
    return Report(values, "\n".join(_frechet_lines(distances)))


def _reconstructions(
    args: argparse.Namespace,
    perceptual: LPIPS | None,
    features: list[Features],
    device: torch.device,
) -> Report:
    model = _models.tokenizer(args.model, device)
    side = model.config.resolution
    real = _Pictures(args.real, args, default=(side, side))
    if any(n % model.config.factor for n in real.size):
        raise UsageError(f"--size must be multiples of {model.config.factor}, got {real.size}")
    counts = torch.zeros(model.n_codes, dtype=torch.int64)
    rows: list[dict[str, Any]] = []
    sets = [(_Statistics(extract), _Statistics(extract)) for _, extract in features]
    for x in real.batches(device):
        with torch.inference_mode():
            codes = model.encode(x)
            x_hat = model.decode(codes).float().clamp(-1, 1)
        counts += torch.bincount(codes.flatten().cpu(), minlength=model.n_codes)
        for a, b in zip(x.split(1), x_hat.split(1), strict=True):
            rows.append(quality(a.cpu(), b.cpu()) | _perceptual(perceptual, a, b))
        for statistics_real, statistics_fake in sets:
            statistics_real.update(x)
            statistics_fake.update(x_hat)
    if not rows:
        raise DataError(f"{args.real}: no picture could be read")
    distances = [
        metrics.FrechetResult(
            "rfid" if name == "inception" else f"rfd_{name}",
            metrics.frechet_distance(a.value, b.value),
            len(a.value.mean),
            a.value.count,
            b.value.count,
        )
        for (name, _), (a, b) in zip(features, sets, strict=True)
        if len(rows) > 1
    ]
    values = {
        "real": args.real,
        "images": len(rows),
        "skipped": real.skipped,
        "size": list(real.size),
        **{key: mean(rows, key) for key in rows[0]},
        "usage": metrics.usage(counts),
        "perplexity": metrics.perplexity(counts),
        **_frechet_values(distances),
    }
    hidden = ("real", "size", "protocol")
    lines = [f"{k:<14}{v}" for k, v in values.items() if k not in hidden]
    return Report(values, "\n".join([*lines, *_frechet_lines(distances)]))


class _Statistics:
    """Feature statistics whose width is that of the first batch."""

    def __init__(self, extract: Callable[[Tensor], Tensor]):
        self._extract, self.value = extract, metrics.FeatureStatistics(1)

    def update(self, x: Tensor) -> None:
        with torch.no_grad():
            features = self._extract(x)
        if not self.value.count:
            self.value = metrics.FeatureStatistics(features.shape[1])
        self.value.update(features)


def _perceptual(network: LPIPS | None, a: Tensor, b: Tensor) -> dict[str, float]:
    if network is None:
        return {}
    with torch.inference_mode():
        return {network.name: float(network(a, b))}


def _frechet_values(distances: list[metrics.FrechetResult]) -> dict[str, Any]:
    values: dict[str, Any] = {d.name: d.value for d in distances}
    return values | {"protocol": [d.protocol for d in distances]}


def _frechet_lines(distances: list[metrics.FrechetResult]) -> list[str]:
    return [f"{d.value:.4f}  {d.protocol}" for d in distances]


class _Pictures:
    """The pictures of a source in one size, batch by batch; bad ones are named on stderr and
    counted."""

    def __init__(self, path: str, args: argparse.Namespace, default: tuple[int, int] | None = None):
        self._source = open_source(path)
        self._count = min(len(self._source), args.limit or len(self._source))
        self._batch_size = args.batch_size
        self.size = args.size or default or self._first_size()
        self.skipped = 0

    def _first_size(self) -> tuple[int, int]:
        first = self._source.read(0)
        return first.height, first.width

    def batches(self, device: torch.device) -> Iterator[Tensor]:
        """[B, 3, H, W] in [-1, 1]."""
        self.skipped, batch = 0, []
        for i in tqdm(range(self._count), unit="image", disable=None):
            try:
                batch.append(to_tensor(self._source.read(i), self.size))
            except DataError as error:
                self.skipped += 1
                print(f"vqfast: skipped: {error}", file=sys.stderr)
            if len(batch) == self._batch_size:
                yield torch.stack(batch).to(device)
                batch = []
        if batch:
            yield torch.stack(batch).to(device)
