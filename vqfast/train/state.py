"""Checkpoints of a run: everything that a resume needs, always whole on disk.

    OUT/checkpoints/step_00001000/   config.json, model.safetensors   the model for use (averaged
    weights when EMA is on)
                                     train_state.safetensors          the rest: raw weights,
                                     optimizers, RNG, counters
    OUT/last -> checkpoints/step_00001000

A checkpoint folder is filled under a temporary name, fsynced and renamed; then the link is replaced
by a rename. So a kill at any moment leaves the newest complete checkpoint.
`train_state.safetensors` holds tensors only (Python values as JSON in a uint8 tensor), depends on
nothing but the state, and carries a sha256 over names and bytes.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vqfast._files import atomic_folder, fsync_path
from vqfast.errors import CheckpointError, NonFiniteError

__all__ = [
    "STATE_FILE",
    "candidates",
    "load_module",
    "load_optimizer",
    "load_tensors",
    "module_tensors",
    "optimizer_tensors",
    "prune",
    "publish",
    "read",
    "restore_rng",
    "rng_tensors",
    "write",
]

STATE_FILE = "train_state.safetensors"
_FORMAT = "1"
_META = "meta.json"


# ---- the file


def _digest(tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        h.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        h.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [n for n, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
    if bad:
        raise NonFiniteError(f"not saved: {', '.join(bad[:5])} hold NaN or infinity")


def write(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `train_state.safetensors` into an open temporary folder. NonFiniteError instead of a
    spoilt checkpoint.
    """
    plain = {n: x.detach().cpu().contiguous().clone() for n, x in tensors.items()}
    _refuse_non_finite(plain)
    text = json.dumps(meta, sort_keys=True).encode()
    plain[_META] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    # one metadata key: safetensors writes several in an order that changes from process to process
    header = json.dumps({"format": _FORMAT, "sha256": _digest(plain)}, sort_keys=True)
    save_file(plain, folder / STATE_FILE, metadata={"vqfast_train_state": header})


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and Python values of a checkpoint. CheckpointError names the file and what is wrong
    with it.
    """
    path = folder / STATE_FILE
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("vqfast_train_state", "{}"))
            if header.get("format") != _FORMAT:
                raise CheckpointError(
                    f"{path}: training state of format {header.get('format')}, "
                    f"this version reads {_FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, so nothing to resume from") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if _digest(tensors) != header.get("sha256"):
        raise CheckpointError(f"{path}: damaged, its checksum does not match")
    return tensors, json.loads(bytes(tensors.pop(_META).numpy()))


# ---- the run folder


def candidates(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints under `out`, newest first. A `last` that is a plain folder
    is one too.
    """
    found = []
    for path in (out / "checkpoints").glob("step_*"):
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and path.is_dir():
            found.append((int(match.group(1)), path))
    found.sort(reverse=True)
    last = out / "last"
    if last.is_dir() and last.resolve() not in {path.resolve() for _, path in found}:
        found.insert(0, (-1, last))
    return found


def publish(out: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Make `out/checkpoints/step_N` with `fill(folder)` and point `out/last` at it."""
    path = out / "checkpoints" / f"step_{step:08d}"
    with atomic_folder(path, overwrite=True) as folder:
        fill(folder)
    link, fresh = out / "last", out / f".tmp-{os.getpid()}-last"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(path.relative_to(out), target_is_directory=True)
    if link.is_dir() and not link.is_symlink():
        os.rename(link, out / f"last_before_{step:08d}")  # somebody copied a folder there
    os.replace(fresh, link)
    fsync_path(out)
    return path


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; never the one that `last` names. A failure is
    harmless.
    """
    current = (out / "last").resolve()
    for _, path in [c for c in candidates(out) if c[0] >= 0][keep:]:
        if path.resolve() == current:
            continue
        # renamed first, so that a kill cannot leave half a checkpoint that looks like one
        aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            os.rename(path, aside)
        except OSError as error:
            print(f"vqfast: {path} could not be removed: {error}", file=sys.stderr)
            continue
        shutil.rmtree(aside, ignore_errors=True)


# ---- what is in it


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def load_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """`load_tensors` into a module's parameters and buffers."""
    load_tensors(prefix, module.state_dict(), tensors, what)


@torch.no_grad()
def load_tensors(
    prefix: str, into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str
) -> None:
    """Copy the tensors `prefix.*` into those of `into`, in place. CheckpointError lists what does
    not fit.
    """
    start = prefix + "."
    given = {n[len(start) :]: x for n, x in tensors.items() if n.startswith(start)}
    wrong = [f"missing {start}{n}" for n in into if n not in given]
    wrong += [f"unexpected {start}{n}" for n in given if n not in into]
    wrong += [
        f"{start}{n} is {list(given[n].shape)}, not {list(x.shape)}"
        for n, x in into.items()
        if n in given and given[n].shape != x.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"{what}: does not fit this run: {'; '.join(wrong[:8])}{more}")
    for name, x in into.items():
        x.copy_(given[name])


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[nn.Parameter, str]:
    names = {p: n for n, p in module.named_parameters()}
    return {p: names[p] for group in optimizer.param_groups for p in group["params"]}


def optimizer_tensors(
    prefix: str, optimizer: torch.optim.Optimizer, module: nn.Module
) -> dict[str, Tensor]:
    """Moments and step counts under the names of the parameters. Rates are functions of the step,
    not state.
    """
    out = {}
    for p, name in _names(optimizer, module).items():
        for slot, value in optimizer.state.get(p, {}).items():
            out[f"{prefix}.{name}.{slot}"] = value
    return out


@torch.no_grad()
def load_optimizer(
    prefix: str,
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
) -> None:
    """Inverse of `optimizer_tensors`. Moments are allocated like their parameters, so that
    arithmetic stays bitwise.
    """
    start = prefix + "."
    given = {n[len(start) :]: x for n, x in tensors.items() if n.startswith(start)}
    for p, name in _names(optimizer, module).items():
        slots = [n for n in given if n.rpartition(".")[0] == name]
        for full in slots:
            value, slot = given.pop(full), full.rpartition(".")[2]
            if value.dim() and value.shape != p.shape:
                raise CheckpointError(
                    f"{what}: {start}{full} is {list(value.shape)}, not {list(p.shape)}"
                )
            like = torch.empty_like(p, memory_format=torch.preserve_format) if value.dim() else None
            own = torch.empty_like(value, device=p.device) if like is None else like
            optimizer.state[p][slot] = own.copy_(value)
    if given:
        raise CheckpointError(f"{what}: unexpected {start}{next(iter(given))}")


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """The random state of this process: Python, numpy, torch, and each CUDA device's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, saved = random.getstate()
    out = {
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if saved is None else [saved], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.{rank}.{name}": x for name, x in out.items()}


def restore_rng(rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `rng_tensors`; a rank that the checkpoint does not know keeps its own seed."""
    start = f"rng.{rank}."
    got = {n[len(start) :]: x.clone() for n, x in tensors.items() if n.startswith(start)}
    if not got:
        return
    position, has_gauss = got["numpy_position"].tolist()
    keys = got["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(got["numpy_gauss"][0])))
    version, *internal = got["python"].tolist()
    gauss = got["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    torch.set_rng_state(got["torch"])
    if "cuda" in got and torch.cuda.is_available():
        torch.cuda.set_rng_state(got["cuda"])
