"""Pictures named in a text file: one path a line, relative to the list's folder, with an optional
class number.
"""

import os
from pathlib import Path

import numpy as np

from vqfast.data.source import NO_LABEL, Names, looks_like_picture
from vqfast.errors import DataError
from vqfast.images import Picture, load_image, printable

_MAX_BYTES = 1 << 30


def claims(path: Path) -> int:
    """1 for a regular file whose name ends in .txt, .lst, .list or .tsv, else 0."""
    return int(path.is_file() and path.suffix.lower() in (".txt", ".lst", ".list", ".tsv"))


class ListFileSource:
    """The pictures of a list, in its order.

    A line is `path`, `path<TAB>label` or `path label`; the label is an integer >= 0. Paths are
    relative to `root`; an absolute one must lie under it. Blank lines are passed over.

    Args:
        path: the list.
        root: folder that the paths start from, and that none may leave; the list's folder by
            default.

    Raises:
        DataError: the list cannot be read, is empty, or a line leaves the root (its number is
            named).
    """

    def __init__(self, path: str | os.PathLike, *, root: str | os.PathLike | None = None):
        self.root = printable(path)
        self.class_names: list[str] | None = None
        folder = os.path.dirname(os.path.abspath(path)) if root is None else os.path.abspath(root)
        self._folder = os.fsencode(folder)
        names, labels = [], []
        for number, line in enumerate(_lines(path), 1):
            name, label = _split(line)
            if not name:
                continue
            inside = _inside(self._folder, name)
            if inside is None:
                raise DataError(
                    f"{self.root} line {number}: {printable(name)} leaves {printable(folder)}"
                )
            names.append(inside)
            labels.append(label)
        if not names:
            raise DataError(f"{self.root}: 0 pictures in this list")
        self._names = Names(names)
        self._labels = np.array(labels, dtype=np.int32)
        if self._labels.max() >= 0:
            self.class_names = [str(i) for i in range(int(self._labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> bytes:
        return self._names[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> Picture:
        return load_image(os.path.join(self._folder, self._names[index]))

    def manifest(self) -> str:
        return self._names.digest(self._labels)


def _lines(path: str | os.PathLike) -> list[bytes]:
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise DataError(f"{printable(path)}: a list of more than {_MAX_BYTES} bytes")
        return Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror}") from None


def _split(line: bytes) -> tuple[bytes, int]:
    """Path and label of one line. A trailing number is a label only if what precedes it is named
    as a picture.
    """
    line = line.strip(b"\r\n\t ")
    for parts in (line.rsplit(b"\t", 1), line.rsplit(None, 1)):
        if len(parts) == 2 and parts[1].isdigit() and looks_like_picture(parts[0].rstrip()):
            return parts[0].rstrip(), min(int(parts[1][:9]), 2**30)
    return line, NO_LABEL


def _inside(folder: bytes, name: bytes) -> bytes | None:
    """The name relative to the folder, or None if it leads out of it."""
    full = os.path.normpath(os.path.join(folder, name))
    base = folder.rstrip(b"/") + b"/"
    return full[len(base) :] if full.startswith(base) else None


def open_source(path: Path, *, subset: str | None = None) -> ListFileSource:
    """The list as a source."""
    if subset:
        raise DataError(f"{printable(path)}: a list has no subsets, got {printable(subset)}")
    return ListFileSource(path)
