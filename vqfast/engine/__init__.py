"""Cached decoding of a GPT: packed weights, a static key-value cache, prefill, step, generate; and
generation in sliding windows.
"""

from vqfast.engine.engine import Engine
from vqfast.engine.packing import PackedGPT
from vqfast.engine.step import Step
from vqfast.engine.windowed import generate_windows

__all__ = ["Engine", "PackedGPT", "Step", "generate_windows"]
