"""Quantizers: [B, D, h, w] latents to codes and back. One file each; names in `vqfast.nn`."""
