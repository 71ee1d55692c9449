"""Checkpoints of every known format, as plain data: a configuration tree and named tensors.

One file per format with `claims(source) -> bool`, `read(source) -> Checkpoint` and, where the
format can be written, `write(path, kind, config, tensors, metadata)`. A new format is one new file:
files are found by name. This package knows no model class; `VQGAN.from_pretrained` and
`Pipeline.from_pretrained` call `read`, build the model and call `load_into`.

A file is found to be of a format by its content, never by its name. Nothing that a file holds is
imported or run.
"""

import fnmatch
import functools
import importlib
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.checkpoints._source import Source
from vqfast.errors import CheckpointError

__all__ = ["Checkpoint", "Source", "clean_tensors", "fit", "formats", "load_into", "read"]

# Keys of released files that no model here has. Anything else that is unexpected is an error.
IGNORED = (
    "loss.*",
    "*.attn.mask",
    "colorize",
    "model_ema.*",
    "freqs_cis",
    "quantize.codebook_used",
)


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        format: name of the format's file in this package.
        kind: "tokenizer" or "pipeline".
        config: tokenizer: fields of VQGANConfig; pipeline: {"tokenizer", "transformer",
            "conditioning"} and, where the transformer's weights are packed, "packed".
        tensors: finite, dense CPU tensors that share no memory with the file; a pipeline's names
            begin with "tokenizer.", "transformer." or "conditioning.".
        metadata: what the file says about itself (steps, data, licence).
        ignored: keys that were dropped because they are on the ignore list.
    """

    format: str
    kind: str
    config: dict
    tensors: dict[str, Tensor]
    metadata: dict = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


@functools.cache
def formats() -> dict[str, ModuleType]:
    """The formats by name, sorted."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def read(
    path: str | os.PathLike,
    config: str | os.PathLike | Mapping[str, Any] | None = None,
    *,
    expect: str | None = None,
    format: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint of any known format.

    Args:
        path: folder or file.
        config: YAML file (or its tree) of a format that keeps its configuration elsewhere; found
            beside the file if None.
        expect: "tokenizer" or "pipeline": what the caller needs. A pipeline's tokenizer is taken
            out of it.
        format: name of a format, for a file that several could claim; None decides by content.

    Raises:
        CheckpointError: missing, damaged, unsafe, of no known format, or not what is expected;
            names the path.
    """
    source, known = Source(path, config), formats()
    if format is not None and format not in known:
        raise ValueError(f"format must be one of {', '.join(known)}, got {format!r}")
    candidates = [known[format]] if format else list(known.values())
    for module in candidates:
        if module.claims(source):
            return _as_expected(module.read(source), expect, path)
    wanted = format or ", ".join(known)
    raise CheckpointError(f"{path}: not a checkpoint of a known format ({wanted})")


def _as_expected(checkpoint: Checkpoint, expect: str | None, path: str | os.PathLike) -> Checkpoint:
    if expect in (None, checkpoint.kind):
        return checkpoint
    if expect == "tokenizer" and checkpoint.kind == "pipeline":
        prefix = "tokenizer."
        tensors = {
            k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)
        }
        return Checkpoint(
            checkpoint.format,
            "tokenizer",
            checkpoint.config["tokenizer"],
            tensors,
            checkpoint.metadata,
            checkpoint.ignored,
        )
    raise CheckpointError(f"{path}: holds a {checkpoint.kind}, a {expect} is needed here")


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], *, what: str | os.PathLike = "checkpoint"
) -> None:
    """Copies `tensors` into the parameters and buffers of `module`, in their dtypes.

    All or nothing: the module is untouched when a key does not fit.

    Args:
        module: may be on the meta device; its parameters and buffers are then made here.
        tensors: by state-dict name.
        what: path for the error text.

    Raises:
        CheckpointError: lists every missing, unexpected and wrong-shape key.
    """
    fitting, _ = fit(module, tensors, what=what)
    with torch.no_grad():
        for name, want in module.state_dict(keep_vars=True).items():
            _put(module, name, want, fitting[name])


def fit(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    allow_partial: bool = False,
    what: str | os.PathLike = "checkpoint",
) -> tuple[dict[str, Tensor], list[str]]:
    """Holds `tensors` against the state dict of `module`, which is not changed.

    Args:
        allow_partial: True puts zeros where a tensor is missing or has another shape, and drops
            what is unexpected.
        what: path for the error text.

    Returns:
        A tensor for each key of the module; one line for each key that was replaced or dropped.

    Raises:
        CheckpointError: lists every missing, unexpected and wrong-shape key.
    """
    wanted = module.state_dict(keep_vars=True)
    bad = [f"unexpected {name}" for name in tensors if name not in wanted]
    fitting: dict[str, Tensor] = {}
    for name, want in wanted.items():
        got = tensors.get(name)
        if got is None:
            bad.append(f"missing {name}")
        elif want.shape != got.shape:
            bad.append(f"{name} has shape {list(got.shape)}, the model {list(want.shape)}")
        elif want.is_floating_point() != got.is_floating_point() or (
            want.dtype == torch.uint8 != got.dtype  # bytes are no numbers to convert
        ):
            bad.append(f"{name} has dtype {got.dtype}, the model {want.dtype}")
        else:
            fitting[name] = got
    if bad and not allow_partial:
        raise CheckpointError(f"{what}: does not fit the model: {'; '.join(sorted(bad))}")
    for name in wanted.keys() - fitting.keys():
        fitting[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
    return fitting, sorted(bad)


def _put(module: nn.Module, name: str, want: Tensor, value: Tensor) -> None:
    """Sets one parameter or buffer; a meta tensor is replaced by a real one."""
    if not want.is_meta:
        want.copy_(value)
        return
    real = value.detach().clone().to(want.dtype)
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(want, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(real, requires_grad=want.requires_grad)
    else:
        owner._buffers[leaf] = real


# ---- shared by the formats


def clean_tensors(
    state: Mapping[str, Any], what: str | os.PathLike, prefixes: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a foreign state dict that may be used, and the keys on the ignore list.

    Args:
        state: names to values as they were loaded.
        prefixes: submodules whose own ignored keys count too ("first_stage_model." drops
            "first_stage_model.loss.*").

    Returns:
        Copies that own their memory, and the ignored names.

    Raises:
        CheckpointError: lists every value that is not a dense, finite tensor of a plain dtype, or
            whose elements overlap.
    """
    tensors, ignored, bad = {}, [], []
    for name, value in state.items():
        if _is_ignored(name, prefixes):
            ignored.append(name)
            continue
        reason = _unfit(value)
        if reason:
            bad.append(f"{name} {reason}")
        else:
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    if bad:
        raise CheckpointError(f"{what}: unusable tensors: {'; '.join(sorted(bad))}")
    return tensors, ignored


def _is_ignored(name: str, prefixes: tuple[str, ...]) -> bool:
    names = [name] + [name.removeprefix(p) for p in prefixes if name.startswith(p)]
    return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in IGNORED)


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _unfit(value: Any) -> str | None:
    """Why a loaded value cannot be a weight."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.layout != torch.strided:
        return "is sparse"
    if value.device.type != "cpu":
        return f"is on {value.device.type}, without values"
    if value.is_quantized or value.dtype not in _DTYPES + _INTEGERS:
        return f"has dtype {value.dtype}"
    if _overlaps(value):
        return (
            f"has overlapping elements (shape {list(value.shape)}, strides {list(value.stride())})"
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "holds NaN or infinity"
    return None


def _overlaps(x: Tensor) -> bool:
    """True when two elements of x may share an address: strides, smallest first, must step over all
    before.
    """
    reach = 0
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += step * (size - 1) if size else 0
    return False
