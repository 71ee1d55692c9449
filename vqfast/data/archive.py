"""Pictures in a tar file, read in place: indexed once, never unpacked to disk. Also .tar.gz,
.tar.bz2 and .tar.xz.

An uncompressed archive is read with `pread`, so forked loader workers share one descriptor. A
compressed one has no random access: the pictures' bytes are read into memory once, in order.
"""

import os
import tarfile
import zlib
from io import BytesIO
from lzma import LZMAError
from pathlib import Path

import numpy as np

from vqfast.data.source import (
    Names,
    labels_by_folder,
    leaves_root,
    looks_like_picture,
    shared_prefix,
)
from vqfast.errors import DataError
from vqfast.images import Picture, load_image, printable

MAX_MEMORY_BYTES = 8 << 30  # of the pictures in a compressed archive
_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, LZMAError)


def claims(path: Path) -> int:
    """1 for a regular file that tarfile can open, else 0."""
    try:
        return int(path.is_file() and tarfile.is_tarfile(path))
    except _DAMAGE:
        return 0


class TarSource:
    """The pictures in a tar, sorted by name; the first folders that differ give the classes.

    Only regular members with a picture's extension are listed. Nothing is ever written, and a
    member whose name is absolute or holds `..` is a bad image.

    Args:
        path: the archive.
        subset: a folder inside it (below those that all members share); only its pictures are
            taken.

    Raises:
        DataError: the archive is missing, damaged, holds no picture, or a compressed one needs over
            8 GiB of memory.
    """

    def __init__(self, path: str | os.PathLike, *, subset: str | None = None):
        self._path, self.root = os.fspath(path), printable(path)
        self._fd: int | None = None
        self._memory: bytes | None = None
        try:
            plain = _is_plain(path)
            with tarfile.open(path, "r:" if plain else "r:*") as tar:
                members = self._read_index(tar, in_memory=not plain)
        except _DAMAGE as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"{self.root}: {printable(reason)}") from None
        members.sort()
        if subset:
            members = _below(members, os.fsencode(subset))
        if not members:
            where = f" below {printable(subset)}" if subset else ""
            raise DataError(f"{self.root}: 0 pictures in this archive{where}")
        self._names = Names(m[0] for m in members)
        self._start = np.array([m[1] for m in members], dtype=np.int64)
        self._size = np.array([m[2] for m in members], dtype=np.int64)
        self._labels, self.class_names = labels_by_folder(self._names)

    def _read_index(self, tar: tarfile.TarFile, *, in_memory: bool) -> list[tuple[bytes, int, int]]:
        """(name, start, size) of each picture: start in the file, or in `_memory`, which is then
        filled.
        """
        members, block = [], bytearray()
        for member in tar:
            name = os.fsencode(member.name).removeprefix(b"./")
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            if not member.isreg() or member.issparse() or not looks_like_picture(name):
                continue
            start = member.offset_data
            if in_memory:
                start = len(block)
                if start + member.size > MAX_MEMORY_BYTES:
                    raise ValueError(f"more than {MAX_MEMORY_BYTES} bytes of pictures in memory")
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise ValueError(f"unexpected end of {printable(name)}")
                block += data
            members.append((name, start, member.size))
        # tarfile stops at a damaged header as if it were the end, which is a block of zeros
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"damaged header at byte {tar.offset}")
        if in_memory:
            self._memory = bytes(block)
        return members

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> bytes:
        return self._names[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> Picture:
        name = self._names[index]
        shown = f"{self.root}: {printable(name)}"
        if leaves_root(name):
            raise DataError(f"{shown}: this name leaves the archive")
        return load_image(BytesIO(self._bytes(index, shown)), shown)

    def _bytes(self, index: int, shown: str) -> bytes:
        start, size = int(self._start[index]), int(self._size[index])
        if self._memory is not None:
            return self._memory[start : start + size]
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._fd, size, start)
        except OSError as error:
            raise DataError(f"{shown}: {error.strerror}") from None
        if len(data) != size:
            raise DataError(f"{shown}: {len(data)} of {size} bytes, the archive was cut")
        return data

    def manifest(self) -> str:
        return self._names.digest(self._labels)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fd": None}  # a descriptor means nothing in a spawned worker

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)


def _is_plain(path: str | os.PathLike) -> bool:
    """True if the archive opens without decompression."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True


def _below(members: list[tuple[bytes, int, int]], subset: bytes) -> list[tuple[bytes, int, int]]:
    prefix = shared_prefix([m[0] for m in members]) + subset.strip(b"/") + b"/"
    return [m for m in members if m[0].startswith(prefix)]


def open_source(path: Path, *, subset: str | None = None) -> TarSource:
    """The archive as a source."""
    return TarSource(path, subset=subset)
