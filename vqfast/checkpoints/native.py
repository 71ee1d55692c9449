"""The native format: a folder with `model.safetensors` and `config.json`.

The weights file stands for itself and is the commit point of a save. Its `__metadata__` holds the
kind, the configuration, the format version and a sha256 over these and over every tensor (name,
dtype, shape, bytes; names sorted); every load verifies it, so that a flipped bit anywhere is an
error. `config.json` says the same to people. Other files in the folder (a README, a training state)
are not this format's business.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqfast import _files
from vqfast.checkpoints import Checkpoint, Source
from vqfast.errors import CheckpointError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
VERSION = 1

_MAX_HEADER_BYTES = 100 << 20
_KINDS = ("tokenizer", "pipeline")
_FIELDS = {"format", "version", "kind", "config", "metadata", "sha256"}
_SAVED_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


def claims(source: Source) -> bool:
    """A folder with the weights file, or the weights file itself."""
    if source.folder:
        return (source.path / WEIGHTS).is_file()
    return not source.pickled


def read(source: Source) -> Checkpoint:
    """Reads and verifies; the tensors own their memory and keep the stored dtype.

    Raises:
        CheckpointError: cut, damaged (any bit), of a newer version, or not written by `write`.
    """
    path = source.path / WEIGHTS if source.folder else source.path
    _check_header(path)
    try:
        # one open file: a writer may replace the path at any moment
        with safe_open(path, "pt", device="cpu") as file:
            said = _fields(path, file.metadata())
            names = list(file.keys())
            # clone: the library's tensors are views of the mapped file
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or cut ({error})") from None
    if _digest(said, tensors) != said["sha256"]:
        raise CheckpointError(f"{path}: damaged: the checksum does not match the content")
    try:
        config, metadata = json.loads(said["config"]), json.loads(said["metadata"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its configuration is damaged ({error})") from None
    if said["kind"] not in _KINDS or not isinstance(config, dict):
        raise CheckpointError(f"{path}: unknown kind {said['kind']!r}")
    return Checkpoint("native", said["kind"], config, tensors, metadata)


def write(
    folder: str | os.PathLike,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint; the old one in `folder` stays whole until the new one is complete on the
    disk.

    Args:
        folder: made if absent. Writing where `tensors` were read from is fine.
        kind: "tokenizer" or "pipeline".
        config: JSON values; see `Checkpoint.config`.
        tensors: on any device, finite.
        metadata: JSON values.
        dtype: float32, float16 or bfloat16 for the floating-point tensors; None keeps theirs.

    Raises:
        ValueError: a tensor is not finite (in `dtype`), or `kind` or `dtype` is unknown.
        OSError: the disk is full or the folder cannot be written.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if dtype not in _SAVED_DTYPES:
        raise ValueError(f"dtype must be float32, float16, bfloat16 or None, got {dtype}")
    plain = _plain(tensors, dtype)
    said = {
        "format": "vqfast",
        "version": str(VERSION),
        "kind": kind,
        "config": _json(config),
        "metadata": _json(metadata or {}),
    }
    said["sha256"] = _digest(said, plain)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _files.remove_stale(folder)
    with _files.atomic_file(folder / WEIGHTS) as temporary:
        _save(plain, temporary, said)
    described = {
        "format_version": VERSION,
        "kind": kind,
        "config": config,
        "metadata": metadata or {},
    }
    with _files.atomic_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path, said: dict[str, str]) -> None:
    """Writes `path`, whose name is that of a temporary file.

    The library goes through a temporary file of its own beside its target, under a name that
    `remove_stale` would not know after a kill: it gets a folder whose name it does know.
    """
    room = path.with_name(path.name + ".d")
    room.mkdir()
    try:
        save_file(tensors, room / WEIGHTS, metadata=said)
        os.replace(room / WEIGHTS, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory with one another, sorted by name, checked to be
    finite.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        x = tensors[name].detach()
        x = x.to("cpu", dtype if x.is_floating_point() else x.dtype).contiguous()
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{name} must be finite to be saved as {x.dtype}, it holds NaN or infinity"
            )
        if (
            x.untyped_storage().data_ptr() in storages
        ):  # tied weights: safetensors refuses shared memory
            x = x.clone()
        storages.add(x.untyped_storage().data_ptr())
        plain[name] = x
    return plain


def _digest(said: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(_FIELDS - {"sha256"}):
        total.update(f"{key}\0{said[key]}\0".encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        total.update(f"{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _check_header(path: Path) -> None:
    """Refuses what the library would take: a header of any size, and names given twice."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: damaged or cut: its header claims {length} bytes")
            json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error})") from None


def _fields(path: Path, said: dict[str, str] | None) -> dict[str, str]:
    """The `__metadata__` of a weights file, complete and of a version that is known here."""
    if said is None or said.get("format") != "vqfast":
        raise CheckpointError(
            f"{path}: weights without a configuration of this package, or damaged"
        )
    version = said.get("version", "")
    if version.isdigit() and int(version) > VERSION:
        raise CheckpointError(
            f"{path}: written in format version {version}, this package reads up to {VERSION}; "
            "upgrade vqfast"
        )
    if set(said) != _FIELDS or version != str(VERSION):
        raise CheckpointError(f"{path}: damaged: its header lacks or adds fields")
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is given twice")
    return made
