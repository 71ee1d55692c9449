"""Files of codes: what `vqfast encode` writes, `vqfast decode` reads, and stage 2 trains from
without a tokenizer in the loop.

A file is safetensors. It holds

    codes      [N, h, w] integers >= 0, or [N, A, h, w] with A encodings of each picture (as it is,
               mirrored); where the pictures differ in size, one [h, w] each under 000000, 000001, …
    labels     [N] integers, -1 for none; optional
    condition  [N, A, Tc] codes of the condition's picture; optional, in the cache of a run only

and, as metadata, any of: `n_codes` and `encoder` (`encoder_digest`) of the tokenizer that made it,
`names` and `class_names` (JSON lists). A folder of such files is one data set.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vqfast import _check
from vqfast._files import atomic_file
from vqfast.data.source import NO_LABEL, Names, Source, labels_by_folder, looks_like_picture
from vqfast.errors import DataError
from vqfast.images import printable

__all__ = ["CodeFile", "CodesDataset", "encoder_digest", "open_codes", "read_codes", "save_codes"]

_SUFFIX = ".safetensors"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_BESIDE = ("labels", "condition")


def encoder_digest(tokenizer: nn.Module) -> str:
    """sha256 of the weights that decide the codes: all but those of the decoder."""
    h = hashlib.sha256()
    for name, x in sorted(tokenizer.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            h.update(name.encode())
            h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


# ---- one file


def save_codes(
    path: str | os.PathLike,
    codes: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    condition: Tensor | None = None,
    **about: str | int | Sequence[str],
) -> None:
    """Write a file of codes, whole or not at all, in the smallest signed type that holds them.

    Args:
        codes: [N, h, w] or [N, A, h, w] integers >= 0, or a list of N grids [h, w].
        labels: [N] integers, -1 for none.
        condition: [N, A, Tc] integers >= 0.
        about: what the metadata say; a list is kept as JSON.
    """
    path = Path(path)
    if not isinstance(codes, Tensor) and len({grid.shape for grid in codes}) == 1:
        codes = torch.stack(list(codes))
    if isinstance(codes, Tensor):
        _check.ndim("codes", codes, (3, 4))
        tensors = {"codes": _smallest("codes", codes)}
    else:
        width = max(6, len(str(len(codes) - 1)))  # names sort in the order of the pictures
        tensors = {f"{i:0{width}d}": _smallest("codes", grid) for i, grid in enumerate(codes)}
    if labels is not None:
        _check.integer_tensor("labels", labels)
        _check.shape("labels", labels, [len(codes)], "for these codes")
        tensors["labels"] = labels.detach().cpu().to(torch.int32).contiguous()
    if condition is not None:
        tensors["condition"] = _smallest("condition", condition)
    said = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "vqfast-codes", **said})


def _smallest(name: str, codes: Tensor) -> Tensor:
    _check.integer_tensor(name, codes)
    top = int(codes.max()) if codes.numel() else 0
    small = next(t for t in (torch.int16, torch.int32, torch.int64) if top <= torch.iinfo(t).max)
    return codes.detach().cpu().to(small).contiguous()


class CodeFile(NamedTuple):
    """grids: [n, A, h, w] each, in the order of the pictures, in the stored type."""

    grids: list[Tensor]
    labels: Tensor | None  # [N] int64
    condition: Tensor | None  # [N, A, Tc]
    about: dict[str, str]


def read_codes(path: str | os.PathLike, n_codes: int | None = None) -> CodeFile:
    """A file of codes.

    Args:
        n_codes: the tokenizer's; None takes any.

    Raises:
        DataError: not such a file, damaged or empty, of another number of codes, a code out of
            range, or labels that do not fit.
    """
    said, tensors = _load(Path(path))
    where = printable(path)
    if n_codes is not None and said.get("n_codes", str(n_codes)) != str(n_codes):
        raise DataError(f"{where}: made with {said['n_codes']} codes, the tokenizer has {n_codes}")
    labels, condition = (tensors.pop(name, None) for name in _BESIDE)
    if not tensors:
        raise DataError(f"{where}: holds no codes")
    grids = [_grid(where, name, x, n_codes) for name, x in tensors.items()]
    n = sum(map(len, grids))
    if labels is not None and (labels.dtype not in _INTEGERS or list(labels.shape) != [n]):
        raise DataError(f"{where}: labels must be integers [{n}], got {_kind(labels)}")
    if condition is not None:
        good = condition.dtype in _INTEGERS and condition.dim() == 3 and condition.numel()
        if not good or condition.shape[:2] != grids[0].shape[:2] or int(condition.min()) < 0:
            raise DataError(f"{where}: condition does not fit the codes: {_kind(condition)}")
    return CodeFile(grids, None if labels is None else labels.long(), condition, said)


def _load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors by name, in sorted order."""
    where = printable(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{where}: not a regular file")
        with safe_open(path, framework="pt", device="cpu") as file:
            # cloned: what is mapped would change with the file
            tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
            return dict(file.metadata() or {}), tensors
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or printable(str(error))}") from None
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{where}: not a file of codes ({printable(str(error))})") from None


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _grid(where: str, name: str, x: Tensor, n_codes: int | None) -> Tensor:
    """A stored tensor as [n, A, h, w]; DataError if it holds no codes."""
    dims = (3, 4) if name == "codes" else (2,)
    if x.dtype not in _INTEGERS or x.dim() not in dims or not x.numel():
        wanted = "[N, h, w] or [N, A, h, w]" if name == "codes" else "[h, w]"
        raise DataError(f"{where}: {name} must be integers {wanted}, got {_kind(x)}")
    low, high = int(x.min()), int(x.max())
    if low < 0 or (n_codes is not None and high >= n_codes):
        allowed = ">= 0" if n_codes is None else f"0..{n_codes - 1}"
        raise DataError(f"{where}: {name} holds codes {low}..{high}, allowed {allowed}")
    return {2: x[None, None], 3: x.unsqueeze(1)}.get(x.dim(), x)


