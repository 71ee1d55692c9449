"""The codes that stage 2 trains on: given in files, or made once from a data set and kept.

With a centred crop the codes are a function of the data and the tokenizer alone (a mirrored copy is
a second encoding). They are stored in OUT/codes.safetensors, a file like those of `vqfast encode`,
under a key of both, so that a resume reads what the run began with.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqfast.config import ConfigError
from vqfast.data import ImageDataset, Source, order
from vqfast.data.codes import CodesDataset, claims, encoder_digest, open_codes, save_codes
from vqfast.data.order import augmentation
from vqfast.data.source import held_out
from vqfast.errors import DataError
from vqfast.models.vqgan import VQGAN
from vqfast.train.distributed import World
from vqfast.train.settings import DataSection

__all__ = [
    "CodeFeed",
    "Encoder",
    "are_codes",
    "check_labels",
    "encode_pictures",
    "given_codes",
    "tokenizer_digest",
]

_FILE = "codes.safetensors"
_PICTURES_ONLY = ("subset", "condition_path", "flip", "crop", "min_crop")


def tokenizer_digest(tokenizer: VQGAN) -> str:
    """sha256 of the configuration and every weight."""
    h = hashlib.sha256(json.dumps(tokenizer.config.to_dict(), sort_keys=True).encode())
    for name, x in sorted(tokenizer.state_dict().items()):
        h.update(name.encode())
        h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


# ---- codes from files


def are_codes(data: DataSection) -> bool:
    """Whether data.path names files of codes, by data.kind or else by what is there."""
    if data.kind is not None or not data.path:
        return data.kind == "codes"
    return claims(Path(os.path.expanduser(data.path))) > 0


def given_codes(data: DataSection, tokenizer: VQGAN) -> tuple[CodesDataset, CodesDataset | None]:
    """Training and validation codes; data.size becomes that of their pictures.

    Raises:
        ConfigError: a key that is about pictures is set, or data.size is not that of the codes.
        DataError: what cannot be read, was made by another tokenizer, or is not square.
    """
    if not data.path:
        raise ConfigError("data.path: not given; name a file or folder of codes (or --data)")
    defaults = {f.name: f.default for f in dataclasses.fields(DataSection)}
    for name in _PICTURES_ONLY:
        if getattr(data, name) != defaults[name]:
            raise ConfigError(
                f"data.{name}: must be {json.dumps(defaults[name])}, since {data.path} holds codes "
                f"and not pictures; got {json.dumps(getattr(data, name))}"
            )
    digest = encoder_digest(tokenizer)
    train, held = _open(data.path, tokenizer, digest), None
    side, factor = train.grid[0], tokenizer.config.factor
    if data.size not in (None, side * factor):
        raise ConfigError(
            f"data.size: the codes are of pictures of {side * factor} pixels, got {data.size}"
        )
    data.size = side * factor
    if data.val_path:
        held = _open(data.val_path, tokenizer, digest)
        if held.grid != train.grid:
            raise DataError(f"{held.root}: grids of {held.grid}, those to train on {train.grid}")
    elif data.val_fraction:
        out = held_out(train, data.val_fraction)
        train, held = train.select(np.flatnonzero(~out)), train.select(np.flatnonzero(out))
        if not len(train):
            raise DataError(
                f"{train.root}: val_fraction {data.val_fraction} leaves nothing to train on"
            )
    return train, held if held is not None and len(held) else None


def _open(path: str, tokenizer: VQGAN, digest: str) -> CodesDataset:
    found = open_codes(os.path.expanduser(path), tokenizer.n_codes)
    if found.about.get("encoder", digest) != digest:
        raise DataError(f"{found.root}: these codes were made by another tokenizer")
    h, w = found.grid
    if h != w:
        raise DataError(f"{found.root}: the grids must be square to train on, got {h}x{w}")
    return found


# ---- codes from pictures


class Encoder:
    """Pictures to codes with a frozen tokenizer, and the condition's pictures with another one."""

    def __init__(self, tokenizer: VQGAN, condition: VQGAN | None, world: World):
        self.tokenizer, self.condition, self._device = tokenizer, condition, world.device

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, h, w] int64 on the device."""
        return self.tokenizer.encode(images.to(self._device))

    @torch.no_grad()
    def condition_codes(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, Tc] int64 on the device."""
        assert self.condition is not None
        return self.condition.encode(images.to(self._device)).flatten(1)

    def digest(self) -> str:
        both = [m for m in (self.tokenizer, self.condition) if m is not None]
        return "+".join(tokenizer_digest(m) for m in both)


def encode_pictures(
    source: Source, data: DataSection, encoder: Encoder, out: Path | None
) -> CodesDataset:
    """The codes of every readable picture; with data.flip the mirrored picture is a second
    encoding.

    Read from `out / codes.safetensors` when that was made from the same data by the same tokenizer,
    else computed and stored there.

    Raises:
        DataError: more than max_bad_fraction of the pictures are bad, or the condition's do not
            match.
    """
    key = json.dumps(
        [source.manifest(), data.size, data.flip, data.condition_path, encoder.digest()]
    )
    key = hashlib.sha256(key.encode()).hexdigest()
    path = None if out is None else out / _FILE
    if path is not None and (stored := _stored(path, key)) is not None:
        return stored
    made = _encode(source, data, encoder)
    if path is not None:
        about: dict[str, str | int | Sequence[str]] = {"made_from": key, "skipped": made.skipped}
        about |= {
            "n_codes": encoder.tokenizer.n_codes,
            "encoder": encoder_digest(encoder.tokenizer),
        }
        if made.class_names is not None:
            about["class_names"] = made.class_names
        save_codes(path, made.codes, made.labels, made.condition, **about)
    return made


