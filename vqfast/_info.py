"""What `vqfast info` shows: versions, devices, instruction sets, and which backend each op takes
and why."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

import vqfast
from vqfast import _dispatch, _native, ops
from vqfast.ops._attention_choice import takes_torch
from vqfast.testing.cases import cases
from vqfast.testing.check import variants

_PACKAGES = ("numpy", "safetensors", "pillow", "omegaconf", "triton", "lpips", "tensorboard")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _choices(device: str) -> dict[str, dict[str, Any]]:
    """For each op the backend that a typical float32 call takes on a device, and the reasons
    against the others."""
    table = {}
    for name, module in ops.load_all().items():
        for raw, sample in variants(module):
            inputs = sample(cases(name, "smoke")[0], torch.float32, device)
            op = _dispatch.OPS[raw]
            takes = op.choose(*inputs)
            if raw in ("causal_attention", "full_attention") and takes_torch(raw, *inputs[:3]):
                takes = "torch"  # its public function does not come to the op
            table[raw] = {"takes": takes, "reasons": op.explain(*inputs)}
    return table


def info() -> dict[str, Any]:
    """Versions, devices, instruction sets, and per op and device the backend taken with every
    reason.

    Returns:
        A dict that json can write.
    """
    library = _native.load()
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "vqfast": vqfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {p: _version(p) for p in _PACKAGES},
        "cpu": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": _native.isa(),
            "isas": library.supported() if library else [],
        },
        "cuda": cuda,
        "native": {"cpu": _native.missing() or "built", "cuda": _native.cuda_missing() or "built"},
        "forced_backend": _dispatch.forced_backend(),
        "ops": {device: _choices(device) for device in ["cpu", *(["cuda"] if cuda else [])]},
    }
