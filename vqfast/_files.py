"""Files that are always whole: atomic writes, removal of what a killed process left, one owner per
run folder.

A write goes to a temporary name beside its target (`.tmp-PID-RANDOM-NAME`), is fsynced and renamed
over it, and then the folder is fsynced. A reader sees the old content or the new, never a mix, also
across a kill -9 or a power loss.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".tmp-"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name}"[:250])


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path to write; on success it becomes `path`, on an exception it is
    removed."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; some writers make private files
        yield temporary
        temporary.chmod(mode)
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it becomes `path`, on an exception it is
    removed.

    An existing non-empty `path` raises FileExistsError unless `overwrite`; then it is moved aside,
    replaced, removed.
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), None
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask allows, for files
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(mode)
            fsync_path(file)
        fsync_path(temporary)
        if path.exists():
            old = _temporary(path)
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old is not None and not path.exists():
            os.rename(old, path)
        _remove(temporary)
        raise
    fsync_path(path.parent)
    if old is not None:
        _remove(old)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_stale(folder: str | os.PathLike) -> list[Path]:
    """Removes temporary files and folders under `folder` whose process is gone; returns what it
    removed."""
    removed = []
    for path in sorted(Path(folder).rglob(_PREFIX + "*")):
        pid = path.name[len(_PREFIX) :].split("-", 1)[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            _remove(path)
            removed.append(path)
    return removed


class FolderLock:
    """Context manager: this process alone writes into `folder`. RuntimeError names the pid of a
    living owner.

    The lock is flock on `folder/.lock`, so that it ends with its process, also by kill -9.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / ".lock"
        self._fd: int | None = None

    def __enter__(self) -> "FolderLock":
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise RuntimeError(
                f"{self.path.parent} is in use by process {owner}; give another --out or stop it"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._fd = fd
        return self

    def __exit__(self, *error: object) -> None:
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None