def _stored(path: Path, key: str) -> CodesDataset | None:
    """What is in the file, if it has this key and is whole."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_from") != key:
                return None
        found = open_codes(path)
    except (OSError, SafetensorError, DataError):
        return None
    return dataclasses.replace(found, skipped=int(found.about["skipped"]))


def _encode(source: Source, data: DataSection, encoder: Encoder) -> CodesDataset:
    assert data.size is not None
    dataset, partner = ImageDataset(source, data.size), _partner(source, data)
    codes: list[Tensor] = []  # [b, A, h, w]
    condition: list[Tensor] = []  # [b, A, Tc]
    labels, bad = [], 0
    limit = min(int(data.max_bad_fraction * len(dataset)), len(dataset) - 1)
    pending: list[tuple[Tensor, Tensor | None]] = []

    def both(images: Tensor) -> list[Tensor]:
        return [images, images.flip(-1)] if data.flip else [images]

    def flush() -> None:
        views = both(torch.stack([image for image, _ in pending]))
        codes.append(_compact([encoder.codes(view) for view in views]))
        if partner is not None:
            views = both(torch.stack([image for _, image in pending if image is not None]))
            condition.append(_compact([encoder.condition_codes(view) for view in views]))
        pending.clear()

    for index in range(len(dataset)):
        try:
            item = dataset[index]
            other = None if partner is None else partner[index]["image"]
        except DataError as error:
            bad += 1
            print(f"skipped {error}", file=sys.stderr, flush=True)
            if bad > limit:
                raise DataError(
                    f"{source.root}: {bad} of {len(dataset)} pictures are bad, "
                    f"max_bad_fraction is {data.max_bad_fraction:g}; the last one: {error}"
                ) from None
            continue
        pending.append((item["image"], other))
        labels.append(item["label"])
        if len(pending) == data.batch_size:
            flush()
    if pending:
        flush()
    return CodesDataset(
        source.root,
        torch.cat(codes),
        torch.tensor(labels, dtype=torch.int64),
        source.class_names,
        condition=torch.cat(condition) if condition else None,
        skipped=bad,
    )


def _partner(source: Source, data: DataSection) -> ImageDataset | None:
    """The condition's pictures, one for each of the source's, in the same order of names."""
    if data.condition_path is None:
        return None
    from vqfast.data import open_source

    other = open_source(data.condition_path, kind=data.kind, subset=data.subset)
    stems = [[s.name(i).rsplit(b".", 1)[0] for i in range(len(s))] for s in (source, other)]
    if stems[0] != stems[1]:
        raise DataError(
            f"{other.root}: the condition's pictures must have the names of those in "
            f"{source.root}, {len(stems[1])} against {len(stems[0])} of them"
        )
    assert data.size is not None
    return ImageDataset(other, data.size)


def _compact(encodings: list[Tensor]) -> Tensor:
    """A tensors [b, ...] as one [b, A, ...], int32 on the CPU: any codebook fits."""
    return torch.stack([x.to("cpu", torch.int32) for x in encodings], 1)


# ---- the batches of a run


class CodeFeed:
    """Batches of codes in the order in which `vqfast.data.Batches` would show pictures; of A
    encodings of a picture one is drawn each time.
    """

    def __init__(
        self,
        dataset: CodesDataset,
        manifest: str,
        data: DataSection,
        seed: int,
        world: World,
        accumulate: int,
    ):
        if not len(dataset):
            raise DataError(f"{dataset.root}: no picture is left to train on")
        self._dataset, self.manifest = dataset, manifest
        self._size, self._seed, self._world = data.batch_size, seed, world
        self._accumulate = accumulate

    def take(self, step: int) -> list[dict[str, Tensor]]:
        """Batches of `CodesDataset.rows`."""
        return [self._batch(step * self._accumulate + i) for i in range(self._accumulate)]

    def _batch(self, number: int) -> dict[str, Tensor]:
        n, variants = self._dataset.codes.shape[:2]
        first = (number * self._world.size + self._world.rank) * self._size
        ordinals = range(first, first + self._size)
        rows = torch.tensor([int(order(self._seed, g // n, n)[g % n]) for g in ordinals])
        if variants == 1:
            return self._dataset.rows(rows)
        # the mirrored picture for a draw below 1/2, as `ImageDataset` takes it
        draws = [augmentation(self._seed, g).random() for g in ordinals]
        return self._dataset.rows(
            rows, torch.tensor([variants - 1 - int(u * variants) for u in draws])
        )

    @property
    def skipped(self) -> int:
        return self._dataset.skipped

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, values: Mapping[str, Any]) -> None:
        """Nothing: the position is the step, and bad files are in no data set of codes."""

    def close(self) -> None:
        """Nothing is held open."""


def check_labels(parts: Iterable[Source | CodesDataset | None], n_classes: int) -> None:
    """ConfigError if a picture has no class, or one that the model does not have."""
    for data in parts:
        if data is None:
            continue
        labels = np.array([data.label(i) for i in range(len(data))])
        without = int((labels < 0).sum())
        if without:
            raise ConfigError(
                f"model.conditioning: class, but {without} pictures of {data.root} have no class"
            )
        if labels.max() >= n_classes:
            raise ConfigError(
                f"model.n_classes: {data.root} has class {labels.max()}, the model {n_classes}"
            )
