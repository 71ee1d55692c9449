"""vqfast: a kernel-accelerated engine for VQGAN.

Public names are loaded on first use, so that `import vqfast` stays quick and loads neither triton
nor Pillow.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "Quantized": "vqfast.ops.quantize",
    "quantize": "vqfast.ops.quantize",
    "nearest": "vqfast.ops.nearest",
    "code_stats": "vqfast.ops.code_stats",
    "causal_attention": "vqfast.ops.causal_attention",
    "group_norm_silu": "vqfast.ops.group_norm_silu",
    "sample_logits": "vqfast.ops.sample_logits",
    "backend": "vqfast._dispatch",
    "explain": "vqfast._dispatch",
    "info": "vqfast._info",
    "BackendError": "vqfast.errors",
    "CheckpointError": "vqfast.errors",
    "DataError": "vqfast.errors",
    "NonFiniteError": "vqfast.errors",
    "VQGAN": "vqfast.models.vqgan",
    "VQGANConfig": "vqfast.models.vqgan",
    "GPT": "vqfast.models.gpt",
    "GPTConfig": "vqfast.models.gpt",
    "Engine": "vqfast.engine",
    "Pipeline": "vqfast.pipeline",
    "accelerate": "vqfast.accelerate",
}
_MODULES = ("data", "losses", "metrics", "models", "nn", "ops", "testing", "train")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        # ops first: schemas exist before anything is traced, and a function wins over the module of
        # its name
        importlib.import_module("vqfast.ops")
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"vqfast.{name}")
    else:
        raise AttributeError(f"module 'vqfast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
