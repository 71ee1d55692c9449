"""What all quantizers share: axes, lookup, index shapes, and the remapping to a part of the codes.

taming counts indices in the order B, h, w after the channels have moved last, and
`get_codebook_entry` takes a shape (B, h, w, D).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import _check

Info = tuple[Tensor, None, Tensor]  # perplexity, taming's place for a one-hot matrix, indices


def channels_last(z: Tensor) -> Tensor:
    """[B, D, ...] -> [B, ..., D], a view."""
    return z.movedim(1, -1)


def perplexity(indices: Tensor, n: int) -> Tensor:
    """exp of the entropy of how often each of n codes occurs in indices; [] float32. 1 if empty."""
    flat = indices.reshape(-1)
    counts = torch.zeros(n, dtype=torch.int64, device=flat.device)
    return perplexity_of_counts(counts.scatter_add(0, flat, torch.ones_like(flat)))


def perplexity_of_counts(counts: Tensor) -> Tensor:
    """`perplexity`, where how often each code occurs is known; counts [n] int64 -> [] float32."""
    share = counts.float() / counts.sum().clamp_min(1)
    return torch.exp(-torch.special.xlogy(share, share).sum())


def _used(remap: str | Path | Sequence[int] | Tensor, n: int) -> Tensor:
    """The ids that are kept, [U] int64, from a .npy file or a list."""
    if isinstance(remap, (str, Path)):
        remap = np.load(remap, allow_pickle=False).tolist()
    used = torch.as_tensor(remap)
    _check.integer_tensor("remap", used)
    if used.dim() != 1 or not used.numel() or int(used.min()) < 0 or int(used.max()) >= n:
        raise ValueError(f"remap must list ids in 0..{n - 1}, got shape {list(used.shape)}")
    return used.long()


class Quantizer(nn.Module):
    """Base class. A subclass has `codebook()`, `codes(z)` and `forward(z)`.

    Args:
        n: number of codes.
        dim: their dimension.
        remap: ids that are kept (a list, or the path of a .npy file); indices then count these, and
            `re_embed` is their number. The buffer `used` holds them.
        unknown_index: what a code outside of `remap` becomes: "random" (from torch's generator),
            "extra" (one more id at the end, which decodes to the first kept code), or an id.
    """

    used: Tensor  # both with `remap` alone
    unknown_index: str | int  # "random" or an id

    def __init__(
        self,
        n: int,
        dim: int,
        remap: str | Path | Sequence[int] | Tensor | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__()
        self.n_e = _check.integer("number of codes", n, low=1)
        self.e_dim = _check.integer("code dimension", dim, low=1)
        self.remap = remap
        self.re_embed = n
        if remap is None:
            return
        self.register_buffer("used", _used(remap, n))
        self.re_embed = len(self.used)
        if unknown_index == "extra":
            unknown_index = self.re_embed
            self.re_embed += 1
        if unknown_index != "random":
            unknown_index = _check.integer(
                "unknown_index", unknown_index, low=0, high=self.re_embed - 1
            )
        self.unknown_index = unknown_index

    def codebook(self) -> Tensor:
        """What indices point at, [n, dim], in float32 or wider."""
        raise NotImplementedError

    def codes(self, z: Tensor) -> Tensor:
        """z [B, dim, h, w] -> indices [B, h, w] int64, without gradient."""
        raise NotImplementedError

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Ids of all codes -> ids among the kept ones; same shape."""
        place = torch.arange(len(self.used), device=indices.device)
        table = torch.full((self.n_e,), len(self.used), device=indices.device)
        table = table.scatter_reduce(0, self.used.to(indices.device), place, "amin")  # [n]
        new = table[indices]
        unknown = new == len(self.used)
        if isinstance(self.unknown_index, str):
            drawn = torch.randint(self.re_embed, indices.shape, device=indices.device)
        else:
            drawn = torch.full_like(indices, self.unknown_index)
        return torch.where(unknown, drawn, new)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Ids among the kept codes -> ids of all codes; the extra id gives the first kept code."""
        used = self.used.to(indices.device)
        return used[torch.where(indices >= len(used), 0, indices)]

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None) -> Tensor:
        """Codes of indices.

        Args:
            indices: any shape of integers in 0..re_embed-1, in the order B, h, w.
            shape: (B, h, w, D), or None for no spatial axes.

        Returns:
            [B, D, h, w]; [number of indices, D] for shape None.

        Raises:
            TypeError: indices are not integers.
            ValueError: an index is out of range, or their number does not fit the shape.
        """
        _check.integer_tensor("indices", indices)
        flat = indices.reshape(-1).long()
        if flat.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(flat))
            if low < 0 or high >= self.re_embed:
                raise ValueError(f"indices must be in 0..{self.re_embed - 1}, got {low}..{high}")
        if self.remap is not None:
            flat = self.unmap_to_all(flat)
        z_q = F.embedding(flat, self.codebook())
        if shape is None:
            return z_q
        if torch.Size(shape).numel() != z_q.numel() or shape[-1] != self.e_dim:
            raise ValueError(
                f"shape must be (B, h, w, {self.e_dim}) of {len(flat)} indices, got {tuple(shape)}"
            )
        return z_q.view(tuple(shape)).movedim(-1, 1).contiguous()

    def _latents(self, z: Tensor, dim: int | None = None) -> Tensor:
        """Checked z [B, D, ...] in float32 or wider."""
        _check.floating("z", z)
        _check.ndim("z", z, (3, 5))
        if z.shape[1] != (dim or self.e_dim):
            raise ValueError(f"z must be [B, {dim or self.e_dim}, h, w], got {list(z.shape)}")
        return wide(z)


def wide(x: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
