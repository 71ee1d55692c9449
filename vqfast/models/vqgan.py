"""VQGAN: images <-> grids of codes. The configuration and presets are in vqgan_config.py.

    x [B, C, H, W] -> encoder -> quant_conv -> z [B, D, h, w] -> nearest codes [B, h, w]
    codes -> codebook rows -> post_quant_conv -> decoder -> x_hat [B, C', H, W]

h = H / f and w = W / f with f = 2 ** (len(ch_mult) - 1). Images are in [-1, 1]; the network never
clamps. Segmentation (one-hot channels) and depth (one channel) are the same network with other
`in_channels` and `out_ch`. Parameter names are those of released taming checkpoints.

Source: arXiv:2012.09841; CompVis/taming-transformers taming/models/vqgan.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from vqfast import _check, checkpoints
from vqfast.checkpoints import native
from vqfast.errors import CheckpointError
from vqfast.models import tiled
from vqfast.models.vqgan_config import PRESETS, VQGANConfig
from vqfast.models.vqgan_run import mark_norms, run
from vqfast.nn.attention import SpatialAttention
from vqfast.nn.blocks import Conv3x3, Downsample, GroupNormSiLU, ResBlock, Upsample
from vqfast.nn.quantizers.base import Quantizer
from vqfast.nn.quantizers.ema import EMAVectorQuantizer
from vqfast.nn.quantizers.gumbel import GumbelQuantizer
from vqfast.nn.quantizers.vector import VectorQuantizer
from vqfast.nn.trained_conv import Conv2d

__all__ = ["PRESETS", "VQGAN", "Decoder", "Encoder", "VQGANConfig"]

_PRECISIONS = {
    "auto": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def _attention(c: VQGANConfig, channels: int) -> nn.Module:
    return nn.Identity() if c.attn_type == "none" else SpatialAttention(channels)


def _middle(c: VQGANConfig, channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": ResBlock(channels, channels, c.dropout),
            "attn_1": _attention(c, channels),
            "block_2": ResBlock(channels, channels, c.dropout),
        }
    )


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the config asks for it."""

    def __init__(self, c: VQGANConfig, before: int, width: int, blocks: int, size: int) -> None:
        super().__init__()
        widths = [before] + [width] * (blocks - 1)
        self.block = nn.ModuleList(ResBlock(w, width, c.dropout) for w in widths)
        attends = size in c.attn_resolutions and c.attn_type != "none"
        self.attn = nn.ModuleList(SpatialAttention(width) for _ in widths if attends)

    def parts(self) -> Iterator[nn.Module]:
        """In the order in which they run: a call of its own for the level would keep its input
        alive to its end.
        """
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[i]
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                yield getattr(self, name)


def _parts(levels: Iterable[Any]) -> Iterator[nn.Module]:
    """The layers of one `_Level` after the other."""
    for level in levels:
        yield from level.parts()


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, z_channels, H/f, W/f]."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = Conv3x3(c.in_channels, c.ch)
        self.down = nn.ModuleList()
        width, size = c.ch, c.resolution
        for i, mult in enumerate(c.ch_mult):
            level = _Level(c, width, c.ch * mult, c.num_res_blocks, size)
            width = c.ch * mult
            if i + 1 < len(c.ch_mult):
                level.downsample = Downsample(width)
                # the config's resolution decides where attention sits, never the image's
                size //= 2
            self.down.append(level)
        self.mid = _middle(c, width)
        self.norm_out = GroupNormSiLU(width)
        self.conv_out = Conv3x3(width, c.z_channels)
        mark_norms(self.parts())

    def parts(self) -> Iterator[nn.Module]:
        """The layers in the order in which they run, each on the result of the one before."""
        yield self.conv_in
        yield from _parts(self.down)
        yield from self.mid.values()
        yield self.norm_out
        yield self.conv_out

    def forward(self, x: Tensor) -> Tensor:
        return run(list(self.parts()), x)


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, out_ch, f·h, f·w]. `up[0]`, the finest, runs last."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        last = len(c.ch_mult) - 1
        width, size = c.ch * c.ch_mult[last], c.resolution // c.factor
        self.conv_in = Conv3x3(c.z_channels, width)
        self.mid = _middle(c, width)
        levels = []
        for i in range(last, -1, -1):
            # the first block of a level takes the width of the level below it
            level = _Level(c, width, c.ch * c.ch_mult[i], c.num_res_blocks + 1, size)
            width = c.ch * c.ch_mult[i]
            if i > 0:
                level.upsample = Upsample(width)
                size *= 2
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = GroupNormSiLU(width)
        self.conv_out = Conv2d(width, c.out_ch, 3, padding=1)
        mark_norms(self.parts())

    def parts(self) -> Iterator[nn.Module]:
        """The layers in the order in which they run, each on the result of the one before."""
        yield self.conv_in
        yield from self.mid.values()
        yield from _parts(reversed(self.up))
        yield self.norm_out
        yield self.conv_out

    def forward(self, z: Tensor) -> Tensor:
        return run(list(self.parts()), z)


