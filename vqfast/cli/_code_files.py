"""Files of codes, between `vqfast encode` and `vqfast decode`: safetensors, one [h, w] grid
each."""

import json
import stat
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vqfast._files import atomic_file
from vqfast.cli._outputs import number_width
from vqfast.errors import DataError

__all__ = ["read_codes", "write_codes"]


def write_codes(path: Path, grids: Sequence[Tensor], names: Sequence[str], n_codes: int) -> None:
    """Grids of codes in 0 .. n_codes - 1 as int32, in this order, and where they came from."""
    grids = [grid.to(torch.int32) for grid in grids]
    if len({grid.shape for grid in grids}) == 1:
        tensors = {"codes": torch.stack(grids)}
    else:
        width = number_width(len(grids))
        tensors = {f"{i:0{width}d}": grid for i, grid in enumerate(grids)}
    said = {"format": "vqfast-codes", "n_codes": str(n_codes), "names": json.dumps(list(names))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=said))


def read_codes(path: Path, n_codes: int) -> list[Tensor]:
    """The [h, w] int64 grids of a file, by name; `labels` are passed over.

    Raises:
        DataError: not such a file, made with another number of codes, or a code out of range.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file")
        with safe_open(path, "pt", device="cpu") as file:
            said = file.metadata() or {}
            names = sorted(set(file.keys()) - {"labels"})
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path}: not a file of codes ({error})") from None
    if said.get("n_codes", str(n_codes)) != str(n_codes):
        raise DataError(f"{path}: made with {said['n_codes']} codes, the tokenizer has {n_codes}")
    grids: list[Tensor] = []
    for name, x in tensors.items():
        if x.is_floating_point() or x.dtype == torch.bool or x.dim() not in (2, 3) or not x.numel():
            raise DataError(
                f"{path}: {name} must be [h, w] integers, got {x.dtype} {list(x.shape)}"
            )
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= n_codes:
            raise DataError(f"{path}: {name} holds codes {low}..{high}, allowed 0..{n_codes - 1}")
        grids += list(x.long()) if x.dim() == 3 else [x.long()]
    if not grids:
        raise DataError(f"{path}: holds no codes")
    return grids
