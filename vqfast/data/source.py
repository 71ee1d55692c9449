"""What every data source offers, and the compact storage of its names: millions of paths in two
arrays.

A source is a numbered list of pictures in a fixed order: `len`, `name(i)`, `label(i)`, `read(i)`,
`class_names`, `manifest()`. Forked loader workers share the memory of a `Names`: reading it touches
two reference counts in all, not one per name.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from vqfast import _check
from vqfast.images import EXTENSIONS, Picture

NO_LABEL = -1


class Source(Protocol):
    """A numbered list of pictures. `root` says where they come from, for messages."""

    root: str
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> bytes:
        """The picture's name, relative to the root."""
        ...

    def label(self, index: int) -> int:
        """Class number, or -1 for none."""
        ...

    def read(self, index: int) -> Picture:
        """The picture as RGB; DataError with its name and the reason."""
        ...

    def manifest(self) -> str:
        """sha256 of names and labels in order: two data sets with equal manifests give equal
        sample orders.
        """
        ...


class Names:
    """An immutable list of byte strings in one block of memory."""

    def __init__(self, names: Iterable[bytes]):
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += name
            ends.append(len(block))
        self._block, self._ends = bytes(block), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        return self._block[self._ends[index] : self._ends[index + 1]]

    def digest(self, labels: np.ndarray) -> str:
        """sha256 over all names, their borders and the labels."""
        h = hashlib.sha256()
        for part in (self._block, self._ends.tobytes(), labels.astype(np.int64).tobytes()):
            h.update(part)
        return h.hexdigest()


def looks_like_picture(name: bytes) -> bool:
    """By its extension, and not hidden."""
    base = name.rsplit(b"/", 1)[-1]
    return (
        not base.startswith(b".") and os.path.splitext(os.fsdecode(base))[1].lower() in EXTENSIONS
    )


def leaves_root(name: bytes) -> bool:
    """True for an absolute name and for one with a `..` part."""
    return name.startswith(b"/") or b".." in name.split(b"/")


def shared_prefix(names: Sequence[bytes] | Names) -> bytes:
    """The folders, with a closing slash, that all names begin with; empty if there are none."""
    prefix: list[bytes] | None = None
    for i in range(len(names)):
        folders = names[i].split(b"/")[:-1]
        if prefix is None:
            prefix = folders
        while prefix != folders[: len(prefix)]:
            prefix = prefix[:-1]
        if not prefix:
            return b""
    return b"".join(p + b"/" for p in prefix or [])


def labels_by_folder(names: Names) -> tuple[np.ndarray, list[str] | None]:
    """Class numbers from the first folder below the shared ones, in the sorted order of the
    folders' names.

    Returns:
        labels [n] int32 and the class names. Pictures beside the class folders get -1; with no
        class folder all do, and the names are None.
    """
    start = len(shared_prefix(names))
    found: dict[bytes, int] = {}
    raw = np.full(len(names), NO_LABEL, dtype=np.int32)
    for i in range(len(names)):
        folder, slash, _ = names[i][start:].partition(b"/")
        if slash:
            raw[i] = found.setdefault(folder, len(found))
    if not found:
        return raw, None
    ordered = sorted(found)
    rank = np.empty(len(found) + 1, dtype=np.int32)
    rank[-1] = NO_LABEL
    for new, folder in enumerate(ordered):
        rank[found[folder]] = new
    return rank[raw], [os.fsdecode(f) for f in ordered]


class Selection:
    """Some pictures of another source, with their own order and, if given, their own classes."""

    def __init__(
        self,
        source: Source,
        indices: Sequence[int] | np.ndarray,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: list[str] | None = None,
    ):
        self._source, self.root = source, source.root
        self._indices = np.asarray(indices, dtype=np.int64)
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int32)
        self.class_names = source.class_names if labels is None else class_names

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> bytes:
        return self._source.name(int(self._indices[index]))

    def label(self, index: int) -> int:
        if self._labels is None:
            return self._source.label(int(self._indices[index]))
        return int(self._labels[index])

    def read(self, index: int) -> Picture:
        return self._source.read(int(self._indices[index]))

    def manifest(self) -> str:
        h = hashlib.sha256(self._source.manifest().encode())
        h.update(self._indices.tobytes())
        if self._labels is not None:
            h.update(self._labels.tobytes())
        return h.hexdigest()


class Named(Protocol):
    """What `held_out` needs of a data set: names in order."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> bytes: ...


def held_out(source: Named, fraction: float) -> np.ndarray:
    """[n] bool: a picture is held out if the hash of its name is below `fraction`.

    So a picture stays on its side when others are added or removed, and in every copy of the data
    set.
    """
    _check.number("fraction", fraction, low=0, high=1)
    held = np.empty(len(source), dtype=bool)
    for i in range(len(source)):
        digest = hashlib.sha256(source.name(i)).digest()
        held[i] = int.from_bytes(digest[:8], "little") < fraction * 2**64
    return held


def split(source: Source, fraction: float) -> tuple[Selection, Selection]:
    """Two disjoint parts; the second is what is `held_out`."""
    held = held_out(source, fraction)
    return Selection(source, np.flatnonzero(~held)), Selection(source, np.flatnonzero(held))
