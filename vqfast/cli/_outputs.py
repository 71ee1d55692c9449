"""Where results go: refusal of what exists already, folders of numbered pictures."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vqfast import _files

__all__ = ["REQUEST", "number_width", "picture_folder", "refuse_existing"]

REQUEST = "vqfast-request.json"  # lies in a folder of samples while it is unfinished


def refuse_existing(path: str | Path, overwrite: bool) -> Path:
    """The path, if it is free: absent, an empty folder, or `overwrite`. Else FileExistsError."""
    path = Path(path)
    if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        more = " and holds an unfinished run, which --resume continues"
        raise FileExistsError(f"{path} exists already{more if (path / REQUEST).is_file() else ''}")
    return path


@contextlib.contextmanager
def picture_folder(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """The folder to write PNGs into.

    A new folder is filled in place, so that what is finished stays after an interruption. An
    existing one is replaced as a whole once the new pictures are complete, and only if it holds
    pictures alone: a mistyped --out must not take a home folder with it.

    Raises:
        FileExistsError: it is not empty and `overwrite` is False, or it holds more than PNGs.
    """
    path = refuse_existing(path, overwrite)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        other = [path]
        if path.is_dir():
            other = [p for p in path.iterdir() if p.suffix != ".png" and p.name != REQUEST]
        if other:
            raise PermissionError(
                f"{path} holds more than PNG files ({other[0].name}); it is not replaced"
            )
        with _files.atomic_folder(path, overwrite=True) as temporary:
            yield temporary
    else:
        path.mkdir(parents=True, exist_ok=True)
        _files.remove_stale(path)
        yield path


def number_width(n: int) -> int:
    """Digits that make the names of n pictures sort in order; at least six, as taming's."""
    return max(6, len(str(max(n - 1, 0))))
