"""Stage 2 without pictures in the loop: the codes of a data set are computed once and kept.

With a centred crop the codes are a function of the data and the tokenizer alone (a mirrored copy
has its own table). They are stored in OUT/codes.safetensors under a key of both, so that a resume
reads what the run began with.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqfast._files import atomic_file
from vqfast.config import ConfigError
from vqfast.data import ImageDataset, Source, order
from vqfast.data.order import augmentation
from vqfast.errors import DataError
from vqfast.models.vqgan import VQGAN
from vqfast.train.distributed import World
from vqfast.train.settings import DataSection

__all__ = ["CodeFeed", "Encoder", "code_table", "tokenizer_digest"]

_FILE = "codes.safetensors"


def tokenizer_digest(tokenizer: VQGAN) -> str:
    """sha256 of the configuration and every weight."""
    h = hashlib.sha256(json.dumps(tokenizer.config.to_dict(), sort_keys=True).encode())
    for name, x in sorted(tokenizer.state_dict().items()):
        h.update(name.encode())
        h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


class Encoder:
    """Pictures to codes with a frozen tokenizer, and the condition's pictures with another one."""

    def __init__(self, tokenizer: VQGAN, condition: VQGAN | None, world: World):
        self.tokenizer, self.condition, self._device = tokenizer, condition, world.device

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T] int64 on the device."""
        return self.tokenizer.encode(images.to(self._device)).flatten(1)

    @torch.no_grad()
    def condition_codes(self, images: Tensor) -> Tensor:
        assert self.condition is not None
        return self.condition.encode(images.to(self._device)).flatten(1)

    def digest(self) -> str:
        both = [m for m in (self.tokenizer, self.condition) if m is not None]
        return "+".join(tokenizer_digest(m) for m in both)


def code_table(
    source: Source, data: DataSection, encoder: Encoder, out: Path | None, *, name: str = _FILE
) -> dict[str, Tensor]:
    """The codes of every readable picture: `codes` [n, T], `label` [n], `index` [n], `bad` [k];
    with data.flip also `flipped`; with a condition `condition` (and `condition_flipped`).

    Read from `out / name` when that was made from the same data by the same tokenizer, else
    computed and stored there.

    Raises:
        DataError: more than max_bad_fraction of the pictures are bad, or the condition's do not
            match.
    """
    key = json.dumps(
        [source.manifest(), data.size, data.flip, data.condition_path, encoder.digest()]
    )
    key = hashlib.sha256(key.encode()).hexdigest()
    path = None if out is None else out / name
    if path is not None and (stored := _stored(path, key)) is not None:
        return stored
    table = _encode(source, data, encoder)
    if path is not None:
        with atomic_file(path) as temporary:
            save_file(table, temporary, metadata={"vqfast_codes": key})
    return table


def _stored(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("vqfast_codes") != key:
                return None
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, FileNotFoundError):
        return None


def _encode(source: Source, data: DataSection, encoder: Encoder) -> dict[str, Tensor]:
    assert data.size is not None
    dataset, partner = ImageDataset(source, data.size), _partner(source, data)
    parts: dict[str, list[Tensor]] = {}
    labels, indices, bad = [], [], []
    limit = min(int(data.max_bad_fraction * len(dataset)), len(dataset) - 1)
    pending: list[tuple[Tensor, Tensor | None]] = []

    def flush() -> None:
        images = torch.stack([image for image, _ in pending])
        views = {"": images, "_flipped": images.flip(-1)} if data.flip else {"": images}
        for suffix, view in views.items():
            parts.setdefault(f"codes{suffix}", []).append(_compact(encoder.codes(view)))
        if partner is not None:
            other = torch.stack([image for _, image in pending if image is not None])
            for suffix in views:
                view = other.flip(-1) if suffix else other
                parts.setdefault(f"condition{suffix}", []).append(
                    _compact(encoder.condition_codes(view))
                )
        pending.clear()

    for index in range(len(dataset)):
        try:
            item = dataset[index]
            other = None if partner is None else partner[index]["image"]
        except DataError as error:
            bad.append(index)
            print(f"skipped {error}", file=sys.stderr, flush=True)
            if len(bad) > limit:
                raise DataError(
                    f"{source.root}: {len(bad)} of {len(dataset)} pictures are bad, "
                    f"max_bad_fraction is {data.max_bad_fraction:g}; the last one: {error}"
                ) from None
            continue
        pending.append((item["image"], other))
        labels.append(item["label"])
        indices.append(index)
        if len(pending) == data.batch_size:
            flush()
    if pending:
        flush()
    table = {name: torch.cat(rows) for name, rows in parts.items()}
    return table | {
        "label": torch.tensor(labels, dtype=torch.int64),
        "index": torch.tensor(indices, dtype=torch.int64),
        "bad": torch.tensor(bad, dtype=torch.int64),
    }


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


def _compact(codes: Tensor) -> Tensor:
    """int32 on the CPU: half the memory of int64, and any codebook fits."""
    return codes.to("cpu", torch.int32)


class CodeFeed:
    """Batches of codes in the order in which `vqfast.data.Batches` would show the pictures that
    are not bad.
    """

    def __init__(
        self,
        table: Mapping[str, Tensor],
        manifest: str,
        data: DataSection,
        seed: int,
        world: World,
        accumulate: int,
    ):
        if not len(table["index"]):
            raise DataError("no picture is left to train on")
        self._table, self.manifest = table, manifest
        self._size, self._seed, self._world = data.batch_size, seed, world
        self._accumulate = accumulate

    def take(self, step: int) -> list[dict[str, Tensor]]:
        return [self._batch(step * self._accumulate + i) for i in range(self._accumulate)]

    def _batch(self, number: int) -> dict[str, Tensor]:
        table, n = self._table, len(self._table["index"])
        first = (number * self._world.size + self._world.rank) * self._size
        ordinals = range(first, first + self._size)
        rows = torch.tensor([int(order(self._seed, *divmod(g, n)[:1], n)[g % n]) for g in ordinals])
        batch = {"codes": table["codes"][rows].long(), "label": table["label"][rows]}
        if "condition" in table:
            batch["condition"] = table["condition"][rows].long()
        if "codes_flipped" in table:
            turned = torch.tensor([augmentation(self._seed, g).random() < 0.5 for g in ordinals])
            for name in ("codes", "condition") if "condition" in table else ("codes",):
                other = table[f"{name}_flipped"][rows].long()
                batch[name] = torch.where(turned[:, None], other, batch[name])
        return batch

    @property
    def skipped(self) -> int:
        return len(self._table["bad"])

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, values: Mapping[str, Any]) -> None:
        """Nothing: the position is the step and the bad files are in the table."""

    def close(self) -> None:
        """Nothing is held open."""


def check_labels(labels: Iterable[int], root: str) -> None:
    """ConfigError if a picture has no class."""
    without = sum(label < 0 for label in labels)
    if without:
        raise ConfigError(
            f"model.conditioning: class, but {without} pictures of {root} are in no class folder"
        )
