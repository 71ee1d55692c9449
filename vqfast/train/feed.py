"""From a `data` section to the batches of a run and the images of its validation."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqfast.config import ConfigError
from vqfast.data import Batches, ImageDataset, Source, open_source, split
from vqfast.errors import DataError
from vqfast.train.distributed import World
from vqfast.train.settings import DataSection

__all__ = ["ImageFeed", "held_out_images", "open_sources"]


def open_sources(data: DataSection) -> tuple[Source, Source | None]:
    """Training and validation pictures. ConfigError without a path; DataError for what cannot be
    used.
    """
    if not data.path:
        raise ConfigError("data.path: not given; name a folder, a list file or a tar (or --data)")
    source = open_source(os.path.expanduser(data.path), kind=data.kind, subset=data.subset)
    if data.val_path:
        return source, open_source(
            os.path.expanduser(data.val_path), kind=data.kind, subset=data.subset
        )
    if data.val_fraction:
        train, held = split(source, data.val_fraction)
        if not len(train):
            raise DataError(
                f"{source.root}: val_fraction {data.val_fraction} leaves nothing to train on"
            )
        return train, held if len(held) else None
    return source, None


class ImageFeed:
    """The batches of a run: `accumulate` of them per step, a function of (seed, step, rank) and the
    files.

    Its state is the set of bad files met so far; the position is the step.
    """

    def __init__(
        self, source: Source, data: DataSection, size: int, seed: int, world: World, accumulate: int
    ):
        self.manifest = source.manifest()
        self.dataset = ImageDataset(
            source, size, crop=data.crop, min_crop=data.min_crop, flip=data.flip, cache=data.cache
        )
        self._data, self._seed, self._world, self._accumulate = data, seed, world, accumulate
        self._bad: list[int] = []
        self._batches: Batches | None = None

    def take(self, step: int) -> list[dict[str, Tensor]]:
        """The batches of `step`. DataError when too many files are bad, or a loader process
        died.
        """
        first = step * self._accumulate
        if self._batches is None or self._batches.step != first:
            self.close()
            self._batches = Batches(
                self.dataset,
                self._data.batch_size,
                seed=self._seed,
                rank=self._world.rank,
                world=self._world.size,
                start_step=first,
                bad=self._bad,
                max_bad_fraction=self._data.max_bad_fraction,
                num_workers=self._data.num_workers,
            )
        try:
            return [next(self._batches) for _ in range(self._accumulate)]
        except RuntimeError as error:
            if isinstance(error, DataError) or "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a data worker died: {str(error).splitlines()[0]}") from None

    @property
    def skipped(self) -> int:
        return self._batches.skipped if self._batches is not None else len(self._bad)

    def state(self) -> dict[str, Any]:
        """{"bad": indices}, the same whether or not this process met the files itself."""
        return {
            "bad": self._batches.bad.tolist() if self._batches is not None else sorted(self._bad)
        }

    def load_state(self, values: Mapping[str, Any]) -> None:
        self.close()
        self._bad = list(values["bad"])

    def close(self) -> None:
        if self._batches is not None:
            self._bad = self._batches.bad.tolist()
            self._batches.close()
            self._batches = None


def held_out_images(
    source: Source | None, size: int, count: int, *, warn: bool = True
) -> Tensor | None:
    """The first `count` readable pictures, [n, 3, size, size]; None if there are none.

    `warn` names the bad ones; those of the training set are named by its feed.
    """
    if source is None:
        return None
    dataset = ImageDataset(source, size)
    found: list[Tensor] = []
    for index in range(len(dataset)):
        if len(found) == count:
            break
        try:
            found.append(dataset[index]["image"])
        except DataError as error:
            if warn:
                print(f"skipped {error}", file=sys.stderr)
    return torch.stack(found) if found else None