def _quantizer(c: VQGANConfig) -> Quantizer:
    if c.quantizer == "gumbel":
        return GumbelQuantizer(
            c.z_channels, c.embed_dim, c.n_embed, kl_weight=c.kl_weight, temp_init=c.temp_init
        )
    if c.quantizer == "ema":
        return EMAVectorQuantizer(
            c.n_embed,
            c.embed_dim,
            c.beta,
            decay=c.decay,
            eps=c.eps,
            dead_code_threshold=c.dead_code_threshold,
            sane_index_shape=True,
        )
    return VectorQuantizer(
        c.n_embed,
        c.embed_dim,
        c.beta,
        remap=c.remap,
        unknown_index=c.unknown_index,
        sane_index_shape=True,
        legacy=c.legacy,
        metric=c.metric,
    )


def _limited(network: Encoder | Decoder, x: Tensor, max_memory: int | None) -> Tensor:
    return network(x) if max_memory is None else tiled.forward(network, x, max_memory)


def _gradients(x: Tensor, max_memory: int | None) -> AbstractContextManager[object]:
    """As they are without a limit of memory; off with one, unless x asks for its own."""
    if max_memory is None:
        return nullcontext()
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("max_memory gives no gradient, but the input requires one")
    return torch.no_grad()


class VQGAN(nn.Module):
    """The tokenizer: encode, decode and the training forward.

    Parts under taming's names: encoder, decoder, quantize, quant_conv, post_quant_conv. The
    quantizer works in float32 (or wider) also inside autocast and in a half model, because
    rounding the latents changes codes. Activations are channels_last.

    Args:
        config: a VQGANConfig; None is the default, f16 with 1024 codes of 256.
    """

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        c = VQGANConfig() if config is None else config
        if not isinstance(c, VQGANConfig):
            raise TypeError(f"config must be a VQGANConfig, got {type(c).__name__}")
        self.config = c
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quantize = _quantizer(c)
        self.quant_conv = nn.Conv2d(c.z_channels, c.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss (`losses.adaptive_weight`)."""
        return self.decoder.conv_out.weight

    @property
    def n_codes(self) -> int:
        """Codes are 0 .. n_codes - 1; fewer than `n_embed` when the codebook is remapped."""
        return int(getattr(self.quantize, "re_embed", self.config.n_embed))

    def _images(self, x: Tensor) -> Tensor:
        """Checked, in the model's dtype, channels_last."""
        _check.floating("x", x)
        c, f = self.config, self.config.factor
        _check.ndim("x", x, 4)
        if x.shape[1] != c.in_channels:
            raise ValueError(f"x must be [B, {c.in_channels}, H, W], got {list(x.shape)}")
        if x.shape[2] % f or x.shape[3] % f or 0 in x.shape[2:]:
            raise ValueError(f"x must have sides that are multiples of {f}, got {list(x.shape)}")
        weight = self.encoder.conv_in.weight
        if x.device != weight.device:
            raise ValueError(f"x must be on the model's device ({weight.device}), got {x.device}")
        return x.to(weight.dtype, memory_format=torch.channels_last)

    def encode_to_prequant(self, x: Tensor, *, max_memory: int | None = None) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> latents before quantisation [B, embed_dim, h, w].

        Args:
            x: floating point, sides multiples of f.
            max_memory: bytes for the encoder's maps beyond weights, input and result: it then
                works through bands of rows, image by image, without gradient, and gives the same
                up to rounding (`models.tiled`). The less, the longer it takes. On Linux up to 26
                MiB more were taken, packed weights above all. None: no limit.

        Raises:
            TypeError: x is not a floating-point tensor, max_memory no int.
            ValueError: wrong rank, channels or device, sides that are not multiples of f, or a
                max_memory below what such an image needs, which the text says.
            RuntimeError: max_memory is given, and x requires a gradient.
        """
        x = self._images(x)
        with _gradients(x, max_memory):
            return self.quant_conv(_limited(self.encoder, x, max_memory))

    def encode(self, x: Tensor, *, max_memory: int | None = None) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> codes [B, h, w] int64. Gumbel: no noise.

        Args, Raises: as `encode_to_prequant`.
        """
        return self.quantize.codes(self.encode_to_prequant(x, max_memory=max_memory))

    def decode_latents(self, z_q: Tensor, *, max_memory: int | None = None) -> Tensor:
        """Quantised latents [B, embed_dim, h, w] -> images [B, out_ch, f·h, f·w], not clamped.

        Args:
            z_q: floating point.
            max_memory: bytes for the decoder, as in `encode_to_prequant`.
        """
        weight = self.post_quant_conv.weight
        z_q = z_q.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        with _gradients(z_q, max_memory):
            return _limited(self.decoder, self.post_quant_conv(z_q), max_memory)

    def decode(self, codes: Tensor, *, max_memory: int | None = None) -> Tensor:
        """codes [B, h, w] of any integer type -> images [B, out_ch, f·h, f·w], not clamped.

        Args:
            codes: on the model's device.
            max_memory: bytes for the decoder, as in `encode_to_prequant`.

        Raises:
            TypeError: codes is not a tensor of integers, max_memory no int.
            ValueError: wrong rank or device, too small a max_memory, or a code outside 0 ..
                n_codes - 1 (in a compiled graph the lookup refuses it, with what torch raises).
        """
        _check.integer_tensor("codes", codes)
        _check.ndim("codes", codes, 3)
        _check.same_device("codes", codes, "the model", self.post_quant_conv.weight)
        # in a compiled graph the lookup itself refuses codes that are not in the table
        if codes.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in torch.aminmax(codes))
            if low < 0 or high >= self.n_codes:
                raise ValueError(f"codes must be in 0..{self.n_codes - 1}, got {low}..{high}")
        B, h, w = codes.shape
        shape = (B, h, w, self.config.embed_dim)
        with _gradients(codes, max_memory):
            z_q = self.quantize.get_codebook_entry(codes.long().reshape(-1), shape)
        return self.decode_latents(z_q, max_memory=max_memory)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Training forward.

        Returns:
            x_hat [B, out_ch, H, W]; the quantizer's loss []; info with indices [B, h, w] int64 and
            the perplexity [] of the codes in this batch.

        Raises:
            TypeError, ValueError: as `encode_to_prequant`.
        """
        z = self.encode_to_prequant(x)
        z_q, loss, (perplexity, _, indices) = self.quantize(z)
        info = {"indices": indices, "perplexity": perplexity}
        return self.decode_latents(z_q), loss, info

    def to_rgb(self, x: Tensor) -> Tensor:
        """[B, C, H, W] for display as [B, 3, H, W] in [-1, 1].

        Three channels are clamped, one (depth) is repeated, more are class scores: each class has a
        fixed colour, the same in every process.
        """
        if x.shape[1] == 3:
            return x.clamp(-1, 1)
        if x.shape[1] == 1:
            return x.clamp(-1, 1).expand(-1, 3, -1, -1)
        palette = torch.rand(x.shape[1], 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return palette.to(x)[x.argmax(1)].permute(0, 3, 1, 2)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: str | Path | Mapping[str, Any] | VQGANConfig | None = None,
        precision: str | None = None,
    ) -> VQGAN:
        """A tokenizer from a native folder, a taming .ckpt with its YAML, or another known format.

        Args:
            path: file or folder; the format is found by content. Of a pipeline, its tokenizer.
            config: for formats that keep it elsewhere: a YAML file, a mapping or a VQGANConfig.
            precision: "fp32" (also None and "auto"), "bf16" or "fp16".

        Returns:
            The model in eval mode, on the CPU. Global random state is left alone.

        Raises:
            CheckpointError: unreadable, unsafe or damaged file; keys or shapes that do not fit.
            ValueError: unknown precision.
        """
        _check.choice("precision", "auto" if precision is None else precision, tuple(_PRECISIONS))
        if isinstance(config, VQGANConfig):
            config = config.to_dict()
        ckpt = checkpoints.read(path, config, expect="tokenizer")
        model = cls.from_tensors(ckpt.config, ckpt.tensors, what=str(path))
        return model.to(_PRECISIONS[precision or "auto"]).eval()

    @classmethod
    def from_tensors(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str
    ) -> VQGAN:
        """A model that holds exactly `tensors`; `what` names their source in errors.

        Raises:
            CheckpointError: the config is wrong, or a key is missing, unexpected or misshapen.
        """
        try:
            c = VQGANConfig.from_dict(config)
        except ValueError as e:
            raise CheckpointError(f"{what}: {e}") from e
        # nothing is drawn and no memory is taken until every shape is known to fit
        with torch.device("meta"):
            model = cls(c)
        checkpoints.load_into(model, tensors, what=what)
        return model.to(memory_format=torch.channels_last)

    def save_pretrained(
        self,
        folder: str | Path,
        metadata: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the native format (safetensors and config.json), atomically.

        Args:
            folder: created if absent; a model already in it is replaced as a whole.
            metadata: plain JSON values kept beside the weights.
            dtype: stored dtype of the weights, e.g. torch.float16; None keeps theirs.
        """
        native.write(
            folder, "tokenizer", self.config.to_dict(), self.state_dict(), metadata, dtype=dtype
        )
