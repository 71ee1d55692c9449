"""Pictures and codes for training and evaluation. Sources are found by file name: each kind is one
file here.

source = open_source("photos/")  # a folder, a list file or a tar, told by its content dataset =
ImageDataset(source, 256, crop="random") for batch in Batches(dataset, 16, seed=0): ...
"""

import importlib
import os
import pkgutil
from pathlib import Path
from types import ModuleType

from vqfast.data.batches import Batches
from vqfast.data.dataset import ImageDataset, to_float
from vqfast.data.order import order
from vqfast.data.source import Selection, Source, split
from vqfast.errors import DataError
from vqfast.images import load_image, printable

__all__ = [
    "Batches",
    "ImageDataset",
    "Selection",
    "Source",
    "kinds",
    "load_image",
    "open_source",
    "order",
    "split",
    "to_float",
]


def kinds() -> dict[str, ModuleType]:
    """The kinds of source by name: every module here that has `claims` and `open_source`."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: m for name, m in modules.items() if hasattr(m, "claims")}


def open_source(
    path: str | os.PathLike, *, kind: str | None = None, subset: str | None = None
) -> Source:
    """The pictures at `path`.

    Args:
        path: a folder, a list file (.txt, .lst, .list, .tsv) or a tar, also compressed.
        kind: "folder", "listfile", "archive" or "noto_emoji"; by default told by the content.
        subset: folder: a folder below it. archive: a folder inside it. noto_emoji: class names with
            commas.

    Raises:
        DataError: nothing there, of no known kind, damaged, or without a picture.
        ValueError: unknown kind.
    """
    path, known = Path(path), kinds()
    if kind is not None:
        if kind not in known:
            raise ValueError(f"kind must be one of {', '.join(known)}, got {kind!r}")
        return known[kind].open_source(path, subset=subset)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from None
    claim, name = max((module.claims(path), name) for name, module in known.items())
    if not claim:
        raise DataError(f"{printable(path)}: neither a folder nor a list file nor a tar")
    return known[name].open_source(path, subset=subset)
