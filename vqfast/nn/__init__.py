"""Modules over the functional ops: quantizers, residual blocks, attention.

`VectorQuantizer` takes the place of taming's `VectorQuantizer2`: arguments, state-dict key, methods
and return structure. What differs: the perplexity is there, a wrong argument is a ValueError,
unknown codes that become random ones are drawn in another order, and `get_codebook_entry` does not
write into its argument. `vqfast.accelerate` keeps a foreign quantizer, all but its search.

Names are resolved on first use, so that importing one module does not load the others.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "VectorQuantizer": "vqfast.nn.quantizers.vector",
    "GumbelQuantizer": "vqfast.nn.quantizers.gumbel",
    "EMAVectorQuantizer": "vqfast.nn.quantizers.ema",
    "GroupNormSiLU": "vqfast.nn.blocks",
    "Conv3x3": "vqfast.nn.blocks",
    "ResBlock": "vqfast.nn.blocks",
    "Downsample": "vqfast.nn.blocks",
    "Upsample": "vqfast.nn.blocks",
    "SpatialAttention": "vqfast.nn.attention",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> type:
    if name not in _WHERE:
        raise AttributeError(f"module 'vqfast.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