# ---- a data set


@dataclass
class CodesDataset:
    """Codes of N pictures of one size in memory, A encodings of each.

    class_names: of the labels, or None without labels; names: of the pictures, in order, or None.
    skipped: pictures that could not be read when the codes were made.
    """

    root: str
    codes: Tensor  # [N, A, h, w] of any integer type
    labels: Tensor  # [N] int64, -1 for none
    class_names: list[str] | None = None
    names: list[str] | None = None
    condition: Tensor | None = None  # [N, A, Tc]
    skipped: int = 0
    about: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def grid(self) -> tuple[int, int]:
        return self.codes.shape[2], self.codes.shape[3]

    def name(self, index: int) -> bytes:
        """The picture's name, or its number where the file tells none."""
        return os.fsencode(str(index) if self.names is None else self.names[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def rows(self, index: Tensor, variant: Tensor | int = 0) -> dict[str, Tensor]:
        """`dict(codes [B, h·w] int64, label [B])` of some pictures, and `condition` [B, Tc] where
        there is one.
        """
        batch = {"codes": self.codes[index, variant].flatten(1).long(), "label": self.labels[index]}
        if self.condition is not None:
            batch["condition"] = self.condition[index, variant].long()
        return batch

    def select(self, index: np.ndarray) -> "CodesDataset":
        """Some of the pictures, in this order."""
        at = torch.from_numpy(index)
        return replace(
            self,
            codes=self.codes[at],
            labels=self.labels[at],
            names=None if self.names is None else [self.names[i] for i in index],
            condition=None if self.condition is None else self.condition[at],
        )

    def manifest(self) -> str:
        """sha256 of codes and labels."""
        h = hashlib.sha256(repr(tuple(self.codes.shape)).encode())
        for some in self.codes.split(1024):  # the stored type changes nothing
            h.update(some.to(torch.int64).numpy().data)
        h.update(self.labels.numpy().data)
        return h.hexdigest()


def open_codes(path: str | os.PathLike, n_codes: int | None = None) -> CodesDataset:
    """The codes of a file, or of all files below a folder in sorted order.

    Labels are those in the files. Where no file has any, folders of files are classes, as folders
    of pictures are.

    Args:
        n_codes: the tokenizer's; None takes any.

    Raises:
        DataError: nothing there, a file that is none or does not fit the others, or pictures of
            several sizes.
    """
    root, path = printable(path), Path(path)
    files = sorted(_files_below(path)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{root}: no {_SUFFIX} file in this folder")
    read = [read_codes(file, n_codes) for file in files]
    shape, first = read[0].grids[0].shape[1:], read[0].about
    for file, one in zip(files, read, strict=True):
        for grid in one.grids:
            if grid.shape[1:] != shape:
                raise DataError(
                    f"{printable(file)}: pictures must be of one size, got {list(grid.shape[1:])} "
                    f"codes beside {list(shape)}; `vqfast encode --size` makes them equal"
                )
        for key in ("n_codes", "encoder", "class_names"):
            if one.about.get(key) != first.get(key):
                raise DataError(
                    f"{printable(file)}: its {key} is not that of {printable(files[0])}"
                )
    codes = torch.cat([grid for one in read for grid in one.grids])
    counts = [sum(map(len, one.grids)) for one in read]
    labels, names = _labels(path, files, read, counts)
    if names is None and bool((labels >= 0).any()):
        names = _json_list(first.get("class_names")) or [
            str(i) for i in range(int(labels.max()) + 1)
        ]
    if names is not None and int(labels.max()) >= len(names):
        raise DataError(f"{root}: label {int(labels.max())}, but only {len(names)} class_names")
    return CodesDataset(
        root,
        codes,
        labels,
        names,
        _picture_names(read, counts),
        read[0].condition if len(read) == 1 else None,
        about=first,
    )


def _files_below(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if _holds_codes(name))


def _holds_codes(name: str) -> bool:
    return name.endswith(_SUFFIX) and not name.startswith(".")


def _labels(
    path: Path, files: Sequence[Path], read: Sequence[CodeFile], counts: Sequence[int]
) -> tuple[Tensor, list[str] | None]:
    """Labels [N], and the class names where folders give them."""
    if any(one.labels is not None for one in read) or not path.is_dir():
        parts = [
            torch.full([n], NO_LABEL) if one.labels is None else one.labels
            for one, n in zip(read, counts, strict=True)
        ]
        return torch.cat(parts), None
    relative = [os.fsencode(file.relative_to(path)) for file in files]
    by_file, names = labels_by_folder(Names(relative))
    return torch.from_numpy(np.repeat(by_file.astype(np.int64), counts)), names


def _json_list(text: str | None) -> list[str] | None:
    """The list of texts that a metadata value holds; None for anything else."""
    try:
        value: Any = json.loads(text or "null")
    except ValueError:
        return None
    good = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return value if good else None


def _picture_names(read: Sequence[CodeFile], counts: Sequence[int]) -> list[str] | None:
    """The names that the files tell, if each tells as many as it has pictures."""
    told = [_json_list(one.about.get("names")) for one in read]
    if any(names is None or len(names) != n for names, n in zip(told, counts, strict=True)):
        return None
    return [name for names in told for name in names or ()]


# ---- a kind of data source that holds no pictures


def claims(path: Path) -> int:
    """2 for a safetensors file and for a folder that holds some before any picture, else 0."""
    if path.is_file():
        return 2 * (path.suffix == _SUFFIX)
    for _, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(looks_like_picture(os.fsencode(name)) for name in files):
            return 0
        if any(_holds_codes(name) for name in files):
            return 2
    return 0


def open_source(path: Path, *, subset: str | None = None) -> Source:
    """DataError: codes are no pictures. The stages that take codes call `open_codes`."""
    raise DataError(f"{printable(path)}: holds codes, not pictures; only stage 2 trains on codes")
