"""A folder of samples that may be continued: its request, and the images that are still missing.

While a run is unfinished, `vqfast-request.json` lies beside its images and says all that decides
their pixels. Images appear whole or not at all, so those that are there are finished. The file goes
when the last image is there; a finished folder holds images alone.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vqfast
from vqfast import _files
from vqfast.cli._outputs import REQUEST, number_width
from vqfast.cli._parser import UsageError
from vqfast.errors import DataError

__all__ = ["describe", "gaps", "refuse_unless_unfinished", "same_request"]


def refuse_unless_unfinished(folder: Path) -> None:
    """FileExistsError for what is there and cannot be continued; absent and empty are fine."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} exists already and is no folder")
    if folder.is_dir() and not (folder / REQUEST).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists already and holds no unfinished run to resume")


def describe(pipe: "vqfast.Pipeline", options: Mapping[str, Any], **names: Any) -> dict[str, Any]:
    """A request as JSON values.

    Args:
        pipe: its weights and configurations are summed up in one digest.
        options: of `Pipeline.sample` as far as they decide pixels; a tensor becomes its digest.
        names: further values that must stay the same.
    """
    said = {name: _plain(value) for name, value in {**options, **names}.items()}
    device = pipe.device.type  # backends round differently
    return {"vqfast": vqfast.__version__, "model": _digest(pipe), "device": device, **said}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.contiguous()
        data = f"{tuple(value.shape)}".encode() + value.numpy().tobytes()
        return hashlib.sha256(data).hexdigest()
    return list(value) if isinstance(value, tuple) else value


def _digest(pipe: "vqfast.Pipeline") -> str:
    total = hashlib.sha256()
    parts = (pipe.tokenizer, pipe.transformer, pipe.conditioning)
    said = (pipe.tokenizer.config, pipe.transformer.config, pipe.conditioning)
    for part, config in zip(parts, (s.to_dict() for s in said), strict=True):
        total.update(json.dumps(config, sort_keys=True).encode())
        for name, x in sorted(part.state_dict().items()):
            total.update(f"{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
            total.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def same_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Begin or continue a run in `folder`: leave the request there, or find the same one.

    Raises:
        UsageError: the folder is of another request; the text says where they differ.
        DataError: the file there is damaged.
    """
    path = folder / REQUEST
    if not path.exists():
        with _files.atomic_file(path) as temporary:
            temporary.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged (no object)")
    differ = [
        f"{name} {json.dumps(found.get(name))}, now {json.dumps(request.get(name))}"
        for name in {**found, **request}
        if found.get(name) != request.get(name)
    ]
    if differ:
        raise UsageError(f"--resume: {folder} is of another request: {'; '.join(differ)}")


def gaps(folder: Path, n: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of images among 0..n - 1 that are not in `folder`, in order."""
    numbers, width = [], number_width(n)
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix != ".png" or not re.fullmatch(r"[0-9]+", stem) or int(stem) >= n:
                continue
            if stem == f"{int(stem):0{width}d}":
                numbers.append(int(stem))
    begin = 0
    for number in [*sorted(numbers), n]:
        if number > begin:
            yield begin, number - begin
        begin = number + 1
