"""Pictures in a folder and its subfolders, in sorted order; the first level of subfolders gives the
classes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from vqfast.data.source import Names, labels_by_folder, leaves_root, looks_like_picture
from vqfast.errors import DataError
from vqfast.images import Picture, load_image, printable


def claims(path: Path) -> int:
    """1 for a folder, else 0; the greatest claim of all kinds wins."""
    return int(path.is_dir())


class FolderSource:
    """All files below `root` that have a picture's extension; hidden ones are left out.

    Links to folders are followed, but not into a folder that encloses them. A folder, FIFO or
    broken link that is named as a picture is listed, so that it is counted as a bad image when its
    turn comes.

    Args:
        root: the folder.
        subset: a folder below it; only its pictures are taken.

    Raises:
        DataError: no such folder, it cannot be listed, or it holds no picture.
    """

    def __init__(self, root: str | os.PathLike, *, subset: str | None = None):
        if subset and leaves_root(os.fsencode(subset)):
            raise DataError(f"subset {printable(subset)} leaves {printable(root)}")
        self._root = os.fsencode(os.path.join(root, subset) if subset else root)
        self.root = printable(self._root)
        try:
            self._names = Names(_walk(self._root, b"", frozenset()))
        except OSError as error:
            where = printable(error.filename or self._root)
            raise DataError(f"{where}: {error.strerror}") from None
        if not len(self._names):
            raise DataError(f"{self.root}: 0 pictures in this folder")
        self._labels, self.class_names = labels_by_folder(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> bytes:
        return self._names[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> Picture:
        return load_image(os.path.join(self._root, self._names[index]))

    def manifest(self) -> str:
        return self._names.digest(self._labels)


def _walk(root: bytes, below: bytes, parents: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    """Names relative to root. One folder's entries are held at a time, so that memory stays
    small.
    """
    here = os.path.join(root, below)
    at = os.stat(here)
    parents = parents | {(at.st_dev, at.st_ino)}
    for name in sorted(os.listdir(here)):
        path = below + name
        if looks_like_picture(name):
            yield path
        elif not name.startswith(b".") and os.path.isdir(os.path.join(root, path)):
            at = os.stat(os.path.join(root, path))
            if (at.st_dev, at.st_ino) not in parents:
                yield from _walk(root, path + b"/", parents)


def open_source(path: Path, *, subset: str | None = None) -> FolderSource:
    """The folder as a source."""
    return FolderSource(path, subset=subset)
