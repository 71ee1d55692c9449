"""Cached decoding of a GPT: packed weights, a static key-value cache, prefill, step, generate."""

from vqfast.engine.engine import Engine
from vqfast.engine.packing import PackedGPT

__all__ = ["Engine", "PackedGPT"]
