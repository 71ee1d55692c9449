"""Pre-tokenised images: a safetensors file of codes and labels, for stage-2 training without a
tokenizer in the loop.

The file holds `codes`, [N, h, w] or [N, A, h, w] with A encodings of each picture (crops,
mirrored), of any integer dtype, and optionally `labels` [N]. Its metadata may say which tokenizer
made it.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqfast import _check
from vqfast._files import atomic_file
from vqfast.data.order import augmentation, order
from vqfast.data.source import NO_LABEL
from vqfast.errors import DataError
from vqfast.images import printable

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def save_codes(
    path: str | os.PathLike,
    codes: Tensor,
    labels: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file that `CodesDataset` reads, whole or not at all; codes are stored in the smallest
    signed type.

    Args:
        codes: [N, h, w] or [N, A, h, w] integers >= 0.
        labels: [N] integers, -1 for none.
        metadata: strings to keep beside them.
    """
    _check.integer_tensor("codes", codes)
    _check.ndim("codes", codes, (3, 4))
    top = int(codes.max()) if codes.numel() else 0
    small = next(t for t in (torch.int16, torch.int32, torch.int64) if top <= torch.iinfo(t).max)
    tensors = {"codes": codes.detach().cpu().to(small).contiguous()}
    if labels is not None:
        _check.integer_tensor("labels", labels)
        _check.shape("labels", labels, [len(codes)], "for these codes")
        tensors["labels"] = labels.detach().cpu().to(torch.int32).contiguous()
    with atomic_file(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata or {}))


class CodesDataset:
    """The codes of a file in memory, in their stored dtype.

    Attributes:
        grid: (h, w). n_codes: the greatest code + 1. class_names: the numbers of the labels, or
            None.
        metadata: the file's strings.

    Raises:
        DataError: missing, damaged, empty, no integer `codes` of 3 or 4 dimensions, a negative
            code, or labels that do not fit.
    """

    def __init__(self, path: str | os.PathLike):
        self.root = printable(path)
        try:
            if not Path(path).is_file():
                raise DataError(f"{self.root}: no such file")
            with safe_open(path, framework="pt") as file:
                self.metadata = dict(file.metadata() or {})
                names = list(file.keys())
                codes = file.get_tensor("codes") if "codes" in names else None
                labels = file.get_tensor("labels") if "labels" in names else None
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{self.root}: {printable(str(error))}") from None
        if codes is None:
            raise DataError(f"{self.root}: no tensor `codes`, only {', '.join(names) or 'nothing'}")
        self._validate(codes, labels)
        self.codes = codes if codes.dim() == 4 else codes.unsqueeze(1)  # [N, A, h, w]
        self.labels = torch.full([len(codes)], NO_LABEL) if labels is None else labels.long()
        self.grid = tuple(codes.shape[-2:])
        self.n_codes = int(codes.max()) + 1
        classes = int(self.labels.max()) + 1
        self.class_names = [str(i) for i in range(classes)] if classes > 0 else None

    def _validate(self, codes: Tensor, labels: Tensor | None) -> None:
        if codes.dtype not in _INTEGERS or codes.dim() not in (3, 4) or not codes.numel():
            raise DataError(
                f"{self.root}: codes must be integers [N, h, w] or [N, A, h, w] and not empty, "
                f"got {str(codes.dtype).removeprefix('torch.')} {list(codes.shape)}"
            )
        if int(codes.min()) < 0:
            raise DataError(f"{self.root}: codes must be >= 0, got {int(codes.min())}")
        if labels is None:
            return
        if labels.dtype not in _INTEGERS or labels.shape != codes.shape[:1]:
            raise DataError(
                f"{self.root}: labels must be integers [{len(codes)}], "
                f"got {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict:
        """`dict(codes [h, w] int64, label, index)`: the first encoding of picture `index`."""
        index = range(len(self))[index]
        return {
            "codes": self.codes[index, 0].long(),
            "label": int(self.labels[index]),
            "index": index,
        }

    def manifest(self) -> str:
        """sha256 of codes and labels."""
        h = hashlib.sha256(repr((tuple(self.codes.shape), self.codes.dtype)).encode())
        h.update(self.codes.contiguous().numpy().tobytes())
        h.update(self.labels.numpy().tobytes())
        return h.hexdigest()


class CodeBatches:
    """Endless iterator over `dict(codes [B, h, w] int64, label [B], index [B])`, in the order of
    `Batches`.

    Batch b depends on (seed, b) alone; of A encodings of a picture one is drawn per sample. `step`,
    `epoch`, `skipped` (always 0) and `bad` (always empty) are as in `Batches`, so that a training
    loop takes either.
    """

    skipped = 0

    def __init__(
        self,
        dataset: CodesDataset,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ):
        _check.integer("batch_size", batch_size, low=1)
        _check.integer("start_step", start_step, low=0)
        _check.integer("world", world, low=1)
        _check.integer("rank", rank, low=0, high=world - 1)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.step = rank, world, start_step
        self.bad = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        n, variants = self.dataset.codes.shape[:2]
        first = (self.step * self.world + self.rank) * self.batch_size
        ordinals = range(first, first + self.batch_size)
        index = torch.tensor([int(order(self.seed, g // n, n)[g % n]) for g in ordinals])
        variant = torch.tensor([augmentation(self.seed, g).randrange(variants) for g in ordinals])
        self.step += 1
        return {
            "codes": self.dataset.codes[index, variant].long(),
            "label": self.dataset.labels[index],
            "index": index,
        }

    @property
    def epoch(self) -> float:
        """Passes over the data set that all ranks together have made."""
        return self.step * self.batch_size * self.world / len(self.dataset)

    def close(self) -> None:
        """Nothing to end here."""
