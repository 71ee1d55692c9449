"""Batches for training: an endless, resumable stream in which batch b depends on (seed, b) and the
bad files alone.

The epochs are laid end to end: sample g of the run is place g mod n of epoch g div n. Batch b of
rank r takes samples (b * world + r) * batch_size and following. So no sample is dropped at the end
of an epoch, a batch may be larger than the data set, and a resume starts at any batch without
reading what lies before it.
"""

import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqfast import _check
from vqfast.data.dataset import ImageDataset, to_float
from vqfast.errors import DataError


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Batches:
    """Endless iterator over `dict(image, label, index)`: image [B, 3, H, W] float32 in [-1, 1],
    label and index [B] int64, label -1 for none.

    A bad file is named once (`warn`), counted in `skipped`, and replaced (see `ImageDataset.draw`).
    Workers only find it: it is counted when the batch that met it is handed out, so the count after
    batch b does not depend on their number.

    Args:
        dataset: the pictures.
        batch_size: samples per batch and rank.
        seed: of order and augmentation.
        rank, world: this process and their number; each rank reads its own samples.
        start_step: number of batches that were handed out before: 0, or the step of a checkpoint.
        bad: the `bad` of that checkpoint: files that were counted and named already.
        max_bad_fraction: DataError once more than this fraction of the data set is bad, or all of
            it.
        num_workers: loader processes; 0 reads in this one.
        shuffle: False takes every epoch in the source's order.
        warn: called with one line for each bad file; by default prints it on stderr.

    A worker that is killed ends the run: DataError while its batch is fetched, else a RuntimeError
    of torch's, which raises in a signal handler.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        bad: Iterable[int] = (),
        max_bad_fraction: float = 0.01,
        num_workers: int = 0,
        shuffle: bool = True,
        warn: Callable[[str], None] = _to_stderr,
    ):
        _check.integer("batch_size", batch_size, low=1)
        _check.integer("num_workers", num_workers, low=0)
        _check.integer("start_step", start_step, low=0)
        _check.integer("world", world, low=1)
        _check.integer("rank", rank, low=0, high=world - 1)
        _check.number("max_bad_fraction", max_bad_fraction, low=0, high=1)
        self.dataset, self.batch_size, self.world = dataset, batch_size, world
        self.step = start_step
        self._bad = {int(i) for i in bad}
        self._warn = warn
        self._max_bad_fraction = max_bad_fraction
        # one good picture is the least that a run needs
        allowed = math.floor(max_bad_fraction * len(dataset) + 1e-9)
        self._max_bad = min(allowed, len(dataset) - 1)
        stream = _Stream(dataset, seed, shuffle, self._max_bad)
        loader = DataLoader(
            stream,
            batch_sampler=_Ordinals(batch_size, rank, world, start_step),
            num_workers=num_workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # or starting the workers would draw from the global one
        )
        self._iterator: Iterator[dict] | None = iter(loader)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if "Caught " in str(error):  # in a worker that lives, which sent it here
                raise
            # torch fetches a finished batch from the process that made it
            raise DataError(f"a DataLoader worker died: {type(error).__name__}") from None
        self._count(batch["bad"])
        self.step += 1
        return {
            "image": to_float(batch["pixels"]),
            "label": batch["label"],
            "index": batch["index"],
        }

    def _count(self, met: list[tuple[int, str]]) -> None:
        for index, reason in met:
            if index not in self._bad:
                self._bad.add(index)
                self._warn(f"skipped {reason}")
        if len(self._bad) > self._max_bad:
            n, limit = len(self.dataset), self._max_bad_fraction
            last = met[-1][1] if met else "none in this run"
            raise DataError(
                f"{self.dataset.source.root}: {len(self._bad)} of {n} pictures are bad, "
                f"max_bad_fraction is {limit:g}; the last one: {last}"
            )

    @property
    def skipped(self) -> int:
        """Bad files met so far by this rank, each counted once; those that `bad` brought along
        included.
        """
        return len(self._bad)

    @property
    def bad(self) -> Tensor:
        """Their indices, sorted, [skipped] int64: what a checkpoint has to keep beside `step`."""
        return torch.tensor(sorted(self._bad), dtype=torch.int64)

    @property
    def epoch(self) -> float:
        """Passes over the data set that all ranks together have made."""
        return self.step * self.batch_size * self.world / len(self.dataset)

    def close(self) -> None:
        """End the worker processes. The iterator is exhausted after that."""
        self._iterator = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Ordinals:
    """The sample numbers of each batch, from `start_step` on."""

    def __init__(self, batch_size: int, rank: int, world: int, start_step: int):
        self.batch_size, self.rank, self.world, self.start = batch_size, rank, world, start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1


class _Stream(Dataset):
    """The data set seen as its endless stream of samples."""

    def __init__(self, dataset: ImageDataset, seed: int, shuffle: bool, max_bad: int):
        self.dataset, self.seed, self.shuffle, self.max_bad = dataset, seed, shuffle, max_bad

    def __getitem__(self, ordinal: int) -> tuple:
        return self.dataset.draw(
            ordinal, seed=self.seed, shuffle=self.shuffle, max_bad=self.max_bad
        )


def _collate(samples: list[tuple]) -> dict:
    """Pixels [B, H, W, 3] uint8 (a quarter of the floats to send), labels, indices and the bad
    files met.
    """
    found = [pixels for pixels, _, _, _ in samples if pixels is not None]
    whole = len(found) == len(samples)
    return {
        "pixels": torch.from_numpy(np.stack(found)) if whole else None,
        "label": torch.tensor([label for _, label, _, _ in samples]),
        "index": torch.tensor([index for _, _, index, _ in samples]),
        "bad": [entry for _, _, _, bad in samples for entry in bad],
    }


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole group: the parent decides. SIGTERM from the parent has to end the
    worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
